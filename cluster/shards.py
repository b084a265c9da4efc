"""A datastore served by actors: one or more for each index shard, asked all at once."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError

from mmrag.datastore import Datastore
from mmrag.index import IndexShard, saved_shards
from mmrag.records import NO_ENTRY, Neighbours, Passages, merge

ANSWER_SECONDS = 30.0
"""How long a shard may take to answer before it counts as missing."""


@ray.remote(max_restarts=-1)
class IndexShardActor:
    """Holds one shard in memory. Ray starts it again if its process dies."""

    def __init__(self, datastore: Path, shard: Path) -> None:
        self._datastore = Datastore.open(datastore)
        self._shard = IndexShard.load(shard, self._datastore)

    def range(self) -> tuple[int, int]:
        """First entry of the shard and the one after its last."""
        return self._shard.start, self._shard.stop

    def search(
        self, queries: np.ndarray, k: int, exclude_documents: Sequence[int] | None
    ) -> Neighbours:
        """The k nearest of this shard's entries to each query (B, D)."""
        return self._shard.search(queries, k, exclude_documents)

    def windows(self, entries: np.ndarray) -> np.ndarray:
        """Token windows (…, W) around `entries` (…,)."""
        return self._datastore.windows(entries)

    def passages(self, entries: np.ndarray) -> Passages:
        """The windows around `entries` (M,), each token with its own key."""
        return self._datastore.passages(entries)


class ShardedRetriever:
    """The `Retriever` contract over shard actors; may be sent to other actors.

    A query goes to one replica of every shard, and on to the next replica where one is dead. A
    shard none of whose replicas answers is counted in `missing_shards`; the others still answer.
    """

    def __init__(
        self, replicas: Sequence[Sequence[ActorHandle]], ranges: Sequence[tuple[int, int]]
    ) -> None:
        self._replicas = [list(shard) for shard in replicas]
        self._ranges = list(ranges)
        self._turn = itertools.count()

    def search(
        self, queries: np.ndarray, k: int, exclude_documents: Sequence[int] | None = None
    ) -> Neighbours:
        """The k nearest entries over all shards to each of `queries` (B, D) float32."""
        answers = self._ask_all("search", [(queries, k, exclude_documents)] * len(self._replicas))
        parts = [
            Neighbours.none(len(queries), k, missing_shards=1) if answer is None else answer
            for answer in answers
        ]
        return merge(parts, k) if parts else Neighbours.none(len(queries), k)

    def windows(self, entries: np.ndarray) -> np.ndarray:
        """Token windows (…, W); all padding for `NO_ENTRY` and for shards that do not answer."""
        asked = [
            (np.where((entries >= start) & (entries < stop), entries, NO_ENTRY),)
            for start, stop in self._ranges
        ]
        answers = [a for a in self._ask_all("windows", asked) if a is not None]
        if not answers:
            raise RuntimeError("no shard of the datastore answers")
        return np.maximum.reduce(answers)

    def passages(self, entries: np.ndarray) -> Passages:
        """The windows around `entries` (M,); one of a shard that does not answer is empty."""
        shards = [(entries >= start) & (entries < stop) for start, stop in self._ranges]
        answers = self._ask_all("passages", [(entries[own],) for own in shards])
        known = next((answer for answer in answers if answer is not None), None)
        if known is None:
            raise RuntimeError("no shard of the datastore answers")
        found = Passages(
            *(np.zeros((len(entries), *a.shape[1:]), a.dtype) for a in vars(known).values())
        )
        for own, answer in zip(shards, answers, strict=True):
            if answer is not None:
                for name, values in vars(answer).items():
                    getattr(found, name)[own] = values
        return found

    def close(self) -> None:
        """Stop the actors."""
        for replica in itertools.chain.from_iterable(self._replicas):
            ray.kill(replica)

    def _ask_all(self, method: str, arguments: Sequence[tuple]) -> list:
        """Each shard's answer to its arguments, None where no replica gives one."""
        turn = next(self._turn)
        answers: list = [None] * len(self._replicas)
        waiting = list(range(len(self._replicas)))
        for attempt in range(max(map(len, self._replicas), default=0)):
            asked = {}
            for shard in waiting:
                replicas = self._replicas[shard]
                if attempt < len(replicas):
                    replica = replicas[(turn + attempt) % len(replicas)]
                    asked[shard] = getattr(replica, method).remote(*arguments[shard])
            waiting, deadline = [], time.monotonic() + ANSWER_SECONDS
            for shard, answer in asked.items():
                try:
                    answers[shard] = ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
                except (RayActorError, GetTimeoutError):
                    waiting.append(shard)
        return answers


def serve_shards(datastore: Path, replicas: int, num_cpus: float) -> ShardedRetriever:
    """Start `replicas` actors for each index shard of the datastore and wait until all answer."""
    actors = [
        [
            IndexShardActor.options(num_cpus=num_cpus).remote(datastore, shard)
            for _ in range(replicas)
        ]
        for shard in saved_shards(datastore)
    ]
    ranges = [ray.get([replica.range.remote() for replica in shard])[0] for shard in actors]
    return ShardedRetriever(actors, ranges)
