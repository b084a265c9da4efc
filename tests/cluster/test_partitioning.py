"""Ways of spending memory and traffic on DeepSpeed's processes: what is learned is the same."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).parents[1] / "support" / "partitioned_training.py"
ROOT = Path(__file__).parents[2]
SECONDS = 240
PLAIN = {
    "zero_stage": 3,
    "bf16": False,
    "tied": False,
    "activation_checkpointing": None,
    "loss_chunk": None,
    "compiled": False,
}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def trained(directory: Path, world: int, cases: list[dict]) -> list[tuple[list[list[float]], dict]]:
    """What each case ended with: every rank's losses by step, and the weights."""
    port = str(free_port())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    logs = [(directory / f"rank-{rank}.txt").open("w+b") for rank in range(world)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(world), port, str(directory)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=logs[rank],
            stderr=subprocess.STDOUT,
        )
        for rank in range(world)
    ]
    try:
        for process in processes:
            process.stdin.write(json.dumps(cases).encode())
            process.stdin.close()
        for rank, process in enumerate(processes):
            assert process.wait(SECONDS) == 0, Path(logs[rank].name).read_text()[-4000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    made = []
    for number in range(len(cases)):
        files = [directory / f"{number}-{rank}.json" for rank in range(world)]
        losses = [json.loads(file.read_text()) for file in files]
        made.append((losses, load_file(directory / f"{number}.safetensors")))
    return made


def assert_learned_the_same(one, other, tolerance: float) -> None:
    torch.testing.assert_close(torch.tensor(one[0]), torch.tensor(other[0]), rtol=1e-3, atol=1e-3)
    assert one[1].keys() == other[1].keys()
    for name, weight in one[1].items():
        torch.testing.assert_close(weight, other[1][name], rtol=0, atol=tolerance, msg=name)


SPARING = {**PLAIN, "activation_checkpointing": 1, "loss_chunk": 5}


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_partitioned_weights_learn_the_same_from_less_memory(tmp_path, tied):
    cases = [PLAIN, SPARING, {**SPARING, "activation_checkpointing": 2}]
    cases += [{**SPARING, "zero_stage": stage} for stage in (0, 2)]
    plain, *others = trained(tmp_path, 2, [{**case, "tied": tied} for case in cases])
    for other in others:
        assert_learned_the_same(plain, other, tolerance=2e-4)


@pytest.mark.slow
def test_bfloat16_learns_the_same_from_less_memory_but_for_rounding(tmp_path):
    plain, sparing = trained(tmp_path, 2, [{**PLAIN, "bf16": True}, {**SPARING, "bf16": True}])
    torch.testing.assert_close(torch.tensor(plain[0]), torch.tensor(sparing[0]), rtol=0.01, atol=0)


@pytest.mark.slow
def test_a_second_copy_of_the_weights_in_each_node_changes_nothing(tmp_path):
    """Two nodes of two: the weights are partitioned over four, and again within a node."""
    (tmp_path / "flat").mkdir()
    (tmp_path / "nodes").mkdir()
    flat = trained(tmp_path / "flat", 4, [SPARING])[0]
    case = {**SPARING, "zero_optimization": {"zero_hpz_partition_size": 2}}
    assert_learned_the_same(flat, trained(tmp_path / "nodes", 4, [case])[0], tolerance=1e-6)


@pytest.mark.slow
def test_compiled_layers_learn_the_same(tmp_path):
    cases = [{**SPARING, "zero_stage": 2, "compiled": compiled} for compiled in (False, True)]
    plain, compiled = trained(tmp_path, 2, cases)
    assert_learned_the_same(plain, compiled, tolerance=2e-4)
