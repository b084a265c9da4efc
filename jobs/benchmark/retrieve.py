"""How well, how fast and in how much memory a large datastore is searched and written to.

The keys are synthetic, and lie as the shipped model's own do (`keys`). Searches have one core; the
index is what `index.kind: auto` makes of one shard.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from rich.console import Console

from cluster.connection import connection
from cluster.shards import serve_shards
from jobs.benchmark.keys import SyntheticKeys
from jobs.benchmark.opened import Opening
from jobs.benchmark.process import OPENED, Process
from jobs.benchmark.targets import Target, compared, table
from mmrag import shipped
from mmrag.config import Index
from mmrag.retrieval import datastore
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.index import (
    IndexShard,
    save_index,
    saved_shards,
    shard_directory,
    shard_ranges,
)
from mmrag.retrieval.retrievers import LocalRetriever

SEED, K = 1, 16
QUERIES, BATCH, SMALL_BATCH = 512, 32, 16
"""Queries that recall is measured on, and how many are asked at once."""
CHUNK = 250_000
"""Keys compared at once where all of them are."""
AUTO = Index(kind="auto", shards=1)
SHARDS, SERVED, SERVED_ENTRIES = 8, 4, 2000
ADDED = 100
"""Entries added at once."""
COMPACT = """
import sys
from mmrag.retrieval.compaction import compact
compact(sys.argv[1], everything=True)
"""
progress = Console(stderr=True, highlight=False)
TARGETS = {
    "recall_at_16": Target(
        "of the 16 nearest of the largest, found", "≥ 0.95", lambda r: r >= 0.95, "{:.3f}".format
    ),
    "speedup_over_flat": Target(
        f"the largest, over comparing every key, batch {BATCH}",
        "≥ 20 at 1 M",
        lambda ratio: ratio >= 20,
        "{:.1f} x".format,
    ),
    "growth_exponent": Target(
        "time a query grows as entries to the power of",
        "≤ 0.5",
        lambda r: r <= 0.5,
        "{:.2f}".format,
    ),
    "resident_bytes_per_entry": Target(
        f"private memory for an entry more: {SHARDS} shards held, over one of them",
        "≤ 5 beyond the codes",
        lambda r: r <= 5,
        "{:.1f} bytes".format,
    ),
    "open_seconds": Target(
        f"{SHARDS} shards opened", "≤ 2 s at 10 M", lambda r: r <= 2, "{:.2f} s".format
    ),
    "remote_overhead_ms": Target(
        f"{SERVED} shards behind actors, over the slowest of them",
        "≤ 3 ms",
        lambda r: r <= 3,
        "{:.1f} ms".format,
    ),
    "adds_per_second": Target(
        f"durable additions, {ADDED} at a time", "≥ 5,000", lambda r: r >= 5000, "{:,.0f}".format
    ),
    "visible_ms": Target(
        "until an addition is found by another reader",
        "≤ 50 ms",
        lambda r: r <= 50,
        "{:.0f} ms".format,
    ),
    "search_p99_while_compacting": Target(
        "99th percentile of searches while segments are merged, over that before",
        "≤ 1.5",
        lambda r: r <= 1.5,
        "{:.2f} x".format,
    ),
}


@dataclass(frozen=True)
class Sizes:
    """How many entries, and how long to measure."""

    growth: tuple[int, ...]
    """Entries of the datastores that are searched, ascending."""
    searches: int
    add_seconds: float


FULL = Sizes(growth=(100_000, 316_000, 1_000_000), searches=300, add_seconds=10)
QUICK = Sizes(growth=(50_000, 200_000), searches=100, add_seconds=3)


def measure(directory: Path, sizes: Sizes) -> dict[str, Any]:
    """Everything, below `directory`."""
    faiss.omp_set_num_threads(1)
    progress.print("reading sentences for keys to imitate")
    keys = SyntheticKeys(shipped.TINY, SEED)
    results: dict[str, Any] = {
        "width": keys.width,
        "neighbour_distance": asdict(keys.likeness),
        "growth": [],
    }
    for entries in sizes.growth:
        progress.print(f"{entries:,} entries")
        place = directory / f"of-{entries}"
        keys.write(place, entries, SEED)
        results["growth"].append(_searched(keys, place, entries, sizes))
    results |= _largest(results["growth"])
    progress.print(f"{SHARDS} shards")
    results |= _opened(place, sizes.growth[-1])
    progress.print(f"{SERVED} shards behind actors")
    results |= _served(keys, directory / "served", sizes)
    progress.print("written to while it is searched")
    results |= _written(keys, directory / "written", sizes)
    return results


def _searched(keys: SyntheticKeys, place: Path, entries: int, sizes: Sizes) -> dict[str, Any]:
    """One shard with all entries: built, and searched beside an exact one."""
    store = Datastore.open(place)
    started = time.perf_counter()
    shard = IndexShard.build(store, 0, entries, AUTO, SEED)
    built = time.perf_counter() - started
    shard.save(shard_directory(place, 0))
    shard = IndexShard.load(shard_directory(place, 0), store)
    queries = keys.draw(QUERIES, SEED + 1_000_000)
    exact, flat = _exact(store, queries)
    found, ours = _by_batches(lambda batch: shard.search(batch, K).entries, queries, BATCH)
    hits = [len(set(a) & set(b)) / K for a, b in zip(exact.tolist(), found.tolist(), strict=True)]
    read = _counted(store)
    times = []
    for number in range(sizes.searches):
        asked = keys.draw(SMALL_BATCH, SEED + 2_000_000 + number)
        started = time.perf_counter()
        shard.search(asked, K)
        times.append(1e3 * (time.perf_counter() - started))
    settings = shard.settings
    return {
        "entries": entries,
        "why": shard.why,
        "probes": settings.probes,
        "rerank": settings.rerank,
        "build_seconds": built,
        "recall_when_built": shard.recall,
        "recall_at_16": float(np.mean(hits)),
        "flat_ms_a_query": 1e3 * flat / QUERIES,
        "ms_a_query": 1e3 * ours / QUERIES,
        "speedup_over_flat": flat / ours,
        "p50_ms": float(np.percentile(times, 50)),
        "p99_ms": float(np.percentile(times, 99)),
        "codes_scanned": settings.probes * entries / settings.lists,
        "keys_read": read["keys"] / sizes.searches / SMALL_BATCH,
    }


def _largest(growth: list[dict[str, Any]]) -> dict[str, Any]:
    """What is said of the largest datastore, and how time grew up to it."""
    first, last = growth[0], growth[-1]
    names = ("recall_at_16", "speedup_over_flat", "p50_ms", "p99_ms")
    ratio = np.log(last["ms_a_query"] / first["ms_a_query"])
    exponent = ratio / np.log(last["entries"] / first["entries"])
    return {name: last[name] for name in names} | {"growth_exponent": float(exponent)}


def _exact(store: Datastore, queries: np.ndarray) -> tuple[np.ndarray, float]:
    """The nearest entries (Q, K) by comparing every key, and the seconds of the comparing alone."""
    best, among, seconds = np.zeros((len(queries), 0)), np.zeros((len(queries), 0), np.int64), 0.0
    for start in range(0, store.entries, CHUNK):
        flat = faiss.IndexFlatL2(queries.shape[1])
        flat.add(store.keys(start, min(start + CHUNK, store.entries)))
        started = time.perf_counter()
        parts = [flat.search(queries[at : at + BATCH], K) for at in range(0, len(queries), BATCH)]
        seconds += time.perf_counter() - started
        far, near = (np.concatenate(part) for part in zip(*parts, strict=True))
        best, among = np.hstack([best, far]), np.hstack([among, near + start])
        order = np.argsort(best, axis=1, kind="stable")[:, :K]
        best, among = (np.take_along_axis(each, order, axis=1) for each in (best, among))
    return among, seconds


def _by_batches(
    search: Callable[[np.ndarray], np.ndarray], queries: np.ndarray, size: int
) -> tuple[np.ndarray, float]:
    """What is found for `queries`, `size` at a time, and the seconds that took; once to warm up."""
    parts = [queries[at : at + size] for at in range(0, len(queries), size)]
    found = [search(part) for part in parts]
    started = time.perf_counter()
    for part in parts:
        search(part)
    return np.concatenate(found), time.perf_counter() - started


def _counted(store: Datastore) -> dict[str, int]:
    """How many keys are read of a datastore from now on."""
    count, keys_of = {"keys": 0}, store.keys_of

    def counting(entries: np.ndarray) -> np.ndarray:
        count["keys"] += len(entries)
        return keys_of(entries)

    store.keys_of = counting  # this object's alone
    return count


def _opened(place: Path, entries: int) -> dict[str, Any]:
    """The same entries in SHARDS shards, opened by processes of their own."""
    _shard(place, entries, SHARDS)
    opened = []
    for shards in (SHARDS, 1):
        with Process(OPENED, Opening(str(place), shards)) as process:
            opened.append(process.result())
    everything, single = opened
    more = everything["private_bytes"] - single["private_bytes"]
    return {
        "open_seconds": everything["seconds"],
        "resident_bytes_per_entry": more / (everything["entries"] - single["entries"]),
    }


def _shard(place: Path, entries: int, shards: int) -> None:
    """Index a datastore anew, in so many shards."""
    store = Datastore.open(place)
    for number, (start, stop) in enumerate(shard_ranges(entries, shards)):
        shard = IndexShard.build(store, start, stop, AUTO, SEED)
        shard.save(shard_directory(place, number))


def _served(keys: SyntheticKeys, place: Path, sizes: Sizes) -> dict[str, Any]:
    """What it costs to ask shards in other processes, over the slowest of them. They are small: so
    many that work at a time are more than there are cores."""
    entries = SERVED * SERVED_ENTRIES
    keys.write(place, entries, SEED + 1)
    _shard(place, entries, SERVED)
    store = Datastore.open(place)
    shards = [IndexShard.load(each, store) for each in saved_shards(place)]
    queries = keys.draw(QUERIES, SEED + 3)
    with connection():
        served = serve_shards(place, 1, 0.05)
        try:
            remote, alone = [], []
            for number in range(sizes.searches):
                asked = queries[(number * BATCH) % QUERIES :][:BATCH]
                remote.append(_timed(lambda asked=asked: served.search(asked, K)))
                alone.append(
                    max(_timed(lambda one=one, asked=asked: one.search(asked, K)) for one in shards)
                )
        finally:
            served.close()
    return {"remote_overhead_ms": 1e3 * float(np.median(remote) - np.median(alone))}


def _written(keys: SyntheticKeys, place: Path, sizes: Sizes) -> dict[str, Any]:
    """Small durable additions: how many a second, when they are found, and what merging them
    costs those who search meanwhile."""
    keys.write(place, sizes.growth[0], SEED + 2)
    save_index(place)
    reader = LocalRetriever.load(saved_shards(place), Datastore.open(place))
    added, seen, number = 0, [], 0
    batches = [keys.segment(f"more-{n:05d}", ADDED, SEED + 5_000_000 + n) for n in range(100)]
    started = time.perf_counter()
    while (passed := time.perf_counter() - started) < sizes.add_seconds:
        name = f"more-{number:05d}"
        datastore.write_segment(place, name, batches[number % len(batches)])
        datastore.publish(place, [name])
        added, number = added + ADDED, number + 1
    for _ in range(10):
        name = f"more-{number:05d}"
        batch = keys.segment(name, ADDED, SEED + 6_000_000 + number)
        number += 1
        begun = time.perf_counter()
        datastore.write_segment(place, name, batch)
        datastore.publish(place, [name])
        reader.refresh()
        if reader.search(batch.keys[:1], 1).entries[0, 0] < reader.entries - ADDED:
            raise ValueError(f"{name} was published and is not found")
        seen.append(1e3 * (time.perf_counter() - begun))
    queries = keys.draw(SMALL_BATCH, SEED + 4)
    before = _tail(reader, queries, sizes.searches)
    with _compacting(place) as running:
        meanwhile = _tail(reader, queries, sizes.searches, running)
    return {
        "adds_per_second": added / passed,
        "visible_ms": float(np.median(seen)),
        "search_p99_while_compacting": meanwhile / before,
        "segments_merged": number,
    }


def _tail(
    reader: LocalRetriever,
    queries: np.ndarray,
    searches: int,
    running: Callable[[], bool] | None = None,
) -> float:
    """The 99th percentile of the seconds of a search, of at least so many, or while something
    runs."""
    times = []
    while len(times) < searches if running is None else running() or len(times) < 3:
        times.append(_timed(lambda: reader.search(queries, K)))
    return float(np.percentile(times, 99))


@contextmanager
def _compacting(place: Path) -> Iterator[Callable[[], bool]]:
    """Another process merges all segments; yields whether it is still at it."""
    child = subprocess.Popen([sys.executable, "-c", COMPACT, str(place)])
    try:
        yield lambda: child.poll() is None
    finally:
        if child.wait() != 0:
            raise OSError("merging segments failed (what it said stands above)")


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def show(results: dict[str, Any]) -> None:
    """Tables for people."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    near = results["neighbour_distance"]
    console.print(
        f"keys of {results['width']} dimensions; median distance to the nearest of another "
        f"sentence {near['real']:.3g} among the model's own, {near['synthetic']:.3g} among as many "
        "of these"
    )
    grown = table(
        "One shard, one core", "entries", "index", "codes", "keys read", "recall", "flat", "ours"
    )
    for one in results["growth"]:
        kind = one["why"].partition(":")[0]
        times = (f"{one[name]:.3g} ms" for name in ("flat_ms_a_query", "ms_a_query"))
        counts = (f"{one[name]:,.0f}" for name in ("codes_scanned", "keys_read"))
        recall = f"{one['recall_at_16']:.3f}"
        grown.add_row(f"{one['entries']:,}", kind, *counts, recall, *times)
    console.print(grown)
    for one in results["growth"]:
        console.print(f"{one['why']}; built in {one['build_seconds']:.0f} s", markup=False)
    last = results["growth"][-1]
    console.print(
        f"batches of {SMALL_BATCH}: median {last['p50_ms']:.1f} ms, 99th percentile "
        f"{last['p99_ms']:.1f} ms\n"
    )
    console.print(compared(TARGETS, results))
