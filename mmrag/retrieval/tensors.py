"""Several arrays in one file, laid out as safetensors are, so that any tool for these opens it.

Eight bytes say how long the header is; the header, JSON, says of each array its type, its shape and
where it lies behind the header, and in `__metadata__` the digest of its contents. Wider types come
first, and so each array begins where its type may. The same arrays have one header and no other: a
header that is read is compared with the one that would have been written. Nothing here knows what
the arrays mean.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path

import numpy as np

from mmrag.retrieval.mapped import map_bytes

Array = tuple[np.dtype, tuple[int, ...]]
"""Type and shape."""
TYPES = {"F16": np.float16, "I32": np.int32, "I64": np.int64, "U64": np.uint64, "U8": np.uint8}
NAMES = {np.dtype(dtype): name for name, dtype in TYPES.items()}
DIGESTS = "__metadata__"
ALIGNMENT = 64
"""Bytes of which the header's end is a multiple."""
LONGEST = 1 << 16
"""Bytes of a header."""
HOLE = 4096
"""Bytes of zeros in a row that are left out of a file."""
BLOCK = 1 << 22
"""Bytes read at once."""


@dataclass(frozen=True)
class Header:
    """What a file says of its arrays."""

    arrays: dict[str, Array]
    starts: dict[str, int]
    """The byte of the file at which each begins."""
    size: int
    """Bytes of the whole file."""
    digests: dict[str, str]
    """Of the contents of arrays that do not change any more."""
    digest: str
    """Of the header itself, and so of all that `digests` covers."""

    def bytes_of(self, name: str) -> int:
        """How many bytes an array has."""
        dtype, shape = self.arrays[name]
        return math.prod(shape) * dtype.itemsize


@dataclass(frozen=True)
class Tensors:
    """The arrays of a file, mapped, and its header."""

    header: Header
    arrays: dict[str, np.ndarray]


