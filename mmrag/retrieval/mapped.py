"""Arrays on disk as memory: mapped, without an open file each.

`numpy.memmap` stands on Python's `mmap`, which keeps a copy of the file's descriptor for as long as
the map lives. A datastore of a thousand segments would use up a process's descriptors, or open and
map its files again and again. The kernel needs no descriptor once a file is mapped, so the map is
made here by `mmap(2)` itself.
"""

from __future__ import annotations

import ctypes
import io
import math
import mmap
import os
from functools import lru_cache
from pathlib import Path

import numpy as np

_C = ctypes.CDLL(None, use_errno=True)
_C.mmap.restype = ctypes.c_void_p
_C.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_C.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED = ctypes.c_void_p(-1).value
HEADER = 128
"""Bytes that numpy writes before an array of one or two dimensions."""
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def open_array(path: Path) -> np.ndarray:
    """The array in an npy file, read-only; pages are read when they are touched.

    Raises OSError for a file that cannot be read or mapped, ValueError for one that is no npy file,
    holds Python objects or ends too early.
    """
    with path.open("rb", buffering=0) as stream:
        start, shape, by_column, dtype = _header(stream.read(HEADER))
        size = os.fstat(stream.fileno()).st_size
        stop = start + math.prod(shape) * dtype.itemsize
        if size < stop:
            raise ValueError(f"it ends after {size} of {stop} bytes")
        contents = map_bytes(stream.fileno(), stop)
    return contents[start:stop].view(dtype).reshape(shape, order="F" if by_column else "C")


def map_bytes(descriptor: int, size: int) -> np.ndarray:
    """The first `size` bytes (size,) uint8 of an open file, read-only; they stay mapped when it is
    closed. OSError for a file that cannot be mapped."""
    return np.asarray(_Map(descriptor, size))


@lru_cache(1024)
def _header(first: bytes) -> tuple[int, tuple[int, ...], bool, np.dtype]:
    """Where the contents begin, their shape, whether they lie by column, and their type; of the
    first HEADER bytes of an npy file. Segments of a size have the same."""
    stream = io.BytesIO(first)
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"npy format {version[0]}.{version[1]} is not read here")
    shape, by_column, dtype = _HEADERS[version](stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    return stream.tell(), shape, by_column, dtype


class _Map:
    """The first `size` bytes of a file; unmapped when no array looks into it any more."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._size = size
        self._address = _C.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if self._address == _FAILED:
            self._address = None
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self.__array_interface__ = {
            "data": (self._address, True),
            "shape": (size,),
            "typestr": "|u1",
            "version": 3,
        }

    def __del__(self) -> None:
        if self._address is not None and _C is not None:  # None where the process ends
            _C.munmap(self._address, self._size)
