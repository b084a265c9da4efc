"""Training on many processes: a Ray Train worker loop around a DeepSpeed engine.

The loop makes the same steps as `mmrag.train.train`: every worker takes its share of each step's
micro-batches, losses are divided by the counts of all workers together. Checkpoints hold weights,
optimizer and step; what a step reads follows from its number, so a resumed run is the run that
was not interrupted.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed

# DeepSpeed looks for an accelerator when it is imported, and warns where there is none.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from torch import Tensor

from cluster.placement import Demand, placing
from cluster.progress import MetricsWriter, following
from mmrag import shipped
from mmrag.config import Experiment, parse
from mmrag.model import pretrained
from mmrag.model.cross_attention import Adapter
from mmrag.model.lm import LM
from mmrag.model.loss import Objective
from mmrag.model.train import (
    Curriculum,
    adamw,
    collate,
    examples,
    learning_rate,
    precision,
    step_log,
    train_step,
)
from mmrag.model.vocabulary import Vocabulary
from mmrag.retrieval.contexts import TrainingContexts, read_neighbours
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.phrases import Phrases
from mmrag.speech.tokenized import Tokenized, read

CHECKPOINTS = ".checkpoints"
STATE = "state"


def fit(
    experiment: Experiment,
    splits: list[Path],
    directory: Path,
    log: Callable[[dict[str, Any]], None],
    lm: Path | None = None,
) -> None:
    """Train on the tokenized `splits`; leave the language model in `directory`.

    `directory` holds the vocabulary already. With `experiment.adapter`, what is trained and left
    there is an adapter for the language model in `lm`. A run that was killed there goes on from
    its last checkpoint. `log` is called, in this process, with each record of `metrics.jsonl`.
    """
    settings = experiment.train
    gpus = settings.workers.num_gpus
    deepspeed_config(experiment, torch.float32)  # a bad file is refused here, not by every worker
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "experiment": _with_absolute_paths(experiment),
            "splits": [str(split) for split in splits],
            "directory": str(directory),
            "lm": lm and str(lm),
        },
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=settings.workers.count,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": settings.workers.num_cpus, "GPU": gpus},
        ),
        run_config=RunConfig(
            name="train",
            storage_path=str(directory / CHECKPOINTS),
            failure_config=FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            worker_runtime_env={"env_vars": {"DS_ACCELERATOR": "cuda" if gpus else "cpu"}},
        ),
    )
    with placing(Demand.of("train.workers", settings.workers)) as answered:

        def heard(record: dict[str, Any]) -> None:
            answered()
            log(record)

        with following(directory, heard):
            trainer.fit()


def _with_absolute_paths(experiment: Experiment) -> dict[str, Any]:
    """The experiment for the workers, whose working directory is not this process's."""
    values = experiment.model_dump(mode="json")
    for section, name in (("train", "base"), ("train", "deepspeed"), ("adapter", "base")):
        path = values[section] and values[section][name]
        if path and not path.startswith(shipped.PREFIX):
            values[section][name] = str(Path(path).absolute())
    return values


