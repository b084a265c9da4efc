"""Arrays of numbers over a connection: what is received can be nothing else.

A message says whether it holds arrays, and its length. They follow one after the other: the type of
an array's numbers, how many axes it has, its shape, and the numbers, little-endian, row by row.
"""

from __future__ import annotations

import math
import socket
import struct
import time
from collections.abc import Sequence

import numpy as np

DTYPES = {np.dtype(name).str for name in ("f2", "f4", "f8", "i4", "i8", "u1")}
LARGEST = 1 << 30
"""Bytes of a message."""
_HEAD = struct.Struct("<?Q")
"""Whether arrays follow, and how many bytes."""
_ARRAY = struct.Struct("<3sB")
"""The type of an array's numbers, and how many axes it has."""


class RefusedError(Exception):
    """The other process raised something, and has no arrays to send."""


def pack(arrays: Sequence[np.ndarray]) -> bytes:
    """Arrays as one message; ValueError for what is not plain numbers, or too many."""
    parts = []
    for array in arrays:
        if array.dtype.str not in DTYPES or array.nbytes > LARGEST:
            raise ValueError(f"an array of {array.dtype} of {array.nbytes} bytes is not sent")
        parts.append(_ARRAY.pack(array.dtype.str.encode(), array.ndim))
        parts.append(struct.pack(f"<{array.ndim}I", *array.shape))
        parts.append(array.tobytes())
    return b"".join(parts)


def unpack(message: bytes | bytearray) -> list[np.ndarray]:
    """What `pack` was given; ValueError for bytes that it did not make."""
    arrays, at = [], 0
    while at < len(message):
        try:
            code, axes = _ARRAY.unpack_from(message, at)
            shape = struct.unpack_from(f"<{axes}I", message, at + _ARRAY.size)
        except struct.error as error:
            raise ValueError(f"a message ends amid a shape: {error}") from None
        at += _ARRAY.size + 4 * axes
        name, count = code.decode("ascii", "replace"), math.prod(shape)
        if name not in DTYPES:
            raise ValueError(f"an array of {name!r} was received")
        if at + count * np.dtype(name).itemsize > len(message):
            raise ValueError(f"a message ends amid an array of shape {shape}")
        flat = np.frombuffer(message, name, count, at)
        arrays.append(flat.reshape(shape).copy())  # aligned, whatever lay before it
        at += flat.nbytes
    return arrays


def send(connection: socket.socket, message: bytes | None, seconds: float | None) -> None:
    """Send what `pack` made, or None in its place; OSError if it is not taken in `seconds`."""
    connection.settimeout(seconds)
    body = message or b""
    connection.sendall(_HEAD.pack(message is not None, len(body)) + body)


def receive_arrays(connection: socket.socket, deadline: float | None) -> list[np.ndarray]:
    """The arrays of the next message; as `receive`, and RefusedError for one that has none,
    ValueError for one that nobody here has sent."""
    answered, size = _HEAD.unpack(receive(connection, _HEAD.size, deadline))
    if not answered:
        raise RefusedError
    if size > LARGEST:
        raise ValueError(f"a message of {size} bytes")
    return unpack(receive(connection, size, deadline))


def receive(connection: socket.socket, size: int, deadline: float | None) -> bytearray:
    """So many bytes; OSError where they have not come when the monotonic clock says `deadline`."""
    received = bytearray(size)
    left = memoryview(received)
    while left:
        if deadline is not None and time.monotonic() >= deadline:
            raise TimeoutError(f"{len(left)} of {size} bytes have not come in time")
        connection.settimeout(None if deadline is None else max(1e-6, deadline - time.monotonic()))
        count = connection.recv_into(left)
        if not count:
            raise ConnectionError("the other process closed the connection")
        left = left[count:]
    return received
