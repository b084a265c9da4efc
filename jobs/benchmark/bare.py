"""A process that trains in bare loops of torch: `python -m jobs.benchmark.bare`. The order comes in
as a line of JSON, the answer goes out as one.

Two loops that somebody would write who has neither Ray nor DeepSpeed, on the micro-batches of a
training, made beforehand: weights in float32 and autocast around the model; or weights in bfloat16
and their masters in float32, which is what DeepSpeed does. Where training is in float32 both would
be the same, and there is one.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrag.config import Experiment, Train, parse
from mmrag.model.curriculum import Curriculum
from mmrag.model.examples import examples
from mmrag.model.lm import LM
from mmrag.model.loss import Batch, Objective, combine
from mmrag.model.train import adamw, collate, learning_rate, precision
from mmrag.model.vocabulary import Vocabulary
from mmrag.speech import tokenized

AUTOCAST, MASTERS = "autocast", "bfloat16 with float32 masters"


@dataclass(frozen=True)
class BareTraining:
    """What to train, as the experiment says."""

    experiment: dict[str, Any]
    split: str
    """A directory of tokenized parts."""
    vocabulary: str
    """A directory that holds it."""
    threads: int


def measured(order: BareTraining) -> dict[str, list[dict[str, float]]]:
    """Of each loop `seconds` and `tokens`, step by step."""
    torch.set_num_threads(order.threads)
    experiment = parse(order.experiment, "the benchmark's experiment")
    vocabulary = Vocabulary.load(Path(order.vocabulary))
    steps = list(_steps(experiment, vocabulary, Path(order.split)))
    dtype = precision(experiment.train.precision, torch.device("cpu"))
    ways = [AUTOCAST] if dtype == torch.float32 else [AUTOCAST, MASTERS]
    return {way: _trained(way, experiment, vocabulary, steps, dtype) for way in ways}


def _steps(experiment: Experiment, vocabulary: Vocabulary, split: Path) -> Iterator[list[Batch]]:
    """The micro-batches of every step."""
    data = examples(list(tokenized.read(split)), vocabulary)
    settings, seed = experiment.train, experiment.seed
    curriculum = Curriculum(data, settings, seed)
    for step in range(settings.steps):
        _, chosen = curriculum.step(step)
        yield [
            collate(data, some, vocabulary, settings.unit_dropout, (seed, step, number))
            for number, some in enumerate(chosen)
        ]


def _trained(
    way: str,
    experiment: Experiment,
    vocabulary: Vocabulary,
    steps: Sequence[Sequence[Batch]],
    dtype: torch.dtype,
) -> list[dict[str, float]]:
    """One loop: what each step took and read, and its `loss` in nats a token."""
    torch.manual_seed(experiment.seed)
    settings = experiment.train
    lm = LM(experiment.lm, vocabulary.size)
    weights = Objective(lm, len(vocabulary.alphabet), settings.ctc_weight)
    model = copy.deepcopy(weights).to(dtype) if way == MASTERS else weights
    pairs = list(zip(weights.parameters(), model.parameters(), strict=True))
    optimizer, took = adamw(weights, settings), []
    for step, batches in enumerate(steps):
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        counts = torch.stack([batch.counts() for batch in batches]).sum(0)
        with torch.autocast("cpu", dtype) if _autocast(way, dtype) else nullcontext():
            losses = [_backward(model, batch, counts, settings) for batch in batches]
        if model is not weights:
            for master, computed in pairs:
                master.grad, computed.grad = computed.grad.float(), None
        torch.nn.utils.clip_grad_norm_(weights.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        if model is not weights:
            with torch.no_grad():
                for master, computed in pairs:
                    computed.copy_(master)
        loss = float(torch.stack(losses).sum(0)[0] / counts[0])
        seconds = time.perf_counter() - started
        tokens = sum(batch.ids.numel() for batch in batches)
        took.append({"seconds": seconds, "tokens": tokens, "loss": loss})
    return took


def _autocast(way: str, dtype: torch.dtype) -> bool:
    return way == AUTOCAST and dtype != torch.float32


def _backward(model: Objective, batch: Batch, counts: Tensor, settings: Train) -> Tensor:
    """The summed losses (2,) of a micro-batch, whose gradients are added to the model's."""
    sums = model(batch)
    combine(sums, counts, (1.0, settings.ctc_weight)).backward()
    return sums.detach()


if __name__ == "__main__":
    print(json.dumps(measured(BareTraining(**json.loads(sys.stdin.readline())))))
