"""Audio in: a path or bytes in any common format to mono float32 at 16 kHz.

Everything is decoded as a stream of blocks, so a two-hour recording takes no more memory than a
short one until somebody asks for all of it, or of a span of it. A header that states a length is
checked before anything is decoded, and a file that decodes to less is an error, never a shorter
clip. A file that is several recordings joined is all of them. (What no header states cannot be
missed: a truncated MP3 without a Xing header, AMR or ADTS is heard as far as its last whole frame.)

Channels are averaged. Where they cancel each other (one of two wired the wrong way round), which
would leave silence, the loudest of them is taken from there on.

Knows nothing of units, transcripts or where the audio came from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from torchaudio.transforms import Resample

from mmrag.folders import printable, walk
from mmrag.records import Rejection, Utterance
from mmrag.speech.decoders import AudioError, Decoder, Source, named, opened
from mmrag.storage import Location, Url, located

SAMPLE_RATE = 16_000
"""Samples a second of every wave that leaves this module."""

SUFFIXES = frozenset(
    {
        *(".3gp", ".3gpp", ".aac", ".aif", ".aiff", ".amr", ".au", ".awb", ".caf", ".flac", ".m4a"),
        *(".mka", ".mov", ".mp3", ".mp4", ".oga", ".ogg", ".opus", ".w64", ".wav", ".weba"),
        ".webm",
    }
)
"""File names that `find` takes for audio; `read` goes by content."""

MAX_CHANNELS = 32
LOWEST_RATE, HIGHEST_RATE = 1_000, 384_000
LARGEST_FILTER = 2**24
"""Coefficients of the resampling filter. Rates with next to no factor in common with 16 kHz
(15,999 Hz) would need billions; every rate in real use needs a small fraction of this."""
CANCELLED = 0.05
"""Energy of the channels' mean over the mean of their energies, below which they cancel each other.
It is 1/2 for two unrelated channels and 0 for a channel and its negative."""
SPAN_SLACK = 0.1
"""Seconds by which a stated length may differ from the decoded one: so much do tools disagree about
a compressed file."""


@dataclass(frozen=True)
class Span:
    """What is wanted of a recording: `seconds` from second `start` on, or all the rest.

    `seconds` without a `start` is what somebody says of the recording as a whole: it is read whole
    if it is as long (give or take SPAN_SLACK), and as far as that if it is longer.
    """

    start: float | None = None
    seconds: float | None = None

    @property
    def first(self) -> int:
        """Its first sample at 16 kHz."""
        return round((self.start or 0.0) * SAMPLE_RATE)

    @property
    def last(self) -> int | None:
        """The sample that follows its last one; None at the recording's end."""
        if self.seconds is None:
            return None
        return round(((self.start or 0.0) + self.seconds) * SAMPLE_RATE)

    @property
    def enough(self) -> float:
        """The sample up to which a recording has to be read."""
        if self.last is None:
            return math.inf
        return self.last + (SPAN_SLACK * SAMPLE_RATE if self.start is None else 0)

    def cut(self, wave: torch.Tensor, position: int) -> torch.Tensor:
        """The span of a wave that begins at sample `position` and reaches to `enough` or to the
        recording's end."""
        ends = position + len(wave)
        last = ends if self.last is None or ends < self.enough else self.last
        return wave[max(0, self.first - position) : max(0, last - position)]

    def check(self, name: str, total: float) -> None:
        """Raise AudioError if a recording of `total` seconds does not have it."""
        if self.start is None and self.seconds is None:
            return  # whatever there is
        start, seconds = self.start or 0.0, self.seconds or 0.0
        if start + seconds <= total + SPAN_SLACK and start < total:
            return
        if self.start is None:
            raise AudioError(f"{name}: is {total:.2f} s long, not {seconds:.2f} s as is said of it")
        wanted = (
            f"{start:.2f} s to {start + seconds:.2f} s" if self.seconds else f"{start:.2f} s on"
        )
        raise AudioError(f"{name}: {wanted} is wanted of it, but it ends after {total:.2f} s")


WHOLE = Span()


def span_of(utterance: Utterance) -> Span:
    """What an utterance is of its recording."""
    return Span(utterance.offset, utterance.duration)


