"""A datastore's directory as the service looks at it: which it is, what is in it and what comes."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from mmrag.config import SLUG
from mmrag.retrieval import datastore as stored
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.segment import Segment, join
from serve.messages import DatastoreSummary


def version(path: Path) -> tuple[int, ...]:
    """Which datastore this is (the first two), and in which state."""
    made, changed = (path / "datastore.json").stat(), (path / "segments.json").stat()
    return made.st_ino, made.st_mtime_ns, changed.st_ino, changed.st_mtime_ns


def documents(datastore: Datastore) -> list[tuple[str, int]]:
    """Every document with entries that are not deleted, and how many; in order of appearance."""
    found, counts = datastore.document_counts()
    return list(zip(datastore.document_names(found), counts.tolist(), strict=True))


def count(datastore: Datastore) -> int:
    """Entries that are not deleted."""
    return datastore.entries - len(datastore.deleted)


def is_one(path: Path) -> bool:
    """Whether a datastore lies in a directory."""
    return (path / "datastore.json").exists() and re.fullmatch(SLUG, path.name) is not None


def summary(path: Path) -> DatastoreSummary:
    """What a datastore is, as its tenant is told. Raises DatastoreError."""
    datastore = Datastore.open(path)
    many, audio = len(documents(datastore)), datastore.description.audio
    return DatastoreSummary(path.name, count(datastore), many, audio)


def entries_in(segments: Sequence[Segment]) -> int:
    """How many entries segments hold."""
    return sum(len(one.tokens) for one in segments)


def publish(directory: Path, segments: Sequence[Segment], instead_of: Sequence[int] = ()) -> None:
    """Put segments, if any, into a datastore, and delete the entries that they replace."""
    if segments:
        name = f"added-{uuid4().hex}"
        stored.write_segment(directory, name, join(segments))
        stored.publish(directory, [name], instead_of)


def forget(kept: dict[str, OrderedDict[Any, Segment]], most: int) -> None:
    """Drop what is more than may be kept, the oldest first, of whoever has the most: nobody's load
    drops what another has met."""
    for _ in range(sum(map(len, kept.values())) - most):
        max(kept.values(), key=len).popitem(last=False)
