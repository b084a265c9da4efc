"""`python -m serve` in a process of its own, with HAProxy in front, as people start it."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import psutil

from cluster.ports import free_ports

ROOT = Path(__file__).parents[2]
START_SECONDS = 240
MODEL = ("model=mmrag:tiny", "decode.max_seconds=4", "decoder.compiled=false")
"""Which the tests' sentences are of, where a test names no other; it is ready soon, and rounds as
the recogniser of the tests does."""
PARTS = ("ingress", "encoder", "retriever", "decoder")


def start(port: int, directory: Path, *settings: str, **variables: str) -> subprocess.Popen:
    """A process that serves there, and prints what it says into `directory`/log."""
    [dashboard] = free_ports(1)
    command = [sys.executable, "-m", "serve", "--port", str(port), "--dashboard-port"]
    command += [str(dashboard), f"datastores={directory / 'datastores'}", *MODEL, *settings]
    command += [f"{part}.max=1" for part in PARTS]
    environment = {name: value for name, value in os.environ.items() if name[:4] != "RAY_"}
    environment |= {"MMRAG_RUNS": str(directory)} | variables
    with (directory / "log").open("wb") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


@contextmanager
def serving(directory: Path, *settings: str, **variables: str) -> Iterator[SimpleNamespace]:
    """A service that is ready: its url, log, pid, process and directory; it ends with the block."""
    [port] = free_ports(1)
    process = start(port, directory, *settings, **variables)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    log = directory / "log"
    try:
        while "ready: " not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield SimpleNamespace(
            url=url, log=log, pid=process.pid, process=process, directory=directory
        )
    finally:
        if process.poll() is None:
            _end(process)


def _end(process: subprocess.Popen) -> None:
    family = psutil.Process(process.pid).children(True)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(60)
    alive = [one for one in (*family, *_living(process)) if one.is_running()]
    for one in alive:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(alive, timeout=20)


def _living(process: subprocess.Popen) -> list[psutil.Process]:
    return [] if process.poll() is not None else [psutil.Process(process.pid)]
