"""Entries on disk: what the language model knew (a key), what came next, and where that was.

A datastore is a directory. Keys and values live in immutable segments, which many processes may
write at once; `segments.json` names the ones that count, in order, and is replaced by rename.

    datastore.json                what made the keys: `Description`
    segments.json                 published segments with their entry counts; the deletions' file
    deleted-<n>.npy               (M,) int64, deleted entries
    segments/<name>/keys.npy      (N, D) float16      tokens.npy     (N,) int32
                    windows.npy   (N, W) int32        positions.npy  (N,) int32
                    names.json    [[utterance, document], …]
                    utterances.npy (N,) int32, index into names.json

An entry's id is its place in the segments laid end to end. Segments are only ever appended and
deletion only hides, so ids never change. What a function here wrote is flushed when it returns, and
the list names nothing that is not: a power cut leaves the old list or the new one. `Datastore.of`
holds segments in memory instead. Nothing here searches, and nothing here knows a model.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from mmrag import durable
from mmrag.artifact import write_json
from mmrag.records import NO_ENTRY, Passages
from mmrag.retrieval.mapped import open_array
from mmrag.retrieval.segment import DatastoreError, Description, Segment, prepare

ARRAYS = {
    "keys": np.float16,
    "tokens": np.int32,
    "windows": np.int32,
    "positions": np.int32,
    "utterances": np.int32,
}


def create(directory: Path | str, description: Description) -> None:
    """Make an empty datastore. Finding one of the same description there changes nothing."""
    directory = Path(directory).absolute()
    durable.make_directory(directory)
    if (directory / "datastore.json").exists():
        if describe(directory) != description:
            raise DatastoreError(f"{directory} already holds a datastore of another description")
        return
    durable.make_directory(directory / "segments")
    write_json(directory / "segments.json", {"segments": [], "deleted": None})
    write_json(directory / "datastore.json", asdict(description))


def describe(directory: Path | str) -> Description:
    """Read `datastore.json`; DatastoreError if there is none."""
    path = Path(directory) / "datastore.json"
    try:
        return Description(**_read_json(path))
    except TypeError as error:
        raise DatastoreError(f"{path} does not describe a datastore: {error}") from None


def write_segment(directory: Path | str, name: str, segment: Segment) -> None:
    """Write a segment aside and rename it into place; `publish` makes it count.

    Safe in many processes at once. A segment of that name that was never published is replaced.
    Keys are prepared for the datastore's metric here. Raises ValueError if the segment does not
    fit the datastore, DatastoreError if the name is published already.
    """
    directory = Path(directory).absolute()
    _check_name(name)
    if any(name == known["name"] for known in _list(directory)["segments"]):
        raise DatastoreError(f"segment {name} of {directory} is published: it cannot be replaced")
    arrays = _arrays(name, segment, describe(directory))
    aside = directory / f".{name}.{uuid4().hex}"
    aside.mkdir()
    for field, values in arrays.items():
        np.save(aside / f"{field}.npy", values, allow_pickle=False)
    write_json(aside / "names.json", [list(pair) for pair in segment.names])
    final = directory / "segments" / name
    if final.exists():
        shutil.rmtree(final)
    durable.rename(aside, final)


def publish(directory: Path | str, names: Sequence[str]) -> None:
    """Append written segments, in this order: all of them appear at once, or none.

    Raises ValueError for a name that is malformed or given twice, DatastoreError for a segment
    that is published already, missing or damaged.
    """
    directory = Path(directory).absolute()
    description = describe(directory)
    with _locked(directory):
        listed = _list(directory)
        taken = {segment["name"] for segment in listed["segments"]}
        for name in names:
            _check_name(name)
            if name in taken:
                raise DatastoreError(f"segment {name} of {directory} is published already")
            taken.add(name)
            entries = _stored(directory, name, description).entries
            listed["segments"].append({"name": name, "entries": entries})
        write_json(directory / "segments.json", listed)


def delete(directory: Path | str, entries: Iterable[int]) -> None:
    """Hide entries, for good; deleting one twice is no error. ValueError for an unknown id."""
    directory = Path(directory).absolute()
    with _locked(directory):
        listed = _list(directory)
        total = sum(segment["entries"] for segment in listed["segments"])
        gone = np.unique(np.fromiter(entries, np.int64))
        if len(gone) and (gone[0] < 0 or gone[-1] >= total):
            raise ValueError(f"entries {gone[0]} to {gone[-1]}: {directory} has {total} entries")
        before = listed["deleted"]
        number = int(before.removeprefix("deleted-").removesuffix(".npy")) + 1 if before else 0
        listed["deleted"] = f"deleted-{number}.npy"
        aside = directory / f".{listed['deleted']}"
        np.save(aside, np.union1d(_deleted(directory, before), gone), allow_pickle=False)
        durable.rename(aside, directory / listed["deleted"])
        write_json(directory / "segments.json", listed)


class Datastore:
    """A snapshot of segments: the published ones of a directory, or some in memory.

    Of a directory's, keys and windows stay on disk, memory-mapped.
    """

    def __init__(self, directory: Path | None, description: Description) -> None:
        """Without entries yet; `open` and `of` give it some."""
        self.directory = directory
        self.description = description
        self._take([], np.zeros(0, np.int64))

    @classmethod
    def open(cls, directory: Path | str) -> Datastore:
        """Open the datastore in `directory`; DatastoreError names what is missing or damaged."""
        directory = Path(directory).absolute()
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
            _Held(name, list(segment.names), _arrays(name, segment, description))
            for name, segment in zip(names, segments, strict=True)
        ]
        made._take(held, made.deleted)
        return made

    def refresh(self) -> None:
        """See what has been published and deleted since. Entry and document ids stay the same.

        Raises DatastoreError, and changes nothing, for what is missing or damaged.
        """
        if self.directory is None:
            return
        listed = _list(self.directory)
        new = [
            _stored(self.directory, segment["name"], self.description, segment["entries"])
            for segment in listed["segments"][len(self._segments) :]
        ]
        self._take([*self._segments, *new], _deleted(self.directory, listed["deleted"]))

    def _take(self, segments: list[_Held], deleted: np.ndarray) -> None:
        """Lay the segments end to end."""
        names = [pair for segment in segments for pair in segment.names]
        # The n-th document to appear is document n: appending segments changes no id.
        documents: dict[str, int] = {}
        for _, document in names:
            documents.setdefault(document, len(documents))
        first_utterance = np.cumsum([0, *(len(segment.names) for segment in segments)])
        utterances = [segment.arrays["utterances"] for segment in segments]
        self._segments = segments
        self._starts = np.cumsum([0, *(segment.entries for segment in segments)])
        self._document_ids = documents
        self._document_names = list(documents)
        self._utterance_names = [utterance for utterance, _ in names]
        self.utterances = _concatenate(
            [own + first for own, first in zip(utterances, first_utterance, strict=False)]
        )
        """(N,) int32, each entry's utterance; those of one utterance follow one another."""
        document_of = np.array([documents[document] for _, document in names], np.int32)
        self.tokens = _concatenate([segment.arrays["tokens"] for segment in segments])
        """(N,) int32, the token that follows each key."""
        self.positions = _concatenate([segment.arrays["positions"] for segment in segments])
        """(N,) int32, index of that token among its utterance's tokens."""
        self.documents = document_of[self.utterances]
        """(N,) int32, each entry's document."""
        self.deleted = deleted
        """(M,) int64, deleted entries, ascending."""

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
        before = self.description.window // 2
        first = np.searchsorted(self.utterances, self.utterances[entries], side="left")
        last = np.searchsorted(self.utterances, self.utterances[entries], side="right")
        stop = np.minimum(last, entries - before + self.description.window)
        return np.maximum(first, entries - before), stop

    def origins(self, entries: np.ndarray) -> list[tuple[str, str]]:
        """Document and utterance that each of `entries` (M,) comes from, by name."""
        self._check(entries)
        return [
            (self._document_names[self.documents[entry]], self.utterance_name(entry))
            for entry in entries
        ]

    def entries_of(self, documents: Iterable[str]) -> np.ndarray:
        """The entries of documents by name, deleted ones left out: (M,) int64, ascending.

        A document that has none here adds none.
        """
        known = [self._document_ids[name] for name in documents if name in self._document_ids]
        entries = np.flatnonzero(np.isin(self.documents, known))
        return np.setdiff1d(entries, self.deleted, assume_unique=True)

    def document_id(self, name: str) -> int | None:
        """The id of a document, None for one that has no entries here."""
        return self._document_ids.get(name)

    def document_name(self, document: int) -> str:
        """The name of document `document`."""
        return self._document_names[document]

    def utterance_name(self, entry: int) -> str:
        """The id of the utterance that an entry comes from."""
        return self._utterance_names[self.utterances[entry]]

    def _gather(self, field: str, entries: np.ndarray) -> np.ndarray:
        """Rows of one of the large arrays: (M,) -> (M, …)."""
        self._check(entries)
        columns = {"keys": self.description.width, "windows": self.description.window}[field]
        rows = np.empty((len(entries), columns), ARRAYS[field])
        segments = np.searchsorted(self._starts, entries, side="right") - 1
        order = np.argsort(segments, kind="stable")
        numbers, firsts = np.unique(segments[order], return_index=True)
        for number, here in zip(numbers, np.split(order, firsts)[1:], strict=True):
            stored = self._segments[number].arrays[field]
            rows[here] = stored[entries[here] - self._starts[number]]
        return rows

    def _check(self, entries: np.ndarray) -> None:
        """IndexError for an entry that does not exist."""
        if len(entries) and not 0 <= entries.min() <= entries.max() < self.entries:
            raise IndexError(
                f"entries {entries.min()} to {entries.max()}: {self} has {self.entries} entries"
            )


