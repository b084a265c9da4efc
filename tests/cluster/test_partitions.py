"""State that is cut for some workers and a stage of ZeRO goes on with others and at another."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-3}
"""Relative, of a loss; in bf16 the stages of ZeRO round at different places."""


def losses(directory: Path, workers: int, precision: str) -> dict[str, list[float]]:
    """What `stages_of_zero` tells."""
    program = subprocess.run(
        [
            *(sys.executable, ROOT / "tests" / "support" / "stages_of_zero.py"),
            *(directory, str(workers), precision),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert program.returncode == 0, program.stderr[-3000:]
    return json.loads(program.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_any_stage_goes_on_at_any_stage_with_more_or_fewer_workers(tmp_path, precision):
    """… after a step that was not taken, on a loss that was no number."""
    straight = losses(tmp_path, 2, precision)
    assert straight.keys() == {"0", "1", "2", "3"}
    if precision == "fp32":
        for stage, told in straight.items():
            assert told == pytest.approx(straight["0"], rel=1e-5), stage
    for workers in (1, 2):
        resumed = losses(tmp_path, workers, precision)
        assert len(resumed) == 16
        for name, told in resumed.items():
            assert told == pytest.approx(straight[name[0]], rel=TOLERANCE[precision]), name
