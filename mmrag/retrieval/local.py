"""Keys on this machine's own disk, where a datastore's directory is a share of another's.

Re-ranking reads thousands of keys at random places for each step of a decoder; everything else
that is read of a datastore is little. A copy is named by what is in it, and so serves every
datastore and snapshot that has the segment; the directory may be emptied at any time.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from uuid import uuid4

from mmrag import durable
from mmrag.retrieval.segment import DatastoreError
from mmrag.retrieval.stored import read_checksums

KEYS = "keys.npy"
BLOCK = 1 << 22
"""Bytes copied at once."""


def copy_keys(segment: Path, local: Path) -> Path:
    """The file below `local` with a segment's keys, copied and checked if it is not there yet.

    Many processes may do so at once. Raises OSError where the copy cannot be written, and
    DatastoreError for keys that are not as they were written.
    """
    checksum = read_checksums(segment)[KEYS]
    copied = local / f"{checksum}.npy"
    if copied.exists():
        return copied
    local.mkdir(parents=True, exist_ok=True)
    aside = local / f".{checksum}.{uuid4().hex}"
    read = hashlib.blake2b(digest_size=16)
    try:
        with (segment / KEYS).open("rb") as source, aside.open("wb") as sink:
            while block := source.read(BLOCK):
                read.update(block)
                sink.write(block)
        if read.hexdigest() != checksum:
            raise DatastoreError(f"{segment / KEYS} is not as it was written")
        durable.rename(aside, copied)
    finally:
        aside.unlink(missing_ok=True)
    return copied
