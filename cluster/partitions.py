"""What this process holds of a DeepSpeed engine's weights and moments, at each ZeRO stage.

A part is a flat range of one parameter by name: its float32 weights and Adam's moments, wherever
DeepSpeed keeps them. Whoever knows the ranges can cut them anew, for any number of processes and
any stage. Frozen parameters have no part. Knows nothing about files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"


class Part(NamedTuple):
    """The range [start, stop) of the flattened parameter `name`."""

    name: str
    start: int
    stop: int
    owner: Tensor
    """The float32 tensor that the optimizer steps; the part is in it, others may be too."""
    offset: int
    """Where the part begins in `owner`, flattened, and in its moments."""

    def of(self, whole: Tensor) -> Tensor:
        """The part (N,) of its owner, or of a moment of it; a view."""
        return whole.detach().view(-1)[self.offset : self.offset + self.stop - self.start]


def parts(engine: DeepSpeedEngine, whole: bool = False) -> Iterator[Part]:
    """The parts that this process holds; those of all processes together are every parameter.

    Without ZeRO every process holds all: each answers for its share, or with `whole` for all.
    """
    optimizer = engine.optimizer
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    if engine.zero_optimization_stage() == 3:
        yield from _sharded(optimizer, names)
    elif hasattr(optimizer, "update_lp_params"):
        yield from _fragments(optimizer, names)
    else:
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        for parameter, master in _replicated(engine):
            count = master.numel()
            start, stop = count * rank // world, count * (rank + 1) // world
            start, stop = (0, count) if whole else (start, stop)
            yield Part(names[parameter], start, stop, master, start)


def state(engine: DeepSpeedEngine) -> dict[Tensor, dict[str, Any]]:
    """The optimizer's state by owner; an owner has none before the first step."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer).state


def publish(engine: DeepSpeedEngine) -> None:
    """Bring the weights that the model computes with up to the parts, on all processes at once."""
    optimizer = engine.optimizer
    with torch.no_grad():
        if engine.zero_optimization_stage() == 3:
            optimizer.checkpoint_event_prologue()  # small ones stay whole on every process
            for group in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            optimizer.checkpoint_event_epilogue()  # gathers those again
        elif hasattr(optimizer, "update_lp_params"):
            optimizer.update_lp_params()
        else:
            for parameter, master in _replicated(engine):
                if parameter is not master:
                    parameter.copy_(master)


def _sharded(optimizer: Any, names: dict[Tensor, str]) -> Iterator[Part]:
    """ZeRO-3: each parameter is cut in as many equal shares as there are processes."""
    for group, parameters in enumerate(optimizer.fp16_groups):
        offset = 0
        for parameter in parameters:
            share = parameter.partition_numel()
            start = min(share * optimizer._get_param_partition_rank(parameter), parameter.ds_numel)
            stop = min(start + share, parameter.ds_numel)  # what follows is padding
            owner = optimizer.fp32_partitioned_groups_flat[group]
            if start < stop:
                yield Part(names[parameter], start, stop, owner, offset)
            offset += share


def _fragments(optimizer: Any, names: dict[Tensor, str]) -> Iterator[Part]:
    """ZeRO-1 and 2: all parameters of a group in a row are cut in equal shares."""
    for parameter, name in names.items():
        held = getattr(parameter, "_hp_mapping", None)
        if held is not None:  # some of it is in this process's share
            there, here = held.lp_fragment_address, held.hp_fragment_address
            [owner] = optimizer.optimizer.param_groups[held.param_group_index]["params"]
            yield Part(name, there.start, there.start + there.numel, owner, here.start)


def _replicated(engine: DeepSpeedEngine) -> Iterator[tuple[Tensor, Tensor]]:
    """No ZeRO: each trained parameter, and the float32 weights that are stepped in its place."""
    optimizer = engine.optimizer
    if optimizer is engine.basic_optimizer:
        trained = [each for group in optimizer.param_groups for each in group["params"]]
        yield from zip(trained, trained, strict=True)
        return
    for computed, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        yield from zip(computed, masters, strict=True)
