"""Checkpoints that any number of workers and any ZeRO stage go on from, stored as training goes on.

A checkpoint's directory holds `step.json` and, from each worker, `part-N.safetensors`: flat ranges
of each trained parameter by name, in float32, with the optimizer's moments of them. Which range is
whose is in a file's own header, so that whoever goes on reads what it needs and no more. What is
frozen is in no checkpoint.

All of it happens behind the training: a worker's share is copied to memory while the next step is
computed, for nothing of it changes before that step is taken; then it is written to the node's own
disk, and Ray Train sends it to the run's storage. A checkpoint counts once every worker has sent
its share.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import ray.train
import torch
from deepspeed import DeepSpeedEngine
from ray.train import Checkpoint, CheckpointUploadMode, UserCallback
from torch import Tensor

from cluster.partitions import MOMENTS, STEP, parts, publish, state
from mmrag import durable

LAYOUT = 1
FIELDS = "step.json"
"""In a checkpoint: how far the run had come, to be read without loading anything."""
WEIGHT = "weight"
BYTES = 4
"""Of a value: all are float32."""
LISTED = "checkpoint_manager_snapshot.json"
"""Ray Train's list of the checkpoints that count."""
COPY = ".checkpoints.json"
"""The list as it last was, whole."""


class CheckpointError(ValueError):
    """This run cannot go on from what is stored; each of its workers finds that out alike."""


class StorageError(RuntimeError):
    """A worker could not store its share of a checkpoint, or not read what is stored."""


