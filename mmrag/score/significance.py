"""Whether systems differ that transcribed the same utterances: paired intervals and tests.

Knows texts alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from mmrag.score.rates import ratio, word_counts

PERMUTATIONS = 10_000
"""Exchanges drawn for a test: p is no smaller than one in as many."""
CHUNK = 1000
"""Exchanges held in memory at once, of as many utterances as CELLS holds."""
CELLS = 10_000_000


@dataclass(frozen=True)
class Difference:
    """WER of a minus WER of b, and its 95 % interval; negative where a is better."""

    delta: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Two of several systems, by name, and whether chance alone explains their difference."""

    a: str
    b: str
    difference: Difference
    """Its interval is of this pair alone: not corrected for the number of pairs."""
    p: float
    """How often a difference as large arises, up or down, where the two systems' transcripts of
    each utterance are exchanged at random."""
    p_holm: float
    """`p` corrected for all pairs that were compared (Holm, 1979)."""


def paired_difference(
    references: Sequence[str],
    a: Sequence[str],
    b: Sequence[str],
    resamples: int = 1000,
    seed: int = 0,
) -> Difference:
    """WER of `a` minus WER of `b` on the same utterances: each resample draws them for both.

    Raises ValueError as `word_error_rate` does.
    """
    return _difference(word_counts(references, a), word_counts(references, b), resamples, seed)


def compare(
    references: Sequence[str],
    systems: Mapping[str, Sequence[str]],
    resamples: int = 1000,
    seed: int = 0,
) -> list[Comparison]:
    """Every pair of `systems` (name -> its hypotheses), in their order.

    The test is a paired permutation test over utterances of the difference in WER. Raises
    ValueError as `word_error_rate` does.
    """
    counts = {name: word_counts(references, texts) for name, texts in systems.items()}
    return compare_counts(counts, resamples, seed)


def compare_counts(
    counts: Mapping[str, np.ndarray], resamples: int = 1000, seed: int = 0
) -> list[Comparison]:
    """`compare`, of each system's `word_counts` (N, 4) on the same utterances in one order."""
    pairs = list(combinations(counts, 2))
    ps = [permutation_p(errors(counts[a]) - errors(counts[b]), seed) for a, b in pairs]
    return [
        Comparison(a, b, _difference(counts[a], counts[b], resamples, seed), p, corrected)
        for (a, b), p, corrected in zip(pairs, ps, holm(ps), strict=True)
    ]


def errors(counts: np.ndarray) -> np.ndarray:
    """(N,) errors of each utterance from `counts` (N, 4)."""
    return counts[:, :3].sum(axis=1)


def permutation_p(differences: np.ndarray, seed: int = 0) -> float:
    """Two-sided p of the sum of `differences` (N,), whose signs chance may turn one by one.

    Of `PERMUTATIONS` draws and what was seen itself, the share whose sum is as far from zero.
    """
    unlike = differences[differences != 0].astype(np.float64)
    seen, rng, as_far = abs(unlike.sum()), np.random.default_rng(seed), 1
    chunk = max(1, min(CHUNK, CELLS // max(1, len(unlike))))
    for start in range(0, PERMUTATIONS, chunk):
        draws = min(chunk, PERMUTATIONS - start)
        signs = rng.integers(0, 2, (draws, len(unlike)), dtype=np.int8) * 2.0 - 1.0
        as_far += int((abs(signs @ unlike) >= seen).sum())
    return as_far / (PERMUTATIONS + 1)


def holm(ps: Sequence[float]) -> list[float]:
    """`ps` corrected by Holm's step-down procedure, in their own order."""
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, which in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[which]))
        corrected[which] = largest
    return corrected


def _difference(a: np.ndarray, b: np.ndarray, resamples: int, seed: int) -> Difference:
    return Difference(*ratio(errors(a) - errors(b), a[:, 3], resamples, seed))