def find(directory: Location | str) -> tuple[list[Location], list[Rejection]]:
    """Every audio file below `directory`, sorted, and what cannot be used: folders that cannot be
    listed, links that lead nowhere, names that are not UTF-8 (no transcript could name them).

    Links to folders are followed; hidden files are passed over. Raises AudioError if there is no
    such directory, or no audio in it.
    """
    directory = located(directory)
    if not directory.is_dir():
        raise AudioError(f"{printable(directory)}: no such directory")
    found, rejected = (_listed if isinstance(directory, Url) else _walked)(directory)
    if not found and not rejected:
        suffixes = ", ".join(sorted(SUFFIXES))
        raise AudioError(f"{printable(directory)}: holds no audio file ({suffixes})")
    return sorted(found), rejected


def _walked(directory: Path) -> tuple[list[Location], list[Rejection]]:
    found, rejected = [], []
    for path in walk(directory):
        if isinstance(path, Rejection):
            rejected.append(path)
        elif _named_audio(path):
            reason = _unusable(path, directory)
            if reason is None:
                found.append(path)
            elif reason:
                rejected.append(Rejection(printable(path), reason))
    return found, rejected


def _listed(folder: Url) -> tuple[list[Location], list[Rejection]]:
    names, unsound = folder.listing()
    reason = "its name could not be a file's: rename it"
    return [one for one in map(folder.__truediv__, names) if _named_audio(one)], [
        Rejection(f"{folder}/{name!r:.200}", reason) for name in unsound
    ]


def _named_audio(path: Location) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _unusable(path: Path, directory: Path) -> str | None:
    """Why a file below `directory` cannot be used, if it cannot; nothing is said of no file."""
    try:
        str(path.relative_to(directory)).encode()
        if path.is_file():
            return None
        return f"a link to {printable(path.readlink())}, which is not there" * path.is_symlink()
    except UnicodeEncodeError:
        return "its name is not UTF-8: rename it"
    except OSError as error:
        return f"cannot be looked at: {error.strerror}"


def duration(source: Source, enough: float = math.inf) -> float:
    """Seconds of audio: by the header where that can be relied on, else by decoding, as far as
    `enough` seconds and no further. Raises AudioError if it cannot be read."""
    return extent(source, enough)[0]


def extent(source: Source, enough: float = math.inf) -> tuple[float, int]:
    """Seconds of audio, as `duration` does, and samples a second over all channels.

    Raises AudioError as `duration` does.
    """
    with opened(source) as decoders:
        _check_headers(named(source), decoders)
        seconds = 0.0
        for decoder in decoders:
            if seconds <= enough:
                seconds += decoder.seconds(enough - seconds)
        return seconds, max(decoder.rate * decoder.channels for decoder in decoders)


def stated(source: Source) -> float | None:
    """Seconds of audio by the header; None if only decoding tells. Raises AudioError if it cannot
    be opened."""
    with opened(source) as decoders:
        return _total(decoders)


def read(
    source: Source,
    span: Span = WHOLE,
    *,
    min_seconds: float = 0.0,
    max_seconds: float | None = None,
) -> torch.Tensor:
    """The whole of `source`, or a span of it, as a mono wave (T,) float32 at 16 kHz.

    A span is cut out of the whole wave, sample for sample. Raises AudioError if `source` is
    missing, not audio, broken off, shorter than the span, holds NaN or infinity, or has a length
    outside the limits (nothing is decoded then if its header states it).
    """
    [wave] = spans(source, [span], min_seconds=min_seconds, max_seconds=max_seconds)
    if isinstance(wave, AudioError):
        raise wave
    return wave


