"""Words with times to subtitles: cut into cues, written as SubRip or WebVTT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmrag.records import Word

PAUSE_SECONDS = 0.6
CUE_SECONDS = 6.0
CUE_LETTERS = 84
"""Two lines of a subtitle."""


@dataclass(frozen=True)
class Cue:
    """A few words said in a row: `first` and `last` of them, from 0."""

    first: int
    last: int
    start: float
    end: float
    text: str


def cues(words: Sequence[Word]) -> list[Cue]:
    """Cut timed words (T,) where somebody pauses, and before a cue becomes too long."""
    found: list[Cue] = []
    for number, word in enumerate(words):
        if found:
            cue = found[-1]
            text = f"{cue.text} {word.text}"
            joined = word.start - cue.end < PAUSE_SECONDS and len(text) <= CUE_LETTERS
            if joined and word.end - cue.start <= CUE_SECONDS:
                found[-1] = Cue(cue.first, number, cue.start, word.end, text)
                continue
        found.append(Cue(number, number, word.start, word.end, word.text))
    return found


def srt(cues: Sequence[Cue]) -> str:
    """The cues as a SubRip file."""
    blocks = [
        f"{number}\n{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}\n{cue.text}\n"
        for number, cue in enumerate(cues, 1)
    ]
    return "\n".join(blocks)


def vtt(cues: Sequence[Cue]) -> str:
    """The cues as a WebVTT file."""
    blocks = [f"{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}\n{cue.text}\n" for cue in cues]
    return "\n".join(["WEBVTT\n", *blocks])


def _clock(seconds: float, point: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    whole, fraction = divmod(rest, 1000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{whole:02}{point}{fraction:03}"
