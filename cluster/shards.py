"""A datastore served by actors: one or more for each index shard, asked all at once; what is
searched for over a connection to each (`channel`), everything else through Ray.

The datastore may grow and shrink while it is served: `refresh` takes in what was published and
deleted. What is published belongs to the last shard.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError

from cluster.channel import Address, BrokenError, Channel, Listener, RefusedError, channel_to
from cluster.idling import Idling, asked
from cluster.placement import Demand, placing
from mmrag import artifact
from mmrag.records import Neighbours, Passages, merge
from mmrag.retrieval.datastore import Datastore, describe
from mmrag.retrieval.index import IndexShard, saved_shards
from mmrag.retrieval.segment import DatastoreError, Description
from mmrag.storage import Location, located

ANSWER_SECONDS = 30.0
"""How long a shard may take to answer before it counts as missing."""
REST_SECONDS = 3.0
"""How long a replica that failed is not asked. Ray takes two seconds, at every call, to find that
an actor is being started again, and a decoder searches at every token."""
RETRY_SECONDS = 0.1
"""Between attempts to start an actor whose namesake is just ending."""
SHARD_CPUS = "evaluate.shard_cpus"
"""The setting of what a shard's actor reserves, where a job serves a datastore."""
NAMESPACE = "mmrag"
"""Where in a cluster the actors that processes share have their names."""

log = logging.getLogger(__name__)

_Place = tuple[int, int]
"""A shard and the number of one of its replicas."""
_Asked = Callable[[float], Any]
"""Waits so many seconds for an answer; raises what a replica that fails is known by."""


@ray.remote(max_restarts=-1)
class IndexShardActor(Idling):
    """Holds one shard in memory. Ray starts it again if its process dies.

    The last shard takes in whatever was published since it was saved, also when started again.
    """

    def __init__(
        self,
        datastore: Location,
        shard: PurePath,
        idle_seconds: float | None = None,
        local: Path | None = None,
    ) -> None:
        """`shard` is a directory in the datastore's. Ends itself for good where nobody asks it
        anything for `idle_seconds`. With `local`, its keys are copied there, and read where they
        are until then."""
        self._datastore = Datastore.open(datastore)
        shard = self._datastore.directory / shard
        self._shard = IndexShard.load(shard, self._datastore)
        # Of its own index: another one may have been built since.
        self._last = shard.name == max(one.name for one in shard.parent.glob("shard-*"))
        self._shard.refresh(self._last)
        self._local, self._copying = local, threading.Lock()
        self._localize()
        self._alone = threading.RLock()
        """What a shard is asked for directly comes in threads of its own."""
        self._end_when_idle(idle_seconds)
        self._listener = listener(self._found)

    def address(self) -> Address | None:
        """Where it may be asked for `search` directly; None where it does not listen."""
        return self._listener and self._listener.address

    @asked
    def range(self) -> tuple[int, int]:
        """First entry of the shard and the one after its last."""
        return self._shard.start, self._shard.stop

    @asked
    def refresh(self) -> tuple[int, int]:
        """Take in what has been published and deleted since; the shard's range then."""
        with self._alone:
            self._datastore.refresh()
            self._shard.refresh(self._last)
            self._localize()
            return self._shard.start, self._shard.stop

    @asked
    def search(
        self, queries: np.ndarray, k: int, exclude_documents: Sequence[int] | None
    ) -> Neighbours:
        """The k nearest of this shard's entries to each query (B, D)."""
        with self._alone:
            return self._shard.search(queries, k, exclude_documents)

    @asked
    def windows(self, entries: np.ndarray) -> np.ndarray:
        """Token windows (M, W) around `entries` (M,)."""
        with self._alone:
            return self._knowing(entries).windows(entries)

    @asked
    def passages(self, entries: np.ndarray) -> Passages:
        """The windows around `entries` (M,), each token with its own key."""
        with self._alone:
            return self._knowing(entries).passages(entries)

    @asked
    def origins(self, entries: np.ndarray) -> list[tuple[str, str]]:
        """Document and utterance that each of `entries` (M,) comes from, by name."""
        with self._alone:
            return self._knowing(entries).origins(entries)

    def _found(self, *question: np.ndarray) -> list[np.ndarray]:
        """`search`, as it is asked for directly."""
        return arrays_of(self.search(*question_of(question)))

    def _knowing(self, entries: np.ndarray) -> Datastore:
        """The datastore with these entries; another replica may have found them before it."""
        if len(entries) and entries.max() >= self._datastore.entries:
            self.refresh()
        return self._datastore

    def _localize(self) -> None:
        """Copy what keys are not on this machine's own disk, behind the answers."""
        if self._local is not None:
            threading.Thread(target=self._copy, daemon=True).start()

    def _copy(self) -> None:
        with self._copying:
            try:
                self._datastore.localize(self._local, self._shard.start, self._shard.stop)
            except (OSError, DatastoreError) as error:
                log.warning("keys stay where they are: %s", error)