def spans(
    source: Source,
    wanted: Sequence[Span],
    *,
    min_seconds: float = 0.0,
    max_seconds: float | None = None,
) -> list[torch.Tensor | AudioError]:
    """Several spans of one recording, in one pass; what `read` would raise for each that fails.

    Raises AudioError if `source` cannot even be opened.
    """
    results: list[torch.Tensor | AudioError] = [AudioError("not read")] * len(wanted)
    name = named(source)
    with opened(source) as decoders:
        _check_headers(name, decoders)
        total, passed = _total(decoders), []
        for number, span in enumerate(wanted):
            try:
                _check_length(name, total, span, min_seconds, max_seconds)
                passed.append(number)
            except AudioError as error:
                results[number] = error
        passed.sort(key=lambda number: wanted[number].first)
        if passed:
            window = _Window(name, decoders, wanted[passed[0]], max_seconds)
        for number in passed:
            try:
                wave = window.of(wanted[number])
                _check_samples(name, len(wave), min_seconds, max_seconds)
                results[number] = wave
            except AudioError as error:
                results[number] = error
    return results


def blocks(
    source: Source, span: Span = WHOLE, *, min_seconds: float = 0.0
) -> Iterator[torch.Tensor]:
    """What `read` gives, piece by piece (T,), at any input rate: resampling is streamed, too, and
    no more than three blocks of the decoder's are in memory.

    Raises AudioError as `read` does, truncation and NaN only when they are met.
    """
    name, samples = named(source), 0
    with opened(source) as decoders:
        _check_headers(name, decoders)
        _check_length(name, _total(decoders), span, min_seconds, None)
        for block in _Window(name, decoders, span).stream(span):
            samples += len(block)
            yield block
    _check_samples(name, samples, min_seconds, None)


