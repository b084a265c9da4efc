"""Stages on a Ray cluster of three nodes, one of which is lost meanwhile; what is seen, as JSON.

A program of its own: the process that runs tests is connected to another cluster.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import cluster.connection  # noqa: F401 - Ray's environment

# isort: split
import lost_nodes
import ray
from ray._private.state import available_resources_per_node
from small_datastores import sealed

from cluster.parts import Part
from jobs import build_datastore, evaluate, pretrain_hubert, stage, synthesize, tokenize, train
from mmrag.artifact import Artifact
from mmrag.config import Experiment, read

NODES = 3
PARTS = 3
"""Of an output, that are there when a node goes."""
NOTICE = 5
"""Seconds from when a node is told that it will be taken away until it is."""
PATIENCE = 120
"""Seconds that a worker holds its part at most."""
DONE = {tokenize: "FindWritten", build_datastore: "FindSegment"}
"""What a stage that writes parts calls the look for one that is there already."""


class Nodes:
    """A head without CPUs, and nodes of one CPU each that come and go."""

    def __init__(self) -> None:
        self._cluster = lost_nodes.head()
        self._nodes = {}
        self._drained = []
        self.fill()

    def fill(self) -> None:
        """Others take the places of those that went; Ray starts nodes in the main thread alone."""
        while self._drained:
            self._cluster.remove_node(self._drained.pop())  # what is left of its processes
        while len(self._nodes) < NODES:
            node = lost_nodes.add(self._cluster)
            self._nodes[node.node_id] = node
        self._cluster.wait_for_nodes()

    def at_work(self) -> list[str]:
        """Nodes whose CPU is taken."""
        free = available_resources_per_node()
        return [name for name in self._nodes if free.get(name, {}).get("CPU", 0) < 0.5]

    def lose(self, name: str) -> None:
        """A node ends without a word."""
        lost_nodes.lose(self._cluster, self._nodes.pop(name))

    def drain(self, name: str) -> None:
        """A node is told that it will be taken away, and leaves once it idles."""
        self._tell(name)
        self._drained.append(self._nodes.pop(name))

    def take_away(self, name: str) -> None:
        """A node is told that it will be taken away, and is, as a cloud's spot machines are."""
        self._tell(name)
        time.sleep(NOTICE)
        self.lose(name)

    def _tell(self, name: str) -> None:
        command = ["ray", "drain-node", "--address", self._cluster.address, "--node-id", name]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"]
        command += ["--deadline-remaining-seconds", str(NOTICE)]
        command[0] = str(Path(sys.executable).parent / "ray")
        subprocess.run(command, check=True, stdout=sys.stderr)

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
            datastore = "datastores/multimodal"
            for name, job, directory, disturb in (
                ("tokenize", tokenize, "tokens", nodes.lose),
                ("build_datastore", build_datastore, datastore, nodes.drain),
                ("build_datastore, at notice", build_datastore, datastore, nodes.take_away),
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
    """Run a stage and disturb a node, as soon as some parts of the output are there and each node
    is amid another (where a stage writes none, as soon as it works); then the same stage again,
    with nobody disturbed.

    `kept` are parts that were written before and are the very same files afterwards, `changed`
    those that are not, `later` those that were written when the node was gone. `in_flight` are the
    parts that the node was amid, `redone` those that were begun more than once. `made` and `again`
    are what both outputs hold.
    """
    path = experiment.workspace / directory
    notes = Path(tempfile.mkdtemp(dir=experiment.workspace.parent))
    before: dict[str, tuple[int, bytes]] = {}
    gone: list[str] = []

    def meanwhile(over: threading.Event) -> None:
        def chosen() -> bool:
            there = len(drafted(path))
            amid = there >= PARTS and len(begun(notes)) == there + NODES
            gone[:] = nodes.at_work()[:1] if amid or job not in DONE else []
            return bool(gone)

        until(chosen, over)
        for number, (name, file) in enumerate(drafted(path).items()):
            os.link(file, notes / str(number))  # nothing else takes the place of this very file
            before[name] = stored(file)
        disturb(gone[0])
        (notes / "gone").touch()

    with noting(job, notes), beside(meanwhile):
        made = job.run(experiment, force=path.exists())
    after = {name: stored(file) for name, file in parts_of(made.path).items()}
    parts, holds = begun(notes), contents(made)
    stays = nodes.stays(gone[0])
    nodes.fill()
    return {
        "kept": [name for name, one in before.items() if after.get(name) == one],
        "changed": [name for name, one in before.items() if after.get(name) != one],
        "later": sorted(after.keys() - before),
        "in_flight": [
            part
            for part, node in parts[: len(before) + NODES]
            if node == gone[0] and not any(part in name for name in before)
        ],
        "redone": [part for part, times in Counter(part for part, _ in parts).items() if times > 1],
        "made": holds,
        "again": contents(job.run(experiment, force=True)),
        "stays": stays,
    }


@dataclass(frozen=True)
class Held:
    """As `done`; but a part that is not done is noted before a worker begins it, and from the
    PARTS-th on held until a node is gone."""

    done: Callable[[Part], Any]
    notes: Path

    def __call__(self, part: Part) -> Any:
        if (answer := self.done(part)) is not None:
            return answer
        free = len(begun(self.notes)) < PARTS
        with (self.notes / "begun").open("a") as stream:
            stream.write(f"{part.name} {ray.get_runtime_context().get_node_id()}\n")
        deadline = time.monotonic() + PATIENCE
        while not (free or (self.notes / "gone").exists()):
            if time.monotonic() > deadline:
                raise TimeoutError("no node went")
            time.sleep(0.05)
        return None


@contextlib.contextmanager
def noting(job: Any, notes: Path) -> Iterator[None]:
    """Have the parts that a stage begins noted, and held (`Held`), in the block."""
    if job not in DONE:
        yield
        return
    done = getattr(job, DONE[job])
    with mock.patch.object(job, DONE[job], lambda *given: Held(done(*given), notes)):
        yield


def begun(notes: Path) -> list[list[str]]:
    """The parts that were begun, in order: each one's name and node."""
    file = notes / "begun"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def contents(made: Artifact) -> Any:
    """What an output is told from another one by: its fingerprint, but for transcripts, beside
    which stands how long they took."""
    transcripts = made.path / "transcripts.jsonl"
    if not transcripts.exists():
        return made.fingerprint
    lines = map(json.loads, transcripts.read_text().splitlines())
    return sorted([one["utterance"], one["mode"], one["text"]] for one in lines)


def drafted(path: Path) -> dict[str, Path]:
    """The parts of an output that is being made, by name."""
    found: dict[str, Path] = {}
    for draft in path.parent.glob(f".{path.name}*"):
        found |= parts_of(draft)
    return found


def parts_of(directory: Path) -> dict[str, Path]:
    return {str(file.relative_to(directory)): file for file in directory.rglob("part-*")}


def stored(part: Path) -> tuple[int, bytes]:
    """Which file it is, and what it holds, but for the numbers that a segment's documents have only
    once it is published."""
    held = sealed(part) if part.suffix == ".safetensors" else part.read_bytes()
    return part.stat().st_ino, held


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
