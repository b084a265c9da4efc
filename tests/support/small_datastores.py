"""Datastores of a few entries whose tokens, keys and names say which they are."""

from pathlib import Path

import numpy as np

from mmrag.retrieval.datastore import publish, read_list, write_list, write_segment
from mmrag.retrieval.segment import Description, Segment, windows_of
from mmrag.retrieval.stored import IDS, segment_file
from mmrag.retrieval.tensors import digest, open_tensors, read_header, write_tensors

DESCRIPTION = Description(width=4, window=5, metric="l2", audio="none", identity={"lm": "aaaa"})


def segment(number, utterances=2, length=3, documents=("shared", "own")) -> Segment:
    """Utterances of `length` entries; tokens, keys and names say which they are."""
    tokens = 1000 * (number + 1) + np.arange(utterances * length)
    each = np.split(tokens, utterances)
    names = [
        (f"utterance-{number}-{n}", documents[n % len(documents)].replace("own", f"own-{number}"))
        for n in range(utterances)
    ]
    return Segment(
        keys=np.random.default_rng(number).standard_normal((len(tokens), 4)),
        tokens=tokens,
        windows=np.concatenate([windows_of(one, 5) for one in each]),
        positions=np.tile(np.arange(length), utterances),
        utterances=np.repeat(np.arange(utterances), length),
        names=names,
    )


def fill(directory: Path, count: int, first: int = 0) -> None:
    """Publish so many segments, one by one, numbered from `first`."""
    for number in range(first, first + count):
        write_segment(directory, f"s-{number}", segment(number))
        publish(directory, [f"s-{number}"])


def stored_arrays(directory: Path, name: str) -> dict[str, np.ndarray]:
    """The arrays of a stored segment, in memory."""
    mapped = open_tensors(segment_file(directory, name)).arrays
    return {field: values.copy() for field, values in mapped.items()}


def store_arrays(directory: Path, name: str, arrays: dict[str, np.ndarray]) -> None:
    """Write a segment's file anew, as a writer that is wrong would, under good digests."""
    file = segment_file(directory, name)
    specified = {field: (values.dtype, values.shape) for field, values in arrays.items()}
    header = write_tensors(file, specified, lambda field: [arrays[field]], changing=[IDS])
    listed = read_list(directory)
    for one in listed["segments"]:
        if one["name"] == name:
            one |= {"header": header.digest, "numbers": digest([arrays[IDS]])}
    write_list(directory, listed)


def sealed(file: Path) -> bytes:
    """What is in a segment's file for good: all but the numbers of its documents."""
    content = bytearray(file.read_bytes())
    with file.open("rb") as stream:
        header = read_header(stream)
    start = header.starts[IDS]
    content[start : start + header.bytes_of(IDS)] = b""
    return bytes(content)


def place_of(file: Path, field: str) -> int:
    """The byte of a segment's file at which an array's last byte is."""
    with file.open("rb") as stream:
        header = read_header(stream)
    return header.starts[field] + header.bytes_of(field) - 1


def flip(file: Path, byte: int) -> None:
    """Change a bit of one byte of a file."""
    content = bytearray(file.read_bytes())
    content[byte] ^= 1
    file.write_bytes(content)
