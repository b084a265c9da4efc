"""Transcripts being made: their tokens with the evidence for each, as arrays until somebody asks.

A step appends what all rows of a batch chose; a transcript is read backwards from its newest choice
when it is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmrag.records import NO_ENTRY
from mmrag.retrieval.memory import AttendedWindow

NOTHING = -1
"""The choice before the first."""


@dataclass(frozen=True)
class Choice:
    """A token of a hypothesis and its evidence; log-probabilities in nats."""

    token: int
    logp: float
    """What it was chosen by, as of one distribution: with what boosted phrases earned it, 0 at
    most, and over the weight of all that had a say."""
    lm_logp: float
    lm_token: int
    """What the language model alone would have chosen after the same prefix: the token itself where
    that is as likely as any, or was drawn with neither retrieval nor letters."""
    entry: int = NO_ENTRY
    """The nearest entry that voted for this token."""
    distance: float = float("inf")
    attended: tuple[AttendedWindow, ...] = ()
    """The windows that the model attended to most when it chose."""


@dataclass(frozen=True)
class Hypothesis:
    """A transcript being made; `stopped` once it has chosen the end token."""

    choices: tuple[Choice, ...] = ()
    logp: float = 0.0
    """The sum of what its choices were chosen by, and of all that phrases earned it."""
    stopped: bool = False

    @property
    def tokens(self) -> list[int]:
        """Its ids, without the end token."""
        return [choice.token for choice in self.choices[: -1 if self.stopped else None]]

    @property
    def mean_logp(self) -> float:
        """Mean log-probability of its choices."""
        return sum(choice.logp for choice in self.choices) / max(1, len(self.choices))

    def score(self, length_penalty: float) -> float:
        """Log-probability over length to the power of `length_penalty`."""
        return self.logp / max(1, len(self.choices)) ** length_penalty


_CHOICE = np.dtype(
    [
        ("token", np.int64),
        ("logp", np.float32),
        ("lm_logp", np.float32),
        ("lm_token", np.int64),
        ("entry", np.int64),
        ("distance", np.float32),
        ("before", np.int64),
        ("place", np.int64),
    ]
)


class History:
    """The choices of a batch's hypotheses, each with the one that it follows.

    A choice is known by its number, which is larger than that of the choice it follows.
    """

    def __init__(self, room: int = 4096) -> None:
        """There is always `room` for so many more choices than are still of use."""
        self._room = room
        self._choices = np.zeros(room, _CHOICE)
        self._attended: dict[int, tuple[AttendedWindow, ...]] = {}
        self._count = self._of_use = 0

    def __len__(self) -> int:
        return self._count

    def append(
        self,
        before: np.ndarray,
        attended: Sequence[Sequence[AttendedWindow]] | None = None,
        **evidence: np.ndarray,
    ) -> np.ndarray:
        """Take in one choice after each of `before` (R,), NOTHING for a first; their numbers (R,).

        `evidence` are the other fields of a `Choice`, each (R,).
        """
        end = self._count + len(before)
        if end > len(self._choices):
            grown = np.zeros(max(end, 2 * len(self._choices)), _CHOICE)
            grown[: self._count] = self._choices[: self._count]
            self._choices = grown
        new, numbers = self._choices[self._count : end], np.arange(self._count, end)
        new["before"] = before
        new["place"] = np.where(before == NOTHING, 0, self._choices["place"][before] + 1)
        for name, values in evidence.items():
            new[name] = values
        if attended is not None:
            self._attended |= zip(numbers.tolist(), map(tuple, attended), strict=True)
        self._count = end
        return numbers

    def hypothesis(self, newest: int, logp: float, stopped: bool) -> Hypothesis:
        """What leads to the choice `newest`, a number."""
        way = self._way(newest)
        names = ("token", "logp", "lm_logp", "lm_token", "entry", "distance")
        columns = [self._choices[name][way].tolist() for name in names]
        attended = [self._attended.get(number, ()) for number in way]
        choices = tuple(Choice(*fields) for fields in zip(*columns, attended, strict=True))
        return Hypothesis(choices, logp, stopped)

    def tokens(self, newest: int, known: Sequence[int] = ()) -> list[int]:
        """The tokens up to the choice `newest`, of which the first are `known`."""
        return [*known, *self._choices["token"][self._way(newest, len(known))].tolist()]

    def tidy(self, newest: np.ndarray) -> np.ndarray:
        """Forget what leads to none of `newest` (R,), once that is much; their new numbers (R,)."""
        if self._count - self._of_use < self._of_use + self._room:
            return newest
        of_use = np.zeros(self._count, bool)
        reached = newest
        while len(reached := np.unique(reached[reached != NOTHING])):
            of_use[reached] = True
            reached = self._choices["before"][reached]
            reached = reached[~of_use[reached]]
        number = np.append(np.cumsum(of_use) - 1, NOTHING)  # and of NOTHING, the last
        kept = self._choices[: self._count][of_use]
        kept["before"] = number[kept["before"]]
        self._count = self._of_use = len(kept)
        self._choices = np.concatenate((kept, np.zeros(self._of_use + self._room, _CHOICE)))
        self._attended = {
            int(number[old]): windows for old, windows in self._attended.items() if of_use[old]
        }
        return number[newest]

    def _way(self, newest: int, start: int = 0) -> list[int]:
        """The numbers of the choices from place `start` to `newest`."""
        before, way = self._choices["before"], []
        for _ in range(start, int(self._choices["place"][newest]) + 1 if newest >= 0 else 0):
            way.append(newest)
            newest = int(before[newest])
        return way[::-1]
