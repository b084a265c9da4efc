"""A quick look is a smaller experiment on the same sentences of dev and test."""

from pathlib import Path

import pytest

from jobs.reproduce.quick import quick
from jobs.reproduce.report import _command
from jobs.stage import CONFIGS
from mmrag import config
from mmrag.config import Experiment, as_dict
from mmrag.storage import Url

FILES = ("reproduce", "reproduce_small")


@pytest.fixture(params=FILES)
def whole(request) -> Experiment:
    return config.read(CONFIGS / f"{request.param}.yaml")


def test_it_has_a_workspace_and_tables_of_its_own(whole):
    few = quick(whole)
    assert few.workspace == whole.workspace.parent / f"{whole.workspace.name}-quick"
    assert few.reproduce.docs == few.workspace / "docs"
    away = whole.model_copy(update={"workspace": Url("s3://bucket/runs/reproduce")})
    assert str(quick(away).workspace) == "s3://bucket/runs/reproduce-quick"
    assert isinstance(quick(away).reproduce.docs, Path)


def test_it_is_an_experiment_that_could_have_been_written_so(whole):
    few = quick(whole)
    assert config.parse(as_dict(few), "quick") == few


def test_it_asks_for_less_and_for_the_same_dev_and_test(whole):
    few = quick(whole)
    for key in ("dev", "test", "everyday_share", "voices", "held_out_voices", "sentences"):
        assert getattr(few.synthesize, key) == getattr(whole.synthesize, key)
    assert few.synthesize.lm < whole.synthesize.lm and few.seed == whole.seed
    assert few.reproduce.utterances < whole.reproduce.utterances
    assert set(few.reproduce.phrases) < set(whole.reproduce.phrases)
    assert few.reproduce.tasks == whole.reproduce.tasks, "every task is done"
    if whole.synthesize.recordings is not None:
        assert few.synthesize.recordings.test == whole.synthesize.recordings.test
    grid, all = few.tune, whole.tune
    assert len(grid.weight) * len(grid.gate) * grid.finalists < len(all.weight) * len(all.gate) * 12


def test_the_page_names_the_command_that_made_it():
    small = config.read(CONFIGS / "reproduce_small.yaml")
    command = "python -m jobs.reproduce --config jobs/configs/reproduce_small.yaml"
    assert _command(small) == command
    assert _command(quick(small)) == f"{command} --quick"
    assert _command(config.read(CONFIGS / "reproduce.yaml")) == "python -m jobs.reproduce"
