"""How the time of a decoding step grows: with the batch, with what was read, with the layers, and
with the entries of the datastore that is asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.benchmark.built import AUTO
from jobs.benchmark.keys import SyntheticKeys
from jobs.benchmark.repeats import exponent
from jobs.benchmark.workload import Request, language_model, requests, stepped
from mmrag import shipped
from mmrag.config import KNN, LanguageModel
from mmrag.model.lm import LM
from mmrag.recogniser import load_decoder
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.index import IndexShard, shard_directory
from mmrag.retrieval.interpolation import Retrieval
from mmrag.retrieval.retrievers import LocalRetriever

SEED = 1
LAYERS_VOCABULARY = 1_005
HEAD_WIDTH = 32
KNN_SETTINGS = KNN(k=16, weight=0.3, temperature=10.0)


@dataclass(frozen=True)
class Axes:
    """What grows, and what stays meanwhile."""

    batch: tuple[int, ...]
    length: tuple[int, ...]
    """Ids of a prompt."""
    layers: tuple[int, ...]
    datastore: tuple[int, ...]
    """Entries."""
    rows: int
    """Where the batch does not grow."""
    prompt: int
    """Where the length does not grow, ids."""
    steps: int
    """Of each batch, the first two of which are not timed."""
    layers_width: int
    """Of the models whose layers grow."""


def measure(
    directory: Path, lm: LM, axes: Axes, tell: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """For each axis its `title`, `sizes`, `ms` (median of a step), `read_ms` (of the prompts), and
    `exponent` and `read_exponent` of lines through the logarithms of sizes and times."""
    rows, prompt = axes.rows, axes.prompt
    grown = {
        "batch": _axis(
            f"batch, prompts of {prompt}",
            [(size, lm, _asked(size, prompt, axes, lm), {}) for size in axes.batch],
        ),
        "length": _axis(
            f"length of the prompts, batch {rows}",
            [(size, lm, _asked(rows, size, axes, lm), {}) for size in axes.length],
        ),
        "layers": _axis(
            f"layers of width {axes.layers_width}, batch {rows}", _deeper(axes, rows, prompt)
        ),
    }
    tell("  with the datastore")
    grown["datastore"] = _axis(
        f"entries of a datastore, {shipped.TINY}, batch {rows}", _searching(directory, axes)
    )
    return grown


Case = tuple[int, LM, Sequence[Request], dict[str, Any]]
"""The size, who decodes what, and how."""


def _axis(title: str, cases: Iterable[Case]) -> dict[str, Any]:
    sizes, read, steps = [], [], []
    for size, lm, asked, how in cases:
        reading, times = stepped(lm, asked, time.perf_counter, **how)
        sizes.append(size)
        read.append(1e3 * reading)
        steps.append(1e3 * float(np.median(times)))
    measured = {"title": title, "sizes": sizes, "ms": steps, "read_ms": read}
    grown = {"exponent": exponent(sizes, steps), "read_exponent": exponent(sizes, read)}
    return {**measured, **grown}


def _asked(rows: int, prompt: int, axes: Axes, lm: LM) -> list[Request]:
    return requests(rows, (prompt, prompt), (axes.steps, axes.steps), lm.vocabulary, SEED)


def _deeper(axes: Axes, rows: int, prompt: int) -> Iterable[Case]:
    heads = axes.layers_width // HEAD_WIDTH
    for layers in axes.layers:
        shape = LanguageModel(
            width=axes.layers_width,
            layers=layers,
            heads=heads,
            kv_heads=heads,
            feed_forward=2 * axes.layers_width,
            tied=False,
        )
        lm = language_model(shape, LAYERS_VOCABULARY, torch.bfloat16, SEED)
        yield layers, lm, _asked(rows, prompt, axes, lm), {}


def _searching(directory: Path, axes: Axes) -> Iterable[Case]:
    lm = load_decoder(shipped.TINY).lm
    keys = SyntheticKeys(shipped.TINY, SEED)
    for entries in axes.datastore:
        place = directory / f"of-{entries}"
        place.mkdir(parents=True)
        keys.write(place, entries, SEED)
        store = Datastore.open(place)
        shard = IndexShard.build(store, 0, entries, AUTO, SEED)
        shard.save(shard_directory(place, 0))
        retrieval = Retrieval(LocalRetriever.load([shard_directory(place, 0)], store), KNN_SETTINGS)
        yield entries, lm, _asked(axes.rows, axes.prompt, axes, lm), {"retrieval": retrieval}
