"""How good a transcript is: error rates with intervals, entity recall, retrieval recall.

Everything is a sum of counts divided once, so a corpus scored in shards and scored whole agree.
Intervals are 95 % percentile bootstraps over utterances. Knows texts and token ids alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jiwer
import numpy as np

from mmrag.records import NO_ENTRY
from mmrag.text import spoken

Kind = Literal["equal", "substitute", "delete", "insert"]

INTERVAL = (2.5, 97.5)
"""Percentiles of the bootstrap between which the truth lies 95 times in a hundred."""


@dataclass(frozen=True)
class ErrorRate:
    """(S + D + I) / reference length, and its 95 % interval. CER counts characters, not words."""

    rate: float
    low: float
    high: float
    substitutions: int
    deletions: int
    insertions: int
    reference: int
    """Words (or characters) in the references."""


@dataclass(frozen=True)
class Difference:
    """WER of a minus WER of b, and its 95 % interval; negative where a is better."""

    delta: float
    low: float
    high: float


@dataclass(frozen=True)
class Recall:
    """How many of `total` were found."""

    found: int
    total: int

    @property
    def rate(self) -> float | None:
        """Share found; None if there was nothing to find."""
        return self.found / self.total if self.total else None


@dataclass(frozen=True)
class Edit:
    """A run of an alignment, all of one kind."""

    kind: Kind
    reference_words: tuple[str, ...]
    hypothesis_words: tuple[str, ...]


def word_error_rate(
    references: Sequence[str], hypotheses: Sequence[str], resamples: int = 1000, seed: int = 0
) -> ErrorRate:
    """WER over all utterances, both sides as they are `spoken`: "2" and "two" are one word.

    An utterance with an empty reference counts its hypothesis as insertions. Raises ValueError
    if the lists differ in length or no reference holds a word.
    """
    return _error_rate(_word_counts(references, hypotheses), resamples, seed)


def character_error_rate(
    references: Sequence[str], hypotheses: Sequence[str], resamples: int = 1000, seed: int = 0
) -> ErrorRate:
    """As `word_error_rate`, over characters; the space between two words is one."""
    pairs = _normalised(references, hypotheses)
    aligned = jiwer.process_characters(*pairs)
    return _error_rate(_counts(aligned), resamples, seed)


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
    counts_a, counts_b = _word_counts(references, a), _word_counts(references, b)
    words = counts_a[:, 3]
    errors = counts_a[:, :3].sum(axis=1) - counts_b[:, :3].sum(axis=1)
    return Difference(*_ratio(errors, words, resamples, seed))


def entity_recall(entities: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> Recall:
    """How many of each utterance's entities its hypothesis holds.

    An entity is found where its spoken words stand in the hypothesis one after the other;
    one that is listed twice has to be there twice. Raises ValueError if the lists differ in
    length or an entity has no letter or digit.
    """
    _check_paired("lists of entities", entities, hypotheses)
    found = total = 0
    for names, hypothesis in zip(entities, hypotheses, strict=True):
        heard = _bounded(spoken(hypothesis))
        for words, times in Counter(map(spoken, names)).items():
            if not words:
                raise ValueError(f"an entity without a letter or digit among {list(names)}")
            total += times
            found += min(times, heard.count(_bounded(words)))
    return Recall(found, total)


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


def align(reference: str, hypothesis: str) -> list[Edit]:
    """The edits that turn `reference` into `hypothesis`, both as they are spoken, in order."""
    aligned = jiwer.process_words(spoken(reference), spoken(hypothesis))
    said, heard = aligned.references[0], aligned.hypotheses[0]
    return [
        Edit(
            chunk.type,
            tuple(said[chunk.ref_start_idx : chunk.ref_end_idx]),
            tuple(heard[chunk.hyp_start_idx : chunk.hyp_end_idx]),
        )
        for chunk in aligned.alignments[0]
    ]


def _bounded(words: str) -> str:
    """Words with a space on both sides each, so that a substring is a sequence of whole words."""
    return "".join(f" {word} " for word in words.split())


def _normalised(
    references: Sequence[str], hypotheses: Sequence[str]
) -> tuple[list[str], list[str]]:
    _check_paired("references", references, hypotheses)
    return [spoken(text) for text in references], [spoken(text) for text in hypotheses]


def _check_paired(what: str, expected: Sequence, hypotheses: Sequence[str]) -> None:
    if isinstance(expected, str) or isinstance(hypotheses, str):
        raise TypeError(f"{what} and hypotheses are sequences, one element an utterance")
    if len(expected) != len(hypotheses):
        raise ValueError(f"{len(expected)} {what} but {len(hypotheses)} hypotheses")


def _word_counts(references: Sequence[str], hypotheses: Sequence[str]) -> np.ndarray:
    return _counts(jiwer.process_words(*_normalised(references, hypotheses)))


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


def _error_rate(counts: np.ndarray, resamples: int, seed: int) -> ErrorRate:
    rate, low, high = _ratio(counts[:, :3].sum(axis=1), counts[:, 3], resamples, seed)
    substitutions, deletions, insertions, reference = counts.sum(axis=0).tolist()
    return ErrorRate(rate, low, high, substitutions, deletions, insertions, reference)


def _ratio(
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
