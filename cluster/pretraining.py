"""HuBERT pretraining on many processes: Ray Train workers that add up their gradients.

The loop is `mmrag.speech.pretraining`'s own, the same as in one process. Its state lies in the
output's directory, which every worker reads and the first one writes, so a run goes on with any
number of workers; nothing is left to Ray's checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from torch import Tensor

from cluster.placement import Demand, placing
from cluster.progress import following
from mmrag import artifact
from mmrag.config import Pretrain
from mmrag.finite import NonFiniteLoss
from mmrag.processes import Processes

RUN = ".workers"
"""Where Ray Train keeps what it has to know of the run."""
STOPPED = ".stopped.json"
"""Why the workers gave up, all of them together."""
BUCKET = 1 << 25
"""Numbers that are added up at once: a sum of many small tensors would mostly wait."""


class Workers:
    """The processes of a Ray Train run."""

    def __init__(self, device: torch.device) -> None:
        self.rank = torch.distributed.get_rank()
        self.count = torch.distributed.get_world_size()
        self._device = device

    def add(self, tensors: Sequence[Tensor]) -> None:
        """As in `Processes`: NCCL or gloo, in float32, some bucketfuls at a time."""
        for bucket in buckets(tensors, BUCKET):
            flat = torch.cat([one.detach().flatten().to(self._device) for one in bucket])
            torch.distributed.all_reduce(flat)
            sums = flat.split([one.numel() for one in bucket])
            for one, total in zip(bucket, sums, strict=True):
                one.copy_(total.view_as(one))


def buckets(tensors: Sequence[Tensor], most: int) -> list[list[Tensor]]:
    """Tensors in their order, of at most `most` numbers together; a larger one is alone."""
    made: list[list[Tensor]] = []
    held = 0
    for one in tensors:
        if not made or held + one.numel() > most:
            made.append([])
            held = 0
        made[-1].append(one)
        held += one.numel()
    return made


def fit(
    work: Callable[[Processes], None],
    settings: Pretrain,
    directory: Path,
    log: Callable[[dict[str, Any]], None],
    after: int | None = None,
) -> None:
    """Run `work`, which pretrains in `directory`, in `settings.workers` processes.

    Each is told which one it is. A worker that dies is replaced, together with the others, up to
    `max_failures` times; they go on from the last state. `log` is called, in this process, with
    each record of `metrics.jsonl`, as in `following`. Raises what `work` raises where it is a
    ValueError, which every worker meets alike: NonFiniteLoss, or what is wrong with the settings.
    """
    stopped = directory / STOPPED
    stopped.unlink(missing_ok=True)
    gpus = settings.num_gpus

    def worker() -> None:
        _worker(work, stopped)

    trainer = TorchTrainer(
        worker,
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=settings.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": settings.num_cpus, "GPU": gpus},
        ),
        run_config=RunConfig(
            name="pretrain",
            storage_path=str(directory / RUN),
            failure_config=FailureConfig(max_failures=settings.max_failures),
        ),
    )
    takes = {"num_cpus": settings.num_cpus, "num_gpus": gpus}
    with placing(Demand("pretrain", settings.workers, **takes, counted="workers")) as answered:

        def heard(record: dict[str, Any]) -> None:
            answered()
            log(record)

        with following(directory, heard, after):
            trainer.fit()
    if stopped.exists():
        told = json.loads(stopped.read_text())
        cause = NonFiniteLoss if told["cause"] == NonFiniteLoss.__name__ else ValueError
        raise cause(told["message"])


def _worker(work: Callable[[Processes], None], stopped: Path) -> None:
    """What each worker runs. What all of them give up for alike is told by a file: raised, it would
    be tried again and end the same."""
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of the node's GPUs, the one that `work` finds
    workers = Workers(device)
    try:
        work(workers)
    except ValueError as error:
        if workers.rank == 0:
            fields = {"cause": type(error).__name__, "message": str(error)}
            artifact.write_json(stopped, fields)
        torch.distributed.barrier()  # nobody is taken for finished before that is written
