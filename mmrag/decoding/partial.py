"""What can be told of a transcript while it is still being spoken, without taking a word back.

The newest words of a hypothesis are guesses: more audio changes them. A word is told once two
hypotheses in a row have it at its place (LocalAgreement-2: Macháček et al., "Turning Whisper into
Real-Time Transcription System", arXiv 2307.14743). A language model that has heard the beginning of
a sentence likes to finish it, twice in a row the same way: so a word is told only when there has
been time to say it. Knows words and seconds alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

LETTERS_A_SECOND = 15.0
"""Nobody is expected to say more, a blank behind each word among them: 180 English words a minute.
"""
UNFINISHED_SECONDS = 0.3
"""The end of what was heard, in which a word may not be over."""


class Agreement:
    """The hypotheses of one turn, each over more audio than the one before."""

    def __init__(self) -> None:
        self.told: list[str] = []
        """The words told so far."""
        self.revised = 0
        """Words of a hypothesis that the next one had otherwise, or not at all: what would have
        been taken back, had every hypothesis been told."""
        self.changes = 0
        """Words told that the final transcript has otherwise (substituted, inserted, deleted)."""
        self._before: list[str] = []

    def update(self, words: Sequence[str], seconds: float = math.inf) -> list[str]:
        """The words newly agreed on, of the newest hypothesis `words`: those after the told ones
        which the hypothesis before has at the same place, up to the first that it has not.

        A hypothesis that does not begin with the words told agrees with nothing. With `seconds`
        of speech so far, only words are told that there was time to say.
        """
        words, before, count = list(words), self._before, len(self.told)
        self._before = words
        same = common(before, words)
        self.revised += len(before) - same
        if common(self.told, words) < count:
            return []
        newly = words[count : min(same, sayable(words, seconds))]
        self.told += newly
        return newly

    def finish(self, words: Sequence[str]) -> list[str]:
        """The words of the final transcript that follow those told; `told` then ends with them.

        Where the final transcript has the told words otherwise, they are taken for the beginning
        of it that differs in the fewest words, and `changes` counts these.
        """
        words = list(words)
        self.revised += len(self._before) - common(self._before, words)
        distances = beginnings(self.told, words)
        begin = min(range(len(distances)), key=lambda n: (distances[n], abs(n - len(self.told))))
        self.changes += distances[begin]
        self.told += words[begin:]
        self._before = []
        return words[begin:]


def sayable(words: Sequence[str], seconds: float) -> int:
    """How many of the first words there is time to say in so many seconds, and to finish."""
    most = LETTERS_A_SECOND * (seconds - UNFINISHED_SECONDS)
    letters = itertools.accumulate(len(word) + 1 for word in words)
    return sum(one <= most for one in letters)


def common(one: Sequence[str], other: Sequence[str]) -> int:
    """How many words two texts begin with alike."""
    for number, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if mine != theirs:
            return number
    return min(len(one), len(other))


def beginnings(told: Sequence[str], words: Sequence[str]) -> list[int]:
    """The word edit distance of `told` to each beginning of `words`, from none to all of them."""
    row = list(range(len(words) + 1))
    for number, one in enumerate(told, start=1):
        above, row = row, [number]
        for place, other in enumerate(words, start=1):
            swapped = above[place - 1] + (one != other)
            row.append(min(swapped, above[place] + 1, row[-1] + 1))
    return row
