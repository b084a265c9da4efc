"""Word and character error rates: sums of counts divided once, with bootstrap intervals.

A corpus scored in shards and scored whole agree. Intervals are 95 % percentile bootstraps over
utterances. Knows texts alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jiwer
import numpy as np

from mmrag.text import spoken

Kind = Literal["equal", "substitute", "delete", "insert"]

INTERVAL = (2.5, 97.5)
"""Percentiles of the bootstrap between which the truth lies 95 times in a hundred."""


@dataclass(frozen=True)
class ErrorRate:
    """(S + D + I) / reference length, and its 95 % interval. CER counts characters, not words.

    Of some of the words alone (biased ones, those of entities) the three rates are None where the
    references hold no such word.
    """

    rate: float | None
    low: float | None
    high: float | None
    substitutions: int
    deletions: int
    insertions: int
    reference: int
    """Words (or characters) in the references."""

    @property
    def errors(self) -> int:
        """All three kinds together."""
        return self.substitutions + self.deletions + self.insertions


@dataclass(frozen=True)
class Edit:
    """A run of an alignment, all of one kind."""

    kind: Kind
    reference_words: tuple[str, ...]
    hypothesis_words: tuple[str, ...]


def word_error_rate(
    references: Sequence[str], hypotheses: Sequence[str], resamples: int = 1000, seed: int = 0
) -> ErrorRate:
    """WER over all utterances, as they are `spoken`.

    An utterance with an empty reference counts its hypothesis as insertions. Raises ValueError
    if the lists differ in length or no reference holds a word.
    """
    return error_rate(word_counts(references, hypotheses), resamples, seed)


def align(reference: str, hypothesis: str) -> list[Edit]:
    """The edits that turn `reference` into `hypothesis`, both as they are spoken, in order."""
    [edits] = alignments([reference], [hypothesis])
    return edits


def alignments(references: Sequence[str], hypotheses: Sequence[str]) -> list[list[Edit]]:
    """`align` for every utterance: the alignments that `word_error_rate` counts."""
    aligned = jiwer.process_words(*_normalised(references, hypotheses))
    return [
        [
            Edit(
                chunk.type,
                tuple(said[chunk.ref_start_idx : chunk.ref_end_idx]),
                tuple(heard[chunk.hyp_start_idx : chunk.hyp_end_idx]),
            )
            for chunk in chunks
        ]
        for said, heard, chunks in zip(
            aligned.references, aligned.hypotheses, aligned.alignments, strict=True
        )
    ]


def word_counts(references: Sequence[str], hypotheses: Sequence[str]) -> np.ndarray:
    """(N, 4): each utterance's substitutions, deletions, insertions and reference words."""
    return _counts(jiwer.process_words(*_normalised(references, hypotheses)))


def character_counts(references: Sequence[str], hypotheses: Sequence[str]) -> np.ndarray:
    """As `word_counts`, of characters; the space between two words is one."""
    return _counts(jiwer.process_characters(*_normalised(references, hypotheses)))


def error_rate(counts: np.ndarray, resamples: int, seed: int) -> ErrorRate:
    """The rate of `counts` (N, 4), one row an utterance: substitutions, deletions, insertions and
    reference words. Raises ValueError if there are no reference words."""
    rate, low, high = ratio(counts[:, :3].sum(axis=1), counts[:, 3], resamples, seed)
    return ErrorRate(rate, low, high, *counts.sum(axis=0).tolist())


def partial_error_rate(counts: np.ndarray, resamples: int, seed: int) -> ErrorRate:
    """As `error_rate`, of some of the words alone: None where the references hold none of them."""
    if counts[:, 3].any():
        return error_rate(counts, resamples, seed)
    return ErrorRate(None, None, None, *counts.sum(axis=0).tolist())


def ratio(
    errors: np.ndarray, words: np.ndarray, resamples: int, seed: int
) -> tuple[float, float, float]:
    """Sum of `errors` (N,) over sum of `words` (N,), and its interval over resampled utterances.

    A resample that drew only empty references says nothing: it stands at the estimate itself.
    """
    if words.sum() == 0:
        raise ValueError(f"no reference words to score against in {len(words)} utterances")
    rate = errors.sum() / words.sum()
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(words), size=len(words)) for _ in range(resamples))
    sums = np.array([(errors[draw].sum(), words[draw].sum()) for draw in draws])
    rates = np.where(sums[:, 1] > 0, sums[:, 0] / np.maximum(sums[:, 1], 1), rate)
    low, high = np.percentile(rates, INTERVAL)
    return float(rate), float(low), float(high)


def check_paired(what: str, expected: Sequence, hypotheses: Sequence[str]) -> None:
    """Raise unless both are lists with one element an utterance."""
    if isinstance(expected, str) or isinstance(hypotheses, str):
        raise TypeError(f"{what} and hypotheses are sequences, one element an utterance")
    if len(expected) != len(hypotheses):
        raise ValueError(f"{len(expected)} {what} but {len(hypotheses)} hypotheses")


def _normalised(
    references: Sequence[str], hypotheses: Sequence[str]
) -> tuple[list[str], list[str]]:
    check_paired("references", references, hypotheses)
    return [spoken(text) for text in references], [spoken(text) for text in hypotheses]


def _counts(aligned: jiwer.WordOutput | jiwer.CharacterOutput) -> np.ndarray:
    """(N, 4): each utterance's substitutions, deletions, insertions and reference length."""
    counts = np.zeros((len(aligned.references), 4), np.int64)
    for row, reference, chunks in zip(counts, aligned.references, aligned.alignments, strict=True):
        row[3] = len(reference)
        for chunk in chunks:
            said = chunk.ref_end_idx - chunk.ref_start_idx
            heard = chunk.hyp_end_idx - chunk.hyp_start_idx
            if chunk.type == "substitute":
                row[0] += said
            elif chunk.type == "delete":
                row[1] += said
            elif chunk.type == "insert":
                row[2] += heard
    return counts
