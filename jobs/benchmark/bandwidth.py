"""How fast memory is read, and how much of it a decoding step has to read."""

from __future__ import annotations

import time

import torch

from mmrag.model.lm import LM
from mmrag.model.prepared import PackedLinear

PASSES = 5


def read_bandwidth(size: int) -> float:
    """Bytes a second at which `size` bytes are summed, the best of PASSES passes.

    `size` should be many times the last cache.
    """
    array = torch.ones(size // 4)
    best = float("inf")
    for _ in range(PASSES):
        started = time.perf_counter()
        array.sum()
        best = min(best, time.perf_counter() - started)
    return size / best


def weight_bytes(lm: LM) -> int:
    """Of the weights that a step reads: all, but for an embedding that is no output projection."""
    passed = lm.embedding.weight if lm.head is not None else None
    packed = sum(one.weight_bytes for one in lm.modules() if isinstance(one, PackedLinear))
    return packed + sum(p.nbytes for p in lm.parameters() if p is not passed)
