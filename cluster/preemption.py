"""Whether a training has been asked to leave the machines that it is on.

A worker is asked by SIGTERM, or by Ray when its node is to be drained or taken away. It does not
leave at once: the workers agree after each step, so that all of them commit a checkpoint of the
same one.
"""

from __future__ import annotations

import signal
import threading
import time
from dataclasses import dataclass
from typing import Any

import ray.train
import torch
import torch.distributed
from ray.train.torch import TorchConfig

NOTICE_SECONDS = 5.0
"""Between two looks at Ray's notices: a look is a call between all workers."""
_asked = threading.Event()


class Preempted(Exception):
    """All workers have committed a checkpoint and leave; the message says at which step."""


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
    """Asks, after each step, whether any worker was asked to leave."""

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank, self._device = rank, device
        self._looked = time.monotonic()

    def agreed(self) -> bool:
        """Whether to leave: the same answer on every worker, all of which have to ask."""
        due = self._rank == 0 and time.monotonic() - self._looked >= NOTICE_SECONDS
        flags = torch.tensor([float(_asked.is_set()), float(due)], device=self._device)
        torch.distributed.all_reduce(flags)
        asked, look = (flags > 0).tolist()
        if look:
            self._looked = time.monotonic()
            asked = ray.train.get_preemption_info() is not None or asked
        return asked
