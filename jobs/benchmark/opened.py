"""A process that opens a datastore's shards and says what that cost: `python -m
jobs.benchmark.opened`. The order comes in as a line of JSON, the answer goes out as one."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from jobs.benchmark.built import shards_of
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.index import IndexShard

SEARCHES, K = 20, 16


@dataclass(frozen=True)
class Opening:
    """What to open."""

    datastore: str
    index: str
    """The directory of the shards' directories."""
    shards: int
    """So many of them, from the first."""


def measured(order: Opening) -> dict[str, Any]:
    """Seconds until the shards can be asked, and the private memory they take once they were."""
    faiss.omp_set_num_threads(1)
    warm = faiss.IndexFlatL2(8)
    warm.add(np.zeros((8, 8), np.float32))
    warm.search(np.zeros((8, 8), np.float32), 1)
    before = _private()
    started = time.perf_counter()
    datastore = Datastore.open(order.datastore)
    chosen = shards_of(order.index)[: order.shards]
    shards = [IndexShard.load(one, datastore) for one in chosen]
    seconds = time.perf_counter() - started
    queries = datastore.keys(0, 16)
    for _ in range(SEARCHES):
        for shard in shards:
            shard.search(queries, K)
    entries = sum(shard.stop - shard.start for shard in shards)
    return {"seconds": seconds, "private_bytes": _private() - before, "entries": entries}


def _private() -> int:
    """Bytes of memory that are this process's alone, and no file's."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    [kilobytes] = [line.split()[1] for line in lines if line.startswith("Private_Dirty:")]
    return 1024 * int(kilobytes)


if __name__ == "__main__":
    print(json.dumps(measured(Opening(**json.loads(sys.stdin.readline())))))