def listener(answer: Callable[..., Sequence[np.ndarray]]) -> Listener | None:
    """Where an actor is asked directly; None where this node's address cannot be listened on."""
    try:
        return Listener(answer)
    except OSError as error:
        log.warning("searches go through Ray: %s", error)
        return None


def question_of(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, int, np.ndarray | None]:
    """`search`'s arguments as they were received."""
    queries, k, *excluded = arrays
    return queries, k.item(), excluded[0] if excluded else None


def arrays_of(found: Neighbours) -> list[np.ndarray]:
    """What was found as it is sent; no shard is missing in one actor's answer."""
    return [found.distances, found.tokens, found.entries, found.documents]


class ShardedRetriever:
    """The `Retriever` contract over shard actors; may be sent to other processes.

    A query goes to one replica of every shard, and on to the next replica where one is dead; that
    one is left alone for REST_SECONDS, or until it answers a `ping`. A shard none of whose replicas
    answers is counted in `missing_shards`; the others still answer. About entries that were found,
    only the shards that hold them are asked.
    """

    remote = True
    """Searches compute in other processes."""

    def __init__(
        self,
        replicas: Sequence[Sequence[ActorHandle]],
        ranges: Sequence[tuple[int, int]],
        description: Description,
        answer_seconds: float = ANSWER_SECONDS,
    ) -> None:
        """`ranges` in order of their entries; `answer_seconds` until a replica counts as dead."""
        self.description = description
        self._replicas = [list(shard) for shard in replicas]
        self._ranges = list(ranges)
        self._answer_seconds = answer_seconds
        self._turn = itertools.count()
        self._failed: dict[_Place, float] = {}
        """When a replica failed, by the clock that machines share: a retriever may be sent."""
        self._open_channels()

    def _open_channels(self) -> None:
        self._channels = [[channel_to(one) for one in shard] for shard in self._replicas]

    def __getstate__(self) -> dict[str, Any]:
        """Without channels: another process has its own."""
        return {name: value for name, value in vars(self).items() if name != "_channels"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open_channels()

    @property
    def entries(self) -> int:
        """How many entries are searched, deleted ones included, as of the last `refresh` here."""
        return self._ranges[-1][1]

    def search(
        self, queries: np.ndarray, k: int, exclude_documents: Sequence[int] | None = None
    ) -> Neighbours:
        """The k nearest entries over all shards to each of `queries` (B, D) float32."""
        asked = dict.fromkeys(range(len(self._replicas)), (queries, k, exclude_documents))
        answers = self._ask("search", asked)
        missing = Neighbours.none(len(queries), k, missing_shards=1)
        return merge([answers.get(shard, missing) for shard in asked], k)

    def windows(self, entries: np.ndarray) -> np.ndarray:
        """Token windows (…, W); all padding for `NO_ENTRY` and for shards that do not answer."""
        found = np.zeros((*entries.shape, self.description.window), np.int32)
        for own, answer in self._ask_owners("windows", entries):
            found[own] = answer
        return found

    def passages(self, entries: np.ndarray) -> Passages:
        """The windows around `entries` (M,); one of a shard that does not answer is empty."""
        shape = (len(entries), self.description.window)
        found = Passages(
            tokens=np.zeros(shape, np.int32),
            keys=np.zeros((*shape, self.description.width), np.float16),
            present=np.zeros(shape, bool),
        )
        for own, answer in self._ask_owners("passages", entries):
            for name, values in vars(answer).items():
                getattr(found, name)[own] = values
        return found

    def origins(self, entries: np.ndarray) -> list[tuple[str, str]]:
        """Document and utterance of `entries` (M,); "" twice for a shard that does not answer."""
        found = [("", "")] * len(entries)
        for own, answer in self._ask_owners("origins", entries):
            for place, origin in zip(np.flatnonzero(own), answer, strict=True):
                found[place] = origin
        return found

    def refresh(self) -> None:
        """Have every replica take in what has been published and deleted since.

        One that does not answer is passed over: it does so when Ray has started it again.
        """
        answers = self._ask_everyone("refresh", self._answer_seconds)
        for (shard, _), (start, stop) in answers.items():
            self._ranges[shard] = (start, max(stop, self._ranges[shard][1]))

    def ping(self, seconds: float) -> int:
        """How many shards have no replica that answers within `seconds`.

        Idle actors that are asked live on.
        """
        answering = {shard for shard, _ in self._ask_everyone("range", seconds)}
        return len(self._replicas) - len(answering)

    def close(self) -> None:
        """Stop the actors, for everybody who shares them."""
        for replica in itertools.chain.from_iterable(self._replicas):
            ray.kill(replica)

    def _ask(self, method: str, arguments: Mapping[int, tuple]) -> dict[int, Any]:
        """What shards answer to their arguments; one whose replicas all fail is left out."""
        turn, answers = next(self._turn), {}
        orders = {shard: self._rested(shard, turn) for shard in arguments}
        for attempt in range(max(map(len, orders.values()), default=0)):
            places = [
                (shard, order[attempt])
                for shard, order in orders.items()
                if shard not in answers and attempt < len(order)
            ]
            asked = {place: self._call(place, method, *arguments[place[0]]) for place in places}
            for (shard, _), answer in self._answers(asked, self._answer_seconds).items():
                answers[shard] = answer
        return answers

    def _rested(self, shard: int, turn: int) -> list[int]:
        """The shard's replicas by number as they are asked, without those that failed just now."""
        numbers, now = range(len(self._replicas[shard])), time.time()
        rested = [n for n in numbers if now - self._failed.get((shard, n), 0) >= REST_SECONDS]
        return sorted(rested, key=lambda number: (number - turn) % len(numbers))

    def _ask_owners(self, method: str, entries: np.ndarray) -> Iterator[tuple[np.ndarray, Any]]:
        """Which of `entries` (…,) a shard holds, and its answer about them; `NO_ENTRY` is in none.

        What another process saw published belongs to the last shard, whose range has grown there.
        """
        starts = [start for start, _ in self._ranges]
        owners = np.searchsorted(starts, entries, side="right") - 1
        shards = np.unique(owners[owners >= 0]).tolist()
        answers = self._ask(method, {shard: (entries[owners == shard],) for shard in shards})
        for shard, answer in answers.items():
            yield owners == shard, answer

    def _ask_everyone(self, method: str, seconds: float) -> dict[_Place, Any]:
        """What each replica answers, also those that failed just now; without those that fail."""
        asked = {
            (shard, number): self._call((shard, number), method)
            for shard, replicas in enumerate(self._replicas)
            for number in range(len(replicas))
        }
        return self._answers(asked, seconds)

    def _call(self, place: _Place, method: str, *arguments: Any) -> _Asked:
        """Have a replica work on something: what is searched for is asked directly if it can be."""
        if method == "search":
            question = self._question(*arguments)
            if pending := self._channel(place).ask(question, self._answer_seconds):
                return partial(self._found, pending, place, arguments)
        answer = self._remote(place, method, *arguments)
        return lambda seconds: ray.get(answer, timeout=seconds)

    def _question(
        self, queries: np.ndarray, k: int, exclude_documents: Sequence[int] | None
    ) -> list[np.ndarray]:
        """`search`'s arguments as they are sent."""
        excluded = [] if exclude_documents is None else [np.asarray(exclude_documents)]
        return [np.asarray(queries), np.asarray(k), *excluded]

    def _found(
        self, pending: Callable, place: _Place, arguments: tuple, seconds: float
    ) -> Neighbours:
        """What a replica that was asked directly found; what it raises, it is asked for again."""
        deadline = time.monotonic() + seconds
        try:
            return Neighbours(*pending(seconds))
        except RefusedError:
            left = max(0.0, deadline - time.monotonic())
            return ray.get(self._remote(place, "search", *arguments), timeout=left)

    def _channel(self, place: _Place) -> Channel:
        shard, number = place
        return self._channels[shard][number]

    def _remote(self, place: _Place, method: str, *arguments: Any) -> ObjectRef:
        """Have a replica work on something, through Ray."""
        shard, number = place
        return getattr(self._replicas[shard][number], method).remote(*arguments)

    def _answers(self, asked: Mapping[_Place, _Asked], seconds: float) -> dict[_Place, Any]:
        """The answers of living actors that come in time; what they raise is raised here."""
        answers, deadline = {}, time.monotonic() + seconds
        for place, answer in asked.items():
            try:
                answers[place] = answer(max(0.0, deadline - time.monotonic()))
                self._failed.pop(place, None)
            except (BrokenError, RayActorError, GetTimeoutError):
                self._failed[place] = time.time()
        return answers


def serve_shards(
    datastore: Location,
    replicas: int,
    num_cpus: float,
    *,
    num_gpus: float = 0.0,
    owner: str | None = None,
    answer_seconds: float = ANSWER_SECONDS,
    idle_seconds: float | None = None,
    key: str = SHARD_CPUS,
    local: Path | str | None = None,
) -> ShardedRetriever:
    """Start `replicas` actors for each index shard of the datastore and wait until all answer.

    Actors with an `owner` are named `<owner>-<index>-<shard>-<replica>`: whoever asks for the same
    owner shares them, whatever its `datastore`, until another index is built, and they outlive this
    process. With `idle_seconds` they end once nobody has asked them anything for that long; with
    `local` they copy their keys to that directory on their machines. Raises DatastoreError if no
    index is saved, PlacementError, naming the setting `key` of `num_cpus`, if the cluster cannot
    hold the actors, RayActorError if one cannot load its shard.

    Replicas of a shard start one after the other, and Ray's SPREAD puts what starts in a row on one
    node after the other. A placement group would promise what that only tries, but actors that are
    shared, come and go by themselves do not fit in one: what an idle actor had stays reserved until
    somebody removes the group, which kills those that are asked; and two processes that serve at
    once cannot share its name, as `get_if_exists` has them share an actor's.
    """
    datastore = located(datastore).absolute()
    here = artifact.local(datastore)
    shards = [shard.relative_to(here) for shard in saved_shards(here)]
    if not shards:
        raise DatastoreError(f"no index of {datastore} is saved")

    def start(shard: int, replica: int) -> ActorHandle:
        options: dict[str, Any] = {
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            "scheduling_strategy": "SPREAD",
        }
        if owner is not None:
            options |= {
                "name": f"{owner}-{shards[shard].parent.name}-{shard}-{replica}",
                "namespace": NAMESPACE,
                "lifetime": "detached",
                "get_if_exists": True,
            }
        more = idle_seconds, None if local is None else Path(local)
        return IndexShardActor.options(**options).remote(datastore, shards[shard], *more)

    places = [(shard, replica) for shard in range(len(shards)) for replica in range(replicas)]
    lower = f"{key} or {key.removesuffix('cpus')}gpus" if num_gpus else key
    with placing(Demand(key, len(places), num_cpus, num_gpus, lower=lower)):
        actors = {place: start(*place) for place in places}  # all of them load at once
        try:
            answering = {at: ready(actor, partial(start, *at)) for at, actor in actors.items()}
        except RayActorError:
            for actor in actors.values():  # or those with an owner would live on, asked by nobody
                ray.kill(actor)
            raise
    by_shard = [[answering[shard, n] for n in range(replicas)] for shard in range(len(shards))]
    return ShardedRetriever(
        [[actor for actor, _ in shard] for shard in by_shard],
        [max(span for _, span in shard) for shard in by_shard],
        describe(here),
        answer_seconds,
    )


def ready(
    actor: ActorHandle, again: Callable[[], ActorHandle], *about: Any
) -> tuple[ActorHandle, tuple[int, int]]:
    """The actor once it answers, and its range, of what it is asked `about`; `again` replaces one
    that was ending."""
    while True:
        try:
            return actor, ray.get(actor.refresh.remote(*about))
        except RayActorError as error:
            if error.actor_init_failed:
                raise
        time.sleep(RETRY_SECONDS)
        actor = again()
