"""What lies below a directory, and names as they can be written down; nothing is opened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from mmrag.records import Rejection
from mmrag.storage import Location


def walk(directory: Path) -> Iterator[Path | Rejection]:
    """Everything below `directory` that is no folder, and each folder that cannot be listed.

    Links to folders are followed, after all real folders; each folder is listed once, whatever
    number of links lead to it, so that loops end. In the order of the names, folder by folder.
    """
    waiting, links, seen = [directory], [], set()
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop(0)
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            yield Rejection(printable(folder), f"the folder cannot be listed: {error.strerror}")
            continue
        below = []
        for entry in entries:
            path = folder / entry.name
            if not _is_folder(entry):
                yield path
            elif entry.is_symlink():
                links.append(path)
            else:
                below.append(path)
        waiting += reversed(below)


def printable(path: Location | str) -> str:
    """A path as UTF-8 text: bytes of it that are none are written `\\xe9`."""
    try:
        name = os.fsencode(str(path))
    except UnicodeEncodeError:  # half a character that no file name stands for
        name = str(path).encode("utf-8", "backslashreplace")
    return name.decode("utf-8", "backslashreplace")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads round in circles
        return False
