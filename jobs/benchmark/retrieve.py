"""How well, how fast and in how much memory a large datastore is searched and written to.

The keys are synthetic, and lie as the shipped model's own do (`keys`). Searches have one core; the
index is what `index.kind: auto` makes of one shard. Datastores and indexes are the large part of a
long run: where they are kept, the next run goes on with those that are there (`built`).
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from rich.console import Console
from rich.table import Table

from cluster.connection import connection
from cluster.shards import serve_shards
from jobs.benchmark.built import AUTO, Building, built, shards_of
from jobs.benchmark.decoded import ALONE, FLAT, IVFPQ, OURS, Decoding
from jobs.benchmark.keys import SyntheticKeys
from jobs.benchmark.opened import Opening
from jobs.benchmark.process import DECODED, OPENED, SHARING, Process
from jobs.benchmark.progress import Progress
from jobs.benchmark.targets import Target, compared, table
from mmrag import shipped
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
TOLD = 1_000_000
"""Keys from one word about how far it is to the next."""
SHARDS, SERVED, SERVED_ENTRIES = 8, 4, 2000
ADDED = 100
"""Entries added at once."""
COMPACT = """
import sys
from mmrag.retrieval.compaction import compact
compact(sys.argv[1], everything=True)
"""
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
    "against_knn_transformers": Target(
        "kNN-LM, tokens decoded a second: over the faster of two hooks",
        "≥ 10",
        lambda ratio: ratio >= 10,
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
        f"{SHARDS} shards of the largest opened",
        "≤ 2 s at 10 M",
        lambda r: r <= 2,
        "{:.2f} s".format,
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


TEN_MILLION = 10_000_000
OF_TEN_MILLION = {
    "speedup_over_flat": replace(
        TARGETS["speedup_over_flat"], wanted="≥ 100 at 10 M", met=lambda ratio: ratio >= 100
    ),
}
"""Targets in place of those above, where the largest is that large."""


@dataclass(frozen=True)
class Sizes:
    """How many entries, and how long to measure."""

    growth: tuple[int, ...]
    """Entries of the datastores that are searched, ascending."""
    searches: int
    add_seconds: float
    clips: int
    """Clips that are decoded, and as many as `rows` at once."""
    rows: int
    decodings: int
    """Of each way to decode."""
    decode_seconds: float
    """After which a way that takes a clip at a time begins no other."""


FULL = Sizes(
    growth=(100_000, 316_000, 1_000_000),
    searches=300,
    add_seconds=10,
    clips=64,
    rows=32,
    decodings=5,
    decode_seconds=30,
)
QUICK = Sizes(
    growth=(50_000, 200_000),
    searches=100,
    add_seconds=3,
    clips=32,
    rows=16,
    decodings=3,
    decode_seconds=10,
)


def measure(directory: Path, sizes: Sizes, kept: Path | None = None) -> dict[str, Any]:
    """Everything. What is searched lies below `kept`, if it is given, and stays there; the rest,
    and what is written to, below `directory`."""
    faiss.omp_set_num_threads(1)
    tell = Progress()
    tell("reading sentences for keys to imitate")
    keys = SyntheticKeys(shipped.TINY, SEED)
    results: dict[str, Any] = {
        "width": keys.width,
        "neighbour_distance": asdict(keys.likeness),
        "growth": [],
    }
    for entries in sizes.growth:
        tell(f"{entries:,} entries")
        place = (kept or directory) / f"of-{entries}"
        keys.write(place, entries, SEED, tell)
        row, queries, exact = _searched(keys, place, sizes, tell)
        results["growth"].append(row)
    results |= _largest(results["growth"])
    tell(f"{SHARDS} shards")
    results |= _opened(place, tell)
    results |= _decoded(place, queries, exact, sizes, tell)
    tell(f"{SERVED} shards behind actors")
    results |= _served(keys, directory / "served", sizes)
    tell("written to while it is searched")
    results |= _written(keys, directory / "written", sizes)
    tell("done")
    return results


def _searched(
    keys: SyntheticKeys, place: Path, sizes: Sizes, tell: Progress
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """One shard with all entries: built, and searched beside an exact one. Also the queries and
    the entries (QUERIES, K) that are nearest to them."""
    tell("one shard")
    whole = Building(str(place), str(place / "in-1"), 1, tell)
    cost = built(whole)
    store = Datastore.open(place)
    entries = store.entries
    [saved] = shards_of(whole.index)
    shard = IndexShard.load(saved, store)
    queries = keys.draw(QUERIES, SEED + 1_000_000)
    tell("every key compared")
    exact, flat = _exact(store, queries, tell)
    tell("searched")
    found, ours = _by_batches(lambda batch: shard.search(batch, K).entries, queries, BATCH)
    settings, recall = shard.settings, _recall(exact, found)
    # Beside reading the keys of all that the scalar codes choose among:
    every = settings.model_copy(update={"rerank": max(settings.rerank, settings.refine)})
    found, _ = _by_batches(lambda b: shard.search(b, K, settings=every).entries, queries, BATCH)
    lost, read = _recall(exact, found) - recall, _counted(store)
    times = []
    for number in range(sizes.searches):
        asked = keys.draw(SMALL_BATCH, SEED + 2_000_000 + number)
        started = time.perf_counter()
        shard.search(asked, K)
        times.append(1e3 * (time.perf_counter() - started))
    scanned = settings.probes * entries / settings.lists
    row = {
        "entries": entries,
        "why": shard.why,
        "probes": settings.probes,
        "rerank": settings.rerank,
        "build_seconds": cost["seconds"],
        "build_peak_bytes": cost["peak_bytes"],
        "recall_when_built": shard.recall,
        "recall_at_16": recall,
        "recall_lost_by_longer_codes": lost,
        "keys_saved_by_longer_codes": 1 - settings.rerank / every.rerank,
        "flat_ms_a_query": 1e3 * flat / QUERIES,
        "ms_a_query": 1e3 * ours / QUERIES,
        "speedup_over_flat": flat / ours,
        "p50_ms": float(np.percentile(times, 50)),
        "p99_ms": float(np.percentile(times, 99)),
        "codes_scanned": 0 if settings.kind == "flat" else scanned,
        "keys_read": read["keys"] / sizes.searches / SMALL_BATCH,
    }
    return row, queries, exact


def _recall(exact: np.ndarray, found: np.ndarray) -> float:
    """The share of the nearest entries (Q, K) that were found."""
    pairs = zip(exact.tolist(), found.tolist(), strict=True)
    return float(np.mean([len(set(a) & set(b)) / K for a, b in pairs]))


def _largest(growth: list[dict[str, Any]]) -> dict[str, Any]:
    """What is said of the largest datastore, and how time grew up to it."""
    first, last = growth[0], growth[-1]
    names = ("recall_at_16", "speedup_over_flat", "p50_ms", "p99_ms")
    exponent = None
    if len(growth) > 1:
        slower = np.log(last["ms_a_query"] / first["ms_a_query"])
        exponent = float(slower / np.log(last["entries"] / first["entries"]))
    return {name: last[name] for name in names} | {"growth_exponent": exponent}


def _exact(store: Datastore, queries: np.ndarray, tell: Progress) -> tuple[np.ndarray, float]:
    """The nearest entries (Q, K) by comparing every key, and the seconds of the comparing alone."""
    best, among, seconds = np.zeros((len(queries), 0)), np.zeros((len(queries), 0), np.int64), 0.0
    for start in range(0, store.entries, CHUNK):
        if start and start % TOLD == 0:
            tell(f"{start:,} of {store.entries:,} keys compared")
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


def _opened(place: Path, tell: Progress) -> dict[str, Any]:
    """The same entries in SHARDS shards, opened by processes of their own."""
    order = Building(str(place), str(place / f"in-{SHARDS}"), SHARDS, tell)
    built(order)
    opened = []
    for shards in (SHARDS, 1):
        with Process(OPENED, Opening(str(place), order.index, shards)) as process:
            opened.append(process.result())
    everything, single = opened
    more = everything["private_bytes"] - single["private_bytes"]
    return {
        "open_seconds": everything["seconds"],
        "resident_bytes_per_entry": more / (everything["entries"] - single["entries"]),
    }


def _decoded(
    place: Path, queries: np.ndarray, exact: np.ndarray, sizes: Sizes, tell: Progress
) -> dict[str, Any]:
    """Clips decoded with the largest datastore, by the engine and by kNN-LM as a hook."""
    tell("decoding with the largest")
    peer = place / "hooked"
    peer.mkdir(exist_ok=True)
    files = {"queries": peer / "queries.npy", "nearest": peer / "nearest.npy"}
    for file, values in zip(files.values(), (queries, exact), strict=True):
        np.save(file, values, allow_pickle=False)
    order = Decoding(
        model=shipped.TINY,
        datastore=str(place),
        index=str(place / "in-1"),
        peer=str(peer),
        **{name: str(file) for name, file in files.items()},
        k=K,
        clips=sizes.clips,
        rows=sizes.rows,
        repeats=sizes.decodings,
        seconds=sizes.decode_seconds,
        progress=tell,
    )
    with Process(DECODED, order, **SHARING) as process:
        decoded = process.result()
    speeds = decoded["tokens_per_second"]
    ratios = {name: speeds[OURS] / speeds[name] for name in (FLAT, IVFPQ)}
    named = {f"against_knn_transformers_{name}": ratio for name, ratio in ratios.items()}
    return {"decoded": decoded, **named, "against_knn_transformers": min(ratios.values())}


def _served(keys: SyntheticKeys, place: Path, sizes: Sizes) -> dict[str, Any]:
    """What it costs to ask shards in other processes, over the slowest of them. They are small: so
    many that work at a time are more than there are cores."""
    entries = SERVED * SERVED_ENTRIES
    keys.write(place, entries, SEED + 1)
    store = Datastore.open(place)
    for number, span in enumerate(shard_ranges(entries, SERVED)):
        IndexShard.build(store, *span, AUTO, SEED).save(shard_directory(place, number))
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
    measures = ("index", "codes", "keys read", "recall", "flat", "ours", "p50", "p99")
    grown = table("One shard, one core", "entries", *measures)
    for one in results["growth"]:
        kind = one["why"].partition(":")[0]
        names = ("flat_ms_a_query", "ms_a_query", "p50_ms", "p99_ms")
        times = (f"{one[name]:.3g} ms" for name in names)
        counts = (f"{one[name]:,.0f}" for name in ("codes_scanned", "keys_read"))
        recall = f"{one['recall_at_16']:.3f}"
        grown.add_row(f"{one['entries']:,}", kind, *counts, recall, *times)
    console.print(grown)
    console.print(
        f"flat and ours: a query of batches of {BATCH}; p50 and p99: whole batches of "
        f"{SMALL_BATCH}; codes and keys read: a query"
    )
    for one in results["growth"]:
        cost = f"{one['build_seconds']:.0f} s, {one['build_peak_bytes'] / 1e9:.1f} GB at most"
        saved, lost = (one[f"{name}_by_longer_codes"] for name in ("keys_saved", "recall_lost"))
        chose = f"scalar codes leave {saved:.0%} of keys unread and lose {lost:.4f} of recall"
        console.print(f"{one['why']}; built in {cost}; {chose}", markup=False)
    console.print(_decoding(results))
    alike = "{transcripts_alike} of {transcripts_compared}".format(**results["decoded"])
    console.print(f"{alike} transcripts of the engine are those of the hook over every key\n")
    targets = TARGETS | (OF_TEN_MILLION if _entries(results) >= TEN_MILLION else {})
    console.print(compared(targets, results))


def _entries(results: dict[str, Any]) -> int:
    """Of the largest datastore."""
    return results["growth"][-1]["entries"]


def _decoding(results: dict[str, Any]) -> Table:
    """How fast clips are decoded in which way."""
    decoded = results["decoded"]
    speeds, recall = decoded["tokens_per_second"], results["recall_at_16"]
    heading = f"Greedy decoding, {_entries(results):,} entries, k {decoded['knn']['k']}, one core"
    rows = table(heading, "", "tokens a second", "recall", "ours is")
    for name, title, found in (
        (ALONE, "engine, without a datastore", None),
        (OURS, "engine, kNN-LM at every step", recall),
        (FLAT, "hook, a clip at a time, flat", 1.0),
        (IVFPQ, "hook, a clip at a time, IVFPQ", decoded["ivfpq_recall"]),
    ):
        ratio = results.get(f"against_knn_transformers_{name}")
        told = "–" if found is None else f"{found:.3f}", "" if ratio is None else f"{ratio:.1f} x"
        rows.add_row(title, f"{speeds[name]:,.0f}", *told)
    return rows
