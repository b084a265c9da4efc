"""A process that runs a stage over so many short texts and says how much memory that took it, the
workers' apart: `python -m jobs.benchmark.driven`. The order comes in as a line of JSON, the answer
goes out as one.

What a recogniser would do is simulated, in the workers: whoever runs the stage holds no model.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cluster.connection import connection
from cluster.parts import Part, work_off
from cluster.stages import AskedFor, TranscribedUtterance, TranscriptionTask
from jobs import build_datastore, evaluate, models, retrieve, stage, synthesize, tokenize
from jobs.evaluate import EvaluationMode
from jobs.evaluation_tables import write
from jobs.transcripts import Transcripts
from mmrag import shipped
from mmrag.artifact import Artifact
from mmrag.config import Experiment, Workers, read
from mmrag.records import Units, Utterance
from mmrag.speech.tokenized import Tokenized, write_part

LOOK_SECONDS = 0.02
"""From one look at the memory to the next."""
PART_UTTERANCES = 300
WORKERS = Workers(count=1, num_cpus=0.5)
NAMES = ("bob", "anna", "maria", "joe", "lee", "ruth", "sam", "kim")


@dataclass(frozen=True)
class Driving:
    """What to run."""

    stage: str
    """A key of STAGES."""
    utterances: int
    directory: str


class Memory:
    """The most that this process held in memory of its own, no file's, while a block ran."""

    def __init__(self) -> None:
        self.before = self.peak = _anonymous()
        self._done = threading.Event()
        self._watching = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._watching.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watching.join()

    def _watch(self) -> None:
        while not self._done.wait(LOOK_SECONDS):
            self.peak = max(self.peak, _anonymous())


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    [kilobytes] = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
    return 1024 * int(kilobytes)


def measured(order: Driving) -> dict[str, Any]:
    """Bytes before the stage ran, and the most while it did."""
    directory = Path(order.directory)
    directory.mkdir(parents=True)
    with redirect_stdout(sys.stderr), connection():
        run = STAGES[order.stage](directory, order.utterances)
        with Memory() as memory:
            run()
    return {"before": memory.before, "peak": memory.peak}


def _experiment(directory: Path, *overrides: str) -> Experiment:
    stage.console.quiet = True
    workers = "{count: 1, num_cpus: 0.5}"
    told = [f"{name}.workers={workers}" for name in ("synthesize", "tokenize", "datastore")]
    told += [f"evaluate.workers={workers}", f"tracking.uri=sqlite:///{directory}/mlflow.db"]
    told.append(f"workspace={directory}/workspace")
    return read(stage.CONFIGS / "tiny.yaml", [*told, *overrides])


def _text(number: int) -> str:
    return " ".join(NAMES[number // 8**place % 8] for place in range(2))


def _tokenize(directory: Path, utterances: int) -> Callable[[], Any]:
    """Texts without recordings: all of a manifest but the sound."""
    source = directory / "texts.jsonl"
    with source.open("w") as stream:
        for number in range(utterances):
            row = {"utterance": f"text-{number:09d}", "text": _text(number), "speaker": "nobody"}
            stream.write(json.dumps(row) + "\n")
    overrides = [f"tokenize.source={source}", f"tokenize.part_seconds={PART_UTTERANCES}"]
    return partial(tokenize.run, _experiment(directory, *overrides))


def _build(directory: Path, utterances: int) -> Callable[[], Any]:
    """Lines of text, keyed by the shipped model's states."""
    source = directory / "lines.txt"
    with source.open("w") as stream:
        stream.writelines(f"{_text(number)}\n" for number in range(utterances))
    overrides = [
        "datastore.name=lines",
        f"datastore.source={source}",
        "datastore.audio=none",
        f"datastore.part_utterances={PART_UTTERANCES}",
    ]
    return partial(build_datastore.run, _experiment(directory, *overrides))


def _synthesize(directory: Path, utterances: int) -> Callable[[], Any]:
    """Sentences that nobody speaks."""
    few = [f"synthesize.{split}=1" for split in ("lm", "adapter", "dev", "test", "mentions")]
    overrides = [*few, f"synthesize.text={utterances}", "synthesize.everyday_share=1"]
    return partial(synthesize.run, _experiment(directory, *overrides))


def _tokens(directory: Path, utterances: int) -> Artifact:
    """A split `test` of made-up units."""
    made = directory / "tokens"
    (made / "test").mkdir(parents=True)
    units = Units(np.arange(8, dtype=np.int32), np.full(8, 6, np.int32))
    for first in range(0, utterances, PART_UTTERANCES):
        numbers = range(first, min(utterances, first + PART_UTTERANCES))
        part = [
            Tokenized(Utterance(id=f"{n:09d}", text=_text(n), duration=1.0, speaker="x"), units)
            for n in numbers
        ]
        write_part(made / "test" / f"part-{first // PART_UTTERANCES:05d}.parquet", part)
    return Artifact(made, "tokens", "", config={}, inputs={})


def _evaluate(directory: Path, utterances: int) -> Callable[[], Any]:
    """Transcripts that are the references, in two ways, scored and compared."""
    ways = [EvaluationMode("none"), EvaluationMode("none", "again")]
    spoken = partial(models.selected, _tokens(directory, utterances), "test", None)

    def run() -> None:
        heard = {way.title: Transcripts(directory / f"{n}") for n, way in enumerate(ways)}
        asked = AskedFor(tuple(heard), spoken, 60.0)
        for title, some in work_off([(Repeat, {})], asked, WORKERS, "transcribing", "workers"):
            heard[title].add(some)
        results = [evaluate._score(way, heard[way.title], 100, 0) for way in ways]
        write(directory, results, evaluate._compare(results, 100, 0), "test", None)

    return run


class Repeat:
    """Utterances asked for in one mode -> the mode's name and their references as transcripts."""

    def __call__(self, part: Part[TranscriptionTask]) -> tuple[str, list[TranscribedUtterance]]:
        return part.work[0].mode, list(map(_repeated, part.work))


def _repeated(task: TranscriptionTask) -> TranscribedUtterance:
    said = task.tokenized.utterance
    return TranscribedUtterance(
        utterance=said.id,
        speaker=said.speaker,
        seconds=said.duration,
        reference=said.text,
        text=said.text,
        entities=[],
        changed=[],
        decode_seconds=0.1,
        recalled=0,
        queries=0,
    )


def _retrieve(directory: Path, utterances: int) -> Callable[[], Any]:
    """What a search reads, counted and not searched for."""
    reading = retrieve.Spoken(
        _tokens(directory, utterances),
        "test",
        Artifact(shipped.find(shipped.TINY) / "lm", "lm", "", config={}, inputs={}),
    )

    def run() -> None:
        counts: Iterator[int] = work_off([(Count, {})], reading, WORKERS, "search", "workers")
        if sum(counts) != utterances:
            raise ValueError("utterances were lost")

    return run


class Count:
    """Utterances -> how many they are."""

    def __call__(self, part: Part[Any]) -> int:
        return len(part.work)


STAGES: dict[str, Callable[[Path, int], Callable[[], Any]]] = {
    "tokenize": _tokenize,
    "build_datastore": _build,
    "evaluate": _evaluate,
    "synthesize": _synthesize,
    "retrieve": _retrieve,
}
"""Makes what a stage reads; what it returns runs it."""


if __name__ == "__main__":
    print(json.dumps(measured(Driving(**json.loads(sys.stdin.readline())))))
