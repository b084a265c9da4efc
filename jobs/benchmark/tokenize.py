"""How fast speech becomes units: the pipeline beside its own encoder alone, and beside a loop over
files through transformers' HuBERT.

Sentences that espeak-ng says. The first comparison is with the shipped model, the second with
weights of HuBERT base's shape that nobody trained: speed does not depend on what they are.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.connection import connection
from cluster.parts import Part, parts, work_off
from cluster.recording import write_flac
from cluster.tokenizing import EncodeUnits
from jobs.benchmark import grids as tables
from jobs.benchmark.encoded import Encoding, alike_in_bf16, bare, one_by_one, speed
from jobs.benchmark.grids import Grid
from jobs.benchmark.progress import Progress
from jobs.benchmark.targets import Target
from mmrag import shipped
from mmrag.config import Synthesize, Tokenize, Workers
from mmrag.corpora import synthetic
from mmrag.corpora.voices.espeak import Synthesizer
from mmrag.model.precision import has_bf16
from mmrag.records import Utterance
from mmrag.speech import audio
from mmrag.speech.hubert import HubertEncoder
from mmrag.speech.units import Codebook

SEED = 1
LAYER, UNITS = 6, 200
"""Of HuBERT base what textless-lib quantizes, and with how many centroids."""
BATCH_SECONDS = 30.0
COMPARED_FILES = 60
"""Clips whose units are compared in two number formats."""
WORKERS = "tokenize.workers"
TARGETS = {
    "tokenize.vs_forward": Target(
        "the pipeline once it runs, over its encoder alone",
        "≥ 0.9",
        lambda ratio: ratio >= 0.9,
        "{:.2f}".format,
    ),
    "tokenize.vs_naive": Target(
        f"HuBERT base, over transformers' {LAYER} layers, a file at a time",
        "≥ 1",
        lambda ratio: ratio >= 1,
        "{:.2f}".format,
    ),
    "tokenize.vs_naive_whole": Target(
        "the same, over all of transformers' layers",
        "≥ 2",
        lambda ratio: ratio >= 2,
        "{:.2f}".format,
    ),
}


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    clips: int
    """Sentences that are spoken."""
    times: int
    """How often the shipped model's pipeline hears each of them."""
    part_seconds: float
    rounds: int
    """Of pipeline and encoder in turn."""
    base_clips: int
    """Of the sentences, how many HuBERT base hears."""
    seconds: float
    """That each encoder alone is timed for."""


FULL = Sizes(clips=400, times=10, part_seconds=300, rounds=3, base_clips=300, seconds=15)
QUICK = Sizes(clips=120, times=8, part_seconds=120, rounds=1, base_clips=24, seconds=4)


@dataclass(frozen=True)
class Answer:
    """When a worker was ready and when it had worked a part off, seconds since the epoch."""

    worker: int
    ready: float
    done: float


class EncodeUnitsTimed(EncodeUnits):
    """Says when it was ready, and when it was done."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._ready = time.time()

    def __call__(self, part: Part[Utterance]) -> Answer:
        super().__call__(part)
        return Answer(os.getpid(), self._ready, time.time())


def measure(directory: Path, sizes: Sizes) -> dict[str, Any]:
    """Everything, below `directory`."""
    tell = Progress()
    tell(f"speaking {sizes.clips} sentences")
    said = _spoken(directory / "speech", sizes.clips)
    results = _shipped(directory, said, sizes, tell)
    base = _base(directory, said, sizes, tell)
    results["real_time_factors"] |= base.pop("real_time_factors")
    results |= base
    results["cores"] = len(os.sched_getaffinity(0))
    return results


def grids(results: Mapping[str, Any]) -> list[Grid]:
    """What was measured beside the targets."""
    speeds = [(name, f"{value:,.1f}") for name, value in results["real_time_factors"].items()]
    return [Grid("Speech to units", ("", "times real time"), speeds)]


def remarks(results: Mapping[str, Any]) -> list[str]:
    """Sentences about what was measured."""
    return [
        f"{results['audio_seconds']:,.0f} s of audio on {results['cores']} cores; HuBERT base's "
        "weights are random.",
        f"With the start of Ray and its workers the pipeline has "
        f"{results['tokenize.vs_forward_started']:.2f} of the encoder's speed.",
        f"{results['bf16_units_alike']:.2%} of the frames keep their unit in bf16.",
    ]


def show(results: Mapping[str, Any]) -> None:
    """Tables for people."""
    tables.show(grids(results), remarks(results), TARGETS, results)


def _spoken(directory: Path, count: int) -> list[Utterance]:
    """Sentences as recordings."""
    counts = {"lm": 1, "adapter": 1, "mentions": 1, "dev": 1, "text": 0, "everyday_share": 0.4}
    config = Synthesize(test=count, workers=Workers(count=1, num_cpus=1), **counts)
    speaker, said = Synthesizer(), []
    for one in synthetic.plan(config, SEED)["test"]:
        wave, path = synthetic.render(one, speaker).wave, directory / f"{one.id}.flac"
        write_flac(path, wave)
        seconds = len(wave) / audio.SAMPLE_RATE
        said.append(Utterance(id=one.id, text=one.text, audio=path, duration=seconds))
    return said


def _shipped(
    directory: Path, said: list[Utterance], sizes: Sizes, tell: Progress
) -> dict[str, Any]:
    """The shipped model's pipeline and its encoder, in turn."""
    model = shipped.find(shipped.TINY)
    again = [replace(one, id=f"{one.id}-{number}") for number in range(sizes.times) for one in said]
    order = _order(model / "hubert", model / "codebook", said, sizes.seconds)
    alone, steady, started = [], [], []
    for number in range(sizes.rounds):
        tell(f"the encoder alone, then the pipeline, {number + 1} of {sizes.rounds}")
        alone.append(_best(order))
        begun = time.time()
        with connection():
            runs, whole = _pipeline(order, again, sizes.part_seconds, directory / f"{number}")
        steady.append(runs)
        started.append(whole / (time.time() - begun))
    alone.append(_best(order))
    # Each pipeline between the encoders before it and behind it.
    beside = [(one + two) / 2 for one, two in pairwise(alone)]
    few = replace(order, files=order.files[:COMPARED_FILES])
    return {
        "tokenize.vs_forward": float(np.median(np.divide(steady, beside))),
        "tokenize.vs_forward_started": float(np.median(np.divide(started, beside))),
        "audio_seconds": _seconds(again),
        "bf16": has_bf16("cpu"),
        "bf16_units_alike": alike_in_bf16(few),
        "real_time_factors": {
            "mmrag:tiny, encoder alone": float(np.median(alone)),
            "mmrag:tiny, pipeline": float(np.median(steady)),
            "mmrag:tiny, pipeline and its start": float(np.median(started)),
        },
    }


