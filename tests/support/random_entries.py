"""A datastore of random entries, searched by brute force."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmrag.records import NO_ENTRY, Neighbours


class RandomEntries:
    """Keys of 16 dimensions, tokens from `first` to `last`, four documents in turn."""

    def __init__(self, first: int, last: int, entries: int = 40, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.keys = random.standard_normal((entries, 16)).astype(np.float32)
        self.tokens = random.integers(first, last + 1, entries).astype(np.int32)
        self.documents = (np.arange(entries) % 4).astype(np.int32)

    def search(
        self, queries: np.ndarray, k: int, exclude_documents: Sequence[int] | None = None
    ) -> Neighbours:
        """As a `Retriever`'s."""
        distances = ((queries[:, None] - self.keys) ** 2).sum(-1)
        if exclude_documents is not None:
            distances[self.documents == np.array(exclude_documents)[:, None]] = np.inf
        entries = np.argsort(distances, axis=1, kind="stable")[:, :k]
        distances = np.take_along_axis(distances, entries, 1)
        return Neighbours(
            distances=distances,
            tokens=self.tokens[entries],
            entries=np.where(np.isfinite(distances), entries, NO_ENTRY),
            documents=self.documents[entries],
        )
