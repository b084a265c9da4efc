"""Retrievers whose every search ends alike: with one entry, or with none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmrag.records import Neighbours


class Insistent:
    """Finds one entry for every query, always the same token at the same distance."""

    def __init__(self, token: int, distance: float = 1.0, entry: int = 77) -> None:
        self.answer = (token, distance, entry)

    def search(
        self, queries: np.ndarray, k: int, exclude_documents: Sequence[int] | None = None
    ) -> Neighbours:
        """As a `Retriever`'s."""
        token, distance, entry = self.answer
        found = Neighbours.none(len(queries), k)
        found.distances[:, 0], found.tokens[:, 0], found.entries[:, 0] = distance, token, entry
        return found


class Silent:
    """Finds nothing: all of its shards are missing."""

    def search(
        self, queries: np.ndarray, k: int, exclude_documents: Sequence[int] | None = None
    ) -> Neighbours:
        """As a `Retriever`'s."""
        return Neighbours.none(len(queries), k, missing_shards=3)
