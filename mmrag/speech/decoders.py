"""Encoded sound to samples, block by block: libsndfile for what is measured, FFmpeg for the rest.

libsndfile (soundfile) decodes WAV, FLAC, AIFF, AU, CAF and Ogg to the bit and to the sample.
FFmpeg's libraries (PyAV, whose wheels bring them) decode what browsers and phones record, MP3, and
what was written into a pipe. What a header claims is never trusted over what is decoded: less is
an error that says how much there was, more is heard.

A file from a stranger is opened by content alone, as one of FORMATS with one of CODECS: FFmpeg
also knows playlists, which name other files and addresses to be read.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

import numpy as np
import soundfile

from mmrag.folders import printable
from mmrag.speech import containers
from mmrag.speech.containers import Recording, Slice
from mmrag.storage import StorageError, Url

if TYPE_CHECKING:
    import av
    from av.container import InputContainer

FORMATS = "matroska,webm,mov,mp3,aac,amr,amrnb,amrwb,flac,wav,caf,ogg"
CODECS = frozenset(
    {
        *("aac", "alac", "amrnb", "amrwb", "flac", "mp3", "mp3float", "opus", "vorbis"),
        *("pcm_alaw", "pcm_mulaw", "pcm_u8", "pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_f32le"),
        *("pcm_f64le", "pcm_s16be", "pcm_s24be", "pcm_s32be", "pcm_f32be", "pcm_f64be"),
    }
)
OPTIONS = {
    "format_whitelist": FORMATS,
    "codec_whitelist": ",".join(sorted(CODECS)),
    "protocol_whitelist": "none",
}
SELF_SYNCHRONISING = frozenset({"mp3", "aac"})
"""Formats without a container: what lies between the frames is for the decoder to find out."""
CLAIMING = frozenset({"matroska", "mov"})
"""Formats whose header states a length; of others FFmpeg's is a guess by the bit rate."""
TAGS = (b"ID3", b"TAG", b"APETAGEX", b"LYRICSBEGIN")
"""Words about an MP3, before, after and (where files were joined) between its frames."""
MP3_FRAMES_SLACK = 20
"""Frames of an MP3 that encoders count and decoders do not give back, or the other way round."""
CLAIM_SLACK = 0.25
"""Seconds by which a container's length may exceed that of what is in it."""
BLOCK_SECONDS = 8
UNKNOWN_FRAMES = 2**62
"""What libsndfile says of a length that it does not know; or more."""


class AudioError(ValueError):
    """Audio that cannot be used; the message names the path (or "uploaded audio") and why."""


class _Unreadable(AudioError):
    """Not even the container is known."""


class _Damaged(Exception):
    """Bytes that hold sound cannot be decoded; the message says why."""


class Decoder(Protocol):
    """One recording, opened, to be read once."""

    rate: int
    channels: int
    frames: int | None
    """Samples a channel; None if only decoding tells."""

    def blocks(self, start: int) -> Iterator[tuple[int, np.ndarray]]:
        """Samples a second and samples (T, C) float32, from sample `start`.

        Raises AudioError where the recording breaks off.
        """
        ...

    def seconds(self, enough: float) -> float:
        """How long it is; where only decoding tells, as far as `enough` and hardly further.

        Raises AudioError where the recording breaks off before.
        """
        ...


Source = Path | Url | str | bytes
"""A file, an object at a URL, or an upload's bytes."""


@contextmanager
def opened(source: Source) -> Iterator[list[Decoder]]:
    """The recordings of a file, an object or an upload; AudioError if there is none to decode.

    Raises StorageError if a storage does not answer, when that is noticed or at the end.
    """
    name = named(source)
    with ExitStack() as stack:
        if not isinstance(source, Url):
            file = stack.enter_context(_file(source, name))
            yield [_decoder(one, name, stack) for one in containers.recordings(file)]
            return
        watched = stack.enter_context(_object(source, name))
        try:
            yield [_decoder(one, name, stack) for one in containers.recordings(watched)]
        except AudioError:
            watched.check(name)
            raise
        watched.check(name)


