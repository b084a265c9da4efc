"""Many names without an object each: end to end as UTF-8, with an array of where each begins.

Nothing here knows what is called by them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from mmrag.arrays import Growing, mapped


class Names(Sequence[str]):
    """Many names, each read where it is asked for."""

    def __init__(self, text: np.ndarray, offsets: np.ndarray) -> None:
        """`text` (X,) uint8; name n is `text[offsets[n]:offsets[n + 1]]`."""
        self.text = text
        self.offsets = offsets

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """Names in memory, as they are stored."""
        encoded = [name.encode() for name in names]
        offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    @classmethod
    def open(cls, directory: Path, name: str) -> Names:
        """What `NamesWriter` wrote, mapped."""
        return cls(mapped(directory / f"{name}.npy"), mapped(directory / f"{name}_offsets.npy"))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, number: int) -> str:
        if not 0 <= number < len(self):
            raise IndexError(f"name {number} of {len(self)}")
        start, stop = self.offsets[number : number + 2].tolist()
        return self.text[start:stop].tobytes().decode()


class NamesWriter:
    """Writes names into a directory, some at a time."""

    def __init__(self, directory: Path, name: str) -> None:
        self._text = Growing(directory / f"{name}.npy", np.uint8)
        self._offsets = Growing(directory / f"{name}_offsets.npy", np.int64)
        self._offsets.append(np.zeros(1, np.int64))

    def append(self, names: Names) -> None:
        """Add names at the end."""
        self._offsets.append(len(self._text) + names.offsets[1:])
        self._text.append(names.text)

    def close(self) -> None:
        self._text.close()
        self._offsets.close()


class Lookup:
    """Where names stand, without reading them all: their digests in order, on disk."""

    def __init__(self, directory: Path, names: Names) -> None:
        """`names` are those that `write` was told the digests of."""
        self._names = names
        self._digests = mapped(directory / "digests.npy")
        self._places = mapped(directory / "places.npy")

    @staticmethod
    def write(directory: Path, digests: np.ndarray) -> None:
        """Make the files for names of these digests (N,) uint64."""
        places = np.argsort(digests, kind="stable")
        np.save(directory / "digests.npy", digests[places])
        np.save(directory / "places.npy", places)

    def __call__(self, name: str) -> np.ndarray:
        """Every place (M,) int64 at which a name stands, in order; none for an unknown one."""
        wanted = np.uint64(digest(name))
        first = int(np.searchsorted(self._digests, wanted))
        last = int(np.searchsorted(self._digests, wanted, side="right"))
        places = [
            place for place in self._places[first:last].tolist() if self._names[place] == name
        ]
        return np.array(places, np.int64)


def digest(name: str) -> int:
    """64 bits by which names are ordered and searched."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())