def _base(directory: Path, said: list[Utterance], sizes: Sizes, tell: Progress) -> dict[str, Any]:
    """HuBERT base's shape: our pipeline, transformers at its depth and whole."""
    tell("HuBERT base: transformers, a file at a time, then the pipeline")
    hubert, codebook, published = (directory / name for name in ("hubert", "codebook", "published"))
    _random_weights(hubert, codebook, published)
    said = said[: sizes.base_clips]
    cores = len(os.sched_getaffinity(0))
    theirs = _order(published, codebook, said, sizes.seconds)
    speeds = {}
    for name, layers in ((f"{LAYER} layers", LAYER), ("all layers", None)):
        peer = replace(theirs, layers=layers)
        speeds[f"HuBERT base, transformers, {name}"] = speed(one_by_one, peer, 1, cores)
    shallow, whole = speeds.values()
    with connection():
        order = replace(theirs, hubert=hubert)
        part_seconds = _seconds(said) / (4 * cores)
        ours, _ = _pipeline(order, said, part_seconds, directory / "base")
    speeds[f"HuBERT base, pipeline, {LAYER} layers"] = ours
    results = {"tokenize.vs_naive": ours / shallow, "tokenize.vs_naive_whole": ours / whole}
    return results | {"real_time_factors": speeds}


def _random_weights(hubert: Path, codebook: Path, published: Path) -> None:
    """HuBERT base as transformers makes it, the same as our encoder, and random centroids."""
    from transformers import HubertConfig, HubertModel

    torch.manual_seed(SEED)
    model = HubertModel(HubertConfig())
    model.save_pretrained(published)
    encoder = HubertEncoder.from_published(str(published), LAYER)
    encoder.save(hubert)
    centroids = np.random.default_rng(SEED).standard_normal((UNITS, encoder.width))
    Codebook(centroids, encoder.frame_seconds).save(codebook)


def _order(hubert: Path, codebook: Path, said: list[Utterance], seconds: float) -> Encoding:
    files = tuple(one.audio for one in said)
    return Encoding(hubert, codebook, files, BATCH_SECONDS, seconds)


def _best(order: Encoding) -> float:
    """Our encoder alone: a process a core, or one of as many threads, whichever is faster."""
    cores = len(os.sched_getaffinity(0))
    ways = {(cores, 1), (1, cores)}
    return max(speed(bare, order, processes, threads) for processes, threads in ways)


def _pipeline(
    order: Encoding, said: list[Utterance], part_seconds: float, directory: Path
) -> tuple[float, float]:
    """Seconds of audio a second of a pipeline while it runs, and seconds of audio in all.

    It runs for a worker from when that is ready until the last part of all is done.
    """
    workers = Workers(count=len(os.sched_getaffinity(0)), num_cpus=0.8)
    settings = Tokenize(
        units=UNITS,
        sample_seconds=1,
        min_seconds=0.1,
        max_seconds=30,
        batch_seconds=order.batch_seconds,
        part_seconds=part_seconds,
        require_text=True,
        workers=workers,
    )
    directory.mkdir()
    shares = parts(said, lambda one: one.duration, part_seconds)
    encode = {
        "hubert": order.hubert,
        "codebook": order.codebook,
        "settings": settings,
        "directory": directory,
    }
    answers = list(work_off([(EncodeUnitsTimed, encode)], shares, workers, "units", WORKERS))
    last = max(one.done for one in answers)
    ready = {one.worker: one.ready for one in answers}
    whole = _seconds(said)
    return whole * len(ready) / sum(last - one for one in ready.values()), whole


def _seconds(said: list[Utterance]) -> float:
    return sum(one.duration for one in said)
