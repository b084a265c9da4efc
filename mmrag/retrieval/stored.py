"""One segment as it is stored: its arrays, those of a directory's mapped, and what names are in it.

`datastore` says which arrays there are and what they mean.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mmrag.artifact import write_json
from mmrag.retrieval.columns import Names, digest
from mmrag.retrieval.mapped import open_array
from mmrag.retrieval.segment import DatastoreError, Description, Segment, prepare

ARRAYS = {
    "keys": np.float16,
    "tokens": np.int32,
    "windows": np.int32,
    "positions": np.int32,
    "utterances": np.int32,
}
"""What each entry has."""
TABLES = {
    "utterance_text": np.uint8,
    "utterance_offsets": np.int64,
    "utterance_documents": np.int32,
    "document_text": np.uint8,
    "document_offsets": np.int64,
    "document_digests": np.uint64,
}
"""What a segment says of its utterances and documents."""
IDS = "document_ids"
LITTLE = 1 << 22
"""Bytes that are hashed sooner than threads are started."""
SUMS = "checksums.json"
"""In a segment: the digest of each of its files."""


@dataclass(frozen=True)
class StoredSegment:
    """One segment of a snapshot; its arrays by field, those of a directory's mapped."""

    name: str
    arrays: dict[str, np.ndarray]

    @property
    def entries(self) -> int:
        return len(self.arrays["tokens"])

    @cached_property
    def utterances(self) -> Names:
        return Names(self.arrays["utterance_text"], self.arrays["utterance_offsets"])

    @cached_property
    def documents(self) -> Names:
        return Names(self.arrays["document_text"], self.arrays["document_offsets"])

    def document(self, name: str) -> int | None:
        """Which of its documents has this name; None for none."""
        digests, wanted = self.arrays["document_digests"], np.uint64(digest(name))
        for at in range(int(np.searchsorted(digests, wanted)), len(digests)):
            if digests[at] != wanted:
                break
            if self.documents[at] == name:
                return at
        return None

    def document_of(self, utterances: np.ndarray) -> np.ndarray:
        """The datastore's numbers of the documents of its utterances, by index; -1 for one that is
        erased."""
        local = self.arrays["utterance_documents"][utterances]
        if not len(self.arrays[IDS]):
            return np.full(np.shape(local), -1, np.int32)
        return np.where(local < 0, np.int32(-1), self.arrays[IDS][np.maximum(local, 0)])


def seal(directory: Path, *names: str) -> None:
    """Write down the checksums of a segment's files, or of some of them anew."""
    known = read_checksums(directory) if names else {}
    write_json(directory / SUMS, known | checksums(directory, names))


def checksums(directory: Path, names: Sequence[str] = ()) -> dict[str, str]:
    """File name -> digest of what is in it, of a segment's arrays, or of some of them."""
    files = [directory / name for name in names] or sorted(directory.glob("*.npy"))

    def digested(file: Path) -> str:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()

    names = [file.name for file in files]
    if sum(file.stat().st_size for file in files) < LITTLE:
        return dict(zip(names, map(digested, files), strict=True))
    with ThreadPoolExecutor() as pool:  # which hashes without Python's lock
        return dict(zip(names, pool.map(digested, files), strict=True))


def read_checksums(directory: Path) -> dict[str, str]:
    """What `seal` wrote; DatastoreError if it cannot be read."""
    return read_json(directory / SUMS, dict)


