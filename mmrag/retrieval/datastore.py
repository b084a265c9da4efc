"""Entries on disk: what the language model knew (a key), what came next, and where that was.

A datastore is a directory. Keys and values live in immutable segments, which many processes may
write at once; `segments.json` names the ones that count, in order, and is replaced by rename.

    datastore.json                FORMAT, and what made the keys: `Description`
    segments.json                 published segments, their entry counts and digests; the deletions;
                                  how many documents have been numbered
    deleted-<n>.npy               (M,) int64, deleted entries
    snapshots/<name>.json         lists as they once were (`snapshots`)
    segments/<name>.safetensors   a segment, its arrays in one file (`tensors`):
        keys       (N, D) float16
        tokens     (N,) int32
        windows    (N, W) int32
        positions  (N,) int32
        utterances (N,) int32, ascending: which of the segment's utterances
        surprisals (N,) float16, or not there: how little the model expects each token as text
        utterance_text, utterance_offsets    the names of its U utterances (`Names`)
        utterance_documents (U,) int32, which of its L documents
        document_text, document_offsets      the names of these
        document_digests (L,) uint64, ascending: their `digest`, to be searched by
        document_ids     (L,) int32, their numbers in the datastore, given when it is published
        wording_text, wording_offsets        JSON of the documents that were given as entries
                         (`wording`); "" for the others, and none of these where no document was
        wording_weights  (L,) float16, what they weigh: those of 0 are never found

A file's header has the digest of each of these arrays but the last, and the list has that of the
header and that of the numbers. All of them stay mapped: opening a datastore reads the list and the
files' headers. An entry's id is its place in the segments laid end to end, a document's is its
number in order of appearance. Segments are only ever appended and deletion only hides, so ids never
change. What a function here wrote is flushed when it returns, and the list names nothing that is
not: a power cut leaves the old list or the new one. `Datastore.of` holds segments in memory
instead. Nothing here searches, and nothing here knows a model.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from mmrag import artifact, durable
from mmrag.artifact import write_json
from mmrag.records import NO_ENTRY, Passages
from mmrag.retrieval.columns import Column, spread
from mmrag.retrieval.local import copy_keys
from mmrag.retrieval.segment import DatastoreError, Description, Segment
from mmrag.retrieval.stored import (
    ARRAYS,
    IDS,
    StoredSegment,
    arrays_of,
    numbered,
    open_documents,
    open_mapped,
    open_segment,
    read_json,
    segment_file,
    write_file,
)
from mmrag.retrieval.tensors import digest, overwrite
from mmrag.retrieval.wordings import Wordings
from mmrag.storage import Location

LIST = "segments.json"
COMPACTING = ".compacting"
"""The lock of whoever merges segments."""
FORMAT = 3
"""Of the files below; 1 held every name and number in memory, 2 had a directory a segment."""
MANY_ROWS = 4096
"""Rows from which on READERS threads read: a disk answers many requests at a time."""
READERS = 8


def create(directory: Path | str, description: Description) -> None:
    """Make an empty datastore. Finding one of the same description there changes nothing."""
    directory = Path(directory).absolute()
    durable.make_directory(directory)
    if (directory / "datastore.json").exists():
        if describe(directory) != description:
            raise DatastoreError(f"{directory} already holds a datastore of another description")
        return
    durable.make_directory(directory / "segments")
    write_list(directory, {"segments": [], "deleted": None, "documents": 0})
    write_json(directory / "datastore.json", {"format": FORMAT, **asdict(description)})


def describe(directory: Path | str) -> Description:
    """Read `datastore.json`; DatastoreError if there is none."""
    path = Path(directory) / "datastore.json"
    fields = read_json(path)
    made = fields.pop("format", 1) if isinstance(fields, dict) else None
    if made is not None and made != FORMAT:
        raise DatastoreError(
            f"{Path(directory)} is a datastore of format {made}, and this version reads {FORMAT}: "
            "build it again"
        )
    try:
        return Description(**fields)
    except TypeError as error:
        raise DatastoreError(f"{path} does not describe a datastore: {error}") from None


def write_segment(directory: Path | str, name: str, segment: Segment) -> None:
    """Write a segment aside and rename it into place; `publish` makes it count.

    Safe in many processes at once. A segment of that name that was never published is replaced.
    Keys are prepared for the datastore's metric here. Raises ValueError if the segment does not
    fit the datastore, DatastoreError if the name is published already, or a snapshot has it.
    """
    directory = Path(directory).absolute()
    _check_name(name)
    arrays = arrays_of(name, segment, describe(directory))
    aside = directory / f".{name}.{uuid4().hex}"
    try:
        write_file(aside, arrays)
        with locked(directory):
            _check_unpublished(directory, read_list(directory), [name])
            durable.place(aside, segment_file(directory, name))
    finally:
        aside.unlink(missing_ok=True)


def publish(directory: Path | str, names: Sequence[str], instead_of: Iterable[int] = ()) -> None:
    """Append written segments, in this order: all of them appear at once, or none; what they stand
    `instead_of`, entries that are there, is hidden in the same moment.

    Raises ValueError for a name that is malformed, DatastoreError for a segment that is published
    already, given twice, missing or damaged.
    """
    directory = Path(directory).absolute()
    description = describe(directory)
    with locked(directory):
        listed = read_list(directory)
        _check_unpublished(directory, listed, names)
        new = [open_segment(directory, name, description) for name in names]
        digests = [np.zeros(0, np.uint64), *(one.arrays["document_digests"] for one in new)]
        before = open_documents(directory, listed["segments"], np.concatenate(digests))
        given, listed["documents"] = numbered(before, new, listed["documents"])
        for one in given:
            overwrite(segment_file(directory, one.name), IDS, one.arrays[IDS])
            listed["segments"].append(listing(one))
        gone = np.fromiter(instead_of, np.int64)
        if len(gone):
            gone = np.union1d(deleted_entries(directory, listed), gone)
            write_deleted(directory, listed, gone)
        else:
            write_list(directory, listed)


def delete(directory: Path | str, entries: Iterable[int]) -> None:
    """Hide entries, for good; deleting one twice is no error. ValueError for an unknown id."""
    directory = Path(directory).absolute()
    with locked(directory):
        listed = read_list(directory)
        total = sum(segment["entries"] for segment in listed["segments"])
        gone = np.unique(np.fromiter(entries, np.int64))
        if len(gone) and (gone[0] < 0 or gone[-1] >= total):
            raise ValueError(f"entries {gone[0]} to {gone[-1]}: {directory} has {total} entries")
        write_deleted(directory, listed, np.union1d(deleted_entries(directory, listed), gone))


def write_deleted(directory: Path, listed: dict[str, Any], deleted: np.ndarray) -> None:
    """Replace the list by `listed`, with these deleted entries (M,); under the list's lock."""
    taken = [file.stem for file in directory.glob("deleted-*.npy")]
    number = max((int(name.removeprefix("deleted-")) + 1 for name in taken), default=0)
    listed["deleted"] = f"deleted-{number}.npy"
    aside = directory / f".{listed['deleted']}"
    np.save(aside, deleted.astype(np.int64), allow_pickle=False)
    durable.rename(aside, directory / listed["deleted"])
    write_list(directory, listed)


