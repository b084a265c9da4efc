"""Whether a datastore on disk is what was written: every byte, and what its numbers say together.

Reading a datastore checks shapes alone; a flipped bit in a key is found here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mmrag.retrieval import datastore
from mmrag.retrieval.segment import DatastoreError
from mmrag.retrieval.stored import IDS, StoredSegment, open_segment, segment_file
from mmrag.retrieval.tensors import blocks_of, digest, read_header


def verify(directory: Path | str) -> Iterator[str]:
    """What is wrong with a datastore, a line each, naming the file; nothing if it is whole.

    DatastoreError for a directory that is no datastore, or whose list cannot be read.
    """
    directory = Path(directory).absolute()
    description = datastore.describe(directory)
    listed = datastore.read_list(directory)
    for one in listed["segments"]:
        path = segment_file(directory, one["name"])
        try:
            segment = open_segment(directory, one["name"], description, one)
            yield from (f"{path}: {problem}" for problem in _changed(path, one["numbers"]))
            yield from (f"{path}: {problem}" for problem in _contradictions(segment, listed))
        except (DatastoreError, OSError) as error:
            yield str(error)
    try:
        deleted = datastore.deleted_entries(directory, listed)
    except DatastoreError as error:
        yield str(error)
        return
    entries = sum(one["entries"] for one in listed["segments"])
    ascending = bool((np.diff(deleted) > 0).all())
    if len(deleted) and not (ascending and deleted[0] >= 0 and deleted[-1] < entries):
        yield f"{directory / listed['deleted']}: not ascending entries below {entries}"


def _changed(path: Path, numbers: str) -> Iterator[str]:
    """Arrays of a segment that are not as they were written, every byte read."""
    with path.open("rb") as stream:
        header = read_header(stream)
        for name, written in (header.digests | {IDS: numbers}).items():
            if digest(blocks_of(stream, header, name)) != written:
                yield f"its {name} are not as they were written: their digest is another"


def _contradictions(segment: StoredSegment, listed: dict) -> Iterator[str]:
    """What the arrays of a segment say against each other."""
    arrays = segment.arrays
    utterances, count = arrays["utterances"], len(segment.utterances)
    if len(utterances) and not (utterances[0] >= 0 and utterances[-1] < count):
        yield f"an entry's utterance is not one of {count}"
    if (np.diff(utterances) < 0).any():
        yield "utterances are not in order"
    documents = arrays["utterance_documents"]
    if len(documents) and not (documents.min() >= -1 and documents.max() < len(segment.documents)):
        yield f"an utterance's document is not one of {len(segment.documents)}"
    if (arrays["document_digests"][1:] < arrays["document_digests"][:-1]).any():
        yield "documents are not in order"
    numbers = arrays[IDS]
    if len(numbers) and not (numbers.min() >= 0 and numbers.max() < listed["documents"]):
        yield f"a document's number is not one of {listed['documents']}"
    for kind in ("utterance", "document", *(["wording"] * segment.worded)):
        offsets, text = arrays[f"{kind}_offsets"], arrays[f"{kind}_text"]
        if offsets[0] != 0 or offsets[-1] != len(text) or (np.diff(offsets) < 0).any():
            yield f"{kind} names do not add up to {len(text)} bytes"
            return
    if segment.worded:
        try:
            for document in range(len(segment.documents)):
                segment.wording(document)
        except ValueError as error:
            yield f"a document's wording is none: {error}"
