"""Where the recordings of a file begin and end, by its bytes alone: nothing is decoded.

Files get joined (`cat a.mp3 b.mp3`), cut off by a full disk or a lost connection, written into a
pipe that cannot go back to fill in how long they became, and preceded by zeros. Decoders stop at
the first end they meet and say nothing of it; here is what they do not look at.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from mmrag.storage import Positioned

OPEN_ENDED = 0x7FFF0000
"""A size from here on, in a file that is smaller, is what programs write that cannot know it."""
FLAC_STARTS = (b"fLaC\x00\x00\x00\x22", b"fLaC\x80\x00\x00\x22")
"""A stream's marker and the header of its first block."""
ZEROS = 64
"""So many zeros in front are no header of anything, and are passed over."""
BLOCK = 2**20


class Slice(Positioned):
    """Bytes `start` to `end` of an open file, as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, end: int) -> None:
        super().__init__()
        self._file, self._start, self.size = file, start, end - start

    def readinto(self, buffer: bytearray) -> int:
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self.size - self._position))
        self._file.seek(self._start + self._position)
        data = self._file.read(wanted)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def at(self, position: int, size: int) -> bytes:
        """`size` bytes from `position`, fewer at the end."""
        self.seek(position)
        return self.read(size)

    def copy(self) -> Slice:
        """The same bytes with a position of their own: a library takes nobody's but its own."""
        return self.cut(0, self.size)

    def cut(self, start: int, end: int) -> Slice:
        """A part of this slice."""
        return Slice(self._file, self._start + start, self._start + end)


@dataclass(frozen=True)
class Recording:
    """One recording of a file."""

    data: Slice
    measured: bool = True
    """False where the header leaves open how long it is."""
    missing: float = 0.0
    """Bytes of sound that the header states and the file lacks, over those that are there."""
    flaw: str | None = None
    """What is wrong with it that no decoder reports."""


def recordings(file: BinaryIO) -> list[Recording]:
    """The recordings of an open file, in order; a format that is not known here is one."""
    size = file.seek(0, io.SEEK_END)
    whole = Slice(file, 0, size)
    whole = whole.cut(_zeros(whole), size)
    start = whole.at(0, 12)
    if start[:4] == b"OggS":
        return list(_ogg(whole))
    if start[:4] == b"fLaC":
        return list(_flac(whole))
    if start[:4] == b"RIFF" and start[8:] == b"WAVE":
        return list(_chunks(whole, "<", b"data", b"WAVE"))
    if start[:4] == b"FORM" and start[8:] in (b"AIFF", b"AIFC"):
        return list(_chunks(whole, ">", b"SSND", start[8:]))
    if start[:4] == b".snd":
        return [_au(whole)]
    return [Recording(whole)]


def xing_frames(data: Slice) -> int | None:
    """Frames that an MP3's Xing or Info header states; None without one."""
    position = 0
    while (tag := data.at(position, 10))[:3] == b"ID3" and len(tag) == 10:
        high, middle, low, last = tag[6:10]
        position += 10 + (high << 21 | middle << 14 | low << 7 | last)
    head = data.at(position, 512)
    found = [at for at in (head.find(b"Xing"), head.find(b"Info")) if at >= 0]
    if not found or len(head) < found[0] + 12 or not head[found[0] + 7] & 1:
        return None
    return int.from_bytes(head[found[0] + 8 : found[0] + 12], "big")


def _zeros(data: Slice) -> int:
    """How many zeros stand in front, if that is no header."""
    position = 0
    while block := data.at(position, BLOCK):
        rest = block.lstrip(b"\0")
        position += len(block) - len(rest)
        if rest:
            break
    return position if ZEROS <= position < data.size else 0


def _ogg(data: Slice) -> Iterator[Recording]:
    """A link of the chain each: it begins where streams begin after others have had their say."""
    start = position = 0
    opening, flaw = True, None
    expected: dict[int, int] = {}
    while position < data.size:
        header = data.at(position, 27)
        if header[:4] != b"OggS"[: len(header)]:
            following = _find(data, (b"OggS\x00",), position)
            if following is None:
                break  # a tag that some program hung on
            flaw, position = "a part of it is damaged", following
            continue
        segments = data.at(position + 27, header[26]) if len(header) == 27 else b""
        end = position + 27 + len(segments) + sum(segments)
        if len(header) < 27 or len(segments) < header[26] or end > data.size:
            flaw = flaw or "its last page is cut off"
            break
        begins = bool(header[5] & 2)
        if begins and not opening:
            yield Recording(data.cut(start, position), flaw=flaw)
            start, flaw, expected = position, None, {}
        opening = begins
        serial, page = struct.unpack_from("<II", header, 14)
        if not begins and expected.get(serial, page) != page:
            flaw = "pages of it are missing"
        expected[serial] = page + 1
        position = end
    yield Recording(data.cut(start, data.size), flaw=flaw)


def _flac(data: Slice) -> Iterator[Recording]:
    start = 0
    while start is not None:
        following = _find(data, FLAC_STARTS, start + 4)
        samples = int.from_bytes(data.at(start + 21, 5), "big") & 0xFFFFFFFFF
        end = data.size if following is None else following
        yield Recording(data.cut(start, end), measured=samples > 0)
        start = following


def _chunks(data: Slice, order: str, sound: bytes, form: bytes) -> Iterator[Recording]:
    """WAV and AIFF: chunks of an id, a size and as many bytes (and one more, if odd)."""
    start, position, measured, missing = 0, 12, True, 0.0
    while len(head := data.at(position, 8)) == 8:
        size, left = struct.unpack(f"{order}I", head[4:])[0], data.size - position - 8
        if head[:4] in (b"RIFF", b"FORM") and data.at(position + 8, 4) == form:
            yield Recording(data.cut(start, position), measured, missing)
            start, position, measured, missing = position, position + 12, True, 0.0
            continue
        if head[:4] == sound:
            if size == 0 and left > 0 and not _chunk_follows(data, position + 8):
                measured = False
            elif OPEN_ENDED > size > left:
                missing = (size - left) / max(left, 1)
            if not measured or size > left:
                break  # the sound goes on to the end
        position += 8 + size + size % 2
    yield Recording(data.cut(start, data.size), measured, missing)


def _chunk_follows(data: Slice, position: int) -> bool:
    """Whether a chunk begins there: an id in letters, and no more bytes than the file has."""
    head = data.at(position, 8)
    size = min(int.from_bytes(head[4:], order) for order in ("little", "big"))
    return head[:4].isalnum() and size <= data.size - position - 8


def _au(data: Slice) -> Recording:
    offset, size = struct.unpack(">II", data.at(4, 8).ljust(8, b"\0"))
    left = data.size - offset
    short = OPEN_ENDED > size > left
    return Recording(data, missing=(size - left) / max(left, 1) if short else 0.0)


def _find(data: Slice, patterns: tuple[bytes, ...], position: int) -> int | None:
    """Where one of `patterns`, of equal length, next stands."""
    overlap = len(patterns[0]) - 1
    while block := data.at(position, BLOCK):
        found = [at for pattern in patterns if (at := block.find(pattern)) >= 0]
        if found:
            return position + min(found)
        if len(block) <= overlap:
            return None
        position += len(block) - overlap
    return None