def named(source: Source) -> str:
    """What a message calls it."""
    return "uploaded audio" if isinstance(source, bytes) else printable(source)


def _file(source: Path | str | bytes, name: str) -> BinaryIO:
    if isinstance(source, bytes):
        if not source:
            raise AudioError(f"{name}: empty")
        return io.BytesIO(source)
    path = Path(source)
    try:
        if path.is_symlink() and not path.exists():
            raise AudioError(f"{name}: a link to {printable(path.readlink())}, which is not there")
        if not path.exists():
            raise AudioError(f"{name}: no such file")
        if not path.is_file():  # a pipe would be waited for
            raise AudioError(f"{name}: is not a file")
        if path.stat().st_size == 0:
            raise AudioError(f"{name}: the file is empty")
        return path.open("rb")
    except AudioError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte in it
        reason = getattr(error, "strerror", None) or error
        raise AudioError(f"{name}: cannot be opened: {reason}") from None


def _object(url: Url, name: str) -> _Watched:
    """An object, opened; what is wrong with it alone is an AudioError."""
    try:
        file = _Watched(url.open())
        empty = not file.seek(0, io.SEEK_END)
    except StorageError:
        raise
    except OSError as error:
        raise AudioError(f"{name}: {error.strerror}") from None
    if empty:
        raise AudioError(f"{name}: the file is empty")
    return file


