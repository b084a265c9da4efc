"""Ways to search one datastore or two in this process: every shard, a subset, or both joined.

All of them keep the contract of `records.Retriever`, and offer what spares a search here: which
entries stand behind others, how far they are from a query, and whether anything has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
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
        self._refreshed = 0

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
        self._refreshed += 1
        self.datastore.refresh()
        for shard in self.shards:
            shard.refresh(last=shard is self.shards[-1])

    @property
    def snapshot(self) -> Hashable:
        """What is searched now: another value once anything was published or deleted."""
        return self._refreshed, self.entries, sum(shard.deletions for shard in self.shards)

    def following(self, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The entries behind `entries` (B, K) in their utterances, and their tokens (B, K).

        `NO_ENTRY`, of token 0, behind the last of an utterance and where that entry is deleted.
        """
        at = (entries != NO_ENTRY) & (entries < self.entries - 1)
        behind = entries[at] + 1
        kept = self.datastore.utterances[behind] == self.datastore.utterances[behind - 1]
        for shard in self.shards:
            own = (behind >= shard.start) & (behind < shard.stop)
            kept[own] &= ~shard.hides(behind[own])
        return _placed(entries.shape, at, behind, kept, self.datastore.tokens[behind])

    def apart(self, queries: np.ndarray, entries: np.ndarray) -> np.ndarray:
        """Exact distances (B, K) from each query (B, D) to its `entries` (B, K); +inf for none."""
        return _apart(self.datastore, queries, entries, self.datastore.keys_of)

    def search(
        self, queries: np.ndarray, k: int, exclude_documents: Sequence[int] | None = None
    ) -> Neighbours:
        """The k nearest over all shards, as `Retriever.search` says."""
        parts = [shard.search(queries, k, exclude_documents) for shard in self.shards]
        return parts[0] if len(parts) == 1 else merge(parts, k)

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

    snapshot: Hashable = ()
    """As `LocalRetriever.snapshot`: nothing changes here."""

    def __init__(self, datastore: Datastore, entries: np.ndarray) -> None:
        """`entries` (N,) int64 ids, of which those that nobody finds are left out."""
        self.datastore = datastore
        kept = np.unique(np.asarray(entries, np.int64))
        self._entries = kept[~np.isin(kept, datastore.hidden)]
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

    def following(self, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `LocalRetriever.following`, among the entries of the subset."""
        last = self._entries[-1] if len(self._entries) else NO_ENTRY
        at = (entries != NO_ENTRY) & (entries < last)
        behind = entries[at] + 1
        kept = self._entries[np.searchsorted(self._entries, behind)] == behind
        utterances = self.datastore.utterances
        kept &= utterances[behind] == utterances[behind - 1]
        return _placed(entries.shape, at, behind, kept, self.datastore.tokens[behind])

    def apart(self, queries: np.ndarray, entries: np.ndarray) -> np.ndarray:
        """As `LocalRetriever.apart`."""
        return _apart(
            self.datastore,
            queries,
            entries,
            lambda wanted: self._keys[np.searchsorted(self._entries, wanted)],
        )

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

    @property
    def snapshot(self) -> Hashable | None:
        """As `LocalRetriever.snapshot`; None where either cannot tell."""
        both = tuple(getattr(one, "snapshot", None) for one in (self.first, self.second))
        return None if None in both else both

    def following(self, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `LocalRetriever.following`; nothing where a datastore cannot tell."""
        behind, tokens = np.full(entries.shape, NO_ENTRY), np.zeros(entries.shape, np.int32)
        for part, own, shift in self._parts(entries):
            found, said = part.following(np.where(own, entries - shift, NO_ENTRY))
            found_here = found != NO_ENTRY
            behind[found_here], tokens[found_here] = found[found_here] + shift, said[found_here]
        return behind, tokens

    def apart(self, queries: np.ndarray, entries: np.ndarray) -> np.ndarray:
        """As `LocalRetriever.apart`; +inf where a datastore cannot tell."""
        distances = np.full(entries.shape, np.inf, np.float32)
        for part, own, shift in self._parts(entries):
            distances[own] = part.apart(queries, np.where(own, entries - shift, NO_ENTRY))[own]
        return distances

    def _parts(self, entries: np.ndarray) -> Iterator[tuple[Retriever, np.ndarray, int]]:
        """The datastores that know what follows, which of `entries` (B, K) each has, and how far
        their ids are from its own."""
        for part, own, shift in (
            (self.first, (entries >= 0) & (entries < SECOND), 0),
            (self.second, entries >= SECOND, SECOND),
        ):
            if own.any() and hasattr(part, "following"):
                yield part, own, shift

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


def _placed(
    shape: tuple[int, ...], at: np.ndarray, entries: np.ndarray, kept: np.ndarray, said: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Entries (M,) and their tokens (M,) where `at` of a shape is true, those that are kept."""
    placed, tokens = np.full(shape, NO_ENTRY, np.int64), np.zeros(shape, np.int32)
    placed[at], tokens[at] = np.where(kept, entries, NO_ENTRY), np.where(kept, said, 0)
    return placed, tokens


def _apart(
    datastore: Datastore,
    queries: np.ndarray,
    entries: np.ndarray,
    keys_of: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Exact distances (B, K) from each query (B, D) to its entries (B, K); +inf for none."""
    metric = datastore.description.metric
    rows, columns = np.nonzero(entries != NO_ENTRY)
    apart = np.full(entries.shape, np.inf, np.float32)
    wanted, places = np.unique(entries[rows, columns], return_inverse=True)
    keys = keys_of(wanted)[places]
    apart[rows, columns] = distances(prepare(queries, metric)[rows], keys, metric)
    return apart
