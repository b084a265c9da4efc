"""Many small segments become few large ones, and what was deleted leaves the disk.

Entries keep their ids: a merged segment has a row for each entry of those it was made of, and the
rows of deleted ones are empty; where enough of them lie together they take no room on the disk. The
list is replaced at the end, by rename: whoever reads meanwhile reads on, and finds what is searched
and what is deleted as it was.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from uuid import uuid4

import numpy as np

from mmrag import durable
from mmrag.artifact import write_json
from mmrag.retrieval import datastore, snapshots
from mmrag.retrieval.columns import Names
from mmrag.retrieval.datastore import locked, read_list
from mmrag.retrieval.segment import Description
from mmrag.retrieval.stored import ARRAYS, IDS, StoredSegment, open_segment, seal, tables

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
        ours = {path.name for path in (directory / "segments").glob(f"{MADE}*")}
        for name in {*listed.get("merged", []), *ours} - kept:
            shutil.rmtree(directory / "segments" / name, ignore_errors=True)
        for file in directory.glob("deleted-*.npy"):
            if file.name not in {each["deleted"] for each in named}:
                file.unlink(missing_ok=True)
        for aside in directory.glob(f".{MADE}*"):
            shutil.rmtree(aside, ignore_errors=True)
        held = [name for name in listed.pop("merged", []) if name in kept]
        if held != read_list(directory).get("merged", []):
            durable.sync(directory / "segments")
            write_json(directory / datastore.LIST, listed | ({"merged": held} if held else {}))


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
    sources = [open_segment(directory, name, description) for name in names]
    name = f"{MADE}{uuid4().hex}"
    aside = directory / f".{name}"
    aside.mkdir()
    _write(aside, sources, deleted)
    durable.rename(aside, directory / "segments" / name)
    with locked(directory):
        listed = read_list(directory)
        there = [one["name"] for one in listed["segments"][place : place + len(names)]]
        crossed = any(start < end < stop for end in snapshots.ends(directory))
        if crossed or there != list(names):  # a snapshot, or another datastore, was made meanwhile
            shutil.rmtree(directory / "segments" / name)
            return None
        before = sum(one.get("erased", 0) for one in listed["segments"][place : place + len(names)])
        made = {"name": name, "entries": stop - start, "erased": len(deleted)}
        listed["segments"][place : place + len(names)] = [made]
        listed["merged"] = [*listed.get("merged", []), *names]
        write_json(directory / datastore.LIST, listed)
    return len(deleted) - before


def _write(aside: Path, sources: Sequence[StoredSegment], deleted: np.ndarray) -> None:
    """The arrays of `sources` laid end to end, empty at the places `deleted`."""
    edges = np.cumsum([0, *(one.entries for one in sources)])
    gone = np.zeros(edges[-1], bool)
    gone[deleted] = True
    for field, dtype in ARRAYS.items():
        shape = (int(edges[-1]), *sources[0].arrays[field].shape[1:])
        with _Rows(aside / f"{field}.npy", shape, dtype) as rows:
            shift = 0
            for one, (start, stop) in zip(sources, pairwise(edges.tolist()), strict=True):
                for first in range(start, stop, BLOCK):
                    last = min(first + BLOCK, stop)
                    values = np.array(one.arrays[field][first - start : last - start])
                    if field == "utterances":  # which is where entries belong, and nothing they say
                        values += np.int32(shift)
                        rows.write(values)
                        continue
                    if field == "windows":
                        _forget(values, one, first - start, gone[start:stop])
                    values[gone[first:last]] = 0
                    rows.write(values)
                shift += len(one.utterances)
    for field, values in _tables(sources, edges, gone).items():
        np.save(aside / f"{field}.npy", values, allow_pickle=False)
    seal(aside)


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
    made = tables(pairs)
    names = Names(made["document_text"], made["document_offsets"])
    return made | {IDS: np.array([numbers[name] for name in names], np.int32)}


class _Rows:
    """An npy file that is written row by row; rows of zeros are left out of it where they can."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: type) -> None:
        self._stream = path.open("wb")
        fields = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype))}
        header = {**fields, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._stream, header)
        self._dtype = np.dtype(dtype)

    def __enter__(self) -> _Rows:
        return self

    def write(self, rows: np.ndarray) -> None:
        """The next rows (M, …)."""
        rows = np.ascontiguousarray(rows, self._dtype)
        empty = ~rows.reshape(len(rows), -1).any(axis=1) if rows.size else np.zeros(len(rows), bool)
        edges = np.flatnonzero(np.diff(empty)) + 1
        for first, last in pairwise([0, *edges.tolist(), len(rows)]):
            part = rows[first:last]
            if len(part) and empty[first]:
                self._stream.seek(part.nbytes, 1)
            else:
                self._stream.write(part.tobytes())

    def __exit__(self, *_: object) -> None:
        with suppress(ValueError):
            self._stream.truncate()  # rows of zeros at the end, too, are part of it
            self._stream.close()
