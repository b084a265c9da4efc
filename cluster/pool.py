"""Many small datastores in a few actors: each is opened when it is first asked for, and given up
when others need its room. A large one has actors of its own (`shards`), so that its searches keep
nobody else's waiting."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle

from cluster.placement import Demand, placing
from cluster.shards import ANSWER_SECONDS, NAMESPACE, Idling, ShardedRetriever, asked, ready
from mmrag.retrieval.datastore import Datastore, describe
from mmrag.retrieval.index import saved_shards
from mmrag.retrieval.retrievers import LocalRetriever

KEY_BYTES = 4
"""Of each dimension of a key that is compared in memory."""
MOST_OPEN = 500
"""Datastores that one actor holds open at most: each maps a dozen files a segment."""


@ray.remote(max_restarts=-1)
class DatastorePool(Idling):
    """Searches small datastores. Ray starts it again if its process dies; it opens anew what it is
    asked for then."""

    def __init__(self, memory: int, idle_seconds: float | None = None) -> None:
        """`memory` are bytes that keys may take; the one asked for last stays whatever it takes."""
        self._memory = memory
        self._open: OrderedDict[str, LocalRetriever] = OrderedDict()
        self._end_when_idle(idle_seconds)

    @asked
    def range(self) -> tuple[int, int]:
        """Answers."""
        return 0, 0

    @asked
    def opened(self) -> list[str]:
        """The datastores that are open, the one that was asked last at the end."""
        return list(self._open)

    @asked
    def forget(self, uid: str) -> None:
        """Close a datastore."""
        self._open.pop(uid, None)

    @asked
    def refresh(self, uid: str, directory: Path) -> tuple[int, int]:
        """Take in what has been published and deleted since; the datastore's range then."""
        known = uid in self._open
        retriever = self._retriever(uid, directory)
        if known:
            retriever.refresh()
            self._make_room()
        return 0, retriever.entries

    @asked
    def ask(self, uid: str, directory: Path, method: str, *arguments: Any) -> Any:
        """What a method of the datastore's retriever answers."""
        return getattr(self._retriever(uid, directory), method)(*arguments)

    def _retriever(self, uid: str, directory: Path) -> LocalRetriever:
        if uid not in self._open:
            datastore = Datastore.open(directory)
            self._open[uid] = LocalRetriever.load(saved_shards(directory), datastore)
        self._open.move_to_end(uid)
        self._make_room()
        return self._open[uid]

    def _make_room(self) -> None:
        while len(self._open) > 1 and (
            len(self._open) > MOST_OPEN or sum(map(_bytes, self._open.values())) > self._memory
        ):
            self._open.popitem(last=False)


def _bytes(retriever: LocalRetriever) -> int:
    return retriever.entries * retriever.datastore.description.width * KEY_BYTES


@dataclass(frozen=True)
class Pooled:
    """A pool's actor, spoken to as if it were the actor of one datastore's only shard."""

    pool: ActorHandle
    uid: str
    directory: Path

    @property
    def range(self) -> Remote:
        return Remote(self.pool.range.remote)

    @property
    def refresh(self) -> Remote:
        return Remote(partial(self.pool.refresh.remote, self.uid, self.directory))

    @property
    def search(self) -> Remote:
        return self._of("search")

    @property
    def windows(self) -> Remote:
        return self._of("windows")

    @property
    def passages(self) -> Remote:
        return self._of("passages")

    @property
    def origins(self) -> Remote:
        return self._of("origins")

    def _of(self, method: str) -> Remote:
        return Remote(partial(self.pool.ask.remote, self.uid, self.directory, method))


@dataclass(frozen=True)
class Remote:
    """A method that is called in another process."""

    remote: partial[ObjectRef]


class PooledRetriever(ShardedRetriever):
    """The `Retriever` contract over a datastore in a pool, as `ShardedRetriever` keeps it."""

    def close(self) -> None:
        """Close the datastore, for everybody who shares the pool; the pool lives on."""
        for replica in self._replicas[0]:
            replica.pool.forget.remote(replica.uid)


def serve_pooled(
    datastore: Path,
    uid: str,
    owner: str,
    actors: int,
    num_cpus: float,
    memory: int,
    *,
    answer_seconds: float = ANSWER_SECONDS,
    idle_seconds: float | None = None,
    key: str,
) -> PooledRetriever:
    """A small datastore in the pool of `owner`, whose actors are started where they are missing.

    A datastore belongs to one of the `actors`, by its `uid`, which no other datastore may have.
    They are detached and named `<owner>-pool-<number>`; `num_cpus`, `idle_seconds` and `key` are as
    for `serve_shards`, `memory` each actor's. Raises DatastoreError for one that cannot be opened.
    """
    number = int(uid, 16) % actors

    def start() -> ActorHandle:
        options = {
            "name": f"{owner}-pool-{number}",
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "get_if_exists": True,
        }
        return DatastorePool.options(num_cpus=num_cpus, **options).remote(memory, idle_seconds)

    datastore = Path(datastore).absolute()
    description = describe(datastore)
    with placing(Demand(key, 1, num_cpus, lower=key)):
        pool, span = ready(start(), start, uid, datastore)
    return PooledRetriever([[Pooled(pool, uid, datastore)]], [span], description, answer_seconds)
