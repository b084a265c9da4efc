"""A recording of any length to segments that a model can hear: cut in pauses, or in speech so that
both sides hear what the cut fell into; or where a detector hears that somebody begins and ends.

Knows samples alone; what is said at a cut in speech is for `mmrag.decoding.stitch` to put together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from mmrag.speech import audio
from mmrag.speech.audio import SAMPLE_RATE, WHOLE, Span
from mmrag.speech.decoders import Source
from mmrag.speech.silero import FRAME
from mmrag.speech.turns import Started, TurnDetector

PAUSE_SAMPLES = SAMPLE_RATE // 10
"""Width of the window whose energy decides where to cut: a pause, not a stop consonant."""
HOP_SAMPLES = SAMPLE_RATE // 100
PAUSE_DECIBELS = 25.0
"""A window this far below the loudest ones may be part of a pause."""
LONGEST_CLOSURE = SAMPLE_RATE * 3 // 20
"""So long is it quiet within words, at most; where it is quiet for longer, nobody speaks."""
LONG_PAUSE = SAMPLE_RATE * 2 // 5
"""So long is a pause between sentences; longer ones are no better."""
SILENCE = 1e-7
"""Mean square of a window below which there is nothing to hear, whatever is around it."""
LATEST_START = SAMPLE_RATE
"""So long after a turn's first sound it is told, at most, for all of its padding to be there."""
OVERLAP_SECONDS = 2.0
"""What neighbours share where they are cut in speech: some words whole, at the slowest pace."""


@dataclass(frozen=True)
class Segment:
    """A part of a longer recording: `wave` (T,) at 16 kHz, `start` and `end` in seconds.

    Where it was cut in speech, its wave goes on for `after` seconds behind its end, and that of the
    next begins `before` seconds ahead of its start: both hold the same words.
    """

    wave: torch.Tensor
    start: float
    end: float
    before: float = 0.0
    after: float = 0.0


def overlap(max_seconds: float) -> float:
    """What neighbours among segments of at most `max_seconds` share where nobody pauses."""
    return min(OVERLAP_SECONDS, max_seconds / 3)


def turns(
    source: Source,
    max_seconds: float,
    min_seconds: float = 0.1,
    overlap: float = 0.0,
    threshold: float = 0.5,
    prefix_padding_ms: int = 300,
    silence_duration_ms: int = 200,
) -> Iterator[Segment]:
    """Cut `source` where a `TurnDetector` with these settings hears somebody begin and finish: each
    turn is a segment, or several where it is longer than `max_seconds`, cut as `segments` cuts.

    What lies between two turns is in no segment; the audio that comes before a turn, and the
    silence that ends it, are in its segment. No more audio is in memory than `segments` keeps and
    the padding. Raises as `segments` does, and ValueError as `TurnDetector` does.
    """
    detector = TurnDetector(threshold, prefix_padding_ms, silence_duration_ms)
    before = prefix_padding_ms * SAMPLE_RATE // 1000 + LATEST_START
    limit, least, half = _samples(max_seconds, min_seconds, overlap)
    kept, position = torch.empty(0), 0  # what is in no segment yet, and where that begins
    turn: _Cutter | None = None
    for block in audio.blocks(source, min_seconds=min_seconds):
        kept = torch.cat([kept, block])
        judged = (position + len(kept)) // FRAME * FRAME
        for event in detector.push(block):
            cut = max(0, event.sample - position)
            if isinstance(event, Started):
                turn = _Cutter(limit, least, half, position + cut)
            else:
                yield from turn.fed(kept[:cut], last=True)
                turn = None
            kept, position = kept[cut:], position + cut
        # Between turns, what the next may begin with is kept; in one, what may be behind its end.
        cut = max(0, judged - position if turn else len(kept) - before)
        if turn:
            yield from turn.fed(kept[:cut])
        kept, position = kept[cut:], position + cut
    if turn:
        yield from turn.fed(kept, last=True)


def segments(
    source: Source,
    max_seconds: float,
    min_seconds: float = 0.1,
    span: Span = WHOLE,
    overlap: float = 0.0,
) -> Iterator[Segment]:
    """Cut `source`, or a span of it, at its quietest places into segments of `min_seconds` to
    `max_seconds`; times count from the span's start.

    The cut falls in the second half of what still fits, where a tenth of a second has the least
    energy (of equals the latest). Audio within the limit is one segment. Concatenated, the
    segments are `read(source)` sample for sample, at any input rate: resampling is streamed too,
    and at no time is more than about `max_seconds + min_seconds` plus three blocks in memory.

    With an `overlap` (seconds, a third of `max_seconds` at most) the cut falls in the longest pause
    of the last three quarters (of long ones the last); where nobody pauses, neighbours share so
    much around the quietest place (`Segment.after`), and are still no longer than `max_seconds`.

    Raises AudioError as `read` does, truncation and NaN only when they are met; ValueError if
    `min_seconds` is more than half of `max_seconds`, which would leave nowhere to cut, or
    `overlap` more than a third.
    """
    cutter = _Cutter(*_samples(max_seconds, min_seconds, overlap))
    for block in audio.blocks(source, span, min_seconds=min_seconds):
        yield from cutter.fed(block)
    yield from cutter.fed(torch.empty(0), last=True)


def _samples(max_seconds: float, min_seconds: float, overlap: float) -> tuple[int, int, int]:
    """The longest and the shortest segment, and half of what neighbours share, in samples."""
    limit, least = int(max_seconds * SAMPLE_RATE), math.ceil(min_seconds * SAMPLE_RATE)
    if limit < 2 * PAUSE_SAMPLES or 2 * least > limit:
        raise ValueError(
            f"cannot cut segments of {min_seconds} to {max_seconds} s: the longest must be at "
            f"least 0.2 s and twice the shortest"
        )
    return limit, least, int(overlap * SAMPLE_RATE) // 2


