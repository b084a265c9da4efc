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
from mmrag.artifact import Artifact
from mmrag.config import Experiment, read

STORE_BYTES = 80_000_000
NODES = 3
PARTS = 3
"""Of an output, that are there when a node goes."""


class Nodes:
    """A head without CPUs, and nodes of one CPU each that come and go."""

    def __init__(self) -> None:
        own = {"num_cpus": 0, "object_store_memory": STORE_BYTES}
        self._cluster = Cluster(initialize_head=True, connect=True, head_node_args=own)
        self._nodes = {}
        self._drained = []
        self.fill()

    def fill(self) -> None:
        """Others take the places of those that went; Ray starts nodes in the main thread alone."""
        while self._drained:
            self._cluster.remove_node(self._drained.pop())  # what is left of its processes
        while len(self._nodes) < NODES:
            node = self._cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
            self._nodes[node.node_id] = node
        self._cluster.wait_for_nodes()

    def at_work(self) -> list[str]:
        """Nodes whose CPU is taken."""
        free = available_resources_per_node()
        return [name for name in self._nodes if free.get(name, {}).get("CPU", 0) < 0.5]

    def lose(self, name: str) -> None:
        """A node ends without a word."""
        self._cluster.remove_node(self._nodes.pop(name), allow_graceful=False)

    def drain(self, name: str) -> None:
        """A node is told that it will be taken away, as a cloud tells its spot machines."""
        command = ["ray", "drain-node", "--address", self._cluster.address, "--node-id", name]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"]
        command += ["--deadline-remaining-seconds", "5"]
        command[0] = str(Path(sys.executable).parent / "ray")
        subprocess.run(command, check=True, stdout=sys.stderr)
        self._drained.append(self._nodes.pop(name))

    def stays(self, name: str) -> bool:
        """Whether a node is still there a while later: one that was drained goes once it idles."""
        for _ in range(600):
            if not any(one["NodeID"] == name and one["Alive"] for one in ray.nodes()):
                return False
            time.sleep(0.1)
        return True

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
            timed(seen, "prepared", synthesize.run, experiment)
            timed(seen, "prepared", pretrain_hubert.run, experiment)
            for name, job, directory, disturb in (
                ("tokenize", tokenize, "tokens", nodes.lose),
                ("build_datastore", build_datastore, "datastores/multimodal", nodes.drain),
                ("evaluate", evaluate, "evaluation", nodes.lose),
            ):
                if name == "build_datastore":
                    seen["train"] = timed(seen, "train", trained, nodes, experiment)
                seen[name] = timed(
                    seen, name, disturbed, nodes, experiment, job, directory, disturb
                )
        return seen
    finally:
        nodes.shutdown()


def timed(seen: dict[str, Any], name: str, work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns; how long it took is added to `seen`'s seconds, by name."""
    started = time.monotonic()
    try:
        return work(*arguments)
    finally:
        seconds = seen.setdefault("seconds", {})
        seconds[name] = round(seconds.get(name, 0) + time.monotonic() - started, 1)


def disturbed(
    nodes: Nodes,
    experiment: Experiment,
    job: Any,
    directory: str,
    disturb: Callable[[str], None],
) -> dict[str, Any]:
    """Run a stage and disturb a node at work, as soon as some parts of the output are there (where
    a stage writes none, as soon as it works); then the same stage again, with nobody disturbed.

    `kept` are files that were written before and are the same afterwards, `changed` those that are
    not; `made` and `again` are what both outputs hold.
    """
    path = experiment.workspace / directory
    before: dict[str, int] = {}
    gone: list[str] = []

    def meanwhile(over: threading.Event) -> None:
        parts = job is not evaluate

        def chosen() -> bool:
            enough = not parts or len(written(path)) >= PARTS
            gone[:] = nodes.at_work()[:1] if enough else []
            return bool(gone)

        until(chosen, over)
        before.update(written(path))
        disturb(gone[0])

    with beside(meanwhile):
        made = job.run(experiment)
    after = files_of(made.path)
    holds = contents(made)
    stays = nodes.stays(gone[0])
    nodes.fill()
    return {
        "kept": [name for name, at in before.items() if after.get(name) == at],
        "changed": [name for name, at in before.items() if after.get(name) not in (None, at)],
        "made": holds,
        "again": contents(job.run(experiment, force=True)),
        "stays": stays,
    }


def contents(made: Artifact) -> Any:
    """What an output is told from another one by: its fingerprint, but for transcripts, beside
    which stands how long they took."""
    transcripts = made.path / "transcripts.jsonl"
    if not transcripts.exists():
        return made.fingerprint
    lines = map(json.loads, transcripts.read_text().splitlines())
    return sorted([one["utterance"], one["mode"], one["text"]] for one in lines)


def written(path: Path) -> dict[str, int]:
    """The numbered parts of an output that is being made: name -> when it was written."""
    found: dict[str, int] = {}
    for draft in path.parent.glob(f".{path.name}*"):
        found |= files_of(draft)
    return {name: at for name, at in found.items() if re.search(r"\d{3}", name)}


def files_of(directory: Path) -> dict[str, int]:
    found = {}
    for file in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            if file.is_file():
                found[str(file.relative_to(directory))] = file.stat().st_mtime_ns
    return found


def trained(nodes: Nodes, experiment: Experiment) -> dict[str, Any]:
    """Train, and lose a node with a worker on it behind the second checkpoint.

    `steps` are those that were taken, in order, `recorded` those of the training's own record.
    """
    said: list[str] = []

    def steps() -> list[int]:
        lines = [line for line in said if not re.search(r"  dev (loss|WER)", line)]
        return [int(one) for line in lines for one in re.findall(r"step (\d+)/", line)]

    def meanwhile(over: threading.Event) -> None:
        every = experiment.train.checkpoint_steps
        until(lambda: steps() and steps()[-1] > 2 * every and nodes.at_work(), over)
        nodes.lose(nodes.at_work()[0])

    print_line = stage.console.print
    stage.console.print = lambda *words, **_: said.append(" ".join(map(str, words)))
    try:
        with beside(meanwhile):
            made = train.run(experiment)
    finally:
        stage.console.print = print_line
    nodes.fill()
    lines = (made.path / "metrics.jsonl").read_text().splitlines()
    return {"steps": steps(), "recorded": [json.loads(line)["step"] for line in lines]}


@contextlib.contextmanager
def beside(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """`work` in a thread, beside the block; it is told when the block is over, and what it raised
    is raised then."""
    failures: list[BaseException] = []
    over = threading.Event()

    def run() -> None:
        try:
            work(over)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if failures:
        raise failures[0]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """What stages say goes to standard error: the last line of the output is the answer."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def until(happens: Callable[[], Any], over: threading.Event) -> None:
    while not happens():
        if over.wait(0.05):
            raise TimeoutError("the stage ended before it could be disturbed")


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