@dataclass
class Share:
    """What one worker adds to a checkpoint."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """`weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` -> the range's values (N,), float32."""
    ranges: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Parameter -> the range of it, flattened."""
    steps: dict[str, int] = field(default_factory=dict)
    """Parameter -> how often the optimizer has stepped it; none before the first time."""

    @classmethod
    def of(cls, engine: DeepSpeedEngine) -> Share:
        """What this worker holds, where it is: the next step changes it."""
        share, known = cls(), state(engine)
        for part in parts(engine):
            share.ranges[part.name] = (part.start, part.stop)
            share.tensors[f"{WEIGHT}/{part.name}"] = part.of(part.owner)
            own = known.get(part.owner)
            if own:
                share.steps[part.name] = int(own[STEP])
                for moment in MOMENTS:
                    share.tensors[f"{moment}/{part.name}"] = part.of(own[moment])
        return share

    def copy(self) -> Share:
        """The same in memory of its own, which nobody changes."""
        tensors = {
            name: values.to("cpu", torch.float32, copy=True)
            for name, values in self.tensors.items()
        }
        return Share(tensors, self.ranges, self.steps)

    def write(self, path: Path) -> None:
        """Write a copy as a safetensors file, from where the values lie."""
        about = {"ranges": json.dumps(self.ranges), "steps": json.dumps(self.steps)}
        header: dict[str, Any] = {"__metadata__": about}
        end = 0
        for name, values in self.tensors.items():
            start, end = end, end + BYTES * values.numel()
            header[name] = {
                "dtype": "F32",
                "shape": [values.numel()],
                "data_offsets": [start, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for values in self.tensors.values():
                stream.write(memoryview(values.numpy()).cast("B"))


class _Stored(NamedTuple):
    """A range of a tensor, and where in which file its first value is."""

    start: int
    stop: int
    file: int
    offset: int


class Saved:
    """A checkpoint in storage, of which ranges are read."""

    def __init__(self, filesystem: Any, path: str) -> None:
        """`filesystem` is one of pyarrow's. CheckpointError if another layout is stored there."""
        self.path = path
        self.fields = {}
        with suppress(FileNotFoundError), filesystem.open_input_stream(f"{path}/{FIELDS}") as file:
            self.fields = json.loads(file.read())
        if self.fields.get("layout") != LAYOUT:
            raise CheckpointError(
                f"{path} was written by another version of this program, in layout "
                f"{self.fields.get('layout')}, and this one goes on from layout {LAYOUT}: finish "
                "the run with that version, or begin it again with --force"
            )
        self.steps: dict[str, int] = {}
        self._stored: dict[str, list[_Stored]] = {}
        self._files = [
            filesystem.open_input_file(f"{path}/{part_file(number)}")
            for number in range(self.fields["workers"])
        ]
        for number, file in enumerate(self._files):
            self._index(number, file)

    def _index(self, number: int, file: Any) -> None:
        length = int.from_bytes(file.read_at(8, 0), "little")
        header = json.loads(file.read_at(length, 8))
        about = header.pop("__metadata__")
        ranges = json.loads(about["ranges"])
        for name, steps in json.loads(about["steps"]).items():
            self.steps[name] = max(steps, self.steps.get(name, 0))
        for key, where in header.items():
            start, stop = ranges[key.partition("/")[2]]
            offset = 8 + length + where["data_offsets"][0]
            self._stored.setdefault(key, []).append(_Stored(start, stop, number, offset))

    @property
    def names(self) -> set[str]:
        """The parameters that are in it."""
        return {key.partition("/")[2] for key in self._stored}

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """The values (stop - start,) of `weight/NAME`, or of a moment; StorageError if some are
        missing."""
        values, position = torch.empty(stop - start), start
        for one in sorted(self._stored[key]):
            if not one.start <= position < min(one.stop, stop):
                continue
            end = min(one.stop, stop)
            file = self._files[one.file]
            file.seek(one.offset + BYTES * (position - one.start))
            into = memoryview(values[position - start : end - start].numpy()).cast("B")
            if file.readinto(into) != len(into):
                break
            position = end
        if position < stop:
            raise StorageError(
                f"{self.path} is damaged: {key} is missing from {position} to {stop}"
            )
        return values

    def restore(self, engine: DeepSpeedEngine) -> None:
        """Go on from it: this worker's weights and moments, on all workers at once."""
        known = state(engine)
        mine = list(parts(engine, whole=True))
        if strange := sorted({part.name for part in mine} - self.names):
            raise CheckpointError(f"{self.path} is of another model: it lacks {', '.join(strange)}")
        for part in mine:
            part.of(part.owner).copy_(self.read(f"{WEIGHT}/{part.name}", part.start, part.stop))
            if part.name not in self.steps:
                continue
            own = known[part.owner]
            own[STEP] = torch.tensor(float(max(self.steps[part.name], own.get(STEP, 0))))
            for moment in MOMENTS:
                if moment not in own:
                    own[moment] = torch.zeros_like(part.owner)
                values = self.read(f"{moment}/{part.name}", part.start, part.stop)
                part.of(own[moment]).copy_(values)
        publish(engine)

    def close(self) -> None:
        """Close its files."""
        for file in self._files:
            file.close()


def part_file(number: int) -> str:
    """The file of a worker's share."""
    return f"part-{number:05d}.safetensors"