def place(wave: torch.Tensor, max_seconds: float, min_seconds: float = 0.1) -> int:
    """The sample at which to cut a wave (T,) that is longer than `max_seconds`: in the longest
    pause of the last three quarters of what fits (of long ones the last), or where it is quietest
    in the second half, if nobody pauses. ValueError for a wave that fits."""
    limit, least = int(max_seconds * SAMPLE_RATE), math.ceil(min_seconds * SAMPLE_RATE)
    if len(wave) <= limit:
        raise ValueError(f"{len(wave)} samples need no cut: {limit} fit")
    cutter = _Cutter(limit, least, 0)
    cutter.pending = wave
    return cutter.place()


class _Cutter:
    """What of a recording has not been cut yet, and where the next cut falls. All in samples."""

    def __init__(self, limit: int, least: int, half_overlap: int, position: int = 0) -> None:
        if 6 * half_overlap > limit:
            raise ValueError(f"an overlap of {2 * half_overlap} samples in segments of {limit}")
        self.pending = torch.empty(0)
        self.position = position
        """Where `pending` begins."""
        self._limit, self._least, self._half = limit, least, half_overlap
        self._before = 0
        """How much of `pending` lies before the next segment's start."""

    def fed(self, wave: torch.Tensor, last: bool = False) -> Iterator[Segment]:
        """What can be cut off once `wave` (T,) is there, too; all of it if that was the last."""
        self.pending = torch.cat([self.pending, wave])
        room = self._limit + (0 if last else self._least)  # what follows a cut is long enough, too
        while len(self.pending) > room:
            yield self.cut()
        if last:
            yield self.rest()

    def cut(self) -> Segment:
        """The first segment of `pending`, which is longer than the limit."""
        highest = min(self._limit, len(self.pending) - self._least)
        lowest = max(self._least, self._limit // 2)
        pause = self._pause(highest) if self._half else None
        if pause is not None or not self._half:
            cut = lowest + _quietest(self.pending[lowest:highest]) if pause is None else pause
            return self._segment(cut, 0)
        highest = max(lowest + 1, min(highest, self._limit - self._half))
        return self._segment(lowest + _quietest(self.pending[lowest:highest]), self._half)

    def place(self) -> int:
        """Where to cut `pending`, which is longer than the limit, if nothing is to be shared."""
        highest = max(1, min(self._limit, len(self.pending) - self._least))
        pause = self._pause(highest)
        if pause is not None:
            return pause
        lowest = min(max(self._least, self._limit // 2), highest - 1)
        return lowest + _quietest(self.pending[lowest:highest])

    def rest(self) -> Segment:
        """All of `pending`."""
        return self._segment(len(self.pending), 0)

    def _segment(self, cut: int, shared: int) -> Segment:
        """`pending` up to its sample `cut`, which both neighbours get `shared` samples around."""
        start, end = self.position + self._before, self.position + cut
        wave = self.pending[: cut + shared].clone()
        made = Segment(
            wave,
            start / SAMPLE_RATE,
            end / SAMPLE_RATE,
            self._before / SAMPLE_RATE,
            shared / SAMPLE_RATE,
        )
        self.pending = self.pending[cut - shared :]
        self.position, self._before = end - shared, shared
        return made

    def _pause(self, highest: int) -> int | None:
        """Middle of the longest pause in the last three quarters of what fits; of those that are
        long enough, the last."""
        energy = _energy(self.pending[: self._limit])
        quiet = (energy < SILENCE) | (energy < energy.max() * 10 ** (-PAUSE_DECIBELS / 10))
        lowest = max(self._least, 2 * self._before, self._limit // 4) // HOP_SAMPLES
        windows = quiet[lowest : max(0, highest - PAUSE_SAMPLES) // HOP_SAMPLES + 1]
        middle = _longest_run(windows)
        return None if middle is None else (lowest + middle) * HOP_SAMPLES + PAUSE_SAMPLES // 2


def _longest_run(quiet: torch.Tensor) -> int | None:
    """Middle of the (last) longest run of True in `quiet` (T,) that is a pause."""
    edges = torch.diff(quiet.int(), prepend=torch.zeros(1).int(), append=torch.zeros(1).int())
    starts, ends = (edges == 1).nonzero()[:, 0], (edges == -1).nonzero()[:, 0]
    lengths = ((ends - starts) * HOP_SAMPLES + PAUSE_SAMPLES).clamp(max=LONG_PAUSE)
    if not len(lengths) or int(lengths.max()) < LONGEST_CLOSURE:
        return None
    longest = len(lengths) - 1 - int(lengths.flip(0).argmax())
    return int(starts[longest] + ends[longest]) // 2


def _energy(wave: torch.Tensor) -> torch.Tensor:
    """Mean square of each window of PAUSE_SAMPLES of `wave`, HOP_SAMPLES apart."""
    return F.avg_pool1d(wave.square()[None], PAUSE_SAMPLES, stride=HOP_SAMPLES)[0]


def _quietest(wave: torch.Tensor) -> int:
    """Middle of the (last) window of `wave` with the least energy."""
    window = min(PAUSE_SAMPLES, len(wave))
    if window == 0:
        return 0
    energy = F.avg_pool1d(wave.square()[None], window, stride=HOP_SAMPLES)[0]
    last = len(energy) - 1 - int(energy.flip(0).argmin())
    return last * HOP_SAMPLES + window // 2
