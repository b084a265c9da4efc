"""Named states of a datastore, to look at what was and to go back to it.

A snapshot is a copy of the list. What it names stays on the disk until it is dropped, also what was
deleted and merged away since. Going back gives no id twice: entries that came later are deleted,
and those that were deleted later are there again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmrag import durable
from mmrag.artifact import write_json
from mmrag.retrieval import datastore
from mmrag.retrieval.segment import DatastoreError
from mmrag.retrieval.stored import read_json

FOLDER = "snapshots"


class SnapshotError(DatastoreError):
    """There is no snapshot of that name, or one already; the datastore is as good as it was."""


@dataclass(frozen=True)
class Snapshot:
    """A state of a datastore."""

    name: str
    entries: int
    """Entries there were, deleted ones included."""
    deleted: int


def create(directory: Path | str, name: str) -> Snapshot:
    """Give the datastore's present state a name.

    ValueError for a name that is malformed, SnapshotError for one that is taken.
    """
    directory = Path(directory).absolute()
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name):
        raise ValueError(f"snapshot name {name!r}: at most 64 small letters, digits, _ and -")
    with datastore.locked(directory):
        listed = datastore.read_list(directory)
        durable.make_directory(directory / FOLDER)
        file = directory / FOLDER / f"{name}.json"
        if file.exists():
            raise SnapshotError(f"{directory.name} has a snapshot {name} already")
        write_json(file, {key: listed[key] for key in ("segments", "deleted", "documents")})
        return _described(directory, name, listed)


def every(directory: Path | str) -> list[Snapshot]:
    """The snapshots there are, by name."""
    directory = Path(directory).absolute()
    datastore.describe(directory)
    return [_described(directory, name, listed) for name, listed in lists(directory).items()]


def rollback(directory: Path | str, name: str) -> None:
    """Make the datastore what it was; SnapshotError for a snapshot that there is not.

    Whoever holds the datastore open sees it at the next refresh.
    """
    directory = Path(directory).absolute()
    with datastore.locked(directory, datastore.COMPACTING), datastore.locked(directory):
        was = _read(directory, name)
        listed = datastore.read_list(directory)
        entries, kept, start = _entries(was), [], 0
        for one in listed["segments"]:
            kept += [one] if start >= entries else []
            start += one["entries"]
        later = np.arange(entries, start)
        gone = np.union1d(datastore.deleted_entries(directory, was), later)
        held = {one["name"] for one in was["segments"]}
        replaced = [one["name"] for one in listed["segments"] if one not in kept]
        merged = [*listed.get("merged", []), *replaced]
        listed["merged"] = [name for name in merged if name not in held]
        listed["segments"] = [*was["segments"], *kept]
        datastore.write_deleted(directory, listed, gone)


def drop(directory: Path | str, name: str) -> None:
    """Forget a snapshot, SnapshotError if there is none; what it alone named is removed when the
    datastore is next compacted."""
    directory = Path(directory).absolute()
    with datastore.locked(directory):
        _read(directory, name)
        (directory / FOLDER / f"{name}.json").unlink()
        durable.sync(directory / FOLDER)


def lists(directory: Path) -> dict[str, dict[str, Any]]:
    """The list of each snapshot, by its name."""
    files = sorted((directory / FOLDER).glob("*.json"))
    return {file.stem: _read(directory, file.stem) for file in files}


def ends(directory: Path) -> set[int]:
    """Numbers of entries at which there were snapshots: segments on either side stay apart."""
    return {_entries(listed) for listed in lists(directory).values()}


def _read(directory: Path, name: str) -> dict[str, Any]:
    file = directory / FOLDER / f"{name}.json"
    if not file.exists():
        raise SnapshotError(f"{directory.name} has no snapshot {name}")
    return read_json(file, dict)


def _entries(listed: dict[str, Any]) -> int:
    return sum(one["entries"] for one in listed["segments"])


def _described(directory: Path, name: str, listed: dict[str, Any]) -> Snapshot:
    return Snapshot(name, _entries(listed), len(datastore.deleted_entries(directory, listed)))
