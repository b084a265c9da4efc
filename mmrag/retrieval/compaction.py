"""Many small segments become few large ones, and what was deleted leaves the disk.

Entries keep their ids: a merged segment has a row for each entry of those it was made of, and the
rows of deleted ones are empty; where enough of them lie together they take no room on the disk. The
list is replaced at the end, by rename: whoever reads meanwhile reads on, and finds what is searched
and what is deleted as it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from uuid import uuid4

import numpy as np

from mmrag import durable
from mmrag.names import Names
from mmrag.retrieval import datastore, snapshots
from mmrag.retrieval.datastore import listing, locked, read_list, write_list
from mmrag.retrieval.segment import Description
from mmrag.retrieval.stored import ARRAYS, IDS, StoredSegment, open_segment, segment_file, tables
from mmrag.retrieval.tensors import write_tensors
from mmrag.retrieval.wording import Entry

FANOUT = 8
"""So many neighbours of a size become one: each entry is written again a logarithm of times."""
LARGEST = 1 << 22
"""Entries of a segment that is merged with no other any more."""
ERASED_SHARE = 0.25
"""Of a segment's entries: deleted ones that are worth writing it again without them."""
MADE = "compact-"
"""Beginning of the names of segments that are made here."""
BLOCK = 16_384
"""Entries in memory at once."""


@dataclass(frozen=True)
class Compacted:
    """What `compact` did."""

    merged: int
    """Segments that are no more."""
    made: int
    """Segments that stand for them."""
    erased: int
    """Deleted entries whose contents left the disk."""


def compact(directory: Path | str, everything: bool = False) -> Compacted:
    """Merge neighbouring segments where there are FANOUT of a size, and write again those of which
    ERASED_SHARE was deleted; or, with `everything`, all that are smaller than LARGEST, and all from
    which anything was deleted.

    May run while others search, publish and delete; what is deleted meanwhile is hidden at once
    and erased the next time. One that is stopped at any moment leaves the old list or the new one.
    """
    directory = Path(directory).absolute()
    description = datastore.describe(directory)
    done = Compacted(0, 0, 0)
    with locked(directory, datastore.COMPACTING):
        while runs := _runs(directory, everything):
            for run in runs:
                erased = _merge(directory, description, run)
                if erased is not None:
                    done = Compacted(done.merged + len(run), done.made + 1, done.erased + erased)
        _sweep(directory)
    return done


def _sweep(directory: Path) -> None:
    """Remove what neither the list nor a snapshot names any more; what was written and not yet
    published stays."""
    with locked(directory):
        listed = read_list(directory)
        named = [listed, *snapshots.lists(directory).values()]
        kept = {one["name"] for each in named for one in each["segments"]}
        ours = {path.stem for path in (directory / "segments").glob(f"{MADE}*")}
        for name in {*listed.get("merged", []), *ours} - kept:
            segment_file(directory, name).unlink(missing_ok=True)
        for file in directory.glob("deleted-*.npy"):
            if file.name not in {each["deleted"] for each in named}:
                file.unlink(missing_ok=True)
        for aside in directory.glob(f".{MADE}*"):
            aside.unlink(missing_ok=True)
        held = [name for name in listed.pop("merged", []) if name in kept]
        if held != read_list(directory).get("merged", []):
            durable.sync(directory / "segments")
            write_list(directory, listed | ({"merged": held} if held else {}))


def _runs(directory: Path, everything: bool) -> list[list[str]]:
    """Names of neighbouring segments that are to become one, each run for itself."""
    listed = read_list(directory)
    segments = listed["segments"]
    edges = np.cumsum([0, *(one["entries"] for one in segments)])
    gone = np.searchsorted(datastore.deleted_entries(directory, listed), edges)
    pending = np.diff(gone) - [one.get("erased", 0) for one in segments]
    ends = np.isin(edges[:-1], list(snapshots.ends(directory))).tolist()
    sizes = [one["entries"] for one in segments]
    highest = _tier(LARGEST)
    runs: list[list[int]] = []
    for tier in [highest] if everything else range(highest + 1):
        found = _neighbours(sizes, ends, tier)
        runs = [run for run in found if len(run) >= (2 if everything else FANOUT)]
        if runs:
            break
    merged = {number for run in runs for number in run}
    for number, one in enumerate(segments):
        least = 1 if everything else max(1, math.ceil(ERASED_SHARE * one["entries"]))
        if number not in merged and pending[number] >= least:
            runs.append([number])
    return [[segments[number]["name"] for number in run] for run in runs]


def _neighbours(sizes: Sequence[int], ends: Sequence[bool], tier: int) -> list[list[int]]:
    """Numbers of segments that stand side by side and are of this tier or a lower one, in runs of
    little more than LARGEST entries; none goes on where a snapshot ends."""
    runs: list[list[int]] = [[]]
    for number, size in enumerate(sizes):
        small = size < LARGEST and _tier(size) <= tier
        if not small or ends[number] or sum(sizes[one] for one in runs[-1]) >= LARGEST:
            runs.append([])
        if small:
            runs[-1].append(number)
    return runs