def deepspeed_config(experiment: Experiment, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's configuration: the experiment's settings and what `train.deepspeed` adds.

    ValueError if that file sets something the experiment decides.
    """
    settings = experiment.train
    decided = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": settings.micro_batches // settings.workers.count,
        "gradient_clipping": settings.clip,
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    extra = json.loads(Path(settings.deepspeed).read_text()) if settings.deepspeed else {}
    clash = sorted(decided.keys() & extra.keys())
    if "stage" in extra.get("zero_optimization", {}):
        clash.append("zero_optimization.stage")
    if clash:
        raise ValueError(f"{settings.deepspeed} sets what the experiment decides: {clash}")
    zero = {**extra.pop("zero_optimization", {}), "stage": settings.zero_stage}
    return {**extra, **decided, "zero_optimization": zero}


def _worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    experiment = parse(config["experiment"], "the driver's experiment")
    settings, directory = experiment.train, Path(config["directory"])
    seed = experiment.seed
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    torch.set_num_threads(max(1, round(settings.workers.num_cpus)))
    deepspeed.init_distributed(dist_init_required=False)

    vocabulary = Vocabulary.load(Path(config["lm"] or directory))
    corpus = [one for split in config["splits"] for one in read(Path(split))]
    data = examples(corpus, vocabulary)
    contexts = shown(experiment, corpus) if experiment.adapter else None
    curriculum = Curriculum(data, settings, seed)
    dtype = precision(settings.precision, device)
    ds_config = deepspeed_config(experiment, dtype)
    objective = _build(experiment, vocabulary, ds_config, config["lm"])
    optimizer = adamw(objective, settings)
    engine, *_ = deepspeed.initialize(
        model=objective, optimizer=optimizer, config=ds_config, dist_init_required=False
    )
    first = _restore(engine)
    metrics = MetricsWriter(directory, first) if rank == 0 else None

    def backward(loss: Tensor) -> None:
        # DeepSpeed averages over ranks; the loss is already divided by everyone's count.
        engine.backward(loss * world, scale_wrt_gas=False)
        engine.step()

    for step in range(first, settings.steps):
        started = time.monotonic()
        phase, micro_batches = curriculum.step(step)
        batches = [
            collate(data, chosen, vocabulary, settings.unit_dropout, (seed, step, n), contexts)
            for n, chosen in enumerate(micro_batches)
            if n % world == rank
        ]
        tokens = torch.tensor([sum(batch.ids.numel() for batch in batches)])
        counts = torch.stack([batch.counts() for batch in batches]).sum(0)
        *counts, tokens = _all_sum(torch.cat((counts, tokens)), device)
        counts = torch.stack(counts)
        rate = learning_rate(step, settings)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        sums = train_step(
            lambda batch: engine(batch.to(device)), backward, batches, counts, settings.ctc_weight
        )
        sums = _all_sum(sums, device)
        if metrics:
            norm = float(engine.get_global_grad_norm() or 0.0)
            record = step_log(step, phase, sums, counts, norm, rate, int(tokens))
            speed = record.tokens / (time.monotonic() - started)
            metrics.write({**asdict(record), "tokens_per_second": speed})
        done = step + 1
        if done % settings.checkpoint_steps == 0 or done == settings.steps:
            _checkpoint(engine, done)
    _export(engine.module, directory, vocabulary, rank)


def shown(experiment: Experiment, corpus: Sequence[Tokenized]) -> TrainingContexts:
    """What an adapter reads while it trains on `corpus`, from the workspace's datastores."""
    settings, root = experiment.adapter.contexts, experiment.workspace
    near = [
        (Datastore.open(root / "datastores" / name), read_neighbours(root / "neighbours" / name))
        for name in (settings.retrieved, settings.wrong)
    ]
    return TrainingContexts(
        settings,
        [one.utterance.id for one in corpus],
        [one.utterance.entities for one in corpus],
        Phrases(Datastore.open(root / "datastores" / settings.phrases)),
        *near,
    )


def _build(
    experiment: Experiment, vocabulary: Vocabulary, ds_config: dict[str, Any], frozen: str | None
) -> Objective:
    """The objective with its starting weights; partitioned as it is built under ZeRO-3.

    `frozen` is the directory of the language model that an adapter is trained for.
    """
    settings = experiment.train
    torch.manual_seed(experiment.seed)
    partitioned = settings.zero_stage == 3
    with deepspeed.zero.Init(config_dict_or_path=ds_config) if partitioned else nullcontext():
        lm = LM(experiment.lm, vocabulary.size)
        adapter = experiment.adapter and Adapter(experiment.adapter.shape, experiment.lm)
        objective = Objective(lm, len(vocabulary.alphabet), settings.ctc_weight, adapter)
    if base := frozen or settings.base:
        for parameter, name, tensor in _filling(lm, pretrained.base_tensors(base), partitioned):
            pretrained.place(name, parameter, tensor, vocabulary, base)
    if adapter is not None and experiment.adapter.base:
        base, names = experiment.adapter.base, {name for name, _ in adapter.named_parameters()}
        tensors = dict(pretrained.adapter_tensors(base))
        if tensors.keys() != names:
            differing = sorted(tensors.keys() ^ names)
            raise pretrained.CheckpointError(f"{base} has another shape: {differing}")
        for parameter, name, tensor in _filling(adapter, tensors.items(), partitioned):
            pretrained.put(name, parameter, tensor, base)
    return objective


def _filling(
    module: torch.nn.Module, tensors: Iterable[tuple[str, Tensor]], partitioned: bool
) -> Iterator[tuple[Tensor, str, Tensor]]:
    """Each parameter with what is to be written into it, where this process has to write it."""
    parameters = dict(module.named_parameters())
    for name, tensor in tensors:
        with deepspeed.zero.GatheredParameters([parameters[name]], modifier_rank=0):
            if not partitioned or torch.distributed.get_rank() == 0:
                yield parameters[name], name, tensor


def _restore(engine: deepspeed.DeepSpeedEngine) -> int:
    """Load the last checkpoint, if there is one; return the step to go on with."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as directory:
        loaded, state = engine.load_checkpoint(directory, tag=STATE)
    if loaded is None:
        raise RuntimeError(f"DeepSpeed could not load the checkpoint in {checkpoint.path}")
    return state["step"]


def _checkpoint(engine: deepspeed.DeepSpeedEngine, step: int) -> None:
    """Report a checkpoint; each rank adds its own files to it."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / STATE).mkdir()
        engine.save_checkpoint(directory, tag=STATE, client_state={"step": step})
        ray.train.report({"step": step}, checkpoint=Checkpoint.from_directory(directory))


def _export(objective: Objective, directory: Path, vocabulary: Vocabulary, rank: int) -> None:
    """Write the language model, or the adapter, as every later stage loads it."""
    lm, adapter = objective.lm, objective.adapter
    tensors = list(_whole(lm if adapter is None else adapter, rank))
    if rank == 0 and adapter is None:
        pretrained.save(directory, lm.config, vocabulary, tensors)
    elif rank == 0:
        pretrained.save_adapter(directory, adapter.config, tensors)
    torch.distributed.barrier()


def _whole(module: torch.nn.Module, rank: int) -> Iterator[tuple[str, Tensor]]:
    """Each weight in full, on rank 0's host memory; gathered one at a time under ZeRO-3."""
    for name, parameter in module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if rank == 0:
                yield name, parameter.detach().cpu().clone()


def _all_sum(values: Tensor, device: torch.device) -> Tensor:
    values = values.to(device)
    torch.distributed.all_reduce(values)
    return values.cpu()