class _Window:
    """What of a recording is in memory while spans of it are read, the earliest first."""

    def __init__(
        self,
        name: str,
        decoders: Sequence[Decoder],
        first: Span,
        max_seconds: float | None = None,
    ) -> None:
        """Begins before the span `first`; a span may not turn out longer than `max_seconds`."""
        self._name, self._ended = name, False
        self._limit = math.inf if max_seconds is None else max_seconds * SAMPLE_RATE
        # A second before is more than the resampling filter reaches, and a whole number of samples.
        seekable = len(decoders) == 1 and decoders[0].frames is not None
        skipped = max(0, first.first // SAMPLE_RATE - 1) if seekable else 0
        self._position = skipped * SAMPLE_RATE
        self._held: list[torch.Tensor] = []
        self._end = self._position
        self._blocks = _waves(name, decoders, skipped)
        self._failed: AudioError | None = None
        """What ended the blocks, and so fails every later span."""

    def of(self, span: Span) -> torch.Tensor:
        """A span that begins no earlier than those before it."""
        self._forget(span.first)
        while not self._ended and self._end < span.enough:
            self._next()
            self._forget(span.first)
            if span.last is None and self._end - span.first > self._limit:
                seconds = self._limit / SAMPLE_RATE  # no need to know by how much
                raise AudioError(f"{self._name}: longer than {seconds} s")
        if self._ended:
            span.check(self._name, self._end / SAMPLE_RATE)
        held = torch.cat(self._held) if self._held else torch.empty(0)
        self._held = [held]
        return span.cut(held, self._position)

    def stream(self, span: Span) -> Iterator[torch.Tensor]:
        """The same, block by block."""
        while not self._ended and self._end < span.enough:
            self._next()
            self._forget(span.first)
            # What lies between `last` and `enough` belongs to the span if the recording ends there.
            sure = self._end if span.last is None else min(self._end, span.last)
            if sure > self._position and self._end > span.first:
                held = torch.cat(self._held)
                piece = held[max(0, span.first - self._position) : sure - self._position]
                self._held, self._position = [held[sure - self._position :]], sure
                yield piece
        if self._ended:
            span.check(self._name, self._end / SAMPLE_RATE)
            if self._held:
                yield span.cut(torch.cat(self._held), self._position)

    def _next(self) -> None:
        if self._failed is not None:
            raise self._failed
        try:
            block = next(self._blocks, None)
        except AudioError as error:
            self._failed = error
            raise
        if block is None:
            self._ended = True
        else:
            self._held.append(block)
            self._end += len(block)

    def _forget(self, before: int) -> None:
        while self._held and self._position + len(self._held[0]) <= before:
            self._position += len(self._held.pop(0))


def _check_headers(name: str, decoders: Sequence[Decoder]) -> None:
    for decoder in decoders:
        _check_rate(name, decoder.rate)
        if decoder.channels > MAX_CHANNELS:
            most = f"at most {MAX_CHANNELS} are supported"
            raise AudioError(f"{name}: {decoder.channels} channels, {most}")


def _check_rate(name: str, rate: int) -> None:
    common = math.gcd(rate, SAMPLE_RATE)
    filter_size = (rate // common) * (SAMPLE_RATE // common)
    if not LOWEST_RATE <= rate <= HIGHEST_RATE or filter_size > LARGEST_FILTER:
        raise AudioError(f"{name}: a sample rate of {rate} Hz is not supported")


def _total(decoders: Sequence[Decoder]) -> float | None:
    """Seconds of all recordings; None if only decoding tells."""
    if any(decoder.frames is None for decoder in decoders):
        return None
    return sum(decoder.frames / decoder.rate for decoder in decoders)


def _check_length(
    name: str, total: float | None, span: Span, min_seconds: float, max_seconds: float | None
) -> None:
    """What can be said before anything is decoded."""
    if total is not None:
        span.check(name, total)
    seconds = span.seconds
    if total is not None:
        rest = total - (span.start or 0.0)
        seconds = rest if seconds is None else min(rest, seconds)
    if seconds is not None:
        _check_samples(name, seconds * SAMPLE_RATE, min_seconds, max_seconds)


def _check_samples(
    name: str, samples: float, min_seconds: float, max_seconds: float | None
) -> None:
    seconds = samples / SAMPLE_RATE
    if seconds < min_seconds:
        raise AudioError(f"{name}: {seconds:.3f} s, shorter than {min_seconds} s")
    if max_seconds is not None and seconds > max_seconds:
        raise AudioError(f"{name}: {seconds:.1f} s, longer than {max_seconds} s")


def _waves(name: str, decoders: Sequence[Decoder], skipped: int) -> Iterator[torch.Tensor]:
    """Everything from second `skipped` on as blocks at 16 kHz."""
    for rate, run in groupby(_mono(name, decoders, skipped), key=itemgetter(0)):
        _check_rate(name, rate)
        yield from _resampled((block for _, block in run), rate)


def _mono(
    name: str, decoders: Sequence[Decoder], skipped: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Samples a second and mono blocks (T,), the recordings one after the other."""
    for decoder in decoders:
        loudest, seconds = None, float(skipped)
        with closing(decoder.blocks(skipped * decoder.rate)) as blocks:
            for rate, samples in blocks:
                if not np.isfinite(samples).all():
                    raise AudioError(f"{name}: NaN or infinite samples after {seconds:.1f} s")
                seconds += len(samples) / rate
                channels = torch.from_numpy(samples)
                if channels.shape[1] == 1:
                    yield rate, channels[:, 0]
                    continue
                if loudest is None and _cancel(channels):
                    loudest = int(channels.square().sum(0).argmax())
                within = loudest is not None and loudest < channels.shape[1]
                yield rate, channels[:, loudest].clone() if within else channels.mean(dim=1)


def _cancel(channels: torch.Tensor) -> bool:
    """Whether the mean of channels (T, C) loses what is in them."""
    if channels.shape[1] == 1:
        return False
    apart = channels.square().mean()
    return bool(apart > 0 and channels.mean(dim=1).square().mean() < CANCELLED * apart)


def _resampled(blocks: Iterator[torch.Tensor], rate: int) -> Iterator[torch.Tensor]:
    """Resample a stream of blocks to 16 kHz, as if it were resampled as a whole.

    Each block is resampled between a second of what comes before and a second of what comes
    after, far more than the filter reaches; a second is a whole number of samples at both rates,
    so the filter's phase stays.
    """
    if rate == SAMPLE_RATE:
        yield from blocks
        return
    resample = Resample(rate, SAMPLE_RATE)
    pending, before = torch.empty(0), 0  # `before` seconds of `pending` have been yielded
    for block in blocks:
        pending = torch.cat([pending, block])
        until = len(pending) // rate - 1
        if until > before:
            yield resample(pending)[before * SAMPLE_RATE : until * SAMPLE_RATE]
            pending, before = pending[(until - 1) * rate :], 1
    yield resample(pending)[before * SAMPLE_RATE :]
