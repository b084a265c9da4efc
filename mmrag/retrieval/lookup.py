"""One step's questions to one datastore: what is behind the entries found before, what was found
lately, and a search for the rest.

Knows arrays and a retriever; neither the language model nor what its rows do with the answers.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import numpy as np

from mmrag.records import NO_ENTRY, Neighbours
from mmrag.retrieval.interpolation import Retrieval
from mmrag.retrieval.recent import COLUMNS, recent_of

SEARCHED, CERTAIN, SETTLED, DISTANT, FOLLOWED, RECENT = range(1, 7)
"""What becomes of a row's question in a step: the four kinds that need no search are named as in
`searching.Searches`; 0 where a row has no question."""
ANSWERED = np.isin(np.arange(RECENT + 1), (SEARCHED, FOLLOWED, RECENT))
"""Which of them bring neighbours."""


@dataclass(frozen=True)
class Lookup:
    """What one retrieval's rows (R,) found, raw, and how."""

    rows: np.ndarray
    found: Neighbours
    fate: np.ndarray
    seconds: float | None
    """That a search took; None without one."""


@dataclass(frozen=True)
class Trail:
    """Entries (R, K) that said what was chosen, of which documents (R, K), and whether they are
    enough and near enough to a search to be followed (R,)."""

    entries: np.ndarray
    documents: np.ndarray
    open: np.ndarray


def look_up(
    retrieval: Retrieval,
    rows: np.ndarray,
    queries: np.ndarray,
    fate: np.ndarray,
    excluded: np.ndarray | None,
    trail: Trail | None,
) -> Lookup:
    """What the rows (R,) of a retrieval find: behind what they found before, among what was found
    lately, or by a search."""
    knn, retriever, fate = retrieval.settings, retrieval.retriever, fate.copy()
    found = Neighbours.none(len(rows), knn.k)
    if trail is not None and hasattr(retriever, "following"):
        _follow(retrieval, queries, fate, trail, found)
    snapshot = getattr(retriever, "snapshot", None) if knn.recent else None
    documents = np.full(len(rows), -1) if excluded is None else excluded
    if snapshot is not None:
        recent = recent_of(retriever, knn.recent)
        left = np.flatnonzero(fate == SEARCHED)
        same, known = recent.find(queries[left], knn.k, documents[left], snapshot)
        place(found, left[same], known)
        fate[left[same]] = RECENT
    left = np.flatnonzero(fate == SEARCHED)
    if not len(left):
        return Lookup(rows, found, fate, None)
    started = time.perf_counter()
    own = None if excluded is None else excluded[left].tolist()
    answer = retriever.search(queries[left], knn.k, own)
    seconds = time.perf_counter() - started
    if snapshot is not None:
        recent.keep(queries[left], knn.k, documents[left], snapshot, answer)
    return Lookup(rows, place(found, left, answer), fate, seconds)


def _follow(
    retrieval: Retrieval, queries: np.ndarray, fate: np.ndarray, trail: Trail, found: Neighbours
) -> None:
    """Put what stands behind the entries of a trail into `found`: for rows that ask, if it is near
    enough to be heard, with how far it is; for the others, to be followed farther on."""
    knn, retriever = retrieval.settings, retrieval.retriever
    entries, tokens = retriever.following(trail.entries)
    asking = fate == SEARCHED
    distances = np.full(entries.shape, np.inf, np.float32)
    tried = np.flatnonzero(asking & trail.open)
    if len(tried):
        distances[tried] = retriever.apart(queries[tried], entries[tried])
    nearest = distances.min(1, initial=np.inf)
    follows = asking & np.isfinite(nearest) & (nearest <= np.float32(largest(knn.gate)))
    fate[follows] = FOLLOWED
    kept = np.flatnonzero(follows | ~asking)
    order = np.lexsort((entries[kept], distances[kept]), axis=1)
    columns = distances, tokens, entries, np.where(entries == NO_ENTRY, -1, trail.documents)
    place(found, kept, Neighbours(*(np.take_along_axis(c[kept], order, 1) for c in columns)))


def place(into: Neighbours, rows: np.ndarray, found: Neighbours) -> Neighbours:
    """Write what was `found` for some rows into theirs; with the shards that did not answer."""
    for name in COLUMNS:
        column = getattr(found, name)
        getattr(into, name)[rows, : column.shape[1]] = column
    return replace(into, missing_shards=max(into.missing_shards, found.missing_shards))


def largest(gate: float | None) -> float:
    """The largest distance that a gate lets through."""
    return math.inf if gate is None else gate
