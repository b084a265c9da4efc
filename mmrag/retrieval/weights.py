"""What entries weigh: the odds that a neighbour gives its token, and a window its place in
attention, are multiplied by it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmrag.records import NO_ENTRY
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.retrievers import SECOND

LEAST = 1e-6
"""Instead of 0, which nothing that is found weighs."""


@dataclass(frozen=True)
class Weights:
    """The entries (M,) int64, ascending, that weigh more or less than one, and the logarithms of
    their weights (M,) float32."""

    entries: np.ndarray
    logarithms: np.ndarray

    @classmethod
    def of(cls, first: Datastore | None, second: Datastore | None = None) -> Weights | None:
        """Of a datastore, or of two that are joined (`JoinedRetriever`); None where all weigh one.

        ValueError where neither is given.
        """
        parts = [(one, shift) for one, shift in ((first, 0), (second, SECOND)) if one is not None]
        found = [
            (own + shift, weights)
            for one, shift in parts
            for own, weights in [one.wordings.weights()]
        ]
        entries, weights = (np.concatenate(columns) for columns in zip(*found, strict=True))
        if not len(entries):
            return None
        return cls(entries, np.log(np.maximum(weights, np.float32(LEAST))))

    @property
    def heaviest(self) -> float:
        """The largest weight, 1 at least."""
        return float(np.exp(max(0.0, self.logarithms.max(initial=0.0))))

    def of_entries(self, entries: np.ndarray) -> np.ndarray:
        """The logarithms of the weights of entries (...,) -> (...,) float32; 0 for NO_ENTRY."""
        place = np.minimum(np.searchsorted(self.entries, entries), len(self.entries) - 1)
        known = (self.entries[place] == entries) & (entries != NO_ENTRY)
        return np.where(known, self.logarithms[place], np.float32(0))
