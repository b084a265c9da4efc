"""Keys on this machine's own disk, where a datastore's directory is a share of another's.

Re-ranking reads thousands of keys at random places for each step of a decoder; everything else
that is read of a datastore is little. A copy is named by what is in it, and so serves every
datastore and snapshot that has the segment; the directory may be emptied at any time.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from uuid import uuid4

import numpy as np

from mmrag import durable
from mmrag.retrieval.segment import DatastoreError
from mmrag.retrieval.tensors import blocks_of, read_header


def copy_keys(segment: Path, local: Path) -> Path:
    """The npy file below `local` with the keys in a segment's file, copied and checked if it is not
    there yet.

    Many processes may do so at once. Raises OSError where the copy cannot be written, and
    DatastoreError for keys that are not as they were written.
    """
    with segment.open("rb") as source:
        try:
            header = read_header(source)
        except ValueError as error:
            raise DatastoreError(f"{segment} is damaged: {error}") from None
        digest, (dtype, shape) = header.digests["keys"], header.arrays["keys"]
        copied = local / f"{digest}-{shape[1]}.npy"
        if copied.exists():
            return copied
        local.mkdir(parents=True, exist_ok=True)
        aside = local / f".{copied.stem}.{uuid4().hex}"
        read = hashlib.blake2b(digest_size=16)
        try:
            with aside.open("wb") as sink:
                fields = {"descr": dtype.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(sink, fields)
                for block in blocks_of(source, header, "keys"):
                    read.update(block)
                    sink.write(block)
            if read.hexdigest() != digest:
                raise DatastoreError(f"{segment}: its keys are not as they were written")
            durable.rename(aside, copied)
        finally:
            aside.unlink(missing_ok=True)
    return copied
