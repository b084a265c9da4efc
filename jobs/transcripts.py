"""Transcripts of an evaluation on disk: in whatever order they come, read back by utterance.

Few are in memory at a time, while they are added and while they are read.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path

from cluster.stages import TranscribedUtterance

HELD = 5000
"""Transcripts that are sorted in memory, and written together."""
BY_UTTERANCE = attrgetter("utterance")


class Transcripts:
    """Transcripts in the order of their utterances' names, read anew each time."""

    def __init__(self, directory: Path) -> None:
        """`directory` is made, and takes the sorted runs that are merged when they are read."""
        directory.mkdir(parents=True)
        self._directory = directory
        self._held: list[TranscribedUtterance] = []
        self._runs: list[Path] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, heard: Iterable[TranscribedUtterance]) -> None:
        """Take in some more."""
        for one in heard:
            self._held.append(one)
            self._count += 1
            if len(self._held) == HELD:
                self._write_run()

    def __iter__(self) -> Iterator[TranscribedUtterance]:
        self._held.sort(key=BY_UTTERANCE)
        return heapq.merge(*map(_read, self._runs), self._held, key=BY_UTTERANCE)

    def _write_run(self) -> None:
        path = self._directory / f"{len(self._runs):05d}.jsonl"
        self._held.sort(key=BY_UTTERANCE)
        with path.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(asdict(one)) + "\n" for one in self._held)
        self._runs.append(path)
        self._held = []


def _read(path: Path) -> Iterator[TranscribedUtterance]:
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            yield TranscribedUtterance(**json.loads(line))
