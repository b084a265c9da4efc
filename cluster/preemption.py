"""Whether a training has been asked to leave the machines that it is on, or to stop.

A worker is asked by SIGTERM, or by Ray when its node is to be drained or taken away; all of them
are by whoever runs the training, with a file beside it. None leaves at once: the workers agree
after each step, so that all of them commit a checkpoint of the same one.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed
from ray.train.torch import TorchConfig

NOTICE_SECONDS = 5.0
"""Between two looks at Ray's notices: a look is a call between all workers."""
STOP = ".stop"
"""A file beside the checkpoints: whoever runs the training asks all of it to stop."""
ASKED = "asked to stop: it stops after its step, with a checkpoint stored (once more: at once)"
TERMINATED = 128 + signal.SIGTERM
"""The exit status of a command that SIGTERM ended, as a shell gives it."""
_asked = threading.Event()


class Preempted(Exception):
    """All workers have committed a checkpoint and leave; the message says at which step."""


class Stopped(SystemExit):
    """The training has stopped as it was asked to, with a checkpoint; the message says at which
    step."""

    def __init__(self, message: str) -> None:
        super().__init__(TERMINATED)
        self.message = message

    def __str__(self) -> str:
        return self.message


@contextmanager
def stopping(directory: Path) -> Iterator[Callable[[], bool]]:
    """In the block a first SIGTERM asks the training in `directory` to stop after its step; what is
    yielded tells whether it was asked. A second one does what it did before.

    In another thread than a process's main one, which alone takes signals, nothing is changed.
    """
    file = directory / STOP
    file.unlink(missing_ok=True)
    if threading.current_thread() is not threading.main_thread():
        yield file.exists
        return
    before = signal.getsignal(signal.SIGTERM)

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGTERM, before)
        os.write(sys.stderr.fileno(), f"{ASKED}\n".encode())
        file.touch()

    signal.signal(signal.SIGTERM, stop)
    try:
        yield file.exists
    finally:
        signal.signal(signal.SIGTERM, before)
        file.unlink(missing_ok=True)


def ask() -> None:
    """Ask the training in this process to leave after its step."""
    _asked.set()


def listen() -> None:
    """Take SIGTERM for a question, in a process's main thread."""
    _asked.clear()
    signal.signal(signal.SIGTERM, lambda *_: ask())


class _Listening(TorchConfig().backend_cls):
    """Sets up the process group, and has each worker listen."""

    def on_training_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        # The training is in a thread; only the main thread of a process can take a signal, and
        # Ray runs this there.
        worker_group.execute(listen)
        super().on_training_start(worker_group, backend_config)


@dataclass
class ListeningConfig(TorchConfig):
    """Ray Train's configuration of a process group whose workers listen for SIGTERM."""

    @property
    def backend_cls(self) -> type:
        return _Listening


class Notice:
    """Asks, after each step, whether any worker was asked to leave, or all of them to stop."""

    def __init__(self, rank: int, device: torch.device, directory: Path) -> None:
        """`directory` is the training's, as in `stopping`."""
        self._rank, self._device = rank, device
        self._stop = directory / STOP
        self._looked = time.monotonic()

    def agreed(self) -> bool:
        """Whether to leave: the same answer on every worker, all of which have to ask."""
        due = self._rank == 0 and time.monotonic() - self._looked >= NOTICE_SECONDS
        asked = _asked.is_set() or (self._rank == 0 and self._stop.exists())
        flags = torch.tensor([float(asked), float(due)], device=self._device)
        torch.distributed.all_reduce(flags)
        asked, look = (flags > 0).tolist()
        if look:
            self._looked = time.monotonic()
            asked = ray.train.get_preemption_info() is not None or asked
        return asked
