"""What the owner of a datastore looks at and keeps in order: each task takes the datastore's
directory and tells what it found or did as plain JSON values.

The command line does them where the directory is, an endpoint for whoever asks it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mmrag.config import Index
from mmrag.retrieval import compaction, reindexing, snapshots
from mmrag.retrieval import verify as checks
from mmrag.retrieval.datastore import Datastore, read_list
from mmrag.retrieval.held_out import NEAREST
from mmrag.retrieval.index import IndexShard, chosen_index, saved_shards
from mmrag.retrieval.phrases import typical_distance
from mmrag.retrieval.stored import segment_file

LISTED = 20
"""Documents that an overview names."""
SHARES = (5, 50, 95)
"""Percentiles of the entries of a document."""
Told = dict[str, Any]


def summary(directory: Path) -> Told:
    """What a datastore is, and how much of it there is."""
    datastore = Datastore.open(directory)
    told = datastore.description
    return {
        "audio": told.audio,
        "identity": told.identity,
        "width": told.width,
        "window": told.window,
        "metric": told.metric,
        "entries": datastore.entries,
        "deleted": len(datastore.deleted),
        "documents": len(datastore.document_counts()[0]),
        "segments": len(datastore.segments),
        "bytes": _sizes(datastore),
    }


def overview(directory: Path) -> Told:
    """What made a datastore, what is in it, and how it is indexed."""
    datastore = Datastore.open(directory)
    documents, counts = datastore.document_counts()
    largest = np.argsort(-counts, kind="stable")[:LISTED]
    names = datastore.document_names(documents[largest])
    shards = [chosen_index(shard) for shard in saved_shards(directory)]
    return {
        **summary(directory),
        "largest_documents": dict(zip(names, counts[largest].tolist(), strict=True)),
        "snapshots": [asdict(one) for one in snapshots.every(directory)],
        "index": [{"chosen": why, f"recall_at_{NEAREST}": recall} for why, recall in shards],
    }


def statistics(directory: Path) -> Told:
    """How a datastore is filled."""
    datastore = Datastore.open(directory)
    sizes = [one["entries"] for one in read_list(directory)["segments"]] or [0]
    documents, counts = datastore.document_counts()
    counts = counts if len(counts) else np.zeros(1, np.int64)
    sizes_of = _sizes(datastore).items()
    each = max(1, datastore.entries)
    return {
        "entries": datastore.entries,
        "deleted": len(datastore.deleted),
        "segments": len(datastore.segments),
        "segment_entries": {"smallest": min(sizes), "largest": max(sizes)},
        "documents": len(documents),
        "document_entries": {f"p{share}": int(np.percentile(counts, share)) for share in SHARES},
        "typical_distance": typical_distance(datastore),
        "bytes_per_entry": {name: round(size / each, 1) for name, size in sizes_of},
    }


def verify(directory: Path) -> Told:
    """Every byte checked: what is wrong, one problem a line."""
    return {"problems": list(checks.verify(directory))}


def compact(directory: Path, everything: bool = False) -> Told:
    """Small segments merged and deleted entries erased, `everything` also where there is little;
    and the index built again where it has fallen behind."""
    done = asdict(compaction.compact(directory, everything=everything))
    again = reindexing.catch_up(directory)
    return done | {"index": again and {"why": again.why, "shards": _shards(again.shards)}}


def index(
    directory: Path,
    shards: int = 1,
    kind: str = "auto",
    entry_bytes: int | None = None,
    min_recall: float | None = None,
) -> Told:
    """The datastore indexed anew, beside the index that there is, with these settings."""
    given = {"entry_bytes": entry_bytes, "min_recall": min_recall}
    given = {name: value for name, value in given.items() if value is not None}
    settings = Index(kind=kind, shards=shards, **given)
    return {"shards": _shards(reindexing.index_anew(directory, settings))}


def list_snapshots(directory: Path) -> Told:
    """The named states that there are."""
    return {"snapshots": [asdict(one) for one in snapshots.every(directory)]}


def create_snapshot(directory: Path, name: str) -> Told:
    """The present state, named."""
    return asdict(snapshots.create(directory, name))


def roll_back(directory: Path, name: str) -> Told:
    """A named state as the present one."""
    snapshots.rollback(directory, name)
    return {"snapshot": name, "done": "rollback"}


def drop_snapshot(directory: Path, name: str) -> Told:
    """A named state forgotten."""
    snapshots.drop(directory, name)
    return {"snapshot": name, "done": "drop"}


TASKS: dict[str, Callable[..., Told]] = {
    task.__name__: task
    for task in (
        *(overview, statistics, verify, compact, index),
        *(list_snapshots, create_snapshot, roll_back, drop_snapshot),
    )
}
"""What an endpoint does for whoever asks."""


def _shards(built: Sequence[IndexShard]) -> list[Told]:
    return [
        {"entries": one.stop - one.start, "chosen": one.why, "recall": one.recall} for one in built
    ]


def _sizes(datastore: Datastore) -> dict[str, int]:
    """Bytes on the disk: keys, windows, the rest of the segments, the index. What a segment's file
    takes there, where erased rows take nothing, is shared out as its arrays share its length."""
    directory, told = datastore.directory, datastore.description
    sizes = {"keys": 0, "windows": 0, "names and numbers": 0, "index": 0}
    indexes = {one.name for one in directory.glob("index*")}
    entries = {
        segment_file(directory, one["name"]): one["entries"]
        for one in read_list(directory)["segments"]
    }
    for file in directory.rglob("*"):
        if not file.is_file():
            continue
        found = file.stat()
        taken = left = found.st_blocks * 512
        for kind, row in (("keys", 2 * told.width), ("windows", 4 * told.window)):
            share = taken * row * entries.get(file, 0) // max(1, found.st_size)
            sizes[kind] += share
            left -= share
        indexed = file.relative_to(directory).parts[0] in indexes
        sizes["index" if indexed else "names and numbers"] += left
    return sizes
