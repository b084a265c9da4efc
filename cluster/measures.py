"""What a training step was worth: its speed, its wait for data, its padding, memory and MFU.

Each worker times its own step; one sum over the workers makes the figures those of all of them.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmrag.config import LanguageModel, Train
from mmrag.model.flops import PEAK_FLOPS, training_flops
from mmrag.model.loss import IGNORE, Batch
from mmrag.model.vocabulary import PAD

RSS_UNIT = 1024
"""Bytes in what Linux counts a process's memory in."""


class Meter:
    """Measures step after step: `begin`, `read` when the batches are there, `end`.

    Every worker makes one, and calls all three at the same steps. A step that is given up is not
    ended; the next one begins anew.
    """

    def __init__(
        self,
        shape: LanguageModel | None,
        vocabulary: int,
        rank: int,
        world: int,
        add_up: Callable[[Tensor], Tensor],
        device: torch.device,
        peak: float | None,
    ) -> None:
        """`shape` is the model's whose every weight is trained; None for an adapter, whose FLOPs
        are not counted. `add_up` gives the sum over all workers, `peak` is as in `peak_flops`."""
        self._shape = shape
        self._vocabulary = vocabulary
        self._rank = rank
        self._world = world
        self._add_up = add_up
        self._device = device
        self._peak = peak
        self._started = 0.0
        self._waited = 0.0
        self._own = torch.zeros(3, dtype=torch.float64)

    def begin(self) -> None:
        """A step begins: what follows until `read` is waiting for its batches."""
        self._started = time.monotonic()

    def read(self, batches: Sequence[Batch]) -> None:
        """This worker's batches of the step are there."""
        self._waited = time.monotonic() - self._started
        positions = sum(batch.ids.numel() for batch in batches)
        useful = flops = 0.0
        for batch in batches:
            lengths = (batch.ids != PAD).sum(1).tolist()
            targets = (batch.targets != IGNORE).sum(1).tolist()
            useful += sum(lengths)
            if self._shape is not None and self._peak is not None:
                flops += sum(
                    training_flops(self._shape, self._vocabulary, length, length, wanted)
                    for length, wanted in zip(lengths, targets, strict=True)
                )
        self._own = torch.tensor([positions, useful, flops], dtype=torch.float64)

    def end(self) -> dict[str, float]:
        """What the step was worth, by the names of `metrics.jsonl`; a sum over all workers.

        * `tokens_per_second`: tokens of all workers, padding included, by this worker's clock;
          `tokens_per_second_per_gpu` those of one worker, which has one GPU or none;
        * `data_wait`: share of the step that the workers, on average, waited for their batches;
        * `padding`: share of the tokens that is padding;
        * `mfu`: FLOPs that the mathematics asks for (`mmrag.model.flops.training_flops`: about 6 a
          parameter and token, and attention's; padding, the CTC head and what checkpointing
          computes again do not count), over step time x workers x peak FLOP/s. Not there where no
          peak is known;
        * `peak_gpu_bytes`: the most that CUDA allocated on one worker so far; on processors
          `peak_rss_bytes`, the largest resident set of a worker so far.
        """
        seconds = time.monotonic() - self._started
        memory = torch.zeros(self._world, dtype=torch.float64)
        memory[self._rank] = peak_bytes(self._device)
        waited = torch.tensor([self._waited], dtype=torch.float64)
        summed = self._add_up(torch.cat((waited, self._own, memory)))
        waits, positions, useful, flops = summed[:4].tolist()
        speed = positions / seconds
        told = {
            "tokens_per_second": speed,
            "tokens_per_second_per_gpu": speed / self._world,
            "data_wait": min(1.0, waits / self._world / seconds),
            "padding": 1 - useful / positions,
            memory_name(self._device): summed[4:].max().item(),
        }
        if flops:
            told["mfu"] = flops / (seconds * self._world * self._peak)
        return told


def peak_flops(settings: Train, device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that MFU is a share of: `train.peak_flops`, else a known GPU's in bf16, else None."""
    if settings.peak_flops is not None or device.type != "cuda" or dtype != torch.bfloat16:
        return settings.peak_flops
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device))


def peak_bytes(device: torch.device) -> int:
    """The most memory so far: what CUDA allocated, or this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT


def memory_name(device: torch.device) -> str:
    """What `peak_bytes` is called."""
    return "peak_gpu_bytes" if device.type == "cuda" else "peak_rss_bytes"
