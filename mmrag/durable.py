"""Files that survive a power cut: flushed, and so are the directories that name them.

A rename is seen at once and kept only when its directory is flushed; what it names must be flushed
before, or a cut leaves a name without its contents. Knows nothing about what is stored.
"""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Flush a file's contents, or a directory's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Flush every file below a directory, then the directories from the leaves up, itself last."""
    for parent, _, files in os.walk(directory, topdown=False):
        for name in files:
            sync(Path(parent, name))
        sync(Path(parent))


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
    aside.rename(final)
    sync(final.parent)
