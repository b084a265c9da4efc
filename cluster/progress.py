"""How a person sees work that goes on in other processes.

A training's numbers go into `metrics.jsonl`, an artifact to open, and the process that runs the
stage reads it for the terminal and MLflow. Parts worked off move a bar.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmrag import terminal
from mmrag.artifact import Held

METRICS = "metrics.jsonl"
SKIPPED = "skipped.jsonl"
"""Steps of a training that were not taken, and what was read before them."""
POLL_SECONDS = 1.0


class MetricsWriter:
    """Appends records, each with a `step`; a resumed run's file is cut back to where it goes on."""

    def __init__(self, directory: Path, first_step: int, name: str = METRICS) -> None:
        """`name` is the file; any but `metrics.jsonl` is there only if it has a record."""
        self._path = directory / name
        kept = [record for record in records(directory, name) if record["step"] < first_step]
        if name != METRICS and not kept:
            self._path.unlink(missing_ok=True)
            return
        # Another file, by which a reader sees that it has to begin anew.
        aside = self._path.with_name(f".{name}.{os.getpid()}")
        aside.write_text("".join(json.dumps(record) + "\n" for record in kept))
        aside.replace(self._path)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record."""
        with self._path.open("a") as stream:
            stream.write(json.dumps(record) + "\n")


class MetricsReader:
    """Reads `metrics.jsonl` as it grows, every line once.

    A file that was cut back, to go on from an earlier step, is read from its beginning.
    """

    def __init__(self, directory: Path, name: str = METRICS) -> None:
        self._path = directory / name
        self._file: int | None = None
        self._offset = 0

    def new(self) -> list[dict[str, Any]]:
        """The records since the last call; a line that is still being written is left for later."""
        try:
            stream = self._path.open("rb")
        except FileNotFoundError:
            return []
        with stream:
            known = os.fstat(stream.fileno())
            if known.st_ino != self._file or known.st_size < self._offset:
                self._file, self._offset = known.st_ino, 0
            stream.seek(self._offset)
            whole = stream.read().rpartition(b"\n")[0]
        if not whole:
            return []
        self._offset += len(whole) + 1
        return [json.loads(line) for line in whole.split(b"\n")]


def records(directory: Path, name: str = METRICS) -> list[dict[str, Any]]:
    """What `metrics.jsonl`, or another such file, holds so far; a line that is still being written
    is left out."""
    return MetricsReader(directory, name).new()


def last_record(directory: Path) -> dict[str, Any]:
    """The newest record of `metrics.jsonl`."""
    return records(directory)[-1]


def held_training(draft: Path, state: str) -> Held | None:
    """What an unfinished training would lose: what it last saved in the file `state`."""
    if not (draft / state).exists():
        return None
    logged = records(draft)
    return Held("the training" + (f" up to about step {logged[-1]['step']}" if logged else ""))


@contextmanager
def following(
    directory: Path, log: Callable[[dict[str, Any]], None], after: int | None = None
) -> Iterator[None]:
    """Call `log` with each record of a later step than `after`, once, from another thread: with
    those that are there, and those that are written while the block runs.

    None for after what is there: a step that is made again is not told again.
    """
    reader = MetricsReader(directory)
    seen = after
    if seen is None:
        seen = max((record["step"] for record in reader.new()), default=-1)
    done = threading.Event()

    def watch() -> None:
        nonlocal seen
        finished = False
        while not finished:
            finished = done.wait(POLL_SECONDS)
            for record in reader.new():
                if record["step"] > seen:
                    seen = record["step"]
                    log(record)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def bar(total: int | None, title: str) -> Iterator[Callable[[], None]]:
    """A progress bar over `total` parts, or as many as there turn out to be; call what it yields
    after each of them."""
    done = 0
    with terminal.progress(title, "parts", before="  ") as tell:

        def count() -> None:
            nonlocal done
            done += 1
            tell(done, total)

        yield count
