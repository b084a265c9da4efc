"""Two transcripts that share some audio to one: no word lost at the seam, and none doubled.

Where a recording was cut in speech, either side heard some of the same words, and the one that the
cut fell into badly. The run of words that both heard at about the same time says where to go over
from the one to the other. Knows texts and times, and neither models nor audio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from mmrag.records import Timed
from mmrag.text import is_letter

T = TypeVar("T")

APART_SECONDS = 0.4
"""So far may the middles of a word lie apart that both sides heard: each timed it for itself."""
SURE_SECONDS = 0.1
"""So far, at most, where one short word is all that both heard: there is many a "the"."""
LONG_WORD = 4
"""Letters of a word that is no such word."""
SLACK_SECONDS = 0.15
"""So far may a word lie outside of what was shared, by its times, and still be of it."""


@dataclass(frozen=True)
class _Held(Generic[T]):
    """A part whose last words wait for the next one."""

    made: T
    words: Sequence[Timed]
    first: int
    """The first of them that counts."""


class Stitcher(Generic[T]):
    """Takes the transcribed segments of a recording in order, and says which words of each count.

    No more than one of them waits at a time, for the next one, with which it shares some audio.
    """

    def __init__(self) -> None:
        self._held: _Held[T] | None = None

    def add(
        self, made: T, words: Sequence[Timed], start: float, before: float, after: float
    ) -> list[tuple[T, slice]]:
        """The next segment, whatever it was `made`; those that are complete, with the words of each
        that count.

        `start`, `before` and `after` are a `Segment`'s; `words`, timed by the recording's clock,
        are only looked at where it shares something.
        """
        complete, first = [], 0
        if (held := self._held) is not None:
            shared = start - before, start + before
            kept, first = seam(held.words[held.first :], words, *shared)
            complete.append((held.made, slice(held.first, held.first + kept)))
            self._held = None
        if after:
            self._held = _Held(made, words, first)
        else:
            complete.append((made, slice(first, None)))
        return complete

    def rest(self) -> list[tuple[T, slice]]:
        """The one that waits, if one does: nothing follows."""
        held, self._held = self._held, None
        return [] if held is None else [(held.made, slice(held.first, None))]


def seam(
    left: Sequence[Timed], right: Sequence[Timed], start: float, end: float
) -> tuple[int, int]:
    """How many words of `left` to keep, and from which word of `right` on.

    Both heard what lies between `start` and `end` (seconds): the left one's audio stops there, and
    the right one's begins there. Their words' times are of the same clock, in order.
    """
    run = _best_run(left, right, start, end)
    if run is None:
        return _by_time(left, right, start, end)
    first, second, length = run
    middle = (start + end) / 2
    nearest = min(range(length), key=lambda n: abs(_middle(left[first + n]) - middle))
    return first + nearest + 1, second + nearest + 1


def _best_run(
    left: Sequence[Timed], right: Sequence[Timed], start: float, end: float
) -> tuple[int, int, int] | None:
    """The longest run of the same words at the same times: where it begins in either, and its
    length. A word counts the less, the farther apart its times are."""
    texts = [[_bare(word.text) for word in words] for words in (left, right)]
    score: dict[tuple[int, int], float] = {}
    length: dict[tuple[int, int], int] = {}
    for i, one in enumerate(left):
        for j, other in enumerate(right):
            shared = _middle(one) > start - SLACK_SECONDS and _middle(other) < end + SLACK_SECONDS
            apart = abs(_middle(one) - _middle(other))
            if not shared or apart > APART_SECONDS or texts[0][i] != texts[1][j]:
                continue
            score[i, j] = score.get((i - 1, j - 1), 0.0) + 1 - apart / APART_SECONDS
            length[i, j] = length.get((i - 1, j - 1), 0) + 1
    if not score:
        return None
    i, j = max(score, key=score.__getitem__)
    apart = abs(_middle(left[i]) - _middle(right[j]))
    if length[i, j] == 1 and len(texts[0][i]) < LONG_WORD and apart > SURE_SECONDS:
        return None
    return i - length[i, j] + 1, j - length[i, j] + 1, length[i, j]


def _by_time(
    left: Sequence[Timed], right: Sequence[Timed], start: float, end: float
) -> tuple[int, int]:
    """Each side's words up to and from the middle of what they share, and those beyond it where the
    other side heard nothing; of a sound that both would keep, the word that lies deeper in its own
    audio."""
    middle = (start + end) / 2
    kept = sum(_middle(word) < middle for word in left)
    begun = sum(_middle(word) < middle for word in right)
    if kept and begun < len(right) and _same_sound(left[kept - 1], right[begun]):
        if end - left[kept - 1].end < right[begun].start - start:
            kept -= 1
        else:
            begun += 1
    while kept < len(left) and (begun == len(right) or _before(left[kept], right[begun])):
        kept += 1
    while begun and (not kept or _before(left[kept - 1], right[begun - 1])):
        begun -= 1
    return kept, begun


def _before(one: Timed, other: Timed) -> bool:
    """Whether a word is over when another begins, or all but over."""
    return one.end <= other.start or (_middle(one) < _middle(other) and not _same_sound(one, other))


def _same_sound(one: Timed, other: Timed) -> bool:
    """Whether two words share more than half of the shorter one's time."""
    shared = min(one.end, other.end) - max(one.start, other.start)
    return shared > min(one.end - one.start, other.end - other.start) / 2


def _middle(word: Timed) -> float:
    return (word.start + word.end) / 2


def _bare(text: str) -> str:
    """A word without its case and its punctuation, which change at the end of a sentence."""
    return "".join(filter(is_letter, text.lower())) or text
