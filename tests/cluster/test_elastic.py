"""A training that may have more workers than there is room for learns what a fixed one learns."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cluster.checkpoints import FIELDS, listed
from cluster.progress import records
from cluster.train import CHECKPOINTS, RUN, fit
from jobs.benchmark.train import QUICK, _corpus, _experiment
from mmrag.config import Experiment
from mmrag.model import pretrained

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def with_workers(directory: Path, **workers) -> Experiment:
    """The quick benchmark's training, in float32, with a dev loss at each sixth step."""
    quick = _experiment(directory, QUICK)
    settings = quick.train.model_copy(
        update={
            "workers": quick.train.workers.model_copy(update=workers),
            "precision": "fp32",
            "zero_stage": 2,
            "dev": quick.train.dev.model_copy(update={"loss_steps": 6, "loss_utterances": 5}),
        }
    )
    return quick.model_copy(update={"train": settings})


def trained(directory: Path, **workers) -> tuple[list[dict], dict[str, torch.Tensor], int]:
    """The records and the weights, and how many workers stored the last checkpoint."""
    directory.mkdir()
    _, split = _corpus(directory, QUICK)
    fit(with_workers(directory, **workers), [split], directory, lambda _: None, dev=split)
    folder = directory / CHECKPOINTS / RUN
    stored = json.loads((folder / listed(folder)[-1] / FIELDS).read_text())
    return records(directory), load_file(directory / pretrained.WEIGHTS), stored["workers"]


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_begins_with_the_workers_there_is_room_for_and_makes_the_fixed_ones_steps(tmp_path):
    """On two CPUs there is room for one worker of two, and for two of one."""
    elastic, ours, few = trained(tmp_path / "elastic", count=(1, 2), num_cpus=2)
    fixed, theirs, many = trained(tmp_path / "fixed", count=2, num_cpus=1)
    assert (few, many) == (1, 2)
    for one, other in zip(elastic, fixed, strict=True):
        names = ("step", "phase", "tokens", "learning_rate")
        assert [one[name] for name in names] == [other[name] for name in names]
        measured = {"loss", "ctc_loss", "gradient_norm", "dev_loss"} & other.keys()
        assert measured <= one.keys()
        for name in measured:
            assert one[name] == pytest.approx(other[name], rel=1e-4), (name, one["step"])
    assert sum("dev_loss" in one for one in elastic) == 2
    for name, weight in ours.items():
        assert torch.allclose(weight, theirs[name], atol=1e-4), name