@dataclass(frozen=True)
class _Held:
    """One segment of a snapshot; its arrays by field."""

    name: str
    names: list[tuple[str, str]]
    arrays: dict[str, np.ndarray]

    @property
    def entries(self) -> int:
        return len(self.arrays["tokens"])


def _stored(
    directory: Path, name: str, description: Description, entries: int | None = None
) -> _Held:
    """A segment read back: its small arrays in memory, its large ones checked and mapped."""
    path = directory / "segments" / name
    if not path.is_dir():
        raise DatastoreError(f"segment {name} of {directory} is missing")
    arrays = {field: _map(path / f"{field}.npy") for field in ARRAYS}
    entries = len(arrays["tokens"]) if entries is None else entries
    for field, shape in _shapes(entries, description).items():
        stored = arrays[field]
        if stored.shape != shape or stored.dtype != ARRAYS[field]:
            raise DatastoreError(
                f"{path / field}.npy is damaged: it holds {stored.dtype} {stored.shape}, "
                f"not {np.dtype(ARRAYS[field])} {shape}"
            )
    small = {field: np.array(arrays[field]) for field in ("tokens", "positions", "utterances")}
    names = [tuple(pair) for pair in _read_json(path / "names.json")]
    if not _indexes(small["utterances"], len(names)):
        raise DatastoreError(f"{path} is damaged: an entry's utterance has no name")
    return _Held(name, names, arrays | small)


