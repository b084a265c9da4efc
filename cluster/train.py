"""Training on many processes: a Ray Train worker loop around a DeepSpeed engine.

The loop makes the same steps as `mmrag.model.train.train`: every worker takes its share of each
step's micro-batches, losses are divided by the counts of all workers together. Checkpoints hold
weights, optimizer and step; what a step reads follows from its number, so a resumed run is the run
that
was not interrupted.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed

# DeepSpeed looks for an accelerator when it is imported, and warns where there is none.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
import deepspeed.ops
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from torch import Tensor

from cluster.measures import Meter, peak_flops
from cluster.placement import Demand, placing
from cluster.progress import MetricsWriter, following
from cluster.validation import DevSplit
from mmrag import artifact, shipped
from mmrag.ahead import ahead
from mmrag.artifact import Held, counted
from mmrag.config import Experiment, Phase, parse
from mmrag.finite import NonFiniteLoss
from mmrag.model import pretrained
from mmrag.model.cross_attention import Adapter
from mmrag.model.lm import LM
from mmrag.model.loss import Batch, Objective
from mmrag.model.train import (
    Chosen,
    Curriculum,
    Example,
    TrainingError,
    adamw,
    collate,
    examples,
    learning_rate,
    lost,
    precision,
    speakable,
    step_log,
    train_step,
    unspeakable,
)
from mmrag.model.vocabulary import Vocabulary
from mmrag.records import Rejection
from mmrag.retrieval.contexts import TrainingContexts, read_neighbours
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.phrases import Phrases
from mmrag.speech.tokenized import Tokenized, read

# It would have a compiler build, for a minute, what reduces over processors in inference alone.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

CHECKPOINTS = ".checkpoints"
STATE = "state"
STEP = "step.json"
"""In a checkpoint: the steps that went into it, to be read without loading it."""
REJECTED = "rejected.jsonl"
"""Utterances that no micro-batch can hold; there is no such file if all fit."""
STOPPED = ".stopped.json"
"""Why the workers gave up, all of them together."""
CAUSES = {cause.__name__: cause for cause in (TrainingError, NonFiniteLoss)}
LEARNED = {
    *("optimizer", "scheduler", "fp16", "amp", "torch_autocast"),
    *("train_batch_size", "prescale_gradients", "gradient_predivide_factor", "sparse_gradients"),
    *("communication_data_type", "curriculum_learning", "data_efficiency"),
    *("progressive_layer_drop", "compression_training", "managed_gradient_accumulation"),
}
"""DeepSpeed's settings that change what is learned: they are no matter of operation."""


def fit(
    experiment: Experiment,
    splits: list[Path],
    directory: Path,
    log: Callable[[dict[str, Any]], None],
    lm: Path | None = None,
    dev: Path | None = None,
    after: int | None = None,
) -> None:
    """Train on the tokenized `splits`; leave the language model in `directory`.

    `directory` holds the vocabulary already. With `experiment.adapter`, what is trained and left
    there is an adapter for the language model in `lm`. A run that was killed there goes on from
    its last checkpoint. `log` is called, in this process, with each record of `metrics.jsonl`, as
    in `following`. What `dev` holds, tokenized too, is measured on the way (`train.dev`).

    Utterances longer than a micro-batch are passed over and listed in `rejected.jsonl`. Raises
    NonFiniteLoss, which names what was read, before a step is taken on a loss that is no number,
    and TrainingError for a run that cannot be made; neither is tried again.
    """
    settings = experiment.train
    (directory / STOPPED).unlink(missing_ok=True)
    gpus = settings.workers.num_gpus
    deepspeed_config(experiment, torch.float32)  # a bad file is refused here, not by every worker
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "experiment": _with_absolute_paths(experiment),
            "splits": [str(split) for split in splits],
            "directory": str(directory),
            "lm": lm and str(lm),
            "dev": dev and str(dev),
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

        with following(directory, heard, after):
            trainer.fit()
    if (directory / STOPPED).exists():
        stopped = json.loads((directory / STOPPED).read_text())
        raise CAUSES[stopped["cause"]](stopped["message"])


def held(draft: Path) -> Held | None:
    """What an unfinished training would lose: its checkpoints, or a vocabulary at the least.

    DeepSpeed's checkpoints go on with as many workers and the ZeRO stage that they were made with.
    """
    if checkpoints := list(draft.glob(f"{CHECKPOINTS}/*/checkpoint_*")):
        files = [file for one in checkpoints if (file := one / STEP).exists()]
        steps = [json.loads(file.read_text())["step"] for file in files]
        return Held(
            counted(len(checkpoints), "checkpoint") + (f" up to step {max(steps)}" if steps else "")
        )
    return Held("a vocabulary", laid_out=False) if (draft / Vocabulary.FILE).exists() else None


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

    ValueError if that file sets something the experiment decides, or that changes what is learned.
    """
    settings = experiment.train
    decided = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": settings.micro_batches // settings.workers.count,
        "gradient_clipping": settings.clip,
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    if settings.zero_stage >= 2:
        decided["data_types"] = {"grad_accum_dtype": "fp32"}
    extra = _read_settings(Path(settings.deepspeed)) if settings.deepspeed else {}
    clash = sorted(decided.keys() & extra.keys())
    if "stage" in extra.get("zero_optimization", {}):
        clash.append("zero_optimization.stage")
    if clash:
        raise ValueError(f"{settings.deepspeed} sets what the experiment decides: {clash}")
    if learned := sorted(LEARNED & extra.keys()):
        raise ValueError(
            f"{settings.deepspeed} sets {learned}, which changes what is learned: such a file says "
            "how training is run (offload, buckets, overlap), so that it may change on the way"
        )
    zero = {**extra.pop("zero_optimization", {}), "stage": settings.zero_stage}
    return {**extra, **decided, "zero_optimization": zero}


def _read_settings(path: Path) -> dict[str, Any]:
    """A file of DeepSpeed's settings; ValueError if it is no JSON object."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"train.deepspeed: {path} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"train.deepspeed: {path} is not one JSON object")
    return settings


