"""A node is lost while callers are being served: other replicas answer, and those that went with it
start on a node that is left."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.ports import free_ports
from serve.operations.environment import PORTS, VARIABLES

ROOT = Path(__file__).parents[2]
SENTENCE = "please call priya raghavan tomorrow"
NAME = "priya raghavan"
PARTS = ("api", "encoder", "retriever", "decoder", "shards")

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def seen(clip, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What `service_on_nodes` saw of a service with two of everything, behind HAProxy."""
    directory = tmp_path_factory.mktemp("nodes")
    file = directory / "clip.flac"
    file.write_bytes(clip(SENTENCE))
    ports = dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True))
    program = subprocess.run(
        [sys.executable, ROOT / "tests/support/service_on_nodes.py", directory, file, NAME],
        env=os.environ | VARIABLES | ports | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1400,
    )
    assert program.returncode == 0, program.stderr[-5000:]
    return json.loads(program.stdout.splitlines()[-1])


def events(call: dict) -> list[dict]:
    """What the events of a streamed answer say."""
    lines = call["answer"].splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


def error(call: dict) -> dict | None:
    """The error that a call got, as an answer or amid a stream; None for one that was answered."""
    if call["status"] is None:
        return {"message": call["answer"], "code": "broken"}
    if call["status"] != 200:
        return json.loads(call["answer"])["error"]
    told = events(call) if "stream" in call["form"] else []
    return next((one["error"] for one in told if "error" in one), None)


def text(call: dict) -> str:
    """The transcript that a call got."""
    if "stream" in call["form"]:
        return events(call)[-1]["text"]
    return json.loads(call["answer"])["text"]


def test_every_part_has_a_replica_elsewhere_than_on_the_node_that_is_lost(seen):
    """Light ones may share a node, decoders cannot."""
    assert set(seen["before"]) == set(PARTS)
    for nodes in seen["before"].values():
        assert len(nodes) > 1 and set(nodes) - {seen["gone"]}
    assert len(set(seen["before"]["decoder"])) == 2 and seen["gone"] in seen["before"]["decoder"]


def test_whoever_calls_once_a_node_is_lost_is_answered(seen):
    later = [call for call in seen["calls"] if call["begun"] >= seen["lost"]]
    assert len(later) >= 12
    assert [call for call in later if error(call)] == []


def test_who_was_being_answered_is_answered_or_told_to_come_again(seen):
    """Only a stream that has begun can do no more than break."""
    assert any(call["begun"] < seen["lost"] <= call["ended"] for call in seen["calls"])
    for call in seen["calls"]:
        if (failed := error(call)) is None:
            continue
        assert call["ended"] >= seen["losing"], call
        if failed["code"] == "broken":
            assert "stream" in call["form"], failed["message"]
        else:
            assert (call["status"], failed["code"]) in [(200, "unavailable"), (503, "unavailable")]


def test_with_its_datastore_the_service_hears_what_it_heard_before(seen):
    heard = {call["form"].get("datastore"): set() for call in seen["calls"]}
    for call in seen["calls"]:
        if error(call) is None:
            heard[call["form"].get("datastore")].add(text(call))
    assert all(len(texts) == 1 for texts in heard.values()), heard
    assert heard["names"] == {SENTENCE}


def test_what_went_with_the_node_is_on_one_that_is_left(seen):
    assert set(seen["after"]) == set(PARTS)
    for part, nodes in seen["after"].items():
        assert len(nodes) == len(seen["before"][part]) and seen["gone"] not in nodes
