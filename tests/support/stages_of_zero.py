"""A small model trained on several processes, stored, and gone on with on others; prints losses.

`python stages_of_zero.py DIRECTORY WORKERS PRECISION`: where DIRECTORY holds nothing, train three
steps at each stage of ZeRO, the second of which has a loss that is no number, store the state, and
train three more; else go on at each stage with each state that is there. One JSON object.
"""

import json
import os
import sys
import tempfile
from contextlib import closing, nullcontext
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from pyarrow.fs import LocalFileSystem
from torch import nn

from cluster.checkpoints import FIELDS, LAYOUT, Saved, Share, part_file
from cluster.train import _take_step, deepspeed

STAGES = (0, 1, 2, 3)
MICRO_BATCHES = 4
SPOILT = 1


def build(stage: int, workers: int, precision: str) -> deepspeed.DeepSpeedEngine:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICRO_BATCHES // workers,
        "gradient_clipping": 0.4,
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": {"stage": stage},
    }
    if stage >= 2:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=config) if stage == 3 else nullcontext():
        layers = [nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 13), nn.Tanh(), nn.Linear(13, 3)]
        model = nn.Sequential(*layers)
    model[2].requires_grad_(False)
    trained = [one for one in model.parameters() if one.requires_grad]
    groups = [{"params": trained[::2], "weight_decay": 0.1}, {"params": trained[1::2]}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0)
    return deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False
    )[0]


def step(engine: deepspeed.DeepSpeedEngine, number: int, precision: str, spoil: bool) -> float:
    """The loss before the step; that of a spoilt one is no number."""
    rank, workers = torch.distributed.get_rank(), torch.distributed.get_world_size()
    random = torch.Generator().manual_seed(number)
    inputs = torch.randn(MICRO_BATCHES, 5, 7, generator=random)
    targets = torch.randn(MICRO_BATCHES, 5, 3, generator=random)
    total = torch.zeros(1)
    for place in range(rank, MICRO_BATCHES, workers):
        given = inputs[place].bfloat16() if precision == "bf16" else inputs[place]
        loss = (engine(given).float() - targets[place]).square().sum() / 60
        loss = loss * (torch.nan if spoil and place == 1 else 1.0)
        engine.backward(loss * workers, scale_wrt_gas=False)
        total += loss.detach()
        if not engine.is_gradient_accumulation_boundary():
            engine.step()
    norm = _take_step(engine)
    torch.distributed.all_reduce(total)
    if (norm is None) != spoil:
        raise RuntimeError(f"step {number} with a gradient of norm {norm}")
    return float(total)


def steps(engine: deepspeed.DeepSpeedEngine, numbers: range, precision: str) -> list[float]:
    return [step(engine, number, precision, number == SPOILT) for number in numbers]


def train(root: Path, rank: int, workers: int, precision: str) -> dict[str, list[float]]:
    told = {}
    for stage in STAGES:
        engine, target = build(stage, workers, precision), root / f"{stage}"
        steps(engine, range(3), precision)
        target.mkdir(exist_ok=True)
        Share.of(engine).copy().write(target / part_file(rank))
        if rank == 0:
            (target / FIELDS).write_text(json.dumps({"layout": LAYOUT, "workers": workers}))
        told[f"{stage}"] = steps(engine, range(3, 6), precision)
    torch.distributed.barrier()
    return told


def go_on(root: Path, workers: int, precision: str) -> dict[str, list[float]]:
    told = {}
    for stored in sorted(root.iterdir()):
        for stage in STAGES:
            engine = build(stage, workers, precision)
            with closing(Saved(LocalFileSystem(), str(stored))) as saved:
                saved.restore(engine)
            told[f"{stored.name} to {stage}"] = steps(engine, range(3, 6), precision)
    return told


def main(rank: int, root: Path, workers: int, precision: str, meeting: str, empty: bool) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(workers), "LOCAL_RANK": str(rank)}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=workers
    )
    deepspeed.init_distributed(dist_init_required=False)
    told = train(root, rank, workers, precision) if empty else go_on(root, workers, precision)
    if rank == 0:
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    root, workers, precision = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    with tempfile.TemporaryDirectory() as directory:
        order = (root, workers, precision, f"{directory}/meeting", not any(root.iterdir()))
        torch.multiprocessing.spawn(main, order, nprocs=workers)
