"""Stages on three nodes of which one goes: what that costs, and that nothing else changes."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from mmrag.config import Experiment

ROOT = Path(__file__).parents[2]
STEPS, CHECKPOINT_STEPS = 60, 10
WRITING = ["tokenize", "build_datastore", "build_datastore, at notice"]
"""Stages that write a file a part: under a node that ends without a word, under one that is told to
leave and does once it idles, and under one that is told to and then taken away."""
MAPPING = [*WRITING, "evaluate"]
"""Stages whose parts are worked off one by one."""

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def seen(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What `stages_on_nodes` saw."""
    directory = tmp_path_factory.mktemp("nodes")
    values = experiment.model_dump(mode="json")
    values["workspace"] = str(directory / "workspace")
    values["tracking"]["uri"] = f"sqlite:///{directory}/mlflow.db"
    values["synthesize"] |= {"lm": 60, "test": 12}
    values["pretrain"]["num_cpus"] = 0.8
    values["tokenize"]["part_seconds"] = 15
    values["datastore"] |= {"splits": ["datastore", "lm"], "part_utterances": 3}
    values["decode"]["batch_seconds"] = 5
    values["evaluate"] |= {"retriever": "local", "modes": ["none", "knn"]}
    for stage in ("tokenize", "datastore", "evaluate"):
        values[stage]["workers"] = {"count": 3, "num_cpus": 0.8}
    values["train"] |= {
        "phases": [{"name": "speech", "steps": STEPS, "mixture": {"speech_first": 1}}],
        "checkpoint_steps": CHECKPOINT_STEPS,
        "log_steps": 1,
    }
    file = directory / "experiment.yaml"
    file.write_text(yaml.safe_dump(values))
    program = subprocess.run(
        [sys.executable, ROOT / "tests" / "support" / "stages_on_nodes.py", file],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=2000,
    )
    assert program.returncode == 0, program.stderr[-5000:]
    return json.loads(program.stdout.splitlines()[-1])


@pytest.mark.parametrize("stage", MAPPING)
def test_a_stage_makes_the_same_though_a_node_went(seen, stage):
    assert seen[stage]["made"] == seen[stage]["again"]
    assert not seen[stage]["stays"]


@pytest.mark.parametrize("stage", WRITING)
def test_what_was_written_is_not_made_again(seen, stage):
    assert len(seen[stage]["kept"]) >= 3
    assert not seen[stage]["changed"]
    assert seen[stage]["later"]


@pytest.mark.parametrize("stage", WRITING)
def test_no_more_is_lost_than_what_the_node_was_amid(seen, stage):
    assert len(seen[stage]["in_flight"]) == 1
    left = stage == "build_datastore"  # in its own time
    assert seen[stage]["redone"] == ([] if left else seen[stage]["in_flight"])


def test_a_training_loses_no_more_than_the_steps_since_its_last_checkpoint(seen):
    steps, recorded = seen["train"]["steps"], seen["train"]["recorded"]
    assert recorded == list(range(STEPS))
    again = [last - first + 1 for last, first in pairwise(steps) if first <= last]
    # None where the workers were told in time; one may have been on its way to the disk.
    assert sum(again) <= 2 * CHECKPOINT_STEPS
    assert steps[-1] == STEPS
