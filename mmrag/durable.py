"""Files that survive a power cut: flushed, and so are the directories that name them.

A rename is seen at once and kept only when its directory is flushed; what it names must be flushed
before, or a cut leaves a name without its contents. Knows nothing about what is stored.
"""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file's contents, or a directory's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network filesystems have nothing to flush for a directory.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def sync_tree(root: Path) -> None:
    """Wait until everything below a directory is on the disk, files before what names them."""
    below = [path for path in root.rglob("*") if not path.is_symlink()]
    pool = _threads(os.getpid())
    list(pool.map(sync, (path for path in below if path.is_file())))
    list(pool.map(sync, (path for path in below if path.is_dir())))
    sync(root)


@cache
def _threads(process: int) -> ThreadPoolExecutor:
    """Those of a process that flush, as a disk takes many at once in the time of one; a forked one
    has none of its parent's."""
    return ThreadPoolExecutor(thread_name_prefix=f"flush-{process}")


def make_directory(path: Path) -> None:
    """Make a directory and its missing parents, and flush the entry of each; one may be there."""
    missing = [one for one in (path, *path.parents) if not one.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        sync(made.parent)


def rename(aside: Path, final: Path) -> None:
    """Put a file or directory that was written aside in its place, all of it flushed.

    Raises OSError as `Path.rename` does: for a directory that is there and not empty.
    """
    if aside.is_dir():
        sync_tree(aside)
    else:
        sync(aside)
    place(aside, final)


def place(aside: Path, final: Path) -> None:
    """`rename` of what is flushed already."""
    aside.rename(final)
    sync(final.parent)


def write_text(path: Path, text: str) -> None:
    """Write a file so that it holds the old text or the new one, never half."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    place(aside, path)
