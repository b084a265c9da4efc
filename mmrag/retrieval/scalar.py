"""Keys in a few bits a dimension, by FAISS: nearly what they are, in half the bytes or fewer.

A dimension's bits lie evenly between its smallest and its largest value among the keys that they
were trained on. Saved codes are mapped, as `ivf` says.
"""

from __future__ import annotations

from pathlib import Path

import faiss

TYPES = {
    4: faiss.ScalarQuantizer.QT_4bit,
    6: faiss.ScalarQuantizer.QT_6bit,
    8: faiss.ScalarQuantizer.QT_8bit,
}


def code_bytes(width: int, bits: int) -> int:
    """Bytes of a key in so many bits a dimension."""
    return -(-width * bits // 8)


def create(width: int, metric: int, bits: int) -> faiss.IndexScalarQuantizer | None:
    """Untrained; None for no bits."""
    return faiss.IndexScalarQuantizer(width, TYPES[bits], metric) if bits else None


def load(file: Path, mapped: bool) -> faiss.IndexScalarQuantizer:
    """What was saved, mapped or read; RuntimeError for a file that is damaged or missing."""
    return faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC if mapped else 0)


def emptied(codes: faiss.IndexScalarQuantizer) -> faiss.IndexScalarQuantizer:
    """Trained as `codes`, without a key."""
    empty = faiss.IndexScalarQuantizer(codes.d, codes.sq.qtype, codes.metric_type)
    trained = faiss.vector_to_array(codes.sq.trained)
    faiss.copy_array_to_vector(trained, empty.sq.trained)
    empty.is_trained = True
    return empty
