"""Training on many processes: a Ray Train worker loop around a DeepSpeed engine.

The loop makes the same steps as `mmrag.model.train.train`: every worker takes its share of each
step's micro-batches, losses are divided by the counts of all workers together. What a step reads
follows from its number, and a checkpoint goes on with any number of workers and any ZeRO stage: a
resumed run is the run that was not interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed

# DeepSpeed looks for an accelerator when it is imported, and warns where there is none.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
# Batches are of all shapes: what oneDNN keeps for each, a thousand by default, took 6 GiB and more.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")

import deepspeed
import deepspeed.ops
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch import Tensor

from cluster.checkpoints import FIELDS, Bookkeeping, CheckpointError, Saved, Uploads, listed, mend
from cluster.measures import Meter, peak_flops
from cluster.packing import pack, pack_contexts, packed_contexts
from cluster.placement import Demand, placing
from cluster.preemption import ListeningConfig, Notice, Preempted, Stopped, stopping
from cluster.progress import SKIPPED, MetricsWriter, following
from cluster.validation import DevSplit
from cluster.zero import deepspeed_config
from mmrag import artifact, shipped
from mmrag.ahead import ahead
from mmrag.artifact import Held, counted
from mmrag.config import Experiment, Phase, parse
from mmrag.finite import Guard, NonFiniteLoss
from mmrag.model import pretrained
from mmrag.model.cross_attention import Adapter
from mmrag.model.curriculum import LEAVE_OUT, Curriculum, TrainingError
from mmrag.model.epochs import Chosen
from mmrag.model.lm import LM
from mmrag.model.loss import Batch, Objective
from mmrag.model.packed import Packed
from mmrag.model.train import (
    adamw,
    collate,
    learning_rate,
    lost,
    precision,
    step_log,
    train_step,
)
from mmrag.model.vocabulary import Vocabulary
from mmrag.retrieval.contexts import NeighbourEntries, TrainingContexts
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.phrases import Phrases
from mmrag.storage import Location, located

# It would have a compiler build, for a minute, what reduces over processors in inference alone.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

CHECKPOINTS = ".checkpoints"
RUN = "train"
"""Ray Train's name of the run: the directory of its checkpoints."""
REJECTED = "rejected.jsonl"
"""Utterances that no micro-batch can hold; there is no such file if all fit."""
STOPPED = ".stopped.json"
"""Why the workers gave up, all of them together."""
CAUSES = {
    cause.__name__: cause for cause in (TrainingError, NonFiniteLoss, CheckpointError, Preempted)
}
RESIZE_SECONDS = 600.0
"""Between two looks for room for more workers: growing makes the steps since the last checkpoint
again."""


def fit(
    experiment: Experiment,
    splits: list[Location],
    directory: Path,
    log: Callable[[dict[str, Any]], None],
    lm: Location | None = None,
    dev: Location | None = None,
    after: int | None = None,
) -> None:
    """Train on the tokenized `splits`; leave the language model in `directory`.

    `directory` holds the vocabulary already. With `experiment.adapter`, what is trained and left
    there is an adapter for the language model in `lm`. A run that was killed there goes on from
    its last checkpoint. `log` is called, in this process, with each record of `metrics.jsonl`, as
    in `following`. What `dev` holds, tokenized too, is measured on the way (`train.dev`).

    Utterances longer than a micro-batch are passed over and listed in `rejected.jsonl`. A step is
    not taken on a loss or a gradient that is no number: it is listed in `skipped.jsonl` with what
    was read, and the third in a row raises NonFiniteLoss. Raises TrainingError for a run that
    cannot be made, CheckpointError for a checkpoint that cannot be gone on from; none is tried
    again. Workers that are asked to leave commit a checkpoint first, and others go on from it.
    SIGTERM to this process asks all of them, and then raises Stopped.
    """
    deepspeed_config(experiment, torch.float32)  # a bad file is refused here, not by every worker
    mend(directory / CHECKPOINTS / RUN)
    with stopping(directory) as asked_to_stop:
        while True:
            ended = _attempt(experiment, splits, directory, log, lm, dev, after)
            if not isinstance(ended, Preempted):
                break
            stop = asked_to_stop()
            then = "the same command goes on from there" if stop else "going on where there is room"
            print(f"{ended}: {then}", file=sys.stderr, flush=True)
            if stop:
                raise Stopped(str(ended))
            after = None  # what is there has been told
    if ended:
        raise ended


