"""Joining a Ray cluster: the one named by RAY_ADDRESS, else a local one started here."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Ray's C++ core reports harmless things as errors; what fails also arrives as a Python exception.
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")

import ray
import ray.data

from cluster import address

LOCAL_OBJECT_STORE_BYTES = 1 << 30
LOG_LEVEL_LINE = b"Set ray log level from environment variable"
"""What Ray's C++ core prints because the level is set, whatever the level."""


@contextmanager
def connection(num_cpus: int | None = None, num_gpus: int | None = None) -> Iterator[None]:
    """Be connected to a cluster inside the block; a connection that exists is used and kept.

    `num_cpus` and `num_gpus` are what a cluster started here offers; by default all that the
    machine has. The workers' output stays in Ray's logs: stages show their own progress. Raises
    ConnectionError or ValueError, within seconds, for a RAY_ADDRESS where no cluster answers.
    """
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if ray.is_initialized():
        yield
        return
    address.check()
    options = {"log_to_driver": False, "logging_level": logging.ERROR}
    if os.environ.get(address.VARIABLE, "") in ("", "local"):
        options |= {
            "address": "local",  # or Ray would join whatever `ray start` left on this machine
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            "include_dashboard": False,
            "object_store_memory": LOCAL_OBJECT_STORE_BYTES,
        }
    with _without(LOG_LEVEL_LINE):
        ray.init(**options)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _without(text: bytes) -> Iterator[None]:
    """Standard error of the block, C++'s own too, passed on line by line but for lines with `text`.

    Lines arrive as they are written: a connection that hangs is seen to hang.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    source, sink = os.pipe()

    def pass_on() -> None:
        with os.fdopen(source, "rb") as lines, os.fdopen(kept, "wb", buffering=0) as out:
            for line in lines:
                if text not in line:
                    out.write(line)

    os.dup2(sink, 2)
    os.close(sink)
    thread = threading.Thread(target=pass_on, daemon=True)
    restored = os.dup(kept)
    thread.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(restored, 2)
        os.close(restored)
        thread.join(1)  # a child that was started meanwhile may hold the pipe open for longer
