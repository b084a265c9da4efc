"""Arrays too large for memory: npy files that grow piece by piece, and are read mapped.

What is mapped is the page cache's: every process of a machine that reads it shares the same pages,
and the kernel takes them back when it needs room.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np


class Growing:
    """An npy file that is appended to; whole once it is closed."""

    def __init__(self, path: Path, dtype: np.dtype | type, width: int | None = None) -> None:
        """`width` is of the rows of a matrix; None for an array of one dimension."""
        self._dtype = np.dtype(dtype)
        self._row = () if width is None else (width,)
        self._length = 0
        self._stream = path.open("wb")
        self._begin()
        self._start = self._stream.tell()

    def __len__(self) -> int:
        return self._length

    def append(self, values: np.ndarray) -> None:
        """Add values, or rows, at the end; ValueError for some that the file's type cannot hold."""
        values = np.asarray(values)
        if values.shape[1:] != self._row:
            raise ValueError(f"rows of shape {values.shape[1:]} where {self._row} are kept")
        kept = np.ascontiguousarray(values, self._dtype)
        if values.dtype != self._dtype and not np.array_equal(kept, values):
            raise ValueError(f"values that {self._dtype} cannot hold")
        self._stream.write(kept.data.cast("B") if kept.size else b"")
        self._length += len(kept)

    def close(self) -> None:
        """Write down how long it has become. numpy leaves room for that in the header."""
        self._stream.seek(0)
        self._begin()
        if self._stream.tell() != self._start:
            raise RuntimeError(f"{self._stream.name}: its header has grown over its contents")
        self._stream.close()

    def _begin(self) -> None:
        fields = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._length, *self._row),
        }
        np.lib.format.write_array_header_1_0(self._stream, fields)


def mapped(path: Path) -> np.ndarray:
    """The array in an npy file, read-only; pages are read when they are touched."""
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
