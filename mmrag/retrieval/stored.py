"""One segment as it is stored: its arrays, those of a directory's mapped, and what names are in it.

`datastore` says which arrays there are and what they mean.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mmrag.names import Names, digest
from mmrag.retrieval.mapped import open_array
from mmrag.retrieval.segment import DatastoreError, Description, Segment, prepare
from mmrag.retrieval.tensors import Tensors, open_tensors, write_tensors
from mmrag.retrieval.wording import Entry, entry

ARRAYS = {
    "keys": np.float16,
    "tokens": np.int32,
    "windows": np.int32,
    "positions": np.int32,
    "utterances": np.int32,
    "surprisals": np.float16,
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
WORDINGS = {
    "wording_text": np.uint8,
    "wording_offsets": np.int64,
    "wording_weights": np.float16,
}
"""What a segment says of documents that were given as entries; none of them where none was."""
IDS = "document_ids"
"""The numbers of its documents in the datastore: -1 each, until it is published."""
Opened = TypeVar("Opened")
FEW = 512
"""Documents of a segment whose digests a process keeps, once it has read them."""


@dataclass(frozen=True)
class StoredSegment:
    """One segment of a snapshot; its arrays by field, those of a directory's mapped."""

    name: str
    arrays: dict[str, np.ndarray]
    digest: str = ""
    """Of its file's header; none of one in memory."""

    @property
    def entries(self) -> int:
        return len(self.arrays["tokens"])

    @cached_property
    def utterances(self) -> Names:
        return Names(self.arrays["utterance_text"], self.arrays["utterance_offsets"])

    @cached_property
    def documents(self) -> Names:
        return Names(self.arrays["document_text"], self.arrays["document_offsets"])

    def with_wordings(self, having: str = "") -> np.ndarray:
        """Its documents (M,) int64 that were given as entries, and have this in their JSON."""
        said = [having in told if told else False for told in self._wordings]
        return np.flatnonzero(said)

    @cached_property
    def _wordings(self) -> Names:
        return Names(self.arrays["wording_text"], self.arrays["wording_offsets"])

    @property
    def worded(self) -> bool:
        """Whether any of its documents was given as an entry."""
        return "wording_text" in self.arrays

    def wording(self, document: int) -> Entry | None:
        """The entry that one of its documents is; None for what was not given as one."""
        said = self._wordings[document] if self.worded else ""
        return entry({"text": self.documents[document], **json.loads(said)}) if said else None

    def weights(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """What its entries weigh, float32; 1 where nobody said so."""
        documents = self.arrays["utterance_documents"][self.arrays["utterances"][rows]]
        if not self.worded:
            return np.ones(len(documents), np.float32)
        own = np.append(self.arrays["wording_weights"], np.float16(1)).astype(np.float32)
        return own[documents]  # -1, of one that is erased, is the last

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


def segment_file(directory: Path, name: str) -> Path:
    """Where a segment is stored."""
    return directory / "segments" / f"{name}.safetensors"


def write_file(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the arrays of a segment that is not published yet, flushed: its documents have no
    numbers."""
    whole = {**arrays, IDS: np.full(len(arrays["document_digests"]), -1, np.int32)}
    specified = {field: (values.dtype, values.shape) for field, values in whole.items()}
    write_tensors(path, specified, lambda field: [whole[field]], changing=[IDS])


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
            theirs = other.arrays["document_digests"]
            if not len(theirs):
                continue
            known = theirs.take(theirs.searchsorted(digests), mode="clip") == digests
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
    directory: Path, name: str, description: Description, listed: Mapping[str, Any] | None = None
) -> StoredSegment:
    """A segment read back: its arrays mapped, their shapes checked, and that it is the one that was
    `listed`; None for one that is not published."""
    path = segment_file(directory, name)
    if not path.is_file():
        raise DatastoreError(f"segment {name} of {directory} is missing")
    stored = _opened(open_tensors, path)
    arrays, fields = stored.arrays, ARRAYS | TABLES | {IDS: np.int32}
    if WORDINGS.keys() & arrays.keys():
        fields |= WORDINGS
    if "surprisals" not in arrays:  # written before anybody asked
        del fields["surprisals"]
    if arrays.keys() != fields.keys() or stored.header.digests.keys() != fields.keys() - {IDS}:
        raise DatastoreError(f"{path} is damaged: it has the arrays {', '.join(arrays)}")
    shapes = _shapes(listed["entries"] if listed else len(arrays["tokens"]), description)
    shapes |= _table_shapes(len(arrays["utterance_documents"]), len(arrays["document_digests"]))
    shapes |= _wording_shapes(len(arrays["document_digests"]))
    for field, dtype in fields.items():
        found, shape = arrays[field], shapes.get(field, arrays[field].shape[:1])
        if found.shape != shape or found.dtype != dtype:
            raise DatastoreError(
                f"{path} is damaged: its {field} are {found.dtype} {found.shape}, "
                f"not {np.dtype(dtype)} {shape}"
            )
    if listed:
        _require_listed(path, stored, listed["header"])
    if "surprisals" not in arrays:
        arrays = arrays | {"surprisals": np.zeros(len(arrays["tokens"]), np.float16)}
    return StoredSegment(name, arrays, stored.header.digest)


class _Opened(dict):
    """The arrays of a published segment by field, opened when one is asked for that is not there
    yet."""

    def __init__(
        self, directory: Path, listed: Mapping[str, Any], digests: np.ndarray | None
    ) -> None:
        super().__init__({} if digests is None else {"document_digests": digests})
        self._directory, self._listed = directory, listed

    def __missing__(self, field: str) -> np.ndarray:
        self.update(_open_listed(self._directory, self._listed["name"], self._listed["header"]))
        return self[field]


def open_documents(
    directory: Path, listed: Sequence[Mapping[str, Any]], digests: np.ndarray
) -> list[StoredSegment]:
    """Those published segments that have, or may have, documents of these digests (M,), in order;
    what is not asked for stays unread."""
    place = str(directory)
    kept = [_few_digests(place, one["name"], one["header"]) for one in listed]
    few = [np.zeros(0, np.uint64) if one is None else one for one in kept]
    owners = np.repeat(np.arange(len(few)), [len(one) for one in few])
    found = set(owners[np.isin(np.concatenate([digests[:0], *few]), digests)].tolist())
    return [
        StoredSegment(one["name"], _Opened(directory, one, kept[number]), one["header"])
        for number, one in enumerate(listed)
        if number in found or kept[number] is None
    ]


@lru_cache(4096)
def _few_digests(directory: str, name: str, header: str) -> np.ndarray | None:
    """The document digests of a published segment, in memory; None for more than FEW."""
    found = _open_listed(Path(directory), name, header)["document_digests"]
    return found.copy() if len(found) <= FEW else None


def _open_listed(directory: Path, name: str, header: str) -> dict[str, np.ndarray]:
    """The arrays of the segment that was published with this header."""
    path = segment_file(directory, name)
    stored = _opened(open_tensors, path)
    _require_listed(path, stored, header)
    return stored.arrays


def _require_listed(path: Path, stored: Tensors, header: str) -> None:
    """The header has a digest of what is in a file, and the list that of the header."""
    if stored.header.digest != header:
        raise DatastoreError(f"{path} is not the segment that was published: its header is another")


def arrays_of(name: str, segment: Segment, description: Description) -> dict[str, np.ndarray]:
    """The arrays of a segment as they are stored; ValueError if they do not fit."""
    segment = replace(segment, surprisals=segment.expected())
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
    return {"keys": keys} | columns | tables(segment.names, segment.wordings)


def tables(
    names: Sequence[tuple[str, str] | None], wordings: Mapping[str, Entry]
) -> dict[str, np.ndarray]:
    """What a segment says of its utterances and documents: (utterance, document) pairs, None for
    an utterance that is erased, and the entries that documents are."""
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
        **_worded(documents, wordings),
    }


def _worded(documents: Sequence[str], wordings: Mapping[str, Entry]) -> dict[str, np.ndarray]:
    """The arrays WORDINGS of documents, in order; none where no document is an entry."""
    given = [wordings.get(document) for document in documents]
    if not any(given):
        return {}
    told = [one.fields() if one else {} for one in given]
    for one in told:
        one.pop("text", None)
    texts = [json.dumps(one) if entry else "" for one, entry in zip(told, given, strict=True)]
    said = Names.of(texts)
    weights = [one.weight if one else 1.0 for one in given]
    return {
        "wording_text": said.text,
        "wording_offsets": said.offsets,
        "wording_weights": np.array(weights, np.float16),
    }


def _shapes(entries: int, description: Description) -> dict[str, tuple[int, ...]]:
    return {
        "keys": (entries, description.width),
        "tokens": (entries,),
        "windows": (entries, description.window),
        "positions": (entries,),
        "utterances": (entries,),
        "surprisals": (entries,),
    }


def _table_shapes(utterances: int, documents: int) -> dict[str, tuple[int, ...]]:
    return {
        "utterance_offsets": (utterances + 1,),
        "utterance_documents": (utterances,),
        "document_offsets": (documents + 1,),
        "document_digests": (documents,),
        IDS: (documents,),
    }


def _wording_shapes(documents: int) -> dict[str, tuple[int, ...]]:
    return {"wording_offsets": (documents + 1,), "wording_weights": (documents,)}


def _indexes(indices: np.ndarray, length: int) -> bool:
    return not len(indices) or bool(0 <= indices.min() <= indices.max() < length)


def open_mapped(path: Path) -> np.ndarray:
    """An array, mapped; DatastoreError if it is missing or damaged."""
    return _opened(open_array, path)


def _opened(opening: Callable[[Path], Opened], path: Path) -> Opened:
    """What is in a file; DatastoreError if it is missing or damaged."""
    try:
        return opening(path)
    except FileNotFoundError:
        raise DatastoreError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise DatastoreError(f"{path} is damaged: {error}") from None