class Uploads:
    """Sends one worker's shares to the run's storage, one at a time, while training goes on."""

    def __init__(self, directory: Path, staging: str | None, rank: int, workers: int) -> None:
        """`directory` is the run's; `staging` is on the node's own disk, None for its temporary
        directory."""
        name = hashlib.sha256(str(directory).encode()).hexdigest()[:12]
        self._root = Path(staging or tempfile.gettempdir()) / f"mmrag-checkpoints-{name}"
        self._staging = self._root / str(rank)
        self._rank, self._workers = rank, workers
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._copying: Future[Share] | None = None
        self._sent = threading.Event()
        self._sent.set()
        self._seconds: dict[str, float] = {}
        shutil.rmtree(self._staging, ignore_errors=True)  # of a worker that was killed

    def send(self, engine: DeepSpeedEngine, fields: Mapping[str, Any]) -> None:
        """Begin to store a checkpoint; every worker calls this at the same step.

        `fields` go into its `step.json`. Waits until the one before is stored. A failure ends the
        run's attempt with a StorageError.
        """
        began = time.monotonic()
        self.wait()
        self._copying = self._copier.submit(Share.of(engine).copy)
        self._sent.clear()
        self._staging.mkdir(parents=True)
        ray.train.report(
            {"step": fields["step"]},
            checkpoint=Checkpoint.from_directory(self._staging),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=self._uploading(self._copying, dict(fields)),
            delete_local_checkpoint_after_upload=False,  # done by the time the next one is staged
        )
        self._stalled(began)

    def copied(self) -> None:
        """Wait until what was sent may change: to be called before a step is taken."""
        if self._copying is not None:
            began = time.monotonic()
            self._copying.result()
            self._copying = None
            self._stalled(began)

    def _stalled(self, began: float) -> None:
        before = self._seconds.get("checkpoint_stall_seconds", 0.0)
        self._seconds["checkpoint_stall_seconds"] = before + time.monotonic() - began

    def _uploading(
        self, share: Future[Share], fields: dict[str, Any]
    ) -> Callable[[Checkpoint, str], Checkpoint]:
        """What Ray Train is to call, in a thread of its own, to store the share."""

        def upload(staged: Checkpoint, name: str) -> Checkpoint:
            began = time.monotonic()
            storage = ray.train.get_context().get_storage()
            try:
                self._write(share.result(), fields)
                stored = storage.persist_current_checkpoint(staged, name)
                if stored.filesystem.type_name == "local":
                    for file in self._staging.iterdir():
                        durable.sync(Path(stored.path) / file.name)
                    durable.sync(Path(stored.path))
            except Exception as error:
                raise StorageError(
                    f"the checkpoint of step {fields['step']} could not be stored as "
                    f"{storage.experiment_fs_path}/{name}: {error}"
                ) from error
            self._seconds["checkpoint_upload_seconds"] = time.monotonic() - began
            shutil.rmtree(self._staging)
            self._sent.set()
            return stored

        return upload

    def _write(self, share: Share, fields: dict[str, Any]) -> None:
        """Write the share to the node's own disk; the first worker adds what is said of all."""
        share.write(self._staging / part_file(self._rank))
        if self._rank == 0:
            about = {"layout": LAYOUT, "workers": self._workers, **fields}
            (self._staging / FIELDS).write_text(json.dumps(about))

    def wait(self) -> None:
        """Wait until what was sent is stored; if it fails, Ray Train ends the attempt meanwhile."""
        self._sent.wait()

    def told(self) -> dict[str, float]:
        """Seconds that training stood still for checkpoints since this was last asked, and that
        the last one took to be stored; nothing where there was none."""
        told, self._seconds = self._seconds, {}
        return told

    def close(self) -> None:
        """Wait for the last one, and leave nothing on the node's disk."""
        self.wait()
        with suppress(OSError):  # another worker's may still be there
            self._root.rmdir()


class Bookkeeping(UserCallback):
    """Keeps a copy of Ray Train's list of checkpoints, which Ray Train writes in place: a kill at
    that moment would leave half of it."""

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        """Called in the controller once a checkpoint is on the list."""
        if checkpoint is not None and checkpoint.filesystem.type_name == "local":
            folder = Path(checkpoint.path).parent
            durable.write_text(folder / COPY, (folder / LISTED).read_text())


def mend(folder: Path) -> None:
    """Make the checkpoints in a run's storage those that count: a killed run may have left half a
    list, and shares that no list names."""
    if not folder.exists():
        return
    if listed(folder) is None and (folder / COPY).exists():
        durable.write_text(folder / LISTED, (folder / COPY).read_text())
    names = listed(folder)
    if names is None and (folder / LISTED).exists():
        (folder / LISTED).unlink()  # half a list, and no copy: none counted before
        return
    for one in folder.glob("checkpoint_*"):
        if one.is_dir() and one.name not in (names or ()):
            shutil.rmtree(one)


def listed(folder: Path) -> list[str] | None:
    """The checkpoints that count, by the names of their directories; None without a list."""
    try:
        known = json.loads((folder / LISTED).read_text())
        return [one["checkpoint_dir_name"] for one in known["checkpoint_results"]]
    except (FileNotFoundError, ValueError, LookupError):
        return None