def _tier(entries: int) -> int:
    return int(math.log(max(entries, 1), FANOUT))


def _merge(directory: Path, description: Description, names: Sequence[str]) -> int | None:
    """Replace neighbouring segments by one: how many deleted entries are no longer in it; None
    where the list has changed too much for it."""
    listed = read_list(directory)
    place = [one["name"] for one in listed["segments"]].index(names[0])
    edges = np.cumsum([0, *(one["entries"] for one in listed["segments"])])
    start, stop = int(edges[place]), int(edges[place + len(names)])
    deleted = datastore.deleted_entries(directory, listed)
    deleted = deleted[(deleted >= start) & (deleted < stop)] - start
    run = listed["segments"][place : place + len(names)]
    sources = [open_segment(directory, one["name"], description, one) for one in run]
    name = f"{MADE}{uuid4().hex}"
    aside = directory / f".{name}"
    _write(aside, sources, deleted)
    durable.place(aside, segment_file(directory, name))
    made = listing(open_segment(directory, name, description)) | {"erased": len(deleted)}
    with locked(directory):
        listed = read_list(directory)
        there = [one["name"] for one in listed["segments"][place : place + len(names)]]
        crossed = any(start < end < stop for end in snapshots.ends(directory))
        if crossed or there != list(names):  # a snapshot, or another datastore, was made meanwhile
            segment_file(directory, name).unlink()
            return None
        before = sum(one.get("erased", 0) for one in listed["segments"][place : place + len(names)])
        listed["segments"][place : place + len(names)] = [made]
        listed["merged"] = [*listed.get("merged", []), *names]
        write_list(directory, listed)
    return len(deleted) - before


def _write(aside: Path, sources: Sequence[StoredSegment], deleted: np.ndarray) -> None:
    """The arrays of `sources` laid end to end, empty at the places `deleted`."""
    edges = np.cumsum([0, *(one.entries for one in sources)])
    gone = np.zeros(edges[-1], bool)
    gone[deleted] = True
    told = _tables(sources, edges, gone)

    def blocks(field: str) -> Iterator[np.ndarray]:
        if field in told:
            yield told[field]
            return
        shift = 0
        for one, (start, stop) in zip(sources, pairwise(edges.tolist()), strict=True):
            for first in range(start, stop, BLOCK):
                last = min(first + BLOCK, stop)
                values = np.array(one.arrays[field][first - start : last - start])
                if field == "utterances":  # which is where entries belong, and nothing they say
                    yield values + np.int32(shift)
                    continue
                if field == "windows":
                    _forget(values, one, first - start, gone[start:stop])
                values[gone[first:last]] = 0
                yield values
            shift += len(one.utterances)

    rows = {
        field: (np.dtype(dtype), (int(edges[-1]), *sources[0].arrays[field].shape[1:]))
        for field, dtype in ARRAYS.items()
    }
    rest = {field: (values.dtype, values.shape) for field, values in told.items()}
    write_tensors(aside, rows | rest, blocks, changing=[IDS])


def _forget(windows: np.ndarray, one: StoredSegment, first: int, gone: np.ndarray) -> None:
    """Blank in windows (M, W), of the entries from `first` on, the tokens of entries that are gone
    and stand beside them in their utterances."""
    if not gone.any():
        return
    utterances, before = one.arrays["utterances"], windows.shape[1] // 2
    own = utterances[first : first + len(windows)]
    for column in range(windows.shape[1]):
        places = first + np.arange(len(windows)) + column - before
        inside = (places >= 0) & (places < len(gone))
        at = np.where(inside, places, 0)
        windows[inside & gone[at] & (utterances[at] == own), column] = 0


def _tables(
    sources: Sequence[StoredSegment], edges: np.ndarray, gone: np.ndarray
) -> dict[str, np.ndarray]:
    """The names that are still in use, and the documents' numbers."""
    pairs: list[tuple[str, str] | None] = []
    numbers: dict[str, int] = {}
    wordings: dict[str, Entry] = {}
    for one, (start, stop) in zip(sources, pairwise(edges.tolist()), strict=True):
        living = np.zeros(len(one.utterances), bool)
        living[one.arrays["utterances"][~gone[start:stop]]] = True
        documents = one.arrays["utterance_documents"]
        for utterance, alive in enumerate(living.tolist()):
            local = int(documents[utterance])
            if not alive or local < 0:
                pairs.append(None)
                continue
            document = one.documents[local]
            numbers[document] = int(one.arrays[IDS][local])
            pairs.append((one.utterances[utterance], document))
            if worded := one.wording(local):
                wordings[document] = worded  # the latest
    made = tables(pairs, wordings)
    names = Names(made["document_text"], made["document_offsets"])
    return made | {IDS: np.array([numbers[name] for name in names], np.int32)}
