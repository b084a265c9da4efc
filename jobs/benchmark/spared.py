"""What spared searches save and cost: searches a token and word error rate, rule by rule, of a
shipped model with a datastore of its own corpus; and what searching costs a token at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.connection import connection
from cluster.shards import serve_shards
from jobs.benchmark.keys import SyntheticKeys
from jobs.benchmark.machine import threads
from jobs.benchmark.progress import Progress
from jobs.benchmark.repeats import interleaved, ratio
from mmrag import shipped
from mmrag.config import Decode, Index, Synthesize, Workers
from mmrag.corpora import synthetic
from mmrag.corpora.synthetic import Planned
from mmrag.corpora.voices.espeak import Synthesizer
from mmrag.decoding.decode import Clip, decode
from mmrag.decoding.engine import Engine
from mmrag.decoding.tune import DEFAULTS, chosen_attention, default
from mmrag.model.prepared import prepare
from mmrag.recogniser import Recogniser
from mmrag.records import Neighbours, Retriever, Utterance
from mmrag.retrieval import datastore
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.entries import read_entries
from mmrag.retrieval.index import IndexShard, shard_directory, shard_ranges
from mmrag.retrieval.interpolation import Retrieval
from mmrag.retrieval.memory import AttentionSource
from mmrag.retrieval.retrievers import LocalRetriever
from mmrag.retrieval.segment import Description
from mmrag.score.rates import word_error_rate
from mmrag.speech.tokenized import Tokenized

SEED, K, WINDOW, BATCH, SHARDS, SHARD_CPUS = 1, 16, 20, 32, 4, 0.05
DECODE = Decode(beams=1, length_penalty=0, tokens_per_second=16, max_seconds=30)
NEVER = "never"
RULES: dict[str, dict[str, Any]] = {
    NEVER: {},
    "certain 0.99": {"certain": 0.99},
    "settled, weight 0.2": {"settled": True, "weight": 0.2},
    "patience 2": {"patience": 2},
    "follow 2": {"follow": 2},
    "follow 4": {"follow": 4},
    "certain 0.99, follow 4": {"certain": 0.99, "follow": 4},
}
"""What each rule changes of settings that search for every token; those of another weight are
compared with searching for every token by that weight."""


SPARING = "certain 0.99"
"""The rule by which searches are spared where time is measured: that of models as they come."""
READING: dict[str, dict[str, Any]] = {
    NEVER: {},
    "certain 0.99": {"certain": 0.99},
    "2 tokens": {"stride": 2},
    "4 tokens": {"stride": 4},
    "8 tokens": {"stride": 8},
    "certain 0.99, 4 tokens": {"certain": 0.99, "stride": 4},
}
"""The same for what cross-attention reads: a search for so many tokens."""
UNHEARD = 1e-3
"""A weight of neighbours at which all is done that is done with them, and the same tokens are
written as without them, so that times are of as much work."""


class _Counting:
    """A retriever that counts the queries it searches for."""

    def __init__(self, inner: Retriever) -> None:
        self.inner, self.queries = inner, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def search(
        self, queries: np.ndarray, k: int, exclude_documents: Sequence[int] | None = None
    ) -> Neighbours:
        """As the retriever's own."""
        self.queries += len(queries)
        return self.inner.search(queries, k, exclude_documents)


def searched(directory: Path, quick: bool, tell: Progress) -> dict[str, Any]:
    """Under `searches` a row a rule: `searches_per_token`, the `wer` with its interval, and how
    many transcripts are `changed` of how many `clips`, against searching for every token. Under
    `reads` the same of what cross-attention searches for."""
    recogniser = Recogniser.load(shipped.find(shipped.TINY))
    planned = _planned(24 if quick else 100)
    tell(f"a datastore of {len(planned['datastore'])} sentences")
    store = _store(recogniser, planned["datastore"], directory / "own")
    retriever = _Counting(LocalRetriever.build(store, Index(kind="flat", shards=1), SEED))
    tuned = default(shipped.find(shipped.TINY), store).knn.model_copy(update={"certain": None})
    clips = _clips(recogniser, planned["test"])
    texts = [one.text for one in planned["test"]]
    rows, unspared = [], {}

    def row(rule: str, before: list[str], heard: list[str], searches: float) -> dict[str, Any]:
        wer = word_error_rate(texts, heard)
        return {
            "rule": rule,
            "searches_per_token": searches,
            "wer": [wer.rate, wer.low, wer.high],
            "changed": sum(a != b for a, b in zip(heard, before, strict=True)),
            "clips": len(clips),
        }

    for rule, changes in RULES.items():
        tell(f"decoding, {rule}")
        weight = changes.get("weight", tuned.weight)
        if weight not in unspared:
            plain = Retrieval(retriever, tuned.model_copy(update={"weight": weight}))
            unspared[weight], _ = _heard(recogniser, clips, retriever, plain)
        knn = Retrieval(retriever, tuned.model_copy(update=changes))
        rows.append(row(rule, unspared[weight], *_heard(recogniser, clips, retriever, knn)))
    cache = recogniser.window_cache(retriever)
    settings = chosen_attention(shipped.find(shipped.TINY) / DEFAULTS)
    read: list[dict[str, Any]] = []
    always: list[str] = []
    for rule, changes in READING.items():
        tell(f"reading, {rule}")
        source = AttentionSource(cache, settings.model_copy(update=changes), retriever)
        heard, searches = _heard(recogniser, clips, retriever, source)
        always = heard if rule == NEVER else always
        read.append(row(rule, always, heard, searches))
    return {"searches": rows, "reads": read}


