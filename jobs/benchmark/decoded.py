"""A process that decodes clips with a datastore in several ways, on one core: `python -m
jobs.benchmark.decoded`. The order comes in as a line of JSON, the answer goes out as one.

Ours is the engine with a batch of clips and the index that `index.kind: auto` makes; the others are
`hooked`, a clip at a time. All have the same model, entries and clips, look something up at every
step, and mix it in with the same settings.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from jobs.benchmark import hooked
from jobs.benchmark.built import shards_of
from jobs.benchmark.hooked import HookedLM
from jobs.benchmark.progress import Progress
from mmrag import shipped
from mmrag.config import Decode, Synthesize, Workers
from mmrag.corpora import synthetic
from mmrag.corpora.voices.espeak import Synthesizer
from mmrag.decoding.decode import Clip
from mmrag.decoding.engine import Engine
from mmrag.decoding.tune import default
from mmrag.recogniser import Recogniser
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.interpolation import Retrieval
from mmrag.retrieval.retrievers import LocalRetriever

SEED = 1
DECODE = Decode(beams=1, length_penalty=0, tokens_per_second=16, max_seconds=30)
OURS, ALONE, FLAT, IVFPQ = "ours", "alone", "flat", "ivfpq"
"""Ways to decode: the engine with and without a datastore, and a hook over either index."""

Transcripts = dict[int, list[int]]
"""Of clips by their numbers: ids, the end token among them."""


@dataclass(frozen=True)
class Decoding:
    """What to decode, and with what."""

    model: str
    datastore: str
    index: str
    """The directory of our shards' directories."""
    peer: str
    """Where the others' files are, or are put: `ivfpq.faiss` and `values`."""
    queries: str
    """A file of queries, and one of the entries that are nearest to each (`.npy`)."""
    nearest: str
    k: int
    clips: int
    rows: int
    """Clips in the engine's batch."""
    repeats: int
    seconds: float
    """After so many no further clip is begun, a clip at a time."""
    progress: Progress


def measured(order: Decoding) -> dict[str, Any]:
    """Tokens a second of each way, median of the repeats; the recall of the other's codes; how many
    transcripts of the engine are those of the hook over every key, of how many.

    Keeps this process on one core once everything is built.
    """
    torch.set_num_threads(1)
    recogniser = Recogniser.load(shipped.find(order.model))
    order.progress(f"hearing {order.clips} clips")
    clips = spoken_clips(recogniser, order.clips)
    store = Datastore.open(order.datastore)
    faiss.omp_set_num_threads(1)  # our shards set FAISS up for as many threads as there are now
    retriever = LocalRetriever.load(shards_of(order.index), store)
    tokens, indexes = _peer(order, store)
    _stay_on_one_core()
    knn = default(shipped.find(order.model), store).knn
    knn = knn.model_copy(update={"k": order.k, "gate": None, "certain": None, "query": "speech"})
    ours = Retrieval(retriever, knn)
    engine = Engine(recogniser.lm, recogniser.vocabulary, order.rows)
    ways: dict[str, Callable[[Sequence[Clip]], Transcripts]] = {
        OURS: lambda some: _together(engine, some, ours),
        ALONE: lambda some: _together(engine, some, None),
    }
    for name, index in indexes.items():
        model = HookedLM(recogniser.lm, recogniser.vocabulary, index, tokens, knn)
        ways[name] = lambda some, model=model: _one_by_one(model, some, order.seconds)
    try:
        found, speeds = _interleaved(ways, clips, order)
    finally:
        engine.close()
    compared = found[FLAT].keys()
    same = sum(found[OURS][number] == found[FLAT][number] for number in compared)
    return {
        "tokens_per_second": {name: float(np.median(each)) for name, each in speeds.items()},
        "ivfpq_recall": _recall(indexes[IVFPQ], np.load(order.queries), np.load(order.nearest)),
        "transcripts_alike": same,
        "transcripts_compared": len(compared),
        "knn": {"k": knn.k, "weight": knn.weight, "temperature": knn.temperature},
    }


def _peer(order: Decoding, store: Datastore) -> tuple[np.ndarray, dict[str, faiss.Index]]:
    """The hook's tokens and its indexes, built with every core."""
    peer, tell = Path(order.peer), order.progress
    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
    flat = hooked.flat(store, tell)
    ivfpq = hooked.ivfpq(store, peer / "ivfpq.faiss", tell)
    faiss.omp_set_num_threads(1)
    return hooked.values(store, peer / "values"), {FLAT: flat, IVFPQ: ivfpq}


def spoken_clips(recogniser: Recogniser, count: int) -> list[Clip]:
    """Sentences of the test split, spoken by its voices."""
    counts = {"lm": 1, "adapter": 1, "mentions": 1, "dev": 1, "text": 0, "everyday_share": 0.4}
    config = Synthesize(test=count, workers=Workers(count=1, num_cpus=1), **counts)
    speaker, clips = Synthesizer(), []
    for one in synthetic.plan(config, SEED)["test"]:
        wave = torch.from_numpy(synthetic.render(one, speaker).wave)
        [units] = recogniser.encode([wave])
        limit = recogniser.longest(recogniser.seconds(units), DECODE)
        clips.append(Clip(recogniser.vocabulary.speech_input(units), limit))
    return clips


def _interleaved(
    ways: dict[str, Callable[[Sequence[Clip]], Transcripts]],
    clips: Sequence[Clip],
    order: Decoding,
) -> tuple[dict[str, Transcripts], dict[str, list[float]]]:
    """What each way hears in the end, and its tokens a second, repeat by repeat."""
    found: dict[str, Transcripts] = {}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(clips[:1])  # the first is slow
    for repeat in range(order.repeats):
        order.progress(f"decoding, {repeat + 1} of {order.repeats}")
        for name, way in ways.items():
            started = time.perf_counter()
            found[name] = way(clips)
            seconds = time.perf_counter() - started
            speeds[name].append(sum(map(len, found[name].values())) / seconds)
    return found, speeds


def _together(engine: Engine, clips: Sequence[Clip], retrieval: Retrieval | None) -> Transcripts:
    """By the engine, as many at a time as it has rows."""
    given = [Clip(clip.speech, clip.limit, retrieval=retrieval) for clip in clips]
    jobs = [engine.submit(clip) for clip in given]
    heard = [job.future.result().hypothesis for job in jobs]
    return {number: [one.token for one in h.choices] for number, h in enumerate(heard)}


def _one_by_one(model: HookedLM, clips: Sequence[Clip], seconds: float) -> Transcripts:
    """By a hook, until all are done or so many seconds have passed."""
    found: Transcripts = {}
    started = time.perf_counter()
    for number, clip in enumerate(clips):
        if found and time.perf_counter() - started > seconds:
            break
        found[number] = model.generate(clip.speech, clip.limit)
    return found


def _recall(index: faiss.Index, queries: np.ndarray, nearest: np.ndarray) -> float:
    """The share of the nearest entries (Q, K) that an index finds."""
    _, found = index.search(queries, nearest.shape[1])
    hits = [len(set(a) & set(b)) for a, b in zip(found.tolist(), nearest.tolist(), strict=True)]
    return sum(hits) / nearest.size


def _stay_on_one_core() -> None:
    """Every thread of this process, and those that it will start."""
    core = min(os.sched_getaffinity(0))
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {core})


if __name__ == "__main__":
    told = json.loads(sys.stdin.readline())
    told["progress"] = Progress(**told["progress"])
    print(json.dumps(measured(Decoding(**told))))
