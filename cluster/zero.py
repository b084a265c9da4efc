"""DeepSpeed's configuration: what the experiment decides of it, and what a file of it may add."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mmrag.config import Experiment

LEARNED = {
    *("optimizer", "scheduler", "fp16", "amp", "torch_autocast"),
    *("train_batch_size", "prescale_gradients", "gradient_predivide_factor", "sparse_gradients"),
    *("communication_data_type", "curriculum_learning", "data_efficiency"),
    *("progressive_layer_drop", "compression_training", "managed_gradient_accumulation"),
    *("zero_optimization.zero_quantized_weights", "zero_optimization.zero_quantized_gradients"),
}
"""DeepSpeed's settings that change what is learned: they are no matter of operation."""


def deepspeed_config(
    experiment: Experiment, dtype: torch.dtype, workers: int | None = None
) -> dict[str, Any]:
    """DeepSpeed's configuration: the experiment's settings and what `train.deepspeed` adds.

    `workers` is how many there are, None for the most there may be. ValueError if that file sets
    something the experiment decides, that changes what is learned, or that does not go with so
    many workers; without `workers`, with any number of them that there may be.
    """
    settings = experiment.train
    allowed = [workers] if workers else range(settings.workers.fewest, settings.workers.most + 1)
    workers = workers or settings.workers.most
    decided = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": settings.micro_batches // workers,
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
    zero = extra.get("zero_optimization", {})
    if learned := sorted(LEARNED & {*extra, *(f"zero_optimization.{key}" for key in zero)}):
        raise ValueError(
            f"{settings.deepspeed} sets {learned}, which changes what is learned: such a file says "
            "how training is run (offload, buckets, overlap), so that it may change on the way"
        )
    shared = zero.get("zero_hpz_partition_size", 1)
    wrong = [str(count) for count in allowed if settings.zero_stage != 3 or count % shared]
    if shared > 1 and wrong:
        raise ValueError(
            f"{settings.deepspeed} sets zero_hpz_partition_size {shared}, the GPUs of a node under "
            f"zero_stage 3; this is zero_stage {settings.zero_stage} with workers.count "
            f"{', '.join(wrong)}"
        )
    if (zero.get("offload_optimizer") or {}).get("device") == "nvme":
        raise ValueError(
            f"{settings.deepspeed} puts the optimizer on NVMe, where checkpoints do not find it: "
            "offload_optimizer.device is cpu or none"
        )
    zero = {**zero, "stage": settings.zero_stage}
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
