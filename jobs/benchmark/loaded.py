"""A process that reads training data as one worker of many does: `python -m jobs.benchmark.loaded`.

The order comes in as a line of JSON, the answer goes out as one: seconds, and the memory that is
this process's alone beside that which it shares with whoever reads the same files.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from mmrag.config import Train
from mmrag.model.curriculum import Curriculum
from mmrag.model.packed import Packed
from mmrag.model.train import collate
from mmrag.model.vocabulary import Vocabulary

MB = 1e6
LOOKS = 0.05
"""Seconds from one look at the memory to the next."""


@dataclass(frozen=True)
class Loading:
    """What to read."""

    corpus: str
    """A packed corpus."""
    vocabulary: str
    """The directory that holds it."""
    train: dict[str, Any]
    seed: int
    step: int
    """The first step that is read; its micro-batches are made."""
    workers: int = 1
    """That share a step: this is the first of them."""
    walk: int = 0
    """Steps from one to the next that are looked up before, so that all epochs are laid out."""


class Memory:
    """What this process holds, in MB, and the most it held while the block ran."""

    def __init__(self) -> None:
        self.peak = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._done.wait(LOOKS):
            self._look()

    def _look(self) -> None:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        [kilobytes] = [line.split()[1] for line in lines if line.startswith("Private_Dirty:")]
        self.peak = max(self.peak, int(kilobytes) * 1024 / MB)


def measured(order: Loading) -> dict[str, float]:
    """Seconds until the first micro-batches are there, by the clock and of the processor, and
    megabytes then."""
    settings, vocabulary = Train(**order.train), Vocabulary.load(Path(order.vocabulary))
    with Memory() as memory:
        started, worked = time.perf_counter(), time.process_time()
        data = Packed(Path(order.corpus), vocabulary)
        curriculum = Curriculum(data, settings, order.seed, data.directory)
        for step in range(0, order.step, order.walk) if order.walk else ():
            curriculum.step(step)
        _, micro_batches = curriculum.step(order.step)
        batches = [
            collate(data, chosen, vocabulary, settings.unit_dropout, (order.seed, order.step, n))
            for n, chosen in enumerate(micro_batches)
            if n % order.workers == 0
        ]
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - worked
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "tokens": sum(batch.ids.numel() for batch in batches),
        "peak_mb": memory.peak,
        **_held(Path(order.corpus)),
    }


def _held(corpus: Path) -> dict[str, float]:
    """Megabytes of this process alone, and of the corpus's files that it has touched, which are the
    page cache's: another reader shares them."""
    process = psutil.Process()
    touched = [one for one in process.memory_maps() if one.path.startswith(str(corpus))]
    alone = sum(one.private_clean + one.private_dirty for one in touched)
    return {
        "private_mb": (process.memory_full_info().uss - alone) / MB,
        "shared_mb": sum(one.rss for one in touched) / MB,
    }


if __name__ == "__main__":
    print(json.dumps(measured(Loading(**json.loads(sys.stdin.readline())))))
