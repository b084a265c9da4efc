"""Stages on a Ray cluster of three nodes, one of which is lost meanwhile; what is seen, as JSON.

A program of its own: the process that runs tests is connected to another cluster.
"""

import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cluster.connection  # noqa: F401 - Ray's environment

# isort: split
import ray
from ray._private.state import available_resources_per_node
from ray.cluster_utils import Cluster

from jobs import build_datastore, evaluate, pretrain_hubert, stage, synthesize, tokenize, train
from mmrag.config import Experiment, read

STORE_BYTES = 80_000_000
NODES = 3
SECONDS = 240


class Nodes:
    """A head without CPUs, and nodes of one CPU each that come and go."""

    def __init__(self) -> None:
        own = {"num_cpus": 0, "object_store_memory": STORE_BYTES}
        self._cluster = Cluster(initialize_head=True, connect=True, head_node_args=own)
        self._nodes = {}
        for _ in range(NODES):
            self.add()

    def add(self) -> None:
        node = self._cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        self._nodes[node.node_id] = node
        self._cluster.wait_for_nodes()

    def at_work(self) -> list[str]:
        """Nodes whose CPU is taken."""
        free = available_resources_per_node()
        return [name for name in self._nodes if free.get(name, {}).get("CPU", 0) < 0.5]

    def lose(self, name: str) -> None:
        """A node ends without a word; another one takes its place."""
        self._cluster.remove_node(self._nodes.pop(name), allow_graceful=False)
        self.add()

    def drain(self, name: str) -> None:
        """A node is told that it will be taken away, as a cloud tells its spot machines."""
        command = ["ray", "drain-node", "--address", self._cluster.address, "--node-id", name]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"]
        command += ["--deadline-remaining-seconds", "5"]
        subprocess.run([Path(sys.executable).parent / command[0], *command[1:]], check=True)
        self._nodes.pop(name)
        self.add()

    def alive(self, name: str) -> bool:
        return any(one["NodeID"] == name and one["Alive"] for one in ray.nodes())

    def shutdown(self) -> None:
        ray.shutdown()
        self._cluster.shutdown()


def main(config: Path) -> dict[str, Any]:
    """What came of each stage while a node was lost, or drained."""
    experiment = read(config)
    nodes = Nodes()
    try:
        seen = {}
        with quietly():
            synthesize.run(experiment)
            pretrain_hubert.run(experiment)
            seen["tokenize"] = disturbed(nodes, experiment, tokenize, "tokens", nodes.lose)
            seen["train"] = trained(nodes, experiment)
            seen["build"] = disturbed(
                nodes, experiment, build_datastore, "datastores/multimodal", nodes.drain
            )
            seen["evaluate"] = disturbed(nodes, experiment, evaluate, "evaluation", nodes.lose)
        return seen
    finally:
        nodes.shutdown()


def disturbed(
    nodes: Nodes,
    experiment: Experiment,
    job: Any,
    directory: str,
    disturb: Callable[[str], None],
) -> dict[str, Any]:
    """Run a stage, disturb a node at work as soon as a part of the output is there; then the same
    stage once more, with nobody disturbed.

    `kept` are files that were written before and are the same afterwards, `changed` those that are
    not; `fingerprints` those of both outputs.
    """
    before: dict[str, int] = {}
    gone: list[str] = []

    def meanwhile() -> None:
        draft = experiment.workspace / directory
        pattern = f"{draft.parent}/.{draft.name}*"
        until(lambda: written(pattern) and nodes.at_work())
        gone.append(nodes.at_work()[0])
        before.update(written(pattern))
        disturb(gone[0])

    with beside(meanwhile):
        made = job.run(experiment)
    after = {
        str(file.relative_to(made.path)): file.stat().st_mtime_ns
        for file in made.path.rglob("*")
        if file.is_file()
    }
    still = nodes.alive(gone[0])
    again = job.run(experiment, force=True)
    return {
        "kept": [name for name, at in before.items() if after.get(name) == at],
        "changed": [name for name, at in before.items() if after.get(name) not in (None, at)],
        "fingerprints": [made.fingerprint, again.fingerprint],
        "alive": still,
    }


def written(pattern: str) -> dict[str, int]:
    """The Parquet files and segments of an output being made: name -> when it was written."""
    parent, name = pattern.rsplit("/", 1)
    found = {}
    for draft in Path(parent).glob(name):
        for file in draft.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                if file.is_file() and re.search(r"part-\d+", str(file)):
                    found[str(file.relative_to(draft))] = file.stat().st_mtime_ns
    return found


def trained(nodes: Nodes, experiment: Experiment) -> dict[str, Any]:
    """Train, and lose a node with a worker on it behind the second checkpoint.

    `steps` are those that were taken, in order, `recorded` those of the training's own record.
    """
    losing: list[str] = []

    def meanwhile() -> None:
        until(lambda: steps() and steps()[-1] > 2 * experiment.train.checkpoint_steps)
        losing.append(nodes.at_work()[0])
        nodes.lose(losing[0])

    said: list[str] = []

    def steps() -> list[int]:
        return [int(one) for line in said for one in re.findall(r"step (\d+)/", line)]

    print_line = stage.console.print
    stage.console.print = lambda *words, **_: said.append(" ".join(map(str, words)))
    try:
        with beside(meanwhile):
            made = train.run(experiment)
    finally:
        stage.console.print = print_line
    lines = (made.path / "metrics.jsonl").read_text().splitlines()
    return {"steps": steps(), "recorded": [json.loads(line)["step"] for line in lines]}


@contextlib.contextmanager
def beside(work: Callable[[], None]) -> Iterator[None]:
    """`work` in a thread, beside the block; what it raised is raised at the block's end."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if failures:
        raise failures[0]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """What stages say goes to standard error: the last line of the output is the answer."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def until(happens: Callable[[], Any]) -> None:
    deadline = time.monotonic() + SECONDS
    while not happens():
        if time.monotonic() > deadline:
            raise TimeoutError("it never happens")
        time.sleep(0.05)


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
