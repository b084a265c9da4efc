"""Ways to search one datastore or two in this process: every shard, a subset, or both joined.

All of them keep the contract of `records.Retriever`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mmrag.config import Index
from mmrag.records import NO_ENTRY, Neighbours, Passages, Retriever, merge
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.index import IndexShard, shard_ranges
from mmrag.retrieval.segment import distances, prepare

SPARE = 32
"""Entries of a subset compared exactly beyond the k asked for."""
SECOND = 1 << 40
"""Where the ids of the second of two joined datastores begin."""


class LocalRetriever:
    """Every shard of a datastore, searched in this process one after the other."""

    def __init__(self, datastore: Datastore, shards: Sequence[IndexShard]) -> None:
        """`shards` in order of their entries; ValueError unless each goes on from the last."""
        stops = [0, *(shard.stop for shard in shards)]
        if not shards or [shard.start for shard in shards] != stops[:-1]:
            ranges = [(shard.start, shard.stop) for shard in shards]
            raise ValueError(f"shards of {datastore} leave entries out: {ranges}")
        self.datastore = datastore
        self.shards = list(shards)

    @classmethod
    def build(cls, datastore: Datastore, settings: Index, seed: int) -> LocalRetriever:
        """Index all of `datastore` in `settings.shards` shards."""
        ranges = shard_ranges(datastore.entries, settings.shards)
        shards = [IndexShard.build(datastore, *span, settings, seed) for span in ranges]
        return cls(datastore, shards)

    @classmethod
    def load(cls, directories: Sequence[Path], datastore: Datastore) -> LocalRetriever:
        """The shards saved in `directories`; the last takes in what was published since."""
        shards = [IndexShard.load(directory, datastore) for directory in directories]
        if shards:
            shards[-1].refresh(last=True)
        return cls(datastore, shards)

    @property
    def entries(self) -> int:
        """How many entries are searched, deleted ones included."""
        return self.shards[-1].stop

    def refresh(self) -> None:
        """Take in what has been published and deleted since; the last shard grows."""
        self.datastore.refresh()
        for shard in self.shards:
            shard.refresh(last=shard is self.shards[-1])

    def search(
        self, queries: np.ndarray, k: int, exclude_documents: Sequence[int] | None = None
    ) -> Neighbours:
        """The k nearest over all shards, as `Retriever.search` says."""
        parts = [shard.search(queries, k, exclude_documents) for shard in self.shards]
        return merge(parts, k)

    def windows(self, entries: np.ndarray) -> np.ndarray:
        """Token windows (…, W) int32 around `entries` (…,)."""
        return self.datastore.windows(entries)

    def passages(self, entries: np.ndarray) -> Passages:
        """The windows around `entries` (M,), each token with its own key."""
        return self.datastore.passages(entries)

    def origins(self, entries: np.ndarray) -> list[tuple[str, str]]:
        """Document and utterance that each of `entries` (M,) comes from, by name."""
        return self.datastore.origins(entries)


class SubsetRetriever:
    """Some entries of a datastore, all of them compared: one caller's phrases, one document."""

    def __init__(self, datastore: Datastore, entries: np.ndarray) -> None:
        """`entries` (N,) int64 ids, of which the deleted ones are left out."""
        self.datastore = datastore
        kept = np.unique(np.asarray(entries, np.int64))
        self._entries = kept[~np.isin(kept, datastore.deleted)]
        self._keys = datastore.keys_of(self._entries)
        self._squares = (self._keys**2).sum(axis=1)

    def search(
        self, queries: np.ndarray, k: int, exclude_documents: Sequence[int] | None = None
    ) -> Neighbours:
        """The k nearest of the subset, as `Retriever.search` says."""
        metric = self.datastore.description.metric
        found = Neighbours.none(len(queries), k)
        if not len(self._entries):
            return found
        documents = self.datastore.documents[self._entries]
        queries = prepare(queries, metric)
        # One product ranks them all, up to rounding; the distances of the best are then exact.
        ranks = -queries @ self._keys.T + (0 if metric == "ip" else self._squares / 2)
        for row, query in enumerate(queries):
            if exclude_documents is not None:
                ranks[row, documents == exclude_documents[row]] = np.inf
            best = np.argpartition(ranks[row], min(k + SPARE, len(self._entries)) - 1)[: k + SPARE]
            best = best[np.isfinite(ranks[row, best])]
            exact = distances(query[None], self._keys[best], metric)
            order = np.lexsort((self._entries[best], exact))[:k]
            nearest, apart = best[order], exact[order]
            columns = slice(len(nearest))
            found.distances[row, columns] = apart
            found.entries[row, columns] = self._entries[nearest]
            found.tokens[row, columns] = self.datastore.tokens[self._entries[nearest]]
            found.documents[row, columns] = documents[nearest]
        return found

    def windows(self, entries: np.ndarray) -> np.ndarray:
        """Token windows (…, W) int32 around `entries` (…,)."""
        return self.datastore.windows(entries)

    def passages(self, entries: np.ndarray) -> Passages:
        """The windows around `entries` (M,), each token with its own key."""
        return self.datastore.passages(entries)

    def origins(self, entries: np.ndarray) -> list[tuple[str, str]]:
        """Document and utterance that each of `entries` (M,) comes from, by name."""
        return self.datastore.origins(entries)


class JoinedRetriever:
    """Two datastores searched as one: entries of the second have ids from SECOND on."""

    def __init__(self, first: Retriever, second: Retriever) -> None:
        """Both keyed alike; ids of `first` stay as they are."""
        self.first = first
        self.second = second

    def search(
        self, queries: np.ndarray, k: int, exclude_documents: Sequence[int] | None = None
    ) -> Neighbours:
        """The k nearest of both; `exclude_documents` are the first's."""
        found = self.second.search(queries, k)
        entries = np.where(found.entries == NO_ENTRY, NO_ENTRY, found.entries + SECOND)
        moved = replace(found, entries=entries)
        return merge([self.first.search(queries, k, exclude_documents), moved], k)

    def windows(self, entries: np.ndarray) -> np.ndarray:
        """Token windows (…, W) int32 around `entries` (…,)."""
        of_first = np.where(entries < SECOND, entries, NO_ENTRY)
        of_second = np.where(entries < SECOND, NO_ENTRY, entries - SECOND)
        # Tokens of a window that is not there are all zero.
        return np.maximum(self.first.windows(of_first), self.second.windows(of_second))

    def passages(self, entries: np.ndarray) -> Passages:
        """The windows around `entries` (M,), each token with its own key."""
        own = entries < SECOND
        parts = self.first.passages(entries[own]), self.second.passages(entries[~own] - SECOND)
        columns = {}
        for name, values in vars(parts[0]).items():
            columns[name] = np.empty((len(entries), *values.shape[1:]), values.dtype)
            columns[name][own], columns[name][~own] = values, getattr(parts[1], name)
        return Passages(**columns)

    def origins(self, entries: np.ndarray) -> list[tuple[str, str]]:
        """Document and utterance of each of `entries` (M,)."""
        own = entries < SECOND
        first, second = (
            iter(self.first.origins(entries[own])),
            iter(self.second.origins(entries[~own] - SECOND)),
        )
        return [next(first if mine else second) for mine in own]