def _attempt(
    experiment: Experiment,
    splits: list[Location],
    directory: Path,
    log: Callable[[dict[str, Any]], None],
    lm: Location | None,
    dev: Location | None,
    after: int | None,
) -> Exception | None:
    """Train to the end, or until all workers give up together: why."""
    settings = experiment.train
    (directory / STOPPED).unlink(missing_ok=True)
    gpus = settings.workers.num_gpus
    corpus = pack(splits, lm or directory, directory)
    if contexts := experiment.adapter and experiment.adapter.contexts:
        names = (contexts.retrieved, contexts.wrong)
        pack_contexts(experiment.workspace / "neighbours", names, directory)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "experiment": _with_absolute_paths(experiment),
            "corpus": str(corpus),
            "directory": str(directory),
            "lm": lm and str(lm),
            "dev": dev and str(dev),
        },
        torch_config=ListeningConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=settings.workers.count,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": settings.workers.num_cpus, "GPU": gpus},
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
        ),
        run_config=RunConfig(
            name=RUN,
            storage_path=str(directory / CHECKPOINTS),
            failure_config=FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            callbacks=[Bookkeeping()],
            worker_runtime_env={"env_vars": {"DS_ACCELERATOR": "cuda" if gpus else "cpu"}},
        ),
    )
    demand = Demand.of("train.workers", settings.workers, settings.workers.fewest)
    with placing(demand) as answered:

        def heard(record: dict[str, Any]) -> None:
            answered()
            log(record)

        with following(directory, heard, after):
            trainer.fit()
    if not (directory / STOPPED).exists():
        return None
    stopped = json.loads((directory / STOPPED).read_text())
    return CAUSES[stopped["cause"]](stopped["message"])


def held(draft: Path) -> Held | None:
    """What an unfinished training would lose: its checkpoints, or a vocabulary at the least."""
    folder = draft / CHECKPOINTS / RUN
    if names := listed(folder):
        files = [file for name in names if (file := folder / name / FIELDS).exists()]
        steps = [json.loads(file.read_text())["step"] for file in files]
        return Held(
            counted(len(names), "checkpoint") + (f" up to step {max(steps)}" if steps else "")
        )
    return Held("a vocabulary", laid_out=False) if (draft / Vocabulary.FILE).exists() else None


def _with_absolute_paths(experiment: Experiment) -> dict[str, Any]:
    """The experiment for the workers, whose working directory is not this process's."""
    values = experiment.model_dump(mode="json")
    for section, name in (("train", "base"), ("train", "deepspeed"), ("adapter", "base")):
        path = values[section] and values[section][name]
        if path and not path.startswith(shipped.PREFIX):
            values[section][name] = str(located(path).absolute())
    return values


def _worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs.

    What every worker gives up for at the same point is told by a file: raised, it would be tried
    again and end the same.
    """
    try:
        _train(config)
    except tuple(CAUSES.values()) as error:
        if ray.train.get_context().get_world_rank() == 0:
            fields = {"cause": type(error).__name__, "message": str(error)}
            artifact.write_json(Path(config["directory"]) / STOPPED, fields)
        torch.distributed.barrier()  # nobody is taken for finished before that is written


def _train(config: dict[str, Any]) -> None:
    experiment = parse(config["experiment"], "the driver's experiment")
    settings, directory = experiment.train, Path(config["directory"])
    seed = experiment.seed
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    torch.set_num_threads(max(1, round(settings.workers.num_cpus)))
    deepspeed.init_distributed(dist_init_required=False)

    vocabulary = Vocabulary.load(located(config["lm"] or directory))
    data = Packed(Path(config["corpus"]), vocabulary)
    contexts = None
    if experiment.adapter:
        read = experiment.adapter.contexts
        near = packed_contexts(directory, (read.retrieved, read.wrong))
        contexts = shown(experiment, data.names, data.entities, near)
    curriculum = Curriculum(data, settings, seed, data.directory)
    if rank == 0:
        _write_rejected(directory / REJECTED, curriculum, data)
    dtype = precision(settings.precision, device)
    ds_config = deepspeed_config(experiment, dtype, world)
    objective = _build(experiment, vocabulary, ds_config, config["lm"])
    optimizer = adamw(objective, settings)
    engine, *_ = deepspeed.initialize(
        model=objective, optimizer=optimizer, config=ds_config, dist_init_required=False
    )
    first, in_a_row = _restore(engine, dtype)
    metrics = MetricsWriter(directory, first) if rank == 0 else None
    skipped = MetricsWriter(directory, first, SKIPPED) if rank == 0 else None
    guard, notice = Guard(LEAVE_OUT, in_a_row), Notice(rank, device, directory)
    uploads = Uploads(directory, settings.staging, rank, world)
    add_up = partial(_all_sum, device=device)
    shape = experiment.lm if experiment.adapter is None else None
    peak = peak_flops(settings, device, dtype)
    meter = Meter(shape, vocabulary.size, rank, world, add_up, device, peak)
    gather = deepspeed.zero.GatheredParameters if settings.zero_stage == 3 else None
    dev = config["dev"] and DevSplit(
        located(config["dev"]), experiment, vocabulary, dtype, rank, world, add_up, gather
    )

    def drawn(step: int) -> tuple[Phase, list[list[Chosen]], list[Batch]]:
        """What step `step` reads, and this worker's share of it."""
        phase, micro_batches = curriculum.step(step)
        own = [
            collate(data, chosen, vocabulary, settings.unit_dropout, (seed, step, n), contexts)
            for n, chosen in enumerate(micro_batches)
            if n % world == rank
        ]
        return phase, micro_batches, own

    def backward(loss: Tensor) -> None:
        # A loss that is no number must not have a gradient that is one: DeepSpeed skips by that.
        number = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
        # DeepSpeed averages over ranks; the loss is already divided by everyone's count.
        engine.backward(loss * number * world, scale_wrt_gas=False)
        if not engine.is_gradient_accumulation_boundary():
            engine.step()  # counts the micro-batch; the real one waits for all losses

    reading = ahead(drawn, range(first, settings.steps))
    for step in range(first, settings.steps):
        meter.begin()
        phase, micro_batches, batches = next(reading)
        meter.read(batches)
        tokens = torch.tensor([sum(batch.ids.numel() for batch in batches)])
        counts = torch.stack([batch.counts() for batch in batches]).sum(0)
        *counts, tokens = _all_sum(torch.cat((counts, tokens)), device)
        counts = torch.stack(counts)
        rate = learning_rate(step, settings)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        losses = train_step(
            lambda batch: engine(batch.to(device)), backward, batches, counts, settings.ctc_weight
        )
        sums = _all_sum(losses.sum(0), device)
        uploads.copied()
        norm = _take_step(engine)
        done = step + 1
        if norm is None:  # on every worker alike
            found = lost(step, micro_batches, data, _of_all(losses, device))
            if metrics:
                skipped.write(asdict(found))
                metrics.write({"step": step, "phase": phase.name, "skipped": str(found)})
            guard.skip(found)
        else:
            guard.taken()
            measured = meter.end()
            measured |= dev.measure(engine, done) if dev else {}
            if metrics:
                record = step_log(step, phase, sums, counts, norm, rate, int(tokens))
                metrics.write({**asdict(record), **measured, **uploads.told()})
        leaving = notice.agreed()
        if done % settings.checkpoint_steps == 0 or done == settings.steps or leaving:
            fields = {"step": done, "precision": str(dtype), "skipped_in_a_row": guard.in_a_row}
            uploads.send(engine, fields)
        if leaving and done < settings.steps:
            uploads.close()
            raise Preempted(f"the workers were asked to leave, and did so after step {done}")
    _export(engine.module, directory, vocabulary, rank)
    uploads.close()


