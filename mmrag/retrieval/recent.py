"""The last queries that one datastore was asked, with what was found: the same question again costs
a comparison, and no search.

A query is the same if all of its bits are. Queries over a transcript alone often are: every clip
begins with the same one.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import fields
from weakref import WeakKeyDictionary

import numpy as np

from mmrag.records import Neighbours, Retriever

COLUMNS = tuple(field.name for field in fields(Neighbours) if field.name != "missing_shards")


class RecentSearches:
    """What was found for at most `size` queries, the oldest of which make room for others."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._lock = threading.Lock()
        self._about: Hashable = None
        """Snapshot of the datastore, width of the queries and neighbours asked for."""
        self._next = 0

    def find(
        self, queries: np.ndarray, k: int, excluded: np.ndarray, snapshot: Hashable
    ) -> tuple[np.ndarray, Neighbours]:
        """Which of `queries` (B, D) are known (B,) bool, and the neighbours (M, k) of those.

        `excluded` (B,) are the documents left out for each, -1 for none; everything is forgotten
        where `snapshot` is another.
        """
        with self._lock:
            self._keep_about(snapshot, queries.shape[1], k)
            sums = _sums(queries, excluded)
            near = self._sums == sums[:, None]
            place = near.argmax(1)
            same = near[np.arange(len(queries)), place]
            same &= (self._queries[place] == queries.view(np.uint32)).all(1)
            same &= self._excluded[place] == excluded
            found = {name: self._found[name][place[same]] for name in COLUMNS}
            return same, Neighbours(**found)

    def keep(
        self, queries: np.ndarray, k: int, excluded: np.ndarray, snapshot: Hashable, of: Neighbours
    ) -> None:
        """Remember the neighbours `of` queries; not where a shard did not answer."""
        if of.missing_shards:
            return
        with self._lock:
            self._keep_about(snapshot, queries.shape[1], k)
            count = min(len(queries), self.size)
            at = (self._next + np.arange(count)) % self.size
            self._sums[at] = _sums(queries[:count], excluded[:count])
            self._queries[at] = queries[:count].view(np.uint32)
            self._excluded[at] = excluded[:count]
            for name in COLUMNS:
                self._found[name][at] = getattr(of, name)[:count]
            self._next = (self._next + count) % self.size

    def _keep_about(self, snapshot: Hashable, width: int, k: int) -> None:
        """Forget everything if it is about something else."""
        if self._about == (snapshot, width, k):
            return
        self._about = snapshot, width, k
        self._sums = np.zeros(self.size, np.uint64)
        self._queries = np.zeros((self.size, width), np.uint32)
        self._excluded = np.full(self.size, NOTHING)
        empty = Neighbours.none(self.size, k)
        self._found = {name: getattr(empty, name) for name in COLUMNS}


NOTHING = -2
"""No document: of a place that holds no query."""
ODD = 0x9E3779B97F4A7C15
_known: WeakKeyDictionary[Retriever, RecentSearches] = WeakKeyDictionary()
_sharing = threading.Lock()


def recent_of(retriever: Retriever, size: int) -> RecentSearches:
    """What is kept about a retriever in this process, of at least `size` queries."""
    with _sharing:
        known = _known.get(retriever)
        if known is None or known.size < size:
            known = _known[retriever] = RecentSearches(size)
        return known


def _sums(queries: np.ndarray, excluded: np.ndarray) -> np.ndarray:
    """64 bits (B,) that tell queries apart for the most part."""
    bits = queries.view(np.uint32).astype(np.uint64)
    weights = (np.arange(1, bits.shape[1] + 1, dtype=np.uint64) * np.uint64(ODD)) | np.uint64(1)
    return (bits * weights).sum(1, dtype=np.uint64) + excluded.astype(np.uint64)
