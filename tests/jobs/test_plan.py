"""`python -m jobs.train --plan` says what a training takes, and starts nothing."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import plan, stage

ROOT = Path(__file__).parents[2]
BIG, SMALL = (str(ROOT / "jobs" / "configs" / f"{name}.yaml") for name in ("6.8b", "330m"))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Paths in the files are relative to the repository."""
    monkeypatch.chdir(ROOT)


def printed(*arguments: str) -> str:
    with stage.console.capture() as said:
        plan.main(["--plan", *arguments])
    return said.get()


def figures(*arguments: str) -> dict:
    return json.loads(printed("--json", *arguments))["cases"]


def test_the_command_prints_every_table_and_starts_no_cluster(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "127.0.0.1:1"}
    command = [sys.executable, "-m", "jobs.train", "--plan", "--config", SMALL]
    command += ["train.deepspeed=null", f"workspace={tmp_path}"]
    said = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    ).stdout
    for title in ("Memory of a GPU", "Traffic of a step", "Time", "The phases", "other ways"):
        assert title in said, said
    assert "NVIDIA H100 80GB HBM3" in said and "fits" in said
    assert list(tmp_path.iterdir()) == [], "nothing is made"


@pytest.mark.parametrize("config", [BIG, SMALL], ids=["6.8b", "330m"])
@pytest.mark.parametrize("card", ["H100-80GB", "A100-80GB"])
def test_the_experiments_of_a_cluster_fit_their_cards_and_do_not_wait_for_links(config, card):
    made = figures("--config", config, "--gpu", card)["as configured"]
    assert made["memory"]["fits"]
    assert made["seconds"]["step"] == made["seconds"]["compute"]


def test_without_rdma_the_big_model_is_trained_as_its_file_says():
    head = Path(BIG).read_text().split("workspace:")[0]
    told = re.findall(r"train\.(?!base)\S+=\S+", head)
    assert len(told) == 4
    slow = ("--config", BIG, "--internode", "12.5")
    plain, spared = (figures(*slow, *more)["as configured"] for more in ((), told))
    assert plain["tokens_a_step"] == spared["tokens_a_step"]
    assert plain["seconds"]["step"] > 5 * plain["seconds"]["compute"]
    assert spared["seconds"]["step"] == spared["seconds"]["compute"]
    assert spared["memory"]["fits"]


def test_every_way_learns_the_same_number_of_tokens():
    cases = figures("--config", BIG)
    assert len({one["tokens_a_step"] for one in cases.values()}) == 1
    assert {"as configured", "ZeRO-2", "ZeRO-3, hpZ 8"} <= cases.keys()
    hours = cases["as configured"]
    assert sum(hours["gpu_hours"].values()) == pytest.approx(32 * sum(hours["hours"].values()))


def test_of_a_range_the_most_workers_are_planned_for_and_the_fewest_are_not_forgotten():
    """They share the same step and the same weights, so each of them takes more memory."""
    few = ("--config", BIG, "train.deepspeed=null", "train.micro_batches=12")
    elastic, *fixed = (
        figures(*few, f"train.workers.count={count}") for count in ("[2, 4]", "4", "2")
    )
    most, fewest = elastic["as configured"], elastic["the fewest workers, 2"]
    assert [most, fewest] == [one["as configured"] for one in fixed]
    assert (most["gpus"], fewest["gpus"]) == (4, 2)
    assert most["tokens_a_step"] == fewest["tokens_a_step"]
    assert most["memory"]["fits"] and not fewest["memory"]["fits"]
    said = printed(*few, "train.workers.count=[2, 4]")
    assert "train.workers.count is [2, 4], and this is planned for 4." in said
    assert "6 micro-batches each in place of 3" in said and "which DOES NOT FIT" in said
    assert not any("fewest" in way for way in fixed[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mfu", "1.5"), "--mfu 1.5: a share"),
        (("--gpus-per-node", "0"), "--gpus-per-node 0: has to be more than 0"),
        (("--config", str(ROOT / "jobs" / "configs" / "adapter.yaml")), "has an adapter"),
        (("train.zero_stage=9",), "zero_stage"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(arguments, message):
    with pytest.raises(SystemExit, match=message):
        printed("--config", BIG, *arguments)
