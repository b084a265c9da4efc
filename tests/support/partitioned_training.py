"""A few steps of training on DeepSpeed's processes over gloo, without Ray: what each way of
spending memory and traffic ends with.

Run as `python partitioned_training.py RANK WORLD PORT OUTPUT`; reads one JSON list of cases from
standard input and writes, for each, the losses and the trained weights.
"""

import json
import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
from safetensors.torch import save_file

from cluster import train as distributed  # noqa: F401  # spares a compiler's minute
from mmrag.config import LanguageModel, Train
from mmrag.model.lm import LM
from mmrag.model.loss import IGNORE, Batch, Objective, combine
from mmrag.model.train import adamw

VOCABULARY, ROWS, TIME, STEPS, MICRO = 61, 2, 12, 3, 2
SHAPE = {"width": 32, "layers": 3, "heads": 4, "kv_heads": 2, "feed_forward": 48}


def settings(case: dict) -> Train:
    chosen = {key: case[key] for key in ("activation_checkpointing", "loss_chunk", "compiled")}
    phase = {"name": "text", "steps": STEPS, "mixture": {"text": 1}}
    return Train(
        phases=[phase],
        micro_batch_tokens=ROWS * TIME,
        micro_batches=MICRO,
        learning_rate=0.01,
        warmup_steps=0,
        weight_decay=0.0,
        clip=1.0,
        ctc_weight=0.0,
        unit_dropout=0.0,
        precision="fp32",
        zero_stage=case["zero_stage"],
        checkpoint_steps=1,
        log_steps=1,
        max_failures=0,
        workers={"count": 1, "num_cpus": 1},
        **chosen,
    )


def batch(seed: int) -> Batch:
    ids = torch.randint(VOCABULARY, (ROWS, TIME), generator=torch.Generator().manual_seed(seed))
    targets = torch.cat((ids[:, 1:], torch.full((ROWS, 1), IGNORE)), 1)
    none = torch.zeros(ROWS, 2, dtype=torch.long)
    return Batch(ids, targets, none, none, none[:, 0])


def trained(case: dict, rank: int, world: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    wanted = settings(case)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICRO,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": case["bf16"]},
        "zero_optimization": {
            "stage3_param_persistence_threshold": 0,  # or so small a model would be kept whole
            "stage": wanted.zero_stage,
            **case.get("zero_optimization", {}),
        },
    }
    if wanted.zero_stage >= 2:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    torch.manual_seed(0)
    partitioned = wanted.zero_stage == 3
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=partitioned):
        lm = LM(LanguageModel(**SHAPE, tied=case["tied"]), VOCABULARY)
        objective = Objective(lm, 0, 0.0)
    objective.trained_by(wanted)
    engine, *_ = deepspeed.initialize(
        model=objective,
        optimizer=adamw(objective, wanted),
        config=config,
        dist_init_required=False,
    )
    losses = []
    for step in range(STEPS):
        total = 0.0
        for micro in range(MICRO):
            read = batch((step * MICRO + micro) * world + rank)
            sums = engine(read)
            counts = read.counts() * world * MICRO
            engine.backward(combine(sums, counts, (1.0, 0.0)) * world, scale_wrt_gas=False)
            engine.step()
            total += float(sums[0].detach())
        losses.append(total)
    if partitioned:
        whole = [name for name, one in engine.module.named_parameters() if one.numel()]
        if whole:
            raise RuntimeError(f"after a step these are still gathered: {whole}")
    whole = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            whole[name] = parameter.detach().float().clone()
    engine.destroy()
    return losses, whole


def main() -> None:
    rank, world, port = (int(number) for number in sys.argv[1:4])
    output = Path(sys.argv[4])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    for number, case in enumerate(json.loads(sys.stdin.read())):
        losses, weights = trained(case, rank, world)
        if rank == 0:
            save_file(weights, output / f"{number}.safetensors")
        (output / f"{number}-{rank}.json").write_text(json.dumps(losses))
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
