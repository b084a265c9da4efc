"""Many small datastores in a few actors: each is opened when it is first asked for, and given up
when others need its room. A large one has actors of its own (`shards`), so that its searches keep
nobody else's waiting."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import ObjectRef
from ray.actor import ActorHandle

from cluster.channel import Address
from cluster.idling import Idling, asked
from cluster.placement import Demand, placing
from cluster.shards import (
    ANSWER_SECONDS,
    NAMESPACE,
    ShardedRetriever,
    arrays_of,
    listener,
    question_of,
    ready,
)
from cluster.turns import Turns
from mmrag.retrieval.datastore import Datastore, describe
from mmrag.retrieval.index import saved_shards
from mmrag.retrieval.retrievers import LocalRetriever

KEY_BYTES = 4
"""Of each dimension of a key that is compared in memory."""
MOST_OPEN = 500
"""Datastores that one actor holds open at most: each maps a dozen files a segment."""


MOST_ASKED = 64
"""Calls through Ray that one actor knows of at a time, to take them in turn; more wait unseen."""


@ray.remote(max_restarts=-1, max_concurrency=MOST_ASKED)
class DatastorePool(Idling):
    """Searches small datastores. Ray starts it again if its process dies; it opens anew what it is
    asked for then.

    One datastore is worked on at a time, and they take turns: whoever searches one of them all the
    time keeps the others' waiting for one search of its own, not for all of them.
    """

    def __init__(self, memory: int, idle_seconds: float | None = None) -> None:
        """`memory` are bytes that keys may take; the one asked for last stays whatever it takes."""
        self._memory = memory
        self._open: OrderedDict[str, LocalRetriever] = OrderedDict()
        self._turns = Turns()
        self._end_when_idle(idle_seconds)
        self._listener = listener(self._found)

    def address(self) -> Address | None:
        """Where it may be asked for `search` directly; None where it does not listen."""
        return self._listener and self._listener.address

    @asked
    def opened(self) -> list[str]:
        """The datastores that are open, the one that was asked last at the end."""
        return list(self._open)

    @asked
    def waiting(self) -> dict[str, int]:
        """How many calls about each datastore wait, in the order of their turns."""
        return self._turns.waiting()

    @asked
    def range(self, uid: str, directory: Path) -> None:
        """Says that the pool is alive; opens nothing."""

    @asked
    def forget(self, uid: str, directory: Path) -> None:
        """Close a datastore."""
        with self._turns.of(uid):
            self._open.pop(uid, None)

    @asked
    def refresh(self, uid: str, directory: Path) -> tuple[int, int]:
        """Take in what has been published and deleted since; the datastore's range then."""
        with self._turns.of(uid):
            known = uid in self._open
            retriever = self._retriever(uid, directory)
            if known:
                retriever.refresh()
                self._make_room()
            return 0, retriever.entries

    @asked
    def ask(self, uid: str, directory: Path, method: str, *arguments: Any) -> Any:
        """What a method of the datastore's retriever answers."""
        with self._turns.of(uid):
            return getattr(self._retriever(uid, directory), method)(*arguments)

    def _found(
        self, uid: np.ndarray, directory: np.ndarray, *question: np.ndarray
    ) -> list[np.ndarray]:
        """A datastore's `search`, as it is asked for directly."""
        about = uid.tobytes().decode(), Path(os.fsdecode(directory.tobytes()))
        return arrays_of(self.ask(*about, "search", *question_of(question)))

    def _retriever(self, uid: str, directory: Path) -> LocalRetriever:
        if uid not in self._open:
            self._drop_deleted(directory)
            datastore = Datastore.open(directory)
            self._open[uid] = LocalRetriever.load(saved_shards(directory), datastore)
        self._open.move_to_end(uid)
        self._make_room()
        return self._open[uid]

    def _drop_deleted(self, taken: Path) -> None:
        """Close what is no more: its directory is gone, or `taken` by another datastore."""
        for uid, one in list(self._open.items()):
            place = one.datastore.directory
            if place == taken or not place.exists():
                del self._open[uid]

    def _make_room(self) -> None:
        while len(self._open) > 1 and (
            len(self._open) > MOST_OPEN or sum(map(_bytes, self._open.values())) > self._memory
        ):
            self._open.popitem(last=False)


def _bytes(retriever: LocalRetriever) -> int:
    return retriever.entries * retriever.datastore.description.width * KEY_BYTES


class PooledRetriever(ShardedRetriever):
    """The `Retriever` contract over a datastore in a pool, whose actor holds its only shard."""

    def __init__(
        self,
        pool: ActorHandle,
        uid: str,
        directory: Path,
        span: tuple[int, int],
        answer_seconds: float,
    ) -> None:
        """`uid` and `directory` are as the pool knows the datastore, `span` is its range."""
        super().__init__([[pool]], [span], describe(directory), answer_seconds)
        self._about = uid, directory

    def close(self) -> None:
        """Close the datastore, for everybody who shares the pool; the pool lives on."""
        self._remote((0, 0), "forget")

    def _question(self, *arguments: Any) -> list[np.ndarray]:
        about = [np.frombuffer(os.fsencode(each), np.uint8) for each in self._about]
        return [*about, *super()._question(*arguments)]

    def _remote(self, place: tuple[int, int], method: str, *arguments: Any) -> ObjectRef:
        if method in ("range", "refresh", "forget"):
            return super()._remote(place, method, *self._about)
        return super()._remote(place, "ask", *self._about, method, *arguments)


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
    with placing(Demand(key, 1, num_cpus, lower=key)):
        pool, span = ready(start(), start, uid, datastore)
    return PooledRetriever(pool, uid, datastore, span, answer_seconds)
