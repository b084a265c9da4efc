"""How many of the things to find were found. Knows counts and token ids alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmrag.records import NO_ENTRY


@dataclass(frozen=True)
class Recall:
    """How many of `total` were found."""

    found: int
    total: int

    @property
    def rate(self) -> float | None:
        """Share found; None if there was nothing to find."""
        return self.found / self.total if self.total else None


def recall_at_k(tokens: np.ndarray, targets: np.ndarray, entries: np.ndarray) -> Recall:
    """How many of Q queries have their target among the tokens of their K neighbours.

    `tokens` (Q, K), `targets` (Q,), `entries` (Q, K) datastore entry ids, -1 for a neighbour
    that was not found, which never counts. Raises ValueError if the shapes do not fit.
    """
    if tokens.ndim != 2 or entries.shape != tokens.shape or targets.shape != tokens.shape[:1]:
        raise ValueError(
            f"recall needs tokens and entries (Q, K) and targets (Q,), not {tokens.shape}, "
            f"{entries.shape} and {targets.shape}"
        )
    hits = (tokens == targets[:, None]) & (entries != NO_ENTRY)
    return Recall(found=int(hits.any(axis=1).sum()), total=len(targets))
