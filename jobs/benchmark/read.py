"""What reading retrieved windows costs while clips are decoded: nothing read, a list of entries
read whole, a datastore searched for every token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jobs.benchmark.built import AUTO
from jobs.benchmark.decoded import spoken_clips
from jobs.benchmark.keys import SyntheticKeys
from jobs.benchmark.machine import threads
from jobs.benchmark.progress import Progress
from jobs.benchmark.repeats import ratio
from mmrag import shipped
from mmrag.decoding.decode import Clip
from mmrag.decoding.engine import Engine
from mmrag.decoding.tune import DEFAULTS, chosen_attention
from mmrag.model.prepared import prepare
from mmrag.recogniser import Recogniser
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.index import IndexShard
from mmrag.retrieval.memory import AttentionSource
from mmrag.retrieval.retrievers import LocalRetriever

SEED = 1
ALONE, LIST, SEARCHED, SPARED = "alone", "list", "searched", "spared"
"""Ways to decode: without an adapter, and with it over either; SPARED where the model is not
CERTAIN."""
CERTAIN = 0.99
"""As in `spared.READING`, which tells what that costs in word errors."""
STRIDES = (2, 4, 8)
"""Tokens from one search to the next where not every token searches."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    clips: int
    rows: int
    """Clips in the engine's batch."""
    entries: int
    """In the datastore."""
    listed: int
    """Of them, in the list that is read whole."""
    repeats: int


FULL = Sizes(clips=64, rows=16, entries=75_000, listed=100, repeats=5)
QUICK = Sizes(clips=24, rows=8, entries=75_000, listed=100, repeats=3)


def overheads(directory: Path, quick: bool, tell: Progress) -> dict[str, Any]:
    """`decode.cross_attention_overhead`, and the same with a datastore: tokens a second without,
    over those with what is read, measured in turn; the share of tokens that read something; and
    the overhead with a datastore that is searched for every token, or every n-th (`read_for`).

    No gate is shut; a datastore is searched where the model is less than CERTAIN, and in `read_for`
    however certain it is.
    """
    sizes = QUICK if quick else FULL
    recogniser = Recogniser.load(shipped.find(shipped.TINY))
    prepare(recogniser.lm, rows=sizes.rows, compiled=False)
    tell(f"a datastore of {sizes.entries:,} entries to read from")
    sources = _sources(recogniser, directory, sizes)
    clips = spoken_clips(recogniser, sizes.clips)
    speeds: dict[str, list[float]] = {way: [] for way in sources}
    reading = {}
    with closing(Engine(recogniser.lm, recogniser.vocabulary, sizes.rows, threads())) as engine:
        for source in sources.values():
            _decoded(engine, clips[: sizes.rows], source)  # the first is slow
        for repeat in range(sizes.repeats):
            tell(f"decoding with and without reading, {repeat + 1} of {sizes.repeats}")
            for way, source in sources.items():
                if source is not None:  # with no window that others, or itself before, encoded
                    source = replace(source, cache=recogniser.window_cache(source.retriever))
                speed, reading[way] = _decoded(engine, clips, source)
                speeds[way].append(speed)
    return {
        "decode.cross_attention_overhead": ratio(speeds[ALONE], speeds[LIST]),
        "decode.cross_attention_overhead_datastore": ratio(speeds[ALONE], speeds[SPARED]),
        "reading": {way: reading[way] for way in (LIST, SEARCHED, SPARED)},
        "read_for": {str(n): ratio(speeds[ALONE], speeds[_every(n)]) for n in (1, *STRIDES)},
    }


def _sources(
    recogniser: Recogniser, directory: Path, sizes: Sizes
) -> dict[str, AttentionSource | None]:
    """What each way reads."""
    SyntheticKeys(shipped.TINY, SEED).write(directory / "read", sizes.entries, SEED)
    store = Datastore.open(directory / "read")
    shard = directory / "read-index"
    IndexShard.build(store, 0, store.entries, AUTO, SEED).save(shard)
    retriever = LocalRetriever.load([shard], store)
    cache = recogniser.window_cache(retriever)
    settings = chosen_attention(shipped.find(shipped.TINY) / DEFAULTS)
    settings = settings.model_copy(update={"gate": None, "certain": None})
    entries = np.random.default_rng(SEED).choice(store.entries, sizes.listed, replace=False)
    listed = AttentionSource(cache, settings, retriever, entries)
    searched = {
        _every(stride): AttentionSource(
            cache, settings.model_copy(update={"stride": stride}), retriever
        )
        for stride in (1, *STRIDES)
    }
    sparing = settings.model_copy(update={"certain": CERTAIN})
    return {
        ALONE: None,
        LIST: listed,
        SPARED: AttentionSource(cache, sparing, retriever),
        **searched,
    }


def _every(stride: int) -> str:
    """The way that searches for every token, or for every n-th."""
    return SEARCHED if stride == 1 else f"{SEARCHED} every {stride}"


def _decoded(
    engine: Engine, clips: Sequence[Clip], source: AttentionSource | None
) -> tuple[float, float]:
    """Tokens a second, and the share of tokens for which something was read."""
    given = [Clip(clip.speech, clip.limit, attention=source) for clip in clips]
    started = time.perf_counter()
    jobs = [engine.submit(clip) for clip in given]
    choices = [one for job in jobs for one in job.future.result().hypothesis.choices]
    seconds = time.perf_counter() - started
    return len(choices) / seconds, sum(bool(one.attended) for one in choices) / len(choices)
