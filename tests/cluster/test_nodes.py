"""Shards on several nodes: where their actors are, and what comes of a node that is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_datastores import DESCRIPTION, fill

from mmrag.config import Index
from mmrag.retrieval.datastore import create
from mmrag.retrieval.index import build_again

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What `served_on_nodes` saw of a datastore of two shards on three nodes."""
    directory = tmp_path_factory.mktemp("datastore")
    create(directory, DESCRIPTION)
    fill(directory, 10)
    build_again(directory, Index(kind="flat", shards=2))
    program = subprocess.run(
        [sys.executable, ROOT / "tests" / "support" / "served_on_nodes.py", directory],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert program.returncode == 0, program.stderr[-3000:]
    return json.loads(program.stdout.splitlines()[-1])


def test_replicas_of_a_shard_are_on_different_nodes(seen):
    assert len(seen["nodes"]) == 3
    for replicas in seen["twice"]:
        assert len(replicas) == len(set(replicas)) == 2
        assert set(replicas) <= set(seen["nodes"])


def test_with_a_replica_elsewhere_nobody_notices_that_a_node_is_lost(seen):
    assert len(seen["with_two"]["missing"]) > 20
    assert not any(seen["with_two"]["missing"])
    assert seen["with_two"]["wrong"] == seen["with_two"]["errors"] == []


def test_a_shard_moves_to_another_node_while_the_others_are_searched(seen):
    """Searches count it until it is there again; none fails, and none is wrong."""
    [[before], [kept]], [[after], [still]] = seen["single"], seen["moved"]
    assert before == seen["gone"] != after
    assert after in seen["nodes"]
    assert kept == still or kept == seen["gone"]
    missing = seen["with_one"]["missing"]
    assert missing[0] == 0 < max(missing) and missing[-1] == 0
    assert seen["with_one"]["wrong"] == seen["with_one"]["errors"] == []
