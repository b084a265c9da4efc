"""A disk that keeps what was flushed and, of the rest, what chance leaves of it."""

import os
import random
import stat
from pathlib import Path

import pytest

TORN = 16
"""Bytes of a file that reach the disk together."""


class PowerCutError(BaseException):
    """Nothing tidies up after it."""


class LossyDisk:
    """Cuts the power before step `cut` that changes the files below `root`, or at `cut_power`.

    `fsync` makes a file's contents, or a directory's names, safe. Of what is not safe all is lost,
    or about half, each name and TORN bytes for themselves, or nothing.
    """

    def __init__(
        self, patch: pytest.MonkeyPatch, root: Path, after: Path, cut: int, chance: random.Random
    ) -> None:
        """What is below `root` now is safe; what is left of it will be below `after`."""
        self.steps = 0
        self._root, self._after, self._cut, self._chance = root, after, cut, chance
        self._held: dict[int, int] = {}
        """Inode -> a descriptor, so that no other file gets its number."""
        self._contents: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        for path in (root, *root.rglob("*")):
            self._flushed(path)
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, self._flush)
        for name in ("rename", "replace", "unlink", "mkdir", "rmdir"):
            patch.setattr(os, name, self._counted(getattr(os, name)))

    def cut_power(self) -> None:
        """Write what is left below `after`."""
        self._cut = None
        self._left(self._hold(self._root), self._after, self._chance.choice([0, 0.5, 1]))
        for descriptor in self._held.values():
            os.close(descriptor)

    def _flush(self, descriptor: int) -> None:
        self._step()
        self._flushed(f"/proc/self/fd/{descriptor}")

    def _counted(self, change):
        def counted(*arguments, **named):
            self._step()
            return change(*arguments, **named)

        return counted

    def _step(self) -> None:
        if self._cut == self.steps:
            self.cut_power()
            raise PowerCutError
        self.steps += 1

    def _hold(self, path: Path | str, within: int | None = None) -> int:
        """The inode of a path, which keeps its number."""
        descriptor = os.open(path, os.O_RDONLY, dir_fd=within)
        inode = os.fstat(descriptor).st_ino
        if self._held.setdefault(inode, descriptor) != descriptor:
            os.close(descriptor)
        return inode

    def _flushed(self, path: Path | str) -> None:
        if self._cut is None:
            return
        inode = self._hold(path)
        if self._is_directory(inode):
            self._names[inode] = self._present(inode)
        else:
            self._contents[inode] = self._read(inode)

    def _is_directory(self, inode: int) -> bool:
        return stat.S_ISDIR(os.fstat(self._held[inode]).st_mode)

    def _present(self, inode: int) -> dict[str, int]:
        """The names in a directory as they are, flushed or not."""
        own = self._held[inode]
        return {name: self._hold(name, own) for name in os.listdir(own)}

    def _read(self, inode: int) -> bytes:
        own = self._held[inode]
        return os.pread(own, os.fstat(own).st_size, 0)

    def _left(self, inode: int, target: Path, kept: float) -> None:
        """Write what is left of a file or directory, each unflushed part with chance `kept`."""
        if not self._is_directory(inode):
            target.write_bytes(self._torn(self._contents.get(inode, b""), self._read(inode), kept))
            return
        target.mkdir()
        safe, present = self._names.get(inode, {}), self._present(inode)
        for name in sorted(safe.keys() | present.keys()):
            found = (present if self._chance.random() < kept else safe).get(name)
            if found is not None:
                self._left(found, target / name, kept)

    def _torn(self, safe: bytes, present: bytes, kept: float) -> bytes:
        """A file's contents, some parts as they were and some as they are."""
        if safe == present:
            return safe
        parts = range(0, max(len(safe), len(present)), TORN)
        chosen = (present if self._chance.random() < kept else safe for _ in parts)
        return b"".join(one[at : at + TORN] for one, at in zip(chosen, parts, strict=True))