def read_json(path: Path, kind: type = object) -> Any:
    """What is in a file of JSON; DatastoreError if it is missing, damaged or not of this kind."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DatastoreError(f"{path} is missing") from None
    except ValueError as error:
        raise DatastoreError(f"{path} is damaged: {error}") from None
    if not isinstance(found, kind):
        raise DatastoreError(f"{path} is damaged: it holds {type(found).__name__}")
    return found


def numbered(
    before: Sequence[StoredSegment], new: Sequence[StoredSegment], following: int = 0
) -> tuple[list[StoredSegment], int]:
    """The new segments with numbers for their documents: those that segments before have, and for
    the others, in order of appearance, the numbers from `following` on; and the next one then."""
    found: list[StoredSegment] = []
    given: dict[str, int] = {}
    for one in new:
        ids = np.full(len(one.documents), -1, np.int32)
        digests = one.arrays["document_digests"]
        for other in before:
            known = np.isin(digests, other.arrays["document_digests"])
            for local in np.flatnonzero(known & (ids < 0)).tolist():
                if (at := other.document(one.documents[local])) is not None:
                    ids[local] = other.arrays[IDS][at]
        _, first = np.unique(one.arrays["utterance_documents"], return_index=True)
        for local in np.argsort(first)[ids[np.argsort(first)] < 0].tolist():
            number = given.setdefault(one.documents[local], following)
            following += number == following
            ids[local] = number
        found.append(replace(one, arrays=one.arrays | {IDS: ids}))
    return found, following


def open_segment(
    directory: Path,
    name: str,
    description: Description,
    entries: int | None = None,
    published: bool = True,
) -> StoredSegment:
    """A segment read back: its arrays mapped, and their shapes checked."""
    path = directory / "segments" / name
    if not path.is_dir():
        raise DatastoreError(f"segment {name} of {directory} is missing")
    fields = ARRAYS | TABLES | ({IDS: np.int32} if published else {})
    arrays = {field: open_mapped(path / f"{field}.npy") for field in fields}
    entries = len(arrays["tokens"]) if entries is None else entries
    shapes = _shapes(entries, description)
    shapes |= _table_shapes(len(arrays["utterance_documents"]), len(arrays["document_digests"]))
    for field, dtype in fields.items():
        stored, shape = arrays[field], shapes.get(field, arrays[field].shape[:1])
        if stored.shape != shape or stored.dtype != dtype:
            raise DatastoreError(
                f"{path / field}.npy is damaged: it holds {stored.dtype} {stored.shape}, "
                f"not {np.dtype(dtype)} {shape}"
            )
    return StoredSegment(name, arrays)


class _Opened(dict):
    """The arrays of a segment by field, each mapped when it is asked for."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def __missing__(self, field: str) -> np.ndarray:
        self[field] = open_mapped(self._path / f"{field}.npy")
        return self[field]


def open_documents(directory: Path, name: str) -> StoredSegment:
    """A published segment to ask for its documents: what is not needed for that stays unread."""
    return StoredSegment(name, _Opened(directory / "segments" / name))


def arrays_of(name: str, segment: Segment, description: Description) -> dict[str, np.ndarray]:
    """The arrays of a segment as they are stored; ValueError if they do not fit."""
    for field, shape in _shapes(len(segment.tokens), description).items():
        given = np.shape(getattr(segment, field))
        if given != shape:
            raise ValueError(f"segment {name}: {field} have shape {given}, not {shape}")
    if not _indexes(segment.utterances, len(segment.names)):
        raise ValueError(f"segment {name}: an utterance index is not below {len(segment.names)}")
    if (np.diff(segment.utterances) < 0).any():
        raise ValueError(f"segment {name}: utterances are not in order")
    with np.errstate(over="ignore"):
        keys = prepare(segment.keys, description.metric).astype(np.float16)
    if not np.isfinite(keys).all():
        raise ValueError(f"segment {name}: a key does not fit float16")
    columns = {
        field: np.asarray(getattr(segment, field)).astype(dtype)
        for field, dtype in ARRAYS.items()
        if field != "keys"
    }
    return {"keys": keys} | columns | tables(segment.names)


def tables(names: Sequence[tuple[str, str] | None]) -> dict[str, np.ndarray]:
    """What a segment says of its utterances and documents: (utterance, document) pairs, None for
    an utterance that is erased."""
    known = {pair[1] for pair in names if pair}
    documents = sorted(known, key=lambda name: (digest(name), name))
    place = {document: number for number, document in enumerate(documents)}
    told, about = Names.of(pair[0] if pair else "" for pair in names), Names.of(documents)
    return {
        "utterance_text": told.text,
        "utterance_offsets": told.offsets,
        "utterance_documents": np.array([place[p[1]] if p else -1 for p in names], np.int32),
        "document_text": about.text,
        "document_offsets": about.offsets,
        "document_digests": np.array([digest(document) for document in documents], np.uint64),
    }


def _shapes(entries: int, description: Description) -> dict[str, tuple[int, ...]]:
    return {
        "keys": (entries, description.width),
        "tokens": (entries,),
        "windows": (entries, description.window),
        "positions": (entries,),
        "utterances": (entries,),
    }


def _table_shapes(utterances: int, documents: int) -> dict[str, tuple[int, ...]]:
    return {
        "utterance_offsets": (utterances + 1,),
        "utterance_documents": (utterances,),
        "document_offsets": (documents + 1,),
        "document_digests": (documents,),
        IDS: (documents,),
    }


def _indexes(indices: np.ndarray, length: int) -> bool:
    return not len(indices) or bool(0 <= indices.min() <= indices.max() < length)


def open_mapped(path: Path) -> np.ndarray:
    """An array, mapped; DatastoreError if it is missing or damaged."""
    try:
        return open_array(path)
    except FileNotFoundError:
        raise DatastoreError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise DatastoreError(f"{path} is damaged: {error}") from None
