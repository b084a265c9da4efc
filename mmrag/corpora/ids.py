"""Which ids a corpus has had so far, in a few bytes each: what tells one that stands twice."""

from __future__ import annotations

from array import array
from hashlib import blake2b

EMPTY = 0
SLOTS = 1 << 10
"""Of a table that nothing was put into."""


class Ids:
    """Ids and where each stood first, by 64 bits of their digests: 24 to 48 bytes an id.

    Two ids among N are taken for one with probability N² / 2⁶⁵: one in 90,000 for 20 million.
    """

    def __init__(self) -> None:
        self._digests, self._places = _table(SLOTS)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def first(self, id: str, place: int = 0) -> int | None:
        """The place at which `id` stood before; None if it is new, and then it stands at `place`
        from now on."""
        digest = blake2b(id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        found = _slot(self._digests, key := int.from_bytes(digest) or 1)
        if self._digests[found] != EMPTY:
            return self._places[found]
        self._digests[found], self._places[found] = key, place
        self._count += 1
        if 3 * self._count > 2 * len(self._digests):
            self._grow()
        return None

    def _grow(self) -> None:
        before = self._digests, self._places
        self._digests, self._places = _table(2 * len(self._digests))
        for key, place in zip(*before, strict=True):
            if key != EMPTY:
                slot = _slot(self._digests, key)
                self._digests[slot], self._places[slot] = key, place


def _table(slots: int) -> tuple[array, array]:
    return array("Q", bytes(8 * slots)), array("q", bytes(8 * slots))


def _slot(digests: array, key: int) -> int:
    """Where `key` stands in a table that is not full, or would."""
    mask = len(digests) - 1
    slot = key & mask
    while digests[slot] not in (EMPTY, key):
        slot = (slot + 1) & mask
    return slot
