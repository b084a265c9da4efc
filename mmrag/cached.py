"""Copies on this machine's disk of what lies at URLs: whole or not there, once for all processes.

A copy that a process uses is locked until that process ends, so that making room for another one
takes none away that is in use. What the copies are is not known here.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from mmrag.storage import StorageError, Url, download

CACHE = "MMRAG_CACHE"
"""Environment variable: where copies are kept, by default in ~/.cache/mmrag."""
LIMIT = "MMRAG_CACHE_GB"
"""Environment variable: the most that the copies take together; by default what the disk has."""
DRAFTS = "MMRAG_DRAFTS"
"""Environment variable: where what goes to a URL is made, by default below CACHE. With workers on
several machines it is a directory that all of them see."""
_in_use: dict[Path, TextIO] = {}
"""The copies that this process uses, by the open files that hold their locks."""


def directory(what: str = "copies") -> Path:
    """The cache; ValueError, which says `what` is to be kept there, where nobody said where and
    there is no home."""
    try:
        return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "mmrag").absolute()
    except RuntimeError:
        raise ValueError(
            f"there is no home directory to keep {what} in: set {CACHE} to a directory"
        ) from None


def draft_place(url: Url) -> Path:
    """Where what is to be at `url` is made: the same place whenever it is asked."""
    parent = hashlib.sha256(url.parent.text.encode()).hexdigest()[:16]
    return Path(os.environ.get(DRAFTS) or directory() / "drafts").absolute() / parent / url.name


def copy(folder: Url, key: str, check: Callable[[Path], None]) -> Path:
    """A directory of the cache that has the files of `folder`, and its name; known by `key`.

    It is fetched unless it is there; `check` raises for a copy that is not what it should be, which
    is then thrown away. Raises StorageError if it does not fit.
    """
    path = _root() / key
    _use(path)
    if not path.exists():
        with _making(path):  # whoever comes second waits, and finds it
            if not path.exists():
                _fetch(folder, path, check)
    os.utime(_lock_file(path))
    return path / folder.name


def adopt(made: Path, key: str) -> None:
    """Take a directory that was made here, and lies at a URL too, as the copy `key`."""
    path = _root() / key
    with _making(path):
        if path.exists():
            shutil.rmtree(made)
            return
        _lock_file(path).write_text(str(_bytes(made)))
        aside = path.with_name(f".{path.name}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        shutil.move(made, aside / made.name)  # perhaps from another disk, and so not at once
        aside.rename(path)


def _fetch(folder: Url, path: Path, check: Callable[[Path], None]) -> None:
    sizes, unsound = folder.listing()
    if unsound:
        raise StorageError(f"{folder}: holds what could be no file here: {unsound[0]!r:.200}")
    names = [name for name in sizes if not any(p.startswith(".") for p in name.split("/"))]
    size = sum(sizes[name] for name in names)
    _make_room(folder, size)
    aside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)  # a killed fetch's
    try:
        (aside / folder.name).mkdir(parents=True)
        download(folder, names, aside / folder.name)
        check(aside / folder.name)
        _lock_file(path).write_text(str(size))
        aside.rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _use(path: Path) -> None:
    """Hold a copy, there or to be made, until this process ends: nobody removes it then."""
    if path not in _in_use:
        lock = _lock_file(path).open("a+")
        fcntl.flock(lock, fcntl.LOCK_SH)
        _in_use[path] = lock


def _make_room(folder: Url, size: int) -> None:
    """Remove copies that nobody uses, those used longest ago first, until `size` bytes fit."""
    root = _root()
    known = [one for one in root.iterdir() if not one.name.startswith(".")]
    held = {one: int(_lock_file(one).read_text() or 0) for one in known if _lock_file(one).exists()}
    most = os.environ.get(LIMIT)
    limit = float(most) * 1e9 if most else float("inf")

    def room() -> float:
        return min(limit - sum(held.values()), shutil.disk_usage(root).free)

    for path in sorted(held, key=lambda one: _lock_file(one).stat().st_mtime):
        if size > room() and path not in _in_use and _remove(path):
            del held[path]
    if size > room():
        raise StorageError(
            f"{folder}: its copy takes {size / 1e9:.1f} GB, and {root} has room for "
            f"{max(0.0, room()) / 1e9:.1f} GB: set {CACHE} to a directory with more, or raise "
            f"{LIMIT}"
        )


def _remove(path: Path) -> bool:
    """Remove a copy, unless a process uses it."""
    with _lock_file(path).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        gone = path.with_name(f".{path.name}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone)
        return True


def _root() -> Path:
    root = directory() / "copies"
    root.mkdir(parents=True, exist_ok=True)
    return root


def _lock_file(path: Path) -> Path:
    """Locked by those who use a copy; holds its bytes; its time tells when it was last used."""
    return path.with_name(f".{path.name}.lock")


@contextmanager
def _making(path: Path) -> Iterator[None]:
    """One process at a time makes a copy."""
    with path.with_name(f".{path.name}.making").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