class Datastore:
    """A snapshot of segments: the published ones of a directory, or some in memory.

    A directory's stay on disk, memory-mapped.
    """

    def __init__(self, directory: Path | None, description: Description) -> None:
        """Without entries yet; `open` and `of` give it some."""
        self.directory = directory
        self.description = description
        self._localized: set[str] = set()
        self._take([], np.zeros(0, np.int64))

    @classmethod
    def open(cls, directory: Location | str) -> Datastore:
        """Open the datastore in `directory`; DatastoreError names what is missing or damaged.

        One at a URL is opened as this machine's copy, which nobody may change.
        """
        directory = artifact.local(directory).absolute()
        opened = cls(directory, describe(directory))
        opened.refresh()
        return opened

    @classmethod
    def of(cls, description: Description, segments: Sequence[Segment]) -> Datastore:
        """A datastore of these segments in memory; it answers as if they had been published.

        Its `directory` is None. ValueError for a segment that does not fit the description.
        """
        made = cls(None, description)
        names = [f"part-{number:05d}" for number in range(len(segments))]
        held = [
            StoredSegment(name, arrays_of(name, segment, description))
            for name, segment in zip(names, segments, strict=True)
        ]
        made._take(numbered([], held)[0], made.deleted)
        return made

    def refresh(self) -> None:
        """See what has been published and deleted since. Entry and document ids stay the same.

        Raises DatastoreError, and changes nothing, for what is missing or damaged.
        """
        if self.directory is None:
            return
        held = {segment.name: segment for segment in self._segments}
        listed = read_list(self.directory)
        while True:
            try:
                segments = [
                    held.get(one["name"])
                    or open_segment(self.directory, one["name"], self.description, one)
                    for one in listed["segments"]
                ]
                deleted = deleted_entries(self.directory, listed)
                break
            except DatastoreError:  # merged meanwhile, and swept away?
                before, listed = listed, read_list(self.directory)
                if listed == before:
                    raise
        self._take(segments, deleted)

    def localize(self, local: Path, start: int, stop: int) -> None:
        """Read the keys of the entries [start, stop) from copies in `local`, a directory on this
        machine's own disk, which are made where they are missing.

        Raises OSError where a copy cannot be written, and DatastoreError for keys that are damaged;
        what was not copied is read where it is.
        """
        for one, first, last in zip(self._segments, self._starts, self._starts[1:], strict=False):
            if first < stop and last > start and one.name not in self._localized:
                copied = copy_keys(segment_file(self.directory, one.name), local)
                one.arrays["keys"] = open_mapped(copied)
                self._localized.add(one.name)

    def _take(self, segments: list[StoredSegment], deleted: np.ndarray) -> None:
        """Lay the segments end to end."""
        self._segments = segments
        self._starts = np.cumsum([0, *(segment.entries for segment in segments)])
        self._utterance_starts = np.cumsum([0, *(len(one.utterances) for one in segments)])

        def column(part: Callable[[StoredSegment, Any], np.ndarray], kind: type) -> Column:
            return Column([partial(part, one) for one in segments], self._starts, kind)

        firsts = dict(zip(map(id, segments), self._utterance_starts.tolist(), strict=False))
        self.tokens = column(lambda one, at: one.arrays["tokens"][at], np.int32)
        """(N,) int32, the token that follows each key."""
        self.positions = column(lambda one, at: one.arrays["positions"][at], np.int32)
        """(N,) int32, index of that token among its utterance's tokens."""
        self.utterances = column(
            lambda one, at: one.arrays["utterances"][at] + np.int32(firsts[id(one)]), np.int32
        )
        """(N,) int32, each entry's utterance; those of one utterance follow one another."""
        self.documents = column(
            lambda one, at: one.document_of(one.arrays["utterances"][at]), np.int32
        )
        """(N,) int32, each entry's document."""
        self.surprisals = column(lambda one, at: one.arrays["surprisals"][at], np.float16)
        """(N,) float16, how little the model expects each token from the text before it, nats."""
        self.deleted = deleted
        """(M,) int64, deleted entries, ascending."""
        self.wordings = Wordings(segments, self._starts, deleted)
        """What was said of documents that were given as entries."""
        entries, weights = self.wordings.weights()
        self.hidden = np.union1d(deleted, entries[weights == 0])
        """(M,) int64, those that nobody finds, ascending: the deleted ones, and what weighs 0."""

    def __str__(self) -> str:
        return "a datastore in memory" if self.directory is None else str(self.directory)

    @property
    def entries(self) -> int:
        """How many entries there are, deleted ones included: ids run from 0 to this."""
        return int(self._starts[-1])

    @property
    def segments(self) -> list[str]:
        """Names of the segments, in order."""
        return [segment.name for segment in self._segments]

    def require(self, identity: Mapping[str, str]) -> None:
        """Check that the keys were made by just these artifacts (role -> fingerprint)."""
        for role, fingerprint in identity.items():
            made = self.description.identity.get(role)
            if made != fingerprint:
                raise DatastoreError(
                    f"{self} was keyed by {role} {made}, but this is {role} {fingerprint}"
                )

    def keys(self, start: int, stop: int) -> np.ndarray:
        """Keys of the entries [start, stop): (stop - start, D) float32."""
        return self.keys_of(np.arange(start, stop))

    def keys_of(self, entries: np.ndarray) -> np.ndarray:
        """Keys of any entries (M,) -> (M, D) float32."""
        return self._gather("keys", entries).astype(np.float32)

    def said(self, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`tokens` and `documents` of any entries (M,), found at once: (M,) int32 each."""
        tokens, documents = np.empty((2, len(entries)), np.int32)
        for number, here, within in spread(entries, self._starts):
            one = self._segments[number]
            tokens[here] = one.arrays["tokens"][within]
            documents[here] = one.document_of(one.arrays["utterances"][within])
        return tokens, documents

    def windows(self, entries: np.ndarray) -> np.ndarray:
        """Token windows around `entries` (…,) -> (…, W) int32; zeros for `NO_ENTRY`."""
        entries = np.asarray(entries)
        windows = np.zeros((*entries.shape, self.description.window), np.int32)
        found = entries != NO_ENTRY
        windows[found] = self._gather("windows", entries[found])
        return windows

    def passages(self, entries: np.ndarray) -> Passages:
        """The windows around `entries` (M,), each token with its own key."""
        starts, stops = self.spans(entries)
        present = np.arange(self.description.window) < (stops - starts)[:, None]
        places = np.where(present, starts[:, None] + np.arange(self.description.window), 0)
        keys = np.zeros((*places.shape, self.description.width), np.float16)
        keys[present] = self._gather("keys", places[present])
        return Passages(np.where(present, self.tokens[places], 0), keys, present)

    def spans(self, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First entry of each entry's window and the one after its last: (M,) -> (M,) twice.

        The entries of a window follow one another and belong to one utterance.
        """
        before, entries = self.description.window // 2, np.asarray(entries)
        first, last = np.empty((2, len(entries)), np.int64)
        for number, here, within in spread(entries, self._starts):
            own = self._segments[number].arrays["utterances"]
            for edges, side in ((first, "left"), (last, "right")):
                edges[here] = self._starts[number] + np.searchsorted(own, own[within], side=side)
        stop = np.minimum(last, entries - before + self.description.window)
        return np.maximum(first, entries - before), stop

    def origins(self, entries: np.ndarray) -> list[tuple[str, str]]:
        """Document and utterance that each of `entries` (M,) comes from, by name; "" twice for one
        that was deleted and erased."""
        self._check(entries)
        found: list[tuple[str, str]] = [("", "")] * len(entries)
        for number, here, within in spread(np.asarray(entries), self._starts):
            one = self._segments[number]
            for place, at in zip(np.arange(len(entries))[here].tolist(), within, strict=True):
                utterance = int(one.arrays["utterances"][at])
                document = int(one.arrays["utterance_documents"][utterance])
                if document >= 0:
                    found[place] = one.documents[document], one.utterances[utterance]
        return found

    def entries_of(self, documents: Iterable[str]) -> np.ndarray:
        """The entries of documents by name, deleted ones left out: (M,) int64, ascending.

        A document that has none here adds none.
        """
        wanted, found = set(documents), [np.zeros(0, np.int64)]
        for one, start in zip(self._segments, self._starts.tolist(), strict=False):
            local = [at for name in wanted if (at := one.document(name)) is not None]
            if local:
                own = np.flatnonzero(np.isin(one.arrays["utterance_documents"], local))
                utterances = one.arrays["utterances"]
                edges = [np.searchsorted(utterances, own, side=side) for side in ("left", "right")]
                found += [start + np.arange(*edge) for edge in zip(*edges, strict=True)]
        return np.setdiff1d(np.concatenate(found), self.deleted, assume_unique=True)

    def document_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """The documents (D,) with entries that are not deleted, and how many each has (D,)."""
        living = np.ones(self.entries, bool)
        living[self.deleted] = False
        return np.unique(self.documents[living], return_counts=True)

    def document_id(self, name: str) -> int | None:
        """The id of a document, None for one that has no entries here."""
        for one in self._segments:
            if (local := one.document(name)) is not None:
                return int(one.arrays[IDS][local])
        return None

    def document_names(self, documents: np.ndarray) -> list[str]:
        """The names of documents (M,) by their ids; IndexError for one that there is not."""
        names: dict[int, str] = {}
        missing = np.unique(documents)
        for one in self._segments:
            at = np.flatnonzero(np.isin(one.arrays[IDS], missing))
            for local, number in zip(at.tolist(), one.arrays[IDS][at].tolist(), strict=True):
                names[number] = one.documents[local]
            missing = missing[~np.isin(missing, one.arrays[IDS][at])]
            if not len(missing):
                break
        if len(missing):
            raise IndexError(f"{self} has no document {missing[0]}")
        return [names[number] for number in np.asarray(documents).tolist()]

    def _gather(self, field: str, entries: np.ndarray) -> np.ndarray:
        """Rows of one of the large arrays: (M,) -> (M, …)."""
        self._check(entries)
        columns = {"keys": self.description.width, "windows": self.description.window}[field]
        rows = np.empty((len(entries), columns), ARRAYS[field])

        def fill(part: slice) -> None:
            for number, here, within in spread(entries[part], self._starts):
                rows[part][here] = self._segments[number].arrays[field].take(within, axis=0)

        if len(entries) < MANY_ROWS:
            fill(slice(None))
        else:
            edges = [len(entries) * part // READERS for part in range(READERS + 1)]
            list(_readers(os.getpid()).map(fill, map(slice, edges, edges[1:])))
        return rows

    def _check(self, entries: np.ndarray) -> None:
        """IndexError for an entry that does not exist."""
        if len(entries) and not 0 <= entries.min() <= entries.max() < self.entries:
            raise IndexError(
                f"entries {entries.min()} to {entries.max()}: {self} has {self.entries} entries"
            )


@cache
def _readers(process: int) -> ThreadPoolExecutor:
    """The threads of a process that read; a forked one has none of its parent's."""
    return ThreadPoolExecutor(READERS, f"read-{process}")


def deleted_entries(directory: Path, listed: Mapping[str, Any]) -> np.ndarray:
    """The deleted entries (M,) int64, ascending, as the list says."""
    name = listed["deleted"]
    return np.array(open_mapped(directory / name)) if name else np.zeros(0, np.int64)


def read_list(directory: Path) -> dict[str, Any]:
    """The segments that count, their entries, and the file of deletions."""
    return read_json(directory / LIST, dict)


def write_list(directory: Path, listed: Mapping[str, Any]) -> None:
    """Replace the list, a segment a line; under its lock."""
    text = json.dumps(listed).replace("}, {", "},\n{")  # names have no braces
    durable.write_text(directory / LIST, f"{text}\n")


def listing(segment: StoredSegment) -> dict[str, Any]:
    """What the list says of a segment whose documents have their numbers."""
    digests = {"header": segment.digest, "numbers": digest([segment.arrays[IDS]])}
    return {"name": segment.name, "entries": segment.entries, **digests}


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise ValueError(f"segment name {name!r}: small letters, digits, _ and - only")


def _check_unpublished(directory: Path, listed: Mapping[str, Any], names: Sequence[str]) -> None:
    """ValueError for a name that is malformed, DatastoreError for one that is given twice, was
    published, or was merged and is still named by a snapshot."""
    taken = {*listed.get("merged", []), *(one["name"] for one in listed["segments"])}
    for name in names:
        _check_name(name)
        if name in taken:
            raise DatastoreError(f"segment {name} of {directory} is published already")
        taken.add(name)


@contextmanager
def locked(directory: Path, name: str = ".lock") -> Iterator[None]:
    """One process at a time changes the list, or does what `name` is the lock of."""
    if not directory.is_dir():
        raise DatastoreError(f"{directory} is missing")
    with (directory / name).open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
