"""How much an approximate index finds: queries whose nearest entries are known exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mmrag.records import NO_ENTRY, Neighbours
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.segment import distances, prepare

QUERIES, NEAREST = 256, 16
BLOCK = 16_384
"""Keys in memory at once."""
TIE = 1e-5
"""Distances that are as good as the same, relative: of equals any may be found."""

Search = Callable[[np.ndarray, int, Sequence[int]], Neighbours]
"""As `Retriever.search`."""


class HeldOutQueries:
    """Keys of entries that lie evenly among some, each to be found elsewhere than in its own
    document: what a decoder asks for that hears what the datastore has heard from others."""

    def __init__(self, datastore: Datastore, start: int, stop: int, nearest: int = NEAREST) -> None:
        """Compares each of QUERIES keys with every key of [start, stop); the `nearest` are to be
        found."""
        self._wanted = nearest
        entries = np.linspace(start, stop - 1, min(QUERIES, stop - start)).astype(np.int64)
        entries = np.setdiff1d(entries, datastore.deleted)
        self._queries = datastore.keys_of(entries)
        self._documents = datastore.documents[entries]
        metric = datastore.description.metric
        nearest = _nearest(datastore, start, stop, self._queries, self._documents, nearest)
        self._there = (nearest != NO_ENTRY).sum(1)
        rows, columns = np.nonzero(nearest != NO_ENTRY)
        far = np.zeros(nearest.shape, np.float32)
        keys = datastore.keys_of(nearest[rows, columns])
        far[rows, columns] = distances(prepare(self._queries, metric)[rows], keys, metric)
        far[nearest == NO_ENTRY] = -np.inf
        self._last = far.max(1, initial=-np.inf)
        """The distance of each query's last neighbour."""

    def recall(self, search: Search) -> float | None:
        """The share of the nearest entries that `search` finds; None where there are none."""
        some = self._there > 0
        if not some.any():
            return None
        there, last = self._there[some], self._last[some]
        found = search(self._queries[some], self._wanted, self._documents[some].tolist()).distances
        hits = (found <= (last + TIE * np.abs(last))[:, None]).sum(1)
        return float((np.minimum(hits, there) / there).mean())


def _nearest(
    datastore: Datastore,
    start: int,
    stop: int,
    queries: np.ndarray,
    own: np.ndarray,
    wanted: int,
) -> np.ndarray:
    """The nearest entries (Q, `wanted`) of other documents than each query's own; NO_ENTRY where
    there are fewer."""
    metric = datastore.description.metric
    queries = prepare(queries, metric)
    far = np.full((len(queries), wanted), np.inf, np.float32)
    entries = np.full((len(queries), wanted), NO_ENTRY, np.int64)
    for block in range(start, stop, BLOCK):
        here = np.arange(block, min(block + BLOCK, stop))
        keys = datastore.keys_of(here)
        apart = -(queries @ keys.T)
        if metric != "ip":
            apart = (keys**2).sum(1) + 2 * apart
        hidden = np.isin(here, datastore.deleted) | (datastore.documents[here] == own[:, None])
        apart = np.concatenate([far, np.where(hidden, np.inf, apart)], axis=1)
        among = np.concatenate([entries, np.broadcast_to(here, hidden.shape)], axis=1)
        best = np.argpartition(apart, wanted - 1, axis=1)[:, :wanted]
        far = np.take_along_axis(apart, best, axis=1)
        found = np.take_along_axis(among, best, axis=1)
        entries = np.where(np.isfinite(far), found, NO_ENTRY)
    return entries
