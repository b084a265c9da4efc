"""The file for Ray's launcher: that Ray takes it, and what a node that it starts has."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import torch
import yaml
from ray.autoscaler._private.docker import validate_docker_config
from ray.autoscaler._private.util import prepare_config

from cluster.zero import deepspeed_config
from mmrag import config

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "ray_cluster.yaml"
DOCKERFILE = ROOT / "cluster" / "Dockerfile"
TELEMETRY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}


@pytest.fixture
def launched() -> dict[str, Any]:
    return yaml.safe_load(LAUNCHER.read_text())


def options(launched: dict[str, Any], *names: str) -> list[list[str]]:
    """Docker's options for a container, each with its value."""
    docker = launched["docker"]
    return [shlex.split(one) for name in names for one in docker[name]]


def test_ray_takes_the_file(launched):
    schema = Path(ray.autoscaler.__file__).with_name("ray-schema.json")
    jsonschema.validate(launched, json.loads(schema.read_text()))
    validate_docker_config(launched)
    ready = prepare_config(launched)
    assert ready["head_node_type"] in ready["available_node_types"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(launched | {"file_mount": {}}, json.loads(schema.read_text()))


def test_nodes_start_from_the_image_and_install_nothing(launched):
    assert "latest" not in launched["docker"]["image"] and ":" in launched["docker"]["image"]
    commands = [
        command
        for name, listed in launched.items()
        if name.endswith("_commands")
        for command in listed
    ]
    assert commands
    assert not [one for one in commands if re.search(r"\bpip\b|\bapt|\bmake\b", one)]
    image = DOCKERFILE.read_text()
    assert "rsync" in image  # with which Ray copies into a container
    [home] = re.findall(r"HOME=(\S+)", image)  # where Ray mounts what is below ~
    assert re.search(r"useradd --uid 1000 --create-home ray", image) and home == "/home/ray"


def test_every_node_asks_for_a_token_and_sends_no_telemetry(launched):
    told = [option for option in options(launched, "run_options") if option[0] == "--env"]
    settings = dict(value.split("=", 1) for _, value in told)
    assert settings["RAY_AUTH_MODE"] == "token"
    assert launched["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert TELEMETRY.items() <= settings.items()
    assert settings["MLFLOW_TRACKING_URI"].startswith("http")
    mounted = [value for name, value in options(launched, "run_options") if name == "--volume"]
    for name in ("MMRAG_RUNS", "MMRAG_CORPUS"):
        assert Path(settings[name]).is_relative_to(mounted[0].partition(":")[2])
    assert any("/mnt/mmrag" in command for command in launched["initialization_commands"])


def test_the_head_takes_no_work_and_nodes_stay_between_two_stages(launched):
    types = launched["available_node_types"]
    assert types[launched["head_node_type"]]["resources"] == {"CPU": 0}
    assert launched["idle_timeout_minutes"] >= 15
    workers = {name: one for name, one in types.items() if name != launched["head_node_type"]}
    assert sum(one["max_workers"] for one in workers.values()) == launched["max_workers"] == 4


def test_spot_nodes_are_those_on_demand_but_for_how_they_are_paid(launched):
    types = launched["available_node_types"]
    spot, kept = types["spot"]["node_config"], types["on_demand"]["node_config"]
    assert spot == kept | {"InstanceMarketOptions": {"MarketType": "spot"}}


def test_gpu_nodes_reach_each_others_memory(launched):
    node = launched["available_node_types"]["spot"]["node_config"]
    # Ray refuses both, and interfaces without either.
    assert not node.keys() & {"SubnetId", "SubnetIds", "SecurityGroupIds"}
    assert all(one["SubnetId"] and one["Groups"] for one in node["NetworkInterfaces"])
    cards = [one["NetworkCardIndex"] for one in node["NetworkInterfaces"]]
    assert cards == list(range(len(cards)))
    assert {one["InterfaceType"] for one in node["NetworkInterfaces"][1:]} == {"efa-only"}
    assert ["--device=/dev/infiniband"] in options(launched, "worker_run_options")
    assert ["--ulimit", "memlock=-1"] in options(launched, "run_options")


def test_the_stage_that_it_tells_how_to_run_would_start(monkeypatch):
    monkeypatch.chdir(ROOT)
    [told] = re.findall(r"^# +(python -m jobs\..*)$", LAUNCHER.read_text(), flags=re.MULTILINE)
    _, _, module, flag, path, *overrides = shlex.split(told)
    assert (ROOT / f"{module.replace('.', '/')}.py").is_file() and flag == "--config"
    deepspeed_config(config.read(path, overrides), torch.bfloat16)
