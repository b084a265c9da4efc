"""Joining a Ray cluster: the one named by RAY_ADDRESS, else a local one started here."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Ray's C++ core reports harmless things as errors; what fails also arrives as a Python exception.
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")

import ray
import ray.data

LOCAL_OBJECT_STORE_BYTES = 1 << 30


@contextmanager
def connection(num_cpus: int | None = None) -> Iterator[None]:
    """Be connected to a cluster inside the block; a connection that exists is used and kept.

    `num_cpus` is what a cluster started here offers; by default all that the machine has. The
    workers' output stays in Ray's logs: stages show their own progress.
    """
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if ray.is_initialized():
        yield
        return
    options = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not os.environ.get("RAY_ADDRESS"):
        options |= {
            "address": "local",  # or Ray would join whatever `ray start` left on this machine
            "num_cpus": num_cpus,
            "include_dashboard": False,
            "object_store_memory": LOCAL_OBJECT_STORE_BYTES,
        }
    ray.init(**options)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    try:
        yield
    finally:
        ray.shutdown()