def _worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs.

    What every worker gives up for at the same point is told by a file: raised, it would be tried
    again and end the same.
    """
    try:
        _train(config)
    except (TrainingError, NonFiniteLoss) as error:
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

    vocabulary = Vocabulary.load(Path(config["lm"] or directory))
    told = [one for split in config["splits"] for one in read(Path(split))]
    corpus = list(speakable(told, vocabulary))
    data = examples(corpus, vocabulary)
    contexts = shown(experiment, corpus) if experiment.adapter else None
    curriculum = Curriculum(data, settings, seed)
    if rank == 0:
        _write_rejected(directory / REJECTED, unspeakable(told, vocabulary), curriculum, data)
    dtype = precision(settings.precision, device)
    ds_config = deepspeed_config(experiment, dtype)
    objective = _build(experiment, vocabulary, ds_config, config["lm"])
    optimizer = adamw(objective, settings)
    engine, *_ = deepspeed.initialize(
        model=objective, optimizer=optimizer, config=ds_config, dist_init_required=False
    )
    first = _restore(engine, dtype)
    metrics = MetricsWriter(directory, first) if rank == 0 else None
    add_up = partial(_all_sum, device=device)
    shape = experiment.lm if experiment.adapter is None else None
    peak = peak_flops(settings, device, dtype)
    meter = Meter(shape, vocabulary.size, rank, world, add_up, device, peak)
    gather = deepspeed.zero.GatheredParameters if settings.zero_stage == 3 else None
    dev = config["dev"] and DevSplit(
        Path(config["dev"]), experiment, vocabulary, dtype, rank, world, add_up, gather
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
        # DeepSpeed averages over ranks; the loss is already divided by everyone's count.
        engine.backward(loss * world, scale_wrt_gas=False)
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
        if not sums.isfinite().all():  # the same sums everywhere: every worker stops here
            losses = _of_all(losses, device)
            raise lost(step, "the loss is not finite", micro_batches, data, losses)
        engine.step()
        norm = float(engine.get_global_grad_norm() or 0.0)
        if not _all_sum(torch.tensor([norm]), device).isfinite():
            raise lost(step, "the gradient is not finite", micro_batches, data)
        done = step + 1
        measured = meter.end()
        measured |= dev.measure(engine, done) if dev else {}
        if metrics:
            record = step_log(step, phase, sums, counts, norm, rate, int(tokens))
            metrics.write({**asdict(record), **measured})
        if done % settings.checkpoint_steps == 0 or done == settings.steps:
            if not _finite(engine, device):  # without ZeRO DeepSpeed tells no norm
                raise lost(step, "a weight is not finite", micro_batches, data)
            _checkpoint(engine, done, dtype, rank)
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


def _write_rejected(
    path: Path, unwritable: Iterable[Rejection], curriculum: Curriculum, data: Sequence[Example]
) -> None:
    """A line for each utterance whose text cannot be written, or that is too long, in tokens."""
    path.unlink(missing_ok=True)
    lines: list[dict[str, Any]] = [{"id": one.source, "reason": one.reason} for one in unwritable]
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


def _restore(engine: deepspeed.DeepSpeedEngine, dtype: torch.dtype) -> int:
    """Load the last checkpoint, if there is one; return the step to go on with."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as directory:
        made = json.loads(file.read_text()) if (file := Path(directory) / STEP).exists() else {}
        if made and made["precision"] != str(dtype):
            raise TrainingError(
                f"the checkpoints were made with {made['precision']}, and this hardware would go "
                f"on with {dtype}: train.precision auto is what the hardware multiplies fast, so "
                "go on where the run was begun"
            )
        loaded, state = engine.load_checkpoint(directory, tag=STATE)
    if loaded is None:
        raise RuntimeError(f"DeepSpeed could not load the checkpoint in {checkpoint.path}")
    return state["step"]


def _checkpoint(
    engine: deepspeed.DeepSpeedEngine, step: int, dtype: torch.dtype, rank: int
) -> None:
    """Report a checkpoint; each rank adds its own files to it."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / STATE).mkdir()
        if rank == 0:
            fields = {"step": step, "precision": str(dtype)}
            artifact.write_json(Path(directory) / STEP, fields)
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


def _finite(engine: deepspeed.DeepSpeedEngine, device: torch.device) -> bool:
    """Whether all weights are numbers, on every rank."""
    own = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
    wrong = sum(not bool(weight.isfinite().all()) for weight in own)
    return not _all_sum(torch.tensor([float(wrong)]), device).item()


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
