"""FAISS's indexes taken to this process's GPU and back, where FAISS was built for one."""

from __future__ import annotations

import faiss

from mmrag.config import Index

MOST_FOUND = 2048
"""Neighbours that a GPU finds of a query at a time; and lists that it visits."""
CODE_BYTES = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96)
"""Of an IVF-PQ index on a GPU."""
CODE_DIMENSIONS = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 28, 32)
"""That a byte of a code may stand for there."""


def used(settings: Index, dimensions: int) -> bool:
    """Whether an index is kept on the GPU, of codes that stand for so many dimensions.

    `settings.gpu` None asks whether there is one that has such an index. ValueError for True where
    it cannot be.
    """
    if settings.gpu is False:
        return False
    reason = None if faiss.get_num_gpus() else "FAISS finds no GPU here"
    if reason is None and settings.kind != "flat":
        reason = _unknown(settings, dimensions)
    if reason and settings.gpu:
        raise ValueError(f"index.gpu: {reason}")
    return reason is None


def _unknown(settings: Index, dimensions: int) -> str | None:
    """Why a GPU has no such lists and codes; None where it has."""
    code, held = settings.code_bytes, dimensions / settings.code_bytes
    if settings.probes > MOST_FOUND:
        return f"it visits at most {MOST_FOUND} lists (index.probes {settings.probes})"
    if settings.kind == "ivfsq":
        bits = settings.scalar_bits
        return f"it has no codes of {bits} bits (index.scalar_bits)" if bits == 6 else None
    if settings.fast_scan or not settings.residual:
        return "it has neither index.fast_scan nor codes of whole keys (index.residual false)"
    if code not in CODE_BYTES or held not in CODE_DIMENSIONS:
        return f"it has no codes of {code} bytes for {dimensions} dimensions (index.code_bytes)"
    return None


def to_gpu(index: faiss.Index) -> faiss.Index:
    """A copy of an index in the memory of the first GPU that this process sees."""
    options = faiss.GpuClonerOptions()
    options.useFloat16 = isinstance(index, faiss.IndexIVFPQ | faiss.IndexPreTransform)
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index, options)


def to_cpu(index: faiss.Index) -> faiss.Index:
    """A copy of such an index in this machine's own memory."""
    return faiss.index_gpu_to_cpu(index)