def _arrays(name: str, segment: Segment, description: Description) -> dict[str, np.ndarray]:
    """The arrays of a segment as they are stored; ValueError if they do not fit."""
    for field, shape in _shapes(len(segment.tokens), description).items():
        given = np.shape(getattr(segment, field))
        if given != shape:
            raise ValueError(f"segment {name}: {field} have shape {given}, not {shape}")
    if not _indexes(segment.utterances, len(segment.names)):
        raise ValueError(f"segment {name}: an utterance index is not below {len(segment.names)}")
    with np.errstate(over="ignore"):
        keys = prepare(segment.keys, description.metric).astype(np.float16)
    if not np.isfinite(keys).all():
        raise ValueError(f"segment {name}: a key does not fit float16")
    return {"keys": keys} | {
        field: np.asarray(getattr(segment, field)).astype(dtype)
        for field, dtype in ARRAYS.items()
        if field != "keys"
    }


def _shapes(entries: int, description: Description) -> dict[str, tuple[int, ...]]:
    return {
        "keys": (entries, description.width),
        "tokens": (entries,),
        "windows": (entries, description.window),
        "positions": (entries,),
        "utterances": (entries,),
    }


def _indexes(indices: np.ndarray, length: int) -> bool:
    return not len(indices) or bool(0 <= indices.min() <= indices.max() < length)


def _concatenate(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int32), *arrays], dtype=np.int32)


def _map(path: Path) -> np.ndarray:
    try:
        return open_array(path)
    except FileNotFoundError:
        raise DatastoreError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise DatastoreError(f"{path} is damaged: {error}") from None


def _deleted(directory: Path, name: str | None) -> np.ndarray:
    return np.array(_map(directory / name)) if name else np.zeros(0, np.int64)


def _list(directory: Path) -> dict[str, Any]:
    return _read_json(directory / "segments.json")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DatastoreError(f"{path} is missing") from None
    except ValueError as error:
        raise DatastoreError(f"{path} is damaged: {error}") from None


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise ValueError(f"segment name {name!r}: small letters, digits, _ and - only")


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One process at a time changes the list."""
    if not directory.is_dir():
        raise DatastoreError(f"{directory} is missing")
    with (directory / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
