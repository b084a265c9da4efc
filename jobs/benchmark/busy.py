"""How busy an encoder is kept: a pretended accelerator that hears so many seconds in one.

It sleeps for as long as an encoder of that speed would take, in the place of one, so what is
measured is whether the pipeline around it has the next clips ready. Recordings are noise.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cluster.clips import Clips
from cluster.connection import connection
from cluster.parts import Operator, Part, cut, work_off
from cluster.recording import write_flac
from cluster.tokenizing import (
    NOT_COMPARED,
    Agreement,
    EncodeClips,
    EncodeUnits,
    Frames,
    operators,
)
from jobs.benchmark.progress import Progress
from mmrag.config import Tokenize, Workers
from mmrag.records import Units, Utterance
from mmrag.speech import audio
from mmrag.speech.tokenized import Tokenized

SPEED = 400.0
"""Seconds of audio in a second, of each accelerator."""
FRAMES = Frames(field=400, hop=320)
SECONDS = (2.0, 16.0)
"""Of the shortest and the longest recording."""
RECORDINGS = 40
"""Files, which are heard again and again."""
UNITS_A_SECOND = 25
PART_SECONDS = 120.0
SEED = 1
WORKERS = "tokenize.workers"


@dataclass(frozen=True)
class Busy:
    """What a pipeline made of its encoders' time."""

    share: float
    """Of the time between its first and its last batch that an encoder was at one."""
    speed: float
    """Seconds of audio in a second, of all encoders together, while they ran."""


class SimulatedEncoder:
    """Stands for `UnitEncoder`: takes its time, and makes units up."""

    frames = FRAMES

    def __init__(self, speed: float, log: Path) -> None:
        self._speed = speed
        self._log = log / f"{os.getpid()}.jsonl"

    def features(self, waves: Sequence[Tensor]) -> list[Tensor]:
        """Nothing, after as long as it would take."""
        seconds = sum(map(len, waves)) / audio.SAMPLE_RATE
        began = time.monotonic()
        time.sleep(seconds / self._speed)
        line = {"began": began, "ended": time.monotonic(), "seconds": seconds}
        with self._log.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        return [torch.empty(0) for _ in waves]

    def assign(self, clips: Clips, features: Sequence[Tensor]) -> list[Tokenized]:
        """As many units as there would be."""
        return [Tokenized(said, _units(len(wave) / audio.SAMPLE_RATE)) for said, wave in clips]

    def compare(self, clips: Clips, features: Sequence[Tensor]) -> Agreement:
        """Has nothing to compare."""
        return NOT_COMPARED


def _units(seconds: float) -> Units:
    count = max(1, round(UNITS_A_SECOND * seconds))
    return Units(np.arange(count, dtype=np.int32) % 2, np.full(count, 2, np.int32))


class EncodeSimulated(EncodeClips):
    """`EncodeClips`, with a simulated encoder."""

    def __init__(self, speed: float, log: Path) -> None:
        self._encode_with(SimulatedEncoder(speed, log))


class EncodeUnitsSimulated(EncodeUnits):
    """`EncodeUnits`, with a simulated encoder."""

    def __init__(self, speed: float, log: Path, settings: Tokenize, directory: Path) -> None:
        self._encode_with(SimulatedEncoder(speed, log), settings, directory)


@dataclass(frozen=True)
class Recordings:
    """Reads `hours` of noise: the same few files under other names, cut into parts."""

    directory: Path
    lengths: tuple[float, ...]
    hours: float
    part_seconds: float

    def utterances(self) -> Iterator[Utterance]:
        """One after the other."""
        filled, number = 0.0, 0
        while filled < 3600 * self.hours:
            file = number % len(self.lengths)
            path = self.directory / f"{file}.flac"
            yield Utterance(id=f"{number}", text="x", audio=path, duration=self.lengths[file])
            filled += self.lengths[file]
            number += 1

    def __call__(self) -> Iterator[Part[Utterance]]:
        """The parts."""
        yield from cut(self.utterances(), lambda one: one.duration, self.part_seconds, "all/part")


def measure(
    directory: Path, hours: float = 4.0, speed: float = SPEED, tell: Progress | None = None
) -> dict[str, Busy]:
    """How busy the encoder is where decoding and writing have processes of their own, and where one
    process does it all. Raises ConnectionError or ValueError as `connection` does."""
    tell = tell or Progress()
    tell(f"recording {RECORDINGS} clips of noise")
    lengths = tuple(np.linspace(*SECONDS, RECORDINGS).round(2).tolist())
    write_noise(directory / "noise", lengths)
    found = {}
    for way in ("separate", "fused"):
        tell(f"{hours:g} h of audio through an encoder of {speed:g} x real time, {way}")
        place = directory / way
        place.mkdir()
        with connection(num_gpus=1):
            reading = Recordings(directory / "noise", lengths, hours, PART_SECONDS)
            found[way] = _run(place, reading, way, speed)
    return found


def write_noise(directory: Path, lengths: Sequence[float]) -> None:
    """Recordings of so many seconds each, `0.flac` and on."""
    draw = np.random.default_rng(SEED)
    for number, seconds in enumerate(lengths):
        wave = draw.normal(0, 0.1, round(seconds * audio.SAMPLE_RATE))
        write_flac(directory / f"{number}.flac", wave.astype(np.float32).clip(-1, 1))


def _run(directory: Path, reading: Recordings, way: str, speed: float) -> Busy:
    cores = len(os.sched_getaffinity(0))
    settings = Tokenize(
        units=2,
        sample_seconds=1,
        min_seconds=0.1,
        max_seconds=60,
        batch_seconds=30,
        part_seconds=reading.part_seconds,
        require_text=True,
        operators=way,
        workers=Workers(count=1, num_cpus=0.4, num_gpus=1),
        decoders=Workers(count=1, num_cpus=max(0.5, cores - 1)),
    )
    log = directory / "log"
    log.mkdir()
    stages = [
        simulated(one, speed, log, settings, directory)
        for one in operators(settings, directory, directory, directory, FRAMES)
    ]
    for _ in work_off(stages, reading, settings.workers, "units", WORKERS):
        pass
    lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in log.iterdir()]
    span = sum(own[-1]["ended"] - own[0]["began"] for own in lines)
    at_it = sum(one["ended"] - one["began"] for own in lines for one in own)
    seconds = sum(one["seconds"] for own in lines for one in own)
    return Busy(at_it / span, seconds / max(own[-1]["ended"] - own[0]["began"] for own in lines))


def simulated(
    operator: Operator, speed: float, log: Path, settings: Tokenize, directory: Path
) -> Operator:
    """The operator, with a simulated encoder in the place of one."""
    stage, arguments, *pool = operator
    made = {"speed": speed, "log": log}
    if stage is EncodeClips:
        return EncodeSimulated, made, *pool
    if stage is EncodeUnits:
        return EncodeUnitsSimulated, {**made, "settings": settings, "directory": directory}
    return stage, arguments, *pool
