"""Processes that encode speech with nothing around it, all at once: our encoder over waves in
memory, and transformers' HuBERT, a file at a time."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain, count
from multiprocessing.synchronize import Barrier
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from cluster.parts import parts
from mmrag.records import Units
from mmrag.speech import audio
from mmrag.speech.hubert import HubertEncoder
from mmrag.speech.units import Codebook, collapse

SEED = 1


@dataclass(frozen=True)
class Encoding:
    """What to encode, and how."""

    hubert: Path
    """Our encoder's directory; transformers' for `one_by_one`."""
    codebook: Path
    files: tuple[Path, ...]
    batch_seconds: float
    seconds: float
    """For how long, over all files again and again."""
    layers: int | None = None
    """Of transformers' encoder; None for all."""


Encode = Callable[[Encoding], Callable[[], Iterator[float]]]
"""Loads everything; what it returns encodes every file once and yields seconds of audio."""


def bare(order: Encoding) -> Callable[[], Iterator[float]]:
    """Our encoder over waves, batched by length, without finding any units."""
    encoder = HubertEncoder.load(order.hubert).eval()
    waves = sorted(map(audio.read, order.files), key=len)
    limit = order.batch_seconds * audio.SAMPLE_RATE
    batches = [part.work for part in parts(waves, len, limit)]
    Random(SEED).shuffle(batches)  # so that short clips are not encoded oftener than long ones
    encoder.features(waves[:1])

    def run() -> Iterator[float]:
        for batch in batches:
            encoder.features(batch)
            yield sum(map(len, batch)) / audio.SAMPLE_RATE

    return run


def one_by_one(order: Encoding) -> Callable[[], Iterator[float]]:
    """Transformers' HubertModel over a file, then the next; units by the nearest centroid."""
    from transformers import HubertModel

    model = HubertModel.from_pretrained(order.hubert, local_files_only=True).eval()
    if order.layers is not None:
        model.encoder.layers = model.encoder.layers[: order.layers]
    centroids = torch.from_numpy(Codebook.load(order.codebook).centroids)

    @torch.inference_mode()
    def units(wave: Tensor) -> Units:
        features = model(wave[None]).last_hidden_state[0]
        return collapse(torch.cdist(features, centroids).argmin(1).numpy())

    units(audio.read(order.files[0]))

    def run() -> Iterator[float]:
        for file in order.files:
            wave = audio.read(file)
            units(wave)
            yield len(wave) / audio.SAMPLE_RATE

    return run


def speed(encode: Encode, order: Encoding, processes: int, threads: int) -> float:
    """Seconds of audio a second, of all processes together, each of so many threads."""
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(processes)
    with ProcessPoolExecutor(processes, context, _ready, (encode, order, threads, start)) as pool:
        runs = [pool.submit(_timed, order.seconds) for _ in range(processes)]
        return sum(run.result() for run in runs)


def alike_in_bf16(order: Encoding) -> float:
    """The share of frames that keep their unit when the encoder multiplies in bfloat16."""
    encoder, book = HubertEncoder.load(order.hubert).eval(), Codebook.load(order.codebook)
    same: list[np.ndarray] = []
    for file in order.files:
        wave = audio.read(file)
        found = []
        for rough in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=rough):
                [features] = encoder.features([wave])
            found.append(book.assign(features.float().numpy()))
        same.append(found[0] == found[1])
    return float(np.concatenate(same).mean())


_process: dict[str, object] = {}
"""What this process encodes with, and the barrier that it starts behind."""


def _ready(encode: Encode, order: Encoding, threads: int, start: Barrier) -> None:
    torch.set_num_threads(threads)
    _process.update(run=encode(order), start=start)


def _timed(seconds: float) -> float:
    run, start = _process["run"], _process["start"]
    start.wait()
    began, heard = time.perf_counter(), 0.0
    for audio_seconds in chain.from_iterable(run() for _ in count()):
        heard += audio_seconds
        if (passed := time.perf_counter() - began) >= seconds:
            return heard / passed
    raise ValueError("no audio to encode")  # never: there is always another time