class _Watched:
    """An object that is read by libraries which take no exception for an answer: where it cannot be
    read it seems to end, and `check` tells."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._failure: OSError | None = None

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        if self._failure is None:
            try:
                return self._file.read(size)
            except OSError as error:
                self._failure = error
        return b""

    def check(self, name: str) -> None:
        """Raise what went wrong: StorageError, or AudioError for what is wrong with the object."""
        if isinstance(self._failure, StorageError):
            raise self._failure
        if self._failure is not None:
            raise AudioError(f"{name}: {self._failure.strerror}") from None


def _decoder(recording: Recording, name: str, stack: ExitStack) -> Decoder:
    """libsndfile's or FFmpeg's: whichever reads all of it."""
    sound, reason = _soundfile(recording, name)
    if sound is not None:
        stack.enter_context(sound)
        if sound.format != "MP3" and recording.measured and 0 < sound.frames < UNKNOWN_FRAMES:
            return _Measured(recording, sound, name)
    try:
        return _FFmpeg(recording, name, stack)
    except _Unreadable:
        if sound is None and reason:
            raise AudioError(f"{name}: {reason}") from None
        if sound is None or sound.format == "MP3":
            raise
    if sound.frames == 0 and not recording.flaw:
        raise AudioError(f"{name}: holds no samples")
    if sound.frames >= UNKNOWN_FRAMES:
        raise AudioError(f"{name}: the header does not say how long the audio is")
    return _Measured(recording, sound, name)


def _soundfile(recording: Recording, name: str) -> tuple[soundfile.SoundFile | None, str | None]:
    """The recording as libsndfile opens it; None if it cannot, and why if FFmpeg cannot either."""
    if recording.data.at(0, 3) == b"ID3" or _mpeg(recording.data.at(0, 2)):
        return None, None  # libsndfile would open an MP3, and stop short
    try:
        return soundfile.SoundFile(recording.data.copy()), None
    except soundfile.LibsndfileError as error:
        return None, f"cannot be read as audio: {error.error_string}"


def _mpeg(start: bytes) -> bool:
    return len(start) == 2 and start[0] == 0xFF and start[1] & 0xE0 == 0xE0


class _Measured:
    """A recording whose header says how long it is, decoded by libsndfile."""

    def __init__(self, recording: Recording, file: soundfile.SoundFile, name: str) -> None:
        self._recording, self._file, self._name = recording, file, name
        self.rate, self.channels = file.samplerate, file.channels
        # Of a damaged one only decoding tells.
        self.frames: int | None = None if recording.flaw else file.frames

    def seconds(self, enough: float) -> float:
        return self._file.frames / self.rate

    def blocks(self, start: int) -> Iterator[tuple[int, np.ndarray]]:
        if start or self._file.tell():
            self._file.seek(start)
        decoded, error = start, ""
        while decoded < self._file.frames:
            read: list[np.ndarray] = []
            try:
                if (block := self._whole_block(decoded)) is not None:
                    decoded += len(block)
                    yield self.rate, block
                    continue
                # A second at a time: with an error, libsndfile gives back nothing.
                while len(read) < BLOCK_SECONDS and decoded < self._file.frames:
                    read.append(self._file.read(self.rate, dtype="float32", always_2d=True))
                    decoded += len(read[-1])
                    if not len(read[-1]):
                        raise _Damaged("nothing more to decode")
            except soundfile.LibsndfileError as broken:
                error = broken.error_string
            except _Damaged as broken:
                error = str(broken)
            if read and len(read[0]):
                yield self.rate, np.concatenate(read)
            if error:
                whole = self._file.frames / self.rate
                raise _broken_off(self._name, decoded / self.rate, whole, error)
        seconds = decoded / self.rate
        if self._recording.missing:
            raise _broken_off(self._name, seconds, seconds * (1 + self._recording.missing))
        if self._recording.flaw:
            raise AudioError(f"{self._name}: {self._recording.flaw}: {seconds:.1f} s can be read")

    def _whole_block(self, start: int) -> np.ndarray | None:
        """The next samples (T, C), as many as a block has; None, and back at `start`, where it
        cannot be decoded whole."""
        wanted = min(BLOCK_SECONDS * self.rate, self._file.frames - start)
        with suppress(soundfile.LibsndfileError):
            samples = self._file.read(wanted, dtype="float32", always_2d=True)
            if len(samples) == wanted:
                return samples
        self._file.seek(start)
        return None


class _FFmpeg:
    """A recording of which only decoding tells how long it is, decoded by FFmpeg."""

    frames: int | None = None

    def __init__(self, recording: Recording, name: str, stack: ExitStack) -> None:
        self._recording, self._name = recording, name
        xing = containers.xing_frames(recording.data)
        self._container = stack.enter_context(_container(recording.data.copy(), name))
        streams = self._container.streams
        if not streams.audio:
            raise AudioError(f"{name}: holds no sound")
        self._stream = streams.best("audio") or streams.audio[0]
        context = self._stream.codec_context
        if context is None or context.name not in CODECS:
            codec = "an unknown codec" if context is None else context.name
            raise AudioError(f"{name}: its sound is coded as {codec}, which is not supported")
        self.rate, self.channels = context.sample_rate, context.channels
        self._format = self._container.format.name.partition(",")[0]
        self._xing = xing if self._format == "mp3" else None
        self._ends: dict[int, int] = {}

    def seconds(self, enough: float) -> float:
        counts: Counter[int] = Counter()  # samples by rate: a sum of seconds would round
        with closing(self._frames()) as frames:
            for frame in frames:
                counts[frame.sample_rate] += frame.samples
                if sum(count / rate for rate, count in counts.items()) > enough:
                    break
        return sum(count / rate for rate, count in counts.items())

    def blocks(self, start: int) -> Iterator[tuple[int, np.ndarray]]:
        pending: list[np.ndarray] = []
        rate = count = 0
        for frame in self._frames():
            samples = _samples(frame)
            samples, start = samples[start:], max(0, start - len(samples))
            kind = frame.sample_rate, samples.shape[1]
            full = count >= BLOCK_SECONDS * rate
            if pending and (full or kind != (rate, pending[0].shape[1])):
                yield rate, np.concatenate(pending)
                pending, count = [], 0
            if len(samples):
                rate, count = frame.sample_rate, count + len(samples)
                pending.append(samples)
        if pending:
            yield rate, np.concatenate(pending)

    def _frames(self) -> Iterator[av.AudioFrame]:
        """Every frame of the sound; AudioError where it breaks off."""
        seconds, count, claimed = 0.0, 0, self._claimed()
        try:
            for frame in self._decoded():
                count += 1
                yield frame
                seconds += frame.samples / frame.sample_rate
        except _Damaged as damaged:
            raise _broken_off(self._name, seconds, claimed, str(damaged)) from None
        if not count and not self._recording.flaw:
            raise AudioError(f"{self._name}: holds no samples")
        reached = [float(n * self._container.streams[i].time_base) for i, n in self._ends.items()]
        if claimed is not None and max([seconds, *reached]) < claimed - CLAIM_SLACK:
            raise _broken_off(self._name, seconds, claimed)
        if self._xing is not None and count < self._xing - MP3_FRAMES_SLACK:
            raise _broken_off(self._name, seconds, seconds / count * self._xing)
        if self._recording.flaw:
            raise AudioError(f"{self._name}: {self._recording.flaw}: {seconds:.1f} s can be read")

    def _decoded(self) -> Iterator[av.AudioFrame]:
        """Frame by frame; _Damaged where a packet is no frame and had to be one."""
        import av

        begun = hole = False
        for packet in self._packets():
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                between = _between_frames(bytes(packet))
                # What stands in front of the first frame is nobody's sound.
                if self._format not in SELF_SYNCHRONISING or (begun and between is None):
                    raise _Damaged(error.strerror) from None
                hole = begun and between == "zeros"
                continue
            if frames and hole:
                raise _Damaged("a part of it is all zeros")
            begun = begun or bool(frames)
            yield from frames

    def _packets(self) -> Iterator[av.Packet]:
        """The sound's packets. How far the others reach is seen, too: a container's length is that
        of its longest stream."""
        import av

        streams = [one for one in self._container.streams if one.type in ("audio", "video")]
        packets = self._container.demux(streams)
        while True:
            try:
                packet = next(packets, None)
            except av.FFmpegError as error:
                raise _Damaged(error.strerror) from None
            if packet is None:
                return
            if packet.pts is not None:
                number, end = packet.stream_index, packet.pts + (packet.duration or 0)
                self._ends[number] = max(end, self._ends.get(number, end))
            if packet.stream is self._stream:  # the last one of a stream has no index
                yield packet

    def _claimed(self) -> float | None:
        """Seconds that the header states, of all that the file holds."""
        if self._format not in CLAIMING or self._container.duration is None:
            return None
        return self._container.duration / 1e6


def _container(data: Slice, name: str) -> InputContainer:
    import av

    try:
        return av.open(data, metadata_errors="ignore", options=OPTIONS)
    except av.FFmpegError as error:
        raise _Unreadable(f"{name}: cannot be read as audio: {error.strerror}") from None


def _between_frames(data: bytes) -> str | None:
    """What bytes that are no frame are, if nobody has lost any sound by them."""
    rest = data.lstrip(b"\0")
    if not rest:
        return "zeros"
    return "tag" if rest.startswith(TAGS) else None


def _samples(frame: av.AudioFrame) -> np.ndarray:
    """A frame's samples (T, C) float32."""
    channels = frame.layout.nb_channels
    samples = frame.to_ndarray()
    samples = samples.T if frame.format.is_planar else samples.reshape(-1, channels)
    if samples.dtype.kind == "u":
        return (samples.astype(np.float32) - 128) / 128
    if samples.dtype.kind == "i":
        return samples.astype(np.float32) / np.float32(2 ** (8 * samples.dtype.itemsize - 1))
    return samples.astype(np.float32)


def _broken_off(
    name: str, seconds: float, claimed: float | None, why: str | None = None
) -> AudioError:
    of = "" if claimed is None or claimed <= seconds else f" of {claimed:.1f} s"
    return AudioError(f"{name}: breaks off after {seconds:.1f} s{of}{f': {why}' if why else ''}")
