"""WER, U-WER and B-WER as the LibriSpeech biasing benchmark counts them.

Le et al., "Contextualized Streaming End-to-End Speech Recognition with Trie-Based Deep Biasing and
Shallow Fusion", Interspeech 2021. B-WER is of the words on the utterance's list of rare words,
U-WER of the others. Words are compared as they are written: whoever wants them normalised does so
before. The counts are those of the benchmark's published results, which depend on its alignment:
that of NIST's sclite, in which a substitution costs less than an insertion and a deletion but more
than one of them. jiwer weighs all three alike, and no library at hand aligns with these weights.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from mmrag.score.rates import ErrorRate, check_paired, error_rate, partial_error_rate

INSERTION = DELETION = 3
SUBSTITUTION = 4
"""Costs of the alignment."""
UNBIASED, BIASED = 0, 1
"""Places of the two kinds of words in counts (N, 2, 4)."""


@dataclass(frozen=True)
class BiasingScore:
    """Error rates of all words, of those not on their utterance's list, and of those on it."""

    words: ErrorRate
    unbiased: ErrorRate
    biased: ErrorRate


def biasing_error_rates(
    references: Sequence[str],
    hypotheses: Sequence[str],
    rare_words: Sequence[Collection[str]],
    resamples: int = 1000,
    seed: int = 0,
) -> BiasingScore:
    """WER, U-WER and B-WER; words are what stands between spaces.

    `rare_words` has each utterance's list. A substitution and a deletion belong to their reference
    word, an insertion to the inserted word: it is a biased one if it is on the list of rare words;
    that it is on the longer list which the recogniser was given does not count. Raises ValueError
    if the lists differ in length or no reference holds a word.
    """
    check_paired("references", references, hypotheses)
    check_paired("lists of rare words", rare_words, hypotheses)
    counts = np.zeros((len(hypotheses), 2, 4), np.int64)
    for row, reference, hypothesis, rare in zip(
        counts, references, hypotheses, rare_words, strict=True
    ):
        said, heard = reference.split(), hypothesis.split()
        for at, on in weighted_alignment(said, heard):
            kind = BIASED if (heard[on] if at is None else said[at]) in rare else UNBIASED
            row[kind, 3] += at is not None
            if at is None:
                row[kind, 2] += 1
            elif on is None:
                row[kind, 1] += 1
            elif said[at] != heard[on]:
                row[kind, 0] += 1
    return BiasingScore(
        error_rate(counts.sum(axis=1), resamples, seed),
        partial_error_rate(counts[:, UNBIASED], resamples, seed),
        partial_error_rate(counts[:, BIASED], resamples, seed),
    )


def weighted_alignment(
    said: Sequence[str], heard: Sequence[str]
) -> list[tuple[int | None, int | None]]:
    """The cheapest alignment: pairs of a place in `said` and one in `heard`, in order.

    None instead of the first is an insertion, instead of the second a deletion. Among alignments of
    equal cost, read from the end, two words are paired rather than inserted or deleted, and a word
    inserted rather than deleted. The errors are as few as in an unweighted alignment or, where that
    has three substitutions or more, up to a third of those substitutions more.
    """
    costs = _costs(said, heard)
    at, on = len(said), len(heard)
    pairs: list[tuple[int | None, int | None]] = []
    while at or on:
        cost = costs[at, on]
        changed = SUBSTITUTION if at and on and said[at - 1] != heard[on - 1] else 0
        if at and on and cost == costs[at - 1, on - 1] + changed:
            at, on = at - 1, on - 1
            pairs.append((at, on))
        elif on and cost == costs[at, on - 1] + INSERTION:
            on -= 1
            pairs.append((None, on))
        else:
            at -= 1
            pairs.append((at, None))
    return pairs[::-1]


def _costs(said: Sequence[str], heard: Sequence[str]) -> np.ndarray:
    """(len(said) + 1, len(heard) + 1): what aligning the first so many words of each costs."""
    ids = {word: number for number, word in enumerate(dict.fromkeys(heard))}
    heard_ids = np.array([ids[word] for word in heard], np.int64)
    inserted = INSERTION * np.arange(len(heard) + 1, dtype=np.int64)
    costs = np.empty((len(said) + 1, len(heard) + 1), np.int64)
    costs[0] = inserted
    for at, word in enumerate(said, start=1):
        above = costs[at - 1]
        best = above + DELETION
        paired = above[:-1] + np.where(heard_ids == ids.get(word, -1), 0, SUBSTITUTION)
        best[1:] = np.minimum(best[1:], paired)
        # Insertions run along the row: the least over all places where they may begin.
        costs[at] = np.minimum.accumulate(best - inserted) + inserted
    return costs