def overheads(directory: Path, quick: bool, tell: Progress) -> dict[str, Any]:
    """`decode.knn_overhead` and `decode.knn_overhead_sharded`: seconds a token among synthetic
    entries over those without, measured in turn, with searches spared as SPARING says; and the same
    with a search for every token (`knn_unspared`). Neighbours weigh UNHEARD."""
    entries = 20_000 if quick else 1_000_000
    recogniser = Recogniser.load(shipped.find(shipped.TINY))
    prepare(recogniser.lm, rows=BATCH, compiled=False)
    tell(f"{entries:,} synthetic entries")
    keys = SyntheticKeys(shipped.TINY, SEED)
    keys.write(directory / "entries", entries, SEED, tell)
    store = Datastore.open(directory / "entries")
    auto = Index(kind="auto", shards=SHARDS)
    for number, span in enumerate(shard_ranges(entries, SHARDS)):
        shard = IndexShard.build(store, *span, auto, SEED)
        shard.save(shard_directory(directory / "entries", number))
    local = LocalRetriever.build(store, Index(kind="auto", shards=1), SEED)
    clips = _clips(recogniser, _planned(8 if quick else 64)["test"])
    repeats = 2 if quick else 5
    knn = default(shipped.find(shipped.TINY), store).knn
    every = knn.model_copy(update={"k": K, "gate": None, "certain": None, "weight": UNHEARD})
    spared = every.model_copy(update=RULES[SPARING])

    def measured(retriever: Retriever) -> tuple[dict[str, Any], dict[str, Any]]:
        with closing(Engine(recogniser.lm, recogniser.vocabulary, BATCH, threads())) as engine:
            ways = {
                "none": _together(engine, clips, None),
                "spared": _together(engine, clips, Retrieval(retriever, spared)),
                "every": _together(engine, clips, Retrieval(retriever, every)),
            }
            for way in ways.values():
                way()  # the first is slow
            tokens: dict[str, list[int]] = {name: [] for name in ways}
            seconds = interleaved(
                {name: lambda n=name, w=way: tokens[n].append(w()) for name, way in ways.items()},
                repeats,
                tell,
            )
        per_token = {
            name: [took / count for took, count in zip(times, tokens[name], strict=True)]
            for name, times in seconds.items()
        }
        return tuple(ratio(per_token[name], per_token["none"]) for name in ("spared", "every"))

    one, unspared = measured(local)
    tell(f"{SHARDS} shards behind actors")
    with connection(), closing(serve_shards(directory / "entries", 1, SHARD_CPUS)) as served:
        several, unspared_sharded = measured(served)
    return {
        "decode.knn_overhead": one,
        "decode.knn_overhead_sharded": several,
        "knn_unspared": {"local": unspared, "sharded": unspared_sharded},
    }


def _together(
    engine: Engine, clips: Sequence[Clip], retrieval: Retrieval | None
) -> Callable[[], int]:
    """Decodes all clips at once; returns how many tokens that were."""

    def way() -> int:
        jobs = [engine.submit(Clip(one.speech, one.limit, retrieval=retrieval)) for one in clips]
        return sum(len(job.future.result().hypothesis.tokens) + 1 for job in jobs)

    return way


def _heard(
    recogniser: Recogniser,
    clips: Sequence[Clip],
    retriever: _Counting,
    helped: Retrieval | AttentionSource,
) -> tuple[list[str], float]:
    """Transcripts, and the queries that were searched for a token, ends among them."""
    before, tokens = retriever.queries, []
    for start in range(0, len(clips), BATCH):
        some = clips[start : start + BATCH]
        speech, limits = [one.speech for one in some], [one.limit for one in some]
        how: dict[str, Any] = {"retrieval": helped}
        if isinstance(helped, AttentionSource):
            how = {"attention_sources": [helped] * len(some)}
        found = decode(recogniser.lm, recogniser.vocabulary, speech, limits, DECODE, **how)
        tokens += [one.tokens for one in found]
    texts = [recogniser.vocabulary.decode(one) for one in tokens]
    return texts, (retriever.queries - before) / sum(len(one) + 1 for one in tokens)


def _planned(test: int) -> dict[str, list[Planned]]:
    counts = {"lm": 1, "adapter": 1, "mentions": 3, "dev": 1, "text": 0, "everyday_share": 0.2}
    return synthetic.plan(Synthesize(test=test, workers=Workers(count=1, num_cpus=1), **counts), 1)


def _encoded(recogniser: Recogniser, planned: Sequence[Planned]) -> list[Any]:
    speaker = Synthesizer()
    waves = (torch.from_numpy(synthetic.render(one, speaker).wave) for one in planned)
    return [recogniser.encode([wave])[0] for wave in waves]


def _clips(recogniser: Recogniser, planned: Sequence[Planned]) -> list[Clip]:
    """Sentences, spoken."""
    return [
        Clip(
            recogniser.vocabulary.speech_input(units),
            recogniser.longest(recogniser.seconds(units), DECODE),
        )
        for units in _encoded(recogniser, planned)
    ]


def _store(recogniser: Recogniser, planned: Sequence[Planned], directory: Path) -> Datastore:
    """Sentences, spoken, as a datastore."""
    lm, vocabulary = recogniser.lm, recogniser.vocabulary
    described = Description(lm.width, WINDOW, "l2", "paired", dict(recogniser.keyed_by))
    datastore.create(directory, described)
    said = [
        Tokenized(Utterance(id=one.id, text=one.text, document=one.id), units)
        for one, units in zip(planned, _encoded(recogniser, planned), strict=True)
    ]
    names = []
    for start in range(0, len(said), BATCH):
        names.append(f"part-{start:05d}")
        segment = read_entries(lm, vocabulary, said[start : start + BATCH], WINDOW, "all")
        datastore.write_segment(directory, names[-1], segment)
    datastore.publish(directory, names)
    return Datastore.open(directory)
