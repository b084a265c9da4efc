"""A child process that is told what to do in JSON and answers in JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from typing import IO, Any

from jobs.benchmark.endpoint import EndpointError

LOAD, PLAIN = "jobs.benchmark.load", "jobs.benchmark.plain"
OPENED, BUILT = "jobs.benchmark.opened", "jobs.benchmark.built"
DECODED, BARE = "jobs.benchmark.decoded", "jobs.benchmark.bare"
LIVE = "jobs.benchmark.live"
LOADED, DRIVEN = "jobs.benchmark.loaded", "jobs.benchmark.driven"
SHARING = {"OMP_WAIT_POLICY": "passive"}
"""Of a process that builds with every core: its threads do not spin while one of them waits for a
core that something else has."""


class Process:
    """A child that takes JSON in and gives JSON out; it does not outlive the `with` block."""

    def __init__(self, module: str, told: Any, **environment: str) -> None:
        """`environment` are variables that it has beside ours."""
        self.module = module
        self._child = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | environment,
            start_new_session=True,  # Ctrl-C is ours alone
        )
        self._input: IO[bytes] = self._child.stdin
        self._input.write(json.dumps(asdict(told)).encode() + b"\n")
        self._input.flush()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.wait()
        self._input.close()
        self._child.stdout.close()

    def stop(self) -> None:
        """Ask for an early end."""
        self._input.close()

    def result(self) -> Any:
        """What it found out, once it is done; EndpointError if it failed."""
        found = self._child.stdout.read()
        if self._child.wait() != 0:
            raise EndpointError(f"python -m {self.module} failed (what it said stands above)")
        return json.loads(found)
