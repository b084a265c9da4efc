"""A process that indexes a datastore, and an index that was built before: `python -m
jobs.benchmark.built`. The order comes in as a line of JSON, the answer goes out as one.

Every core builds; a process of its own gives back the memory, and knows how much that was.
"""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss

from jobs.benchmark.process import BUILT, SHARING, Process
from jobs.benchmark.progress import Progress
from mmrag import retrieval
from mmrag.artifact import write_json
from mmrag.config import Index
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.index import IndexShard, shard_ranges

SEED = 1
AUTO = Index(kind="auto", shards=1)
RECORD = "built.json"
"""Beside the shards: what built them, and what that cost."""


@dataclass(frozen=True)
class Building:
    """What to index, in how many shards."""

    datastore: str
    index: str
    """The directory of the shards' directories."""
    shards: int
    progress: Progress


def shards_of(index: Path | str) -> list[Path]:
    """The directories of an index's shards, in order of their entries."""
    return sorted(Path(index).glob("shard-*"))


def built(order: Building) -> dict[str, Any]:
    """What an index cost: `seconds`, and `peak_bytes` of memory, mapped files among them.

    One that this code built before, of as many entries in as many shards, is not built again.
    """
    record = Path(order.index) / RECORD
    wanted = {"code": _code(), "entries": Datastore.open(order.datastore).entries}
    if record.exists():
        found = json.loads(record.read_text())
        same = all(found[name] == value for name, value in wanted.items())
        if same and len(shards_of(order.index)) == order.shards:
            order.progress(f"{order.index} is there already")
            return found
    with Process(BUILT, order, **SHARING) as process:
        measured = process.result()
    write_json(record, wanted | measured)
    return measured


def measured(order: Building) -> dict[str, Any]:
    """Index a datastore in place of what was there."""
    store = Datastore.open(order.datastore)
    shutil.rmtree(order.index, ignore_errors=True)
    started = time.perf_counter()
    for number, span in enumerate(shard_ranges(store.entries, order.shards)):
        if number:
            order.progress(f"{number} of {order.shards} shards built")
        shard = IndexShard.build(store, *span, AUTO, SEED)
        shard.save(Path(order.index) / f"shard-{number:05d}")
    seconds = time.perf_counter() - started
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "peak_bytes": peak}


def _code() -> str:
    """What an index depends on beside its entries: the sources that build it, and FAISS."""
    sources = sorted(Path(retrieval.__file__).parent.glob("*.py"))
    told = [faiss.__version__, repr(AUTO), str(SEED), *(one.read_text() for one in sources)]
    return hashlib.sha256("\0".join(told).encode()).hexdigest()[:16]


if __name__ == "__main__":
    told = json.loads(sys.stdin.readline())
    told["progress"] = Progress(**told["progress"])
    print(json.dumps(measured(Building(**told))))
