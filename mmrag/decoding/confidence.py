"""How sure to be of a transcript: the decoder's probabilities, calibrated on speech it never saw.

A language model is sure of itself where it should not be: handed speech unlike any that it knows,
it writes a fluent sentence, each word of it likely after the last. What gives it away is that its
words are less likely on the whole, and a short word is more easily made up than a long one. So a
word's confidence depends on its own probability, on those of its whole segment and on its length,
by a logistic regression (Platt scaling) whose four numbers are fitted on a development set that
holds speech of both kinds; and it is that of this set alone. A segment's confidence is the share of
its words that are expected to be right.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmrag.artifact import write_json
from mmrag.records import Word

FILE = "calibration.json"
BINS = 10
LEAST_ODDS = 1e-4
"""Probabilities are taken as no nearer to 0 or 1 than this."""
GOOD, BAD = 0.1, 0.5
"""Word error rates up to which a transcript is a good one, and from which on a bad one."""
COST_OF_DOUBT = 2.0
"""A good transcript that is marked as unclear is as wrong as so many bad ones that are not: marks
that are mostly for nothing are soon overlooked."""


class Judged(NamedTuple):
    """A transcript whose words are known to be right or wrong."""

    words: Sequence[Word]
    correct: Sequence[bool]
    """Of its words."""
    error_rate: float
    """Of the transcript: word errors over reference words."""
    reference_words: int = 1


@dataclass(frozen=True)
class Calibration:
    """Probabilities to confidences, for one language model."""

    bias: float
    own: float
    """Weight of a word's own log-odds."""
    mean: float
    """Weight of the log-odds of the segment's mean probability."""
    unclear: float
    """A segment whose confidence is below is marked as unclear."""
    fitted_on: Mapping[str, int] = field(default_factory=dict)
    """Development sets and their transcripts."""
    letters: float = 0.0
    """Weight of the logarithm of a word's letters."""

    def words(self, words: Sequence[Word]) -> np.ndarray:
        """The confidence (W,) of each word of a segment."""
        if not words:
            return np.zeros(0)
        own, mean, letters = _features(words)
        return _sigmoid(self.bias + self.own * own + self.mean * mean + self.letters * letters)

    def segment(self, words: Sequence[Word]) -> float:
        """The share of a segment's words that are expected to be right; 0 if it has none."""
        return float(self.words(words).mean()) if words else 0.0

    def save(self, directory: Path) -> None:
        """Write FILE into a directory."""
        write_json(directory / FILE, asdict(self))

    @classmethod
    def read(cls, directory: Path) -> Calibration:
        """What `save` wrote."""
        return cls(**json.loads((directory / FILE).read_text(encoding="utf-8")))


def fit(sets: Mapping[str, Sequence[Judged]]) -> Calibration:
    """The calibration that makes the judged words likeliest, each set weighing the same.

    ValueError if all words are right, or all wrong: nothing can be told apart then.
    """
    features, correct, weights = [], [], []
    for judged in sets.values():
        words = sum(len(one.correct) for one in judged)
        for one in judged:
            if len(one.correct):
                features.append(np.stack(_features(one.words)))
                correct.append(np.array(one.correct, float))
                weights.append(np.full(len(one.correct), 1 / words))
    if not features or len({*np.concatenate(correct)}) < 2:
        raise ValueError("a calibration needs words that are right and words that are wrong")
    x, y, w = np.concatenate(features, 1), np.concatenate(correct), np.concatenate(weights)
    from sklearn.linear_model import LogisticRegression

    found = LogisticRegression(C=1e4).fit(x.T, y, w * len(w) / w.sum())
    [bias], [[own, mean, letters]] = found.intercept_.tolist(), found.coef_.tolist()
    counts = {name: len(each) for name, each in sets.items()}
    made = Calibration(bias, own, mean, 0.0, counts, letters)
    everything = [one for judged in sets.values() for one in judged]
    return Calibration(**asdict(made) | {"unclear": _threshold(made, everything)})


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Mean distance of confidence and accuracy over BINS bins of equal width (Guo et al. 2017)."""
    table = reliability(confidence, correct)
    return sum(count * abs(sure - right) for count, sure, right in table) / max(1, len(correct))


def reliability(confidence: np.ndarray, correct: np.ndarray) -> list[tuple[int, float, float]]:
    """(words, mean confidence, share that is right) of each of BINS bins; zeros where none."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    table = []
    for number in range(BINS):
        inside = bins == number
        count = int(inside.sum())
        sure = float(confidence[inside].mean()) if count else 0.0
        table.append((count, sure, float(correct[inside].mean()) if count else 0.0))
    return table


def marked(calibration: Calibration, judged: Sequence[Judged]) -> tuple[float, float]:
    """Shares of the bad transcripts and of the good ones that are marked as unclear; nan of none.

    Transcripts without a word say nothing, and are not counted.
    """
    shares = []
    for chosen in (_bad, _good):
        each = [one for one in judged if len(one.correct) and chosen(one)]
        unclear = [calibration.segment(one.words) < calibration.unclear for one in each]
        shares.append(float(np.mean(unclear)) if each else float("nan"))
    return shares[0], shares[1]


def _bad(one: Judged) -> bool:
    return one.error_rate > BAD


def _good(one: Judged) -> bool:
    return one.error_rate <= GOOD


def _threshold(calibration: Calibration, judged: Sequence[Judged]) -> float:
    """Between the confidences of bad and of good transcripts, where the shares of either that are
    on the wrong side cost least.

    Of several such places the middle one: what comes is not quite what was seen.
    """
    spoken = [one for one in judged if len(one.correct)]
    bad = np.array([calibration.segment(one.words) for one in spoken if _bad(one)])
    good = np.array([calibration.segment(one.words) for one in spoken if _good(one)])
    if not len(bad) or not len(good):
        return 0.5
    edges = np.unique(np.concatenate([[0.0], bad, good, [1.0]]))
    places = (edges[1:] + edges[:-1]) / 2
    wrong = [(bad >= one).mean() + COST_OF_DOUBT * (good < one).mean() for one in places]
    best = np.flatnonzero(np.isclose(wrong, min(wrong)))
    return float((edges[best[0]] + edges[best[-1] + 1]) / 2)


def _features(words: Sequence[Word]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-odds of each word and, as often, of their mean; and how long each is written."""
    each = np.array([word.probability for word in words])
    mean = np.full(len(each), each.mean())
    return _log_odds(each), _log_odds(mean), np.log([max(1, len(word.text)) for word in words])


def _log_odds(probability: np.ndarray) -> np.ndarray:
    bounded = np.clip(probability, LEAST_ODDS, 1 - LEAST_ODDS)
    return np.log(bounded / (1 - bounded))


def _sigmoid(value: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-value))