def digest(parts: Iterable[bytes | np.ndarray]) -> str:
    """128 bits of BLAKE2b over contents, part after part, as hex digits."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(part)
    return found.hexdigest()


def write_tensors(
    path: Path,
    arrays: Mapping[str, Array],
    blocks: Callable[[str], Iterable[np.ndarray]],
    changing: Iterable[str] = (),
) -> Header:
    """Write a file and flush it: `blocks` gives the rows of an array, some after others, and is
    asked for one array at a time. Rows of zeros take no room where the file system allows.

    The arrays `changing` have no digest and may be written again (`overwrite`). ValueError for an
    array that has other rows than was said.
    """
    arrays = dict(sorted(arrays.items(), key=lambda one: -one[1][0].itemsize))
    sealed = [name for name in arrays if name not in set(changing)]
    digests = dict.fromkeys(sealed, digest([]))
    header = _header(_encoded(arrays, digests))  # digests are all as long
    with path.open("wb") as stream:
        stream.seek(header.size - sum(map(header.bytes_of, arrays)))
        for name, (dtype, shape) in arrays.items():
            read = hashlib.blake2b(digest_size=16)
            for rows in blocks(name):
                rows = np.ascontiguousarray(rows, dtype)
                read.update(rows)
                _write_rows(stream, rows)
            if stream.tell() != header.starts[name] + header.bytes_of(name):
                raise ValueError(f"{path}: the rows of {name} are not those of {dtype} {shape}")
            if name in digests:
                digests[name] = read.hexdigest()
        stream.truncate(header.size)  # rows of zeros at the end, too, are part of it
        stream.seek(0)
        stream.write(encoded := _encoded(arrays, digests))
        stream.flush()
        os.fsync(stream.fileno())
    return _header(encoded)


def overwrite(path: Path, name: str, values: np.ndarray) -> None:
    """Write a `changing` array of a file in its place, and flush it.

    Raises OSError and ValueError as `open_tensors` does, and ValueError for another type or shape.
    """
    with path.open("r+b", buffering=0) as stream:
        header = read_header(stream)
        if name in header.digests or header.arrays[name] != (values.dtype, values.shape):
            raise ValueError(f"{name} is not {values.dtype} {values.shape} that may change")
        stream.seek(header.starts[name])
        stream.write(values.tobytes())
        os.fdatasync(stream.fileno())  # neither size nor place are others


def open_tensors(path: Path) -> Tensors:
    """The arrays of a file, read-only; pages are read when they are touched.

    Raises OSError for a file that cannot be read or mapped, ValueError for one with another layout
    or size.
    """
    with path.open("rb", buffering=0) as stream:
        header = read_header(stream)
        contents = map_bytes(stream.fileno(), header.size)
    arrays = {}
    for name, (dtype, shape) in header.arrays.items():
        start = header.starts[name]
        part = contents[start : start + header.bytes_of(name)]
        arrays[name] = part.view(dtype).reshape(shape)
    return Tensors(header, arrays)


def read_header(stream: BufferedIOBase) -> Header:
    """The header of an open file, from its beginning; ValueError for one with another layout or
    size."""
    first = stream.read(HOLE)
    length = int.from_bytes(first[:8], "little")
    if len(first) < 8 or not 0 < length <= LONGEST:
        raise ValueError(f"its first bytes {first[:8].hex()} are not the length of a header")
    if len(first) < 8 + length:
        first += stream.read(8 + length - len(first))
    header = _header(first[: 8 + length])
    if (size := os.fstat(stream.fileno()).st_size) != header.size:
        raise ValueError(f"it has {size} bytes, not {header.size}")
    return header


def blocks_of(stream: BufferedIOBase, header: Header, name: str) -> Iterator[bytes]:
    """The bytes of an array, BLOCK at a time."""
    stream.seek(header.starts[name])
    left = header.bytes_of(name)
    while left and (block := stream.read(min(left, BLOCK))):
        left -= len(block)
        yield block


def _encoded(arrays: Mapping[str, Array], digests: Mapping[str, str]) -> bytes:
    """The header of these arrays, which lie one behind another."""
    fields: dict[str, dict] = {DIGESTS: dict(digests)}
    start = 0
    for name, (dtype, shape) in arrays.items():
        stop = start + math.prod(shape) * dtype.itemsize
        fields[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": (start, stop)}
        start = stop
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _header(encoded: bytes) -> Header:
    """What a header says; ValueError for one that is not just as `_encoded` writes it."""
    try:
        fields = json.loads(encoded[8:])
        digests = fields.pop(DIGESTS)
        arrays = {
            name: (np.dtype(TYPES[one["dtype"]]), tuple(one["shape"]))
            for name, one in fields.items()
        }
        widths = [dtype.itemsize for dtype, _ in arrays.values()]
        counts = all(type(n) is int and n >= 0 for _, shape in arrays.values() for n in shape)
        texts = all(isinstance(one, str) for one in digests.values())
        ordered = widths == sorted(widths, reverse=True)
        same = counts and texts and ordered and _encoded(arrays, digests) == encoded
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header is not one: {type(error).__name__} {error}") from None
    if not same:
        raise ValueError("its header is not one that is written here")
    starts, start = {}, len(encoded)
    for name, (dtype, shape) in arrays.items():
        starts[name] = start
        start += math.prod(shape) * dtype.itemsize
    return Header(arrays, starts, start, digests, digest([encoded]))


def _write_rows(stream: BufferedIOBase, rows: np.ndarray) -> None:
    """Write rows (M, …); HOLE bytes of zeros and more in a row are skipped."""
    if rows.nbytes < HOLE:
        stream.write(rows)
        return
    empty = np.zeros(len(rows) + 2, bool)
    empty[1:-1] = ~rows.reshape(len(rows), -1).view(np.uint8).any(axis=1)  # -0.0 is no zero here
    edges = np.flatnonzero(empty[1:] != empty[:-1]).reshape(-1, 2)
    width, written = rows.nbytes // len(rows), 0
    for first, last in edges[(edges[:, 1] - edges[:, 0]) * width >= HOLE].tolist():
        stream.write(rows[written:first])
        stream.seek((last - first) * width, os.SEEK_CUR)
        written = last
    stream.write(rows[written:])
