"""What the benchmark of decoding decodes, by what, and how often."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.benchmark.scaling import Axes
from jobs.benchmark.workload import Request
from mmrag.config import LanguageModel


@dataclass(frozen=True)
class Sizes:
    """What is decoded, by what, and how often."""

    lm: LanguageModel
    vocabulary: int
    requests: int
    prompts: tuple[int, int]
    """Ids of the shortest and of the longest prompt."""
    outputs: tuple[int, int]
    batches: tuple[int, ...]
    """Batch sizes of `generate` that are tried."""
    continuous: tuple[int, ...]
    """Requests at a time that are tried with continuous batching."""
    rows: tuple[int, ...]
    """Rows of the engine that are tried."""
    repeats: int
    alike: int
    """Requests whose tokens are compared in float32."""
    alone: Request | None
    """The lone request; None for the longest."""
    phrases: tuple[int, ...]
    axes: Axes
    bandwidth_bytes: int
    quick: bool
    compiled: bool | None
    """Whether our steps are compiled; None where that is the quicker."""


def _shape(width: int, layers: int, heads: int, feed_forward: int) -> LanguageModel:
    return LanguageModel(
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        feed_forward=feed_forward,
        tied=False,
    )


FULL = Sizes(
    lm=_shape(768, 12, 12, 2048),
    vocabulary=10_005,
    requests=64,
    prompts=(50, 400),
    outputs=(10, 100),
    batches=(4, 8, 16),
    continuous=(8, 16),
    rows=(32, 64),
    repeats=3,
    alike=4,
    alone=None,
    phrases=(100, 2_000, 20_000),
    axes=Axes(
        batch=(1, 2, 4, 8, 16, 32, 64),
        length=(64, 128, 256, 512, 1024),
        layers=(2, 6, 12, 24),
        datastore=(5_000, 20_000, 80_000),
        rows=16,
        prompt=200,
        steps=10,
        layers_width=192,
    ),
    bandwidth_bytes=1 << 30,
    quick=False,
    compiled=None,
)
QUICK = Sizes(
    lm=_shape(128, 2, 2, 256),
    vocabulary=1_005,
    requests=16,
    prompts=(20, 60),
    outputs=(4, 12),
    batches=(4, 16),
    continuous=(8,),
    rows=(16,),
    repeats=2,
    alike=2,
    alone=None,
    phrases=(100, 2_000),
    axes=Axes(
        batch=(1, 4, 16),
        length=(32, 64, 128),
        layers=(2, 4, 8),
        datastore=(1_000, 4_000),
        rows=4,
        prompt=32,
        steps=5,
        layers_width=64,
    ),
    bandwidth_bytes=1 << 27,
    quick=True,
    compiled=False,
)