def _take_step(engine: deepspeed.DeepSpeedEngine) -> float | None:
    """Take the step; the gradient's norm, or None where that is no number and nothing changed."""
    if engine.optimizer is not engine.basic_optimizer:
        engine.step()  # takes none on such a gradient
        return float(engine.get_global_grad_norm()) if engine.was_step_applied() else None
    # Without ZeRO in float32 it would; an optimizer changes nothing of what has no gradient.
    gradients = [each.grad for each in engine.module.parameters() if each.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if norm.isfinite():
        engine.step()
        return float(norm)
    dropping = engine.optimizer.register_step_pre_hook(lambda *_: engine.module.zero_grad())
    engine.step()
    dropping.remove()
    return None


def shown(
    experiment: Experiment,
    names: Sequence[str],
    entities: Sequence[Sequence[str]],
    neighbours: Mapping[str, NeighbourEntries],
) -> TrainingContexts:
    """What an adapter reads while it trains, from the workspace's datastores.

    `names` and `entities` are those of the examples; `neighbours` are by the name of the datastore.
    """
    settings, stores = experiment.adapter.contexts, experiment.workspace / "datastores"
    near = [
        (Datastore.open(stores / name), neighbours[name])
        for name in (settings.retrieved, settings.wrong)
    ]
    phrases = Phrases(Datastore.open(stores / settings.phrases))
    return TrainingContexts(settings, names, entities, phrases, *near)


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
    objective.trained_by(settings)
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


def _write_rejected(path: Path, curriculum: Curriculum, data: Packed) -> None:
    """A line for each utterance whose text cannot be written, or that is too long, in tokens."""
    path.unlink(missing_ok=True)
    lines: list[Mapping[str, Any]] = [*data.rejected()]
    lines += [
        {
            "id": data[one.index].name,
            "length": one.length,
            "budget": curriculum.settings.micro_batch_tokens,
            "formats": one.forms,
        }
        for one in curriculum.too_long()
    ]
    if lines:
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _restore(engine: deepspeed.DeepSpeedEngine, dtype: torch.dtype) -> tuple[int, int]:
    """Load the last checkpoint, if there is one; return the step to go on with, and how many were
    not taken just before it."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0, 0
    with closing(Saved(checkpoint.filesystem, checkpoint.path)) as saved:
        if saved.fields["precision"] != str(dtype):
            raise TrainingError(
                f"the checkpoints were made with {saved.fields['precision']}, and this hardware "
                f"would go on with {dtype}: train.precision auto is what the hardware multiplies "
                "fast, so go on where the run was begun"
            )
        saved.restore(engine)
        return saved.fields["step"], saved.fields["skipped_in_a_row"]


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


def _of_all(losses: Tensor, device: torch.device) -> Tensor:
    """Every rank's losses (M, 2) -> those of all micro-batches of the step, in order."""
    own = losses.to(device)
    everyone = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everyone, own)
    return torch.stack(everyone, dim=1).flatten(0, 1).cpu()


def _all_sum(values: Tensor, device: torch.device) -> Tensor:
    values = values.to(device)
    torch.distributed.all_reduce(values)
    return values.cpu()
