"""What a datastore knows about its entries without holding it: columns that stay mapped.

A column has one number an entry, in as many parts as there are segments; rows are read where they
are asked for. Nothing here knows what is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import numpy as np

Part = Callable[[np.ndarray | slice], np.ndarray]
"""Places within one segment -> their values."""


class Column:
    """One number an entry, of all segments laid end to end: (N,). It is read like an array."""

    def __init__(self, parts: Sequence[Part], starts: np.ndarray, dtype: type) -> None:
        """`starts` (S + 1,) is where each of the S parts begins, and where the last one ends."""
        self._parts = parts
        self._starts = starts
        self.dtype = np.dtype(dtype)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shape(self) -> tuple[int]:
        return (len(self),)

    def __array__(self, dtype: type | None = None, copy: bool | None = None) -> np.ndarray:
        """All of it, in memory."""
        whole = np.concatenate(
            [np.zeros(0, self.dtype), *(part(slice(None)) for part in self._parts)]
        )
        return whole if dtype is None else whole.astype(dtype)

    def __eq__(self, other: object) -> np.ndarray:
        """Element by element, as arrays compare."""
        return np.asarray(self) == other

    __hash__ = None

    def tolist(self) -> list[int]:
        """All of it, as Python's numbers."""
        return np.asarray(self).tolist()

    def __getitem__(self, places: int | slice | np.ndarray) -> np.ndarray:
        """The values at `places`: of an array's shape, of a mask's count, or one number."""
        if isinstance(places, slice):
            places = np.arange(*places.indices(len(self)))
        places = np.asarray(places)
        if places.dtype == bool:
            places = np.flatnonzero(places)
        values = np.empty(places.size, self.dtype)
        for number, here, within in spread(places.ravel(), self._starts):
            values[here] = self._parts[number](within)
        return values.reshape(places.shape)[()]


def spread(
    places: np.ndarray, starts: np.ndarray
) -> Iterable[tuple[int, np.ndarray | slice, np.ndarray]]:
    """Which places (M,) fall into which part: its number, where they stand, places within it.

    IndexError for a place that no part has.
    """
    if not len(places):
        return
    if places.min() < 0 or places.max() >= starts[-1]:
        raise IndexError(f"places {places.min()} to {places.max()} of {starts[-1]}")
    parts = np.searchsorted(starts, places, side="right") - 1
    first = int(parts[0])
    if (parts == first).all():
        yield first, slice(None), places - starts[first]
        return
    order = np.argsort(parts, kind="stable")
    parts = parts[order]
    ascending = (order[1:] > order[:-1]).all()
    edges = [0, *(np.flatnonzero(parts[1:] != parts[:-1]) + 1).tolist(), len(parts)]
    for first, last in pairwise(edges):
        number = int(parts[first])
        here = slice(first, last) if ascending else order[first:last]
        yield number, here, places[here] - starts[number]
