"""Audio in: a path or bytes in any common format to mono float32 at 16 kHz.

Everything is decoded as a stream of blocks, so a two-hour recording takes no more memory than a
short one until somebody asks for all of it. A header is checked before anything is decoded, and
a file that decodes to less than its header promises is an error, never a shorter clip. (Two
exceptions that libsndfile hides: a truncated WAV or AIFF is read as the samples it has, and a
variable-rate MP3 without a Xing header as the length estimated from its first frames.)

Knows nothing of units, transcripts or where the audio came from.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import soundfile
import torch
from torch.nn import functional as F
from torchaudio.transforms import Resample

SAMPLE_RATE = 16_000
"""Samples a second of every wave that leaves this module."""

SUFFIXES = frozenset(
    {".aif", ".aiff", ".au", ".caf", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".w64", ".wav"}
)
"""File names that `find` takes for audio; `read` goes by content."""

BLOCK_SECONDS = 8
MAX_CHANNELS = 32
LOWEST_RATE, HIGHEST_RATE = 1_000, 384_000
LARGEST_FILTER = 2**24
"""Coefficients of the resampling filter. Rates with next to no factor in common with 16 kHz
(15,999 Hz) would need billions; every rate in real use needs a small fraction of this."""
PAUSE_SAMPLES = SAMPLE_RATE // 10
"""Width of the window whose energy decides where to cut: a pause, not a stop consonant."""
HOP_SAMPLES = SAMPLE_RATE // 100


class AudioError(ValueError):
    """Audio that cannot be used; the message names the path (or "uploaded audio") and why."""


@dataclass(frozen=True)
class Segment:
    """A part of a longer recording: `wave` (T,) at 16 kHz, `start` and `end` in seconds."""

    wave: torch.Tensor
    start: float
    end: float


def find(directory: Path | str) -> list[Path]:
    """Every audio file below `directory`, sorted; hidden files are passed over.

    Raises AudioError if there is no such directory, or no audio in it.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise AudioError(f"{directory}: no such directory")
    found = sorted(
        path
        for path in directory.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not found:
        raise AudioError(f"{directory}: holds no audio file ({', '.join(sorted(SUFFIXES))})")
    return found


def duration(source: Path | str | bytes) -> float:
    """Seconds of audio, from the header alone. Raises AudioError if there is no valid header."""
    with _open(source) as file:
        return file.frames / file.samplerate


def extent(source: Path | str | bytes) -> tuple[float, int]:
    """Seconds of audio and samples a second over all channels, from the header alone.

    Raises AudioError as `duration` does.
    """
    with _open(source) as file:
        return file.frames / file.samplerate, file.samplerate * file.channels


def read(
    source: Path | str | bytes, *, min_seconds: float = 0.0, max_seconds: float | None = None
) -> torch.Tensor:
    """The whole of `source` as a mono wave (T,) float32 at 16 kHz.

    Raises AudioError if `source` is missing, not audio, truncated, holds NaN or infinity, or if
    its header states a length outside the limits (nothing is decoded then).
    """
    with _open(source) as file:
        _check_length(source, file, min_seconds, max_seconds)
        return torch.cat(list(_resampled(_blocks(source, file), file.samplerate)))


def segments(
    source: Path | str | bytes, max_seconds: float, min_seconds: float = 0.1
) -> Iterator[Segment]:
    """Cut `source` at its quietest places into segments of `min_seconds` to `max_seconds`.

    The cut falls in the second half of what still fits, where a tenth of a second has the least
    energy (of equals the latest). Audio within the limit is one segment. Concatenated, the
    segments are `read(source)` sample for sample, at any input rate: resampling is streamed too,
    and at no time is more than about `max_seconds + min_seconds` plus three blocks in memory.

    Raises AudioError as `read` does, truncation and NaN only when they are met; ValueError if
    `min_seconds` is more than half of `max_seconds`, which would leave nowhere to cut.
    """
    limit, least = int(max_seconds * SAMPLE_RATE), math.ceil(min_seconds * SAMPLE_RATE)
    if limit < 2 * PAUSE_SAMPLES or 2 * least > limit:
        raise ValueError(
            f"cannot cut segments of {min_seconds} to {max_seconds} s: the longest must be at "
            f"least 0.2 s and twice the shortest"
        )
    with _open(source) as file:
        _check_length(source, file, min_seconds, None)
        start, pending = 0, torch.empty(0)
        for block in _resampled(_blocks(source, file), file.samplerate):
            pending = torch.cat([pending, block])
            while len(pending) > limit + least:  # what follows the cut is long enough, too
                segment, pending = _split(pending, limit, least, start)
                start += len(segment.wave)
                yield segment
        while len(pending) > limit:
            segment, pending = _split(pending, limit, least, start)
            start += len(segment.wave)
            yield segment
        yield Segment(pending, start / SAMPLE_RATE, (start + len(pending)) / SAMPLE_RATE)


def _split(wave: torch.Tensor, limit: int, least: int, start: int) -> tuple[Segment, torch.Tensor]:
    """Cut `wave`, longer than `limit` samples: its first segment, and the rest.

    `start` is the sample of the recording at which `wave` begins.
    """
    lowest, highest = max(least, limit // 2), min(limit, len(wave) - least)
    cut = lowest + _quietest(wave[lowest:highest])
    segment = Segment(wave[:cut].clone(), start / SAMPLE_RATE, (start + cut) / SAMPLE_RATE)
    return segment, wave[cut:]


def _quietest(wave: torch.Tensor) -> int:
    """Middle of the (last) window of `wave` with the least energy."""
    window = min(PAUSE_SAMPLES, len(wave))
    if window == 0:
        return 0
    energy = F.avg_pool1d(wave.square()[None], window, stride=HOP_SAMPLES)[0]
    last = len(energy) - 1 - int(energy.flip(0).argmin())
    return last * HOP_SAMPLES + window // 2


@contextmanager
def _open(source: Path | str | bytes) -> Iterator[soundfile.SoundFile]:
    """Open `source` and check what its header says of everything but the length wanted."""
    name = _name(source)
    if isinstance(source, bytes):
        if not source:
            raise AudioError(f"{name}: empty")
        handle: io.BytesIO | bytes = io.BytesIO(source)
    else:
        path = Path(source)
        if not path.exists():
            raise AudioError(f"{name}: no such file")
        if not path.is_file():
            raise AudioError(f"{name}: is not a file")
        if path.stat().st_size == 0:
            raise AudioError(f"{name}: the file is empty")
        handle = os.fsencode(path)  # soundfile would encode a name more strictly than we got it
    try:
        file = soundfile.SoundFile(handle)
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{name}: cannot be read as audio: {error.error_string}") from None
    except TypeError:  # soundfile's answer to a file named .raw
        raise AudioError(f"{name}: headerless audio does not say its sample rate") from None
    with file:
        _check_header(name, file)
        yield file


def _check_header(name: str, file: soundfile.SoundFile) -> None:
    rate = file.samplerate
    common = math.gcd(rate, SAMPLE_RATE)
    filter_size = (rate // common) * (SAMPLE_RATE // common)
    if not LOWEST_RATE <= rate <= HIGHEST_RATE or filter_size > LARGEST_FILTER:
        raise AudioError(f"{name}: a sample rate of {rate} Hz is not supported")
    if file.channels > MAX_CHANNELS:
        raise AudioError(f"{name}: {file.channels} channels, at most {MAX_CHANNELS} are supported")
    if file.frames == 0:
        raise AudioError(f"{name}: holds no samples")
    if file.frames >= 2**62:  # libsndfile's "unknown": a FLAC written into a pipe
        raise AudioError(f"{name}: the header does not say how long the audio is")


def _check_length(
    source: Path | str | bytes,
    file: soundfile.SoundFile,
    min_seconds: float,
    max_seconds: float | None,
) -> None:
    seconds = file.frames / file.samplerate
    if seconds < min_seconds:
        raise AudioError(f"{_name(source)}: {seconds:.3f} s, shorter than {min_seconds} s")
    if max_seconds is not None and seconds > max_seconds:
        raise AudioError(f"{_name(source)}: {seconds:.1f} s, longer than {max_seconds} s")


def _blocks(source: Path | str | bytes, file: soundfile.SoundFile) -> Iterator[torch.Tensor]:
    """Decode to mono blocks (T,) of `BLOCK_SECONDS`, the last one shorter, at the file's rate."""
    name, rate, decoded = _name(source), file.samplerate, 0
    while decoded < file.frames:
        where = f"after {decoded / rate:.1f} of {file.frames / rate:.1f} s"
        try:
            frames = file.read(BLOCK_SECONDS * rate, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            reason = error.error_string
            raise AudioError(f"{name}: truncated or broken {where}: {reason}") from None
        if len(frames) == 0:
            raise AudioError(f"{name}: truncated or broken {where}: nothing more to decode")
        block = torch.from_numpy(frames).mean(dim=1)
        if not block.isfinite().all():
            raise AudioError(f"{name}: NaN or infinite samples {where}")
        decoded += len(frames)
        yield block


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


def _name(source: Path | str | bytes) -> str:
    return "uploaded audio" if isinstance(source, bytes) else str(source)
