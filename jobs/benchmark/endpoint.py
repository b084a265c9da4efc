"""The transcription service as a process: started as a user starts it, watched, hurt, stopped.

`python -m serve` on ports of its own, with a Ray instance and a directory of datastores of its own:
nothing that runs on the machine already is asked, stopped or killed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from cluster.ports import free_ports

CONFIG = Path(__file__).parents[2] / "serve" / "config.yaml"
KEYS = ("MMRAG_API_KEYS", "MMRAG_API_KEYS_FILE")
READY_SECONDS = 240
ASK_SECONDS = 2
"""How long it may take to say that it is ready; while it starts, an early question gets stuck."""
STOP_SECONDS = 15
"""How long the service may take to end by itself."""
LOG_LINES = 30


class EndpointError(RuntimeError):
    """The service does not do what it must for a measurement; the message shows its log's end."""


@dataclass(frozen=True)
class Endpoint:
    """A running service."""

    url: str
    process: psutil.Process
    log: Path

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Its processes whose title starts so; those of a replica start with
        `ray::ServeReplica:mmrag:decoder`."""
        found = []
        for process in [self.process, *self.process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess, IndexError):
                if not title or process.cmdline()[0].startswith(title):
                    found.append(process)
        return found

    def memory_mb(self) -> float:
        """Resident memory of all its processes; what they share counts for each."""
        total = 0
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total / 1e6

    def ready(self) -> bool:
        """Whether every part answers."""
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=ASK_SECONDS) as reply:
                return reply.status == 200
        except OSError:
            return False

    def wait(self, seconds: float = READY_SECONDS) -> None:
        """Until it is ready; EndpointError if it has ended or takes longer."""
        deadline = time.monotonic() + seconds
        while not self.ready():
            if not self.process.is_running() or self.process.status() == psutil.STATUS_ZOMBIE:
                raise EndpointError(f"the service has ended\n{self.last_lines()}")
            if time.monotonic() > deadline:
                raise EndpointError(
                    f"the service is not ready in {seconds:g} s\n{self.last_lines()}"
                )
            time.sleep(0.5)

    def last_lines(self) -> str:
        """The end of its log."""
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return "\n".join(["the end of its log:", *lines])

    def create(self, datastore: str, texts: list[str]) -> None:
        """Make a datastore of texts; EndpointError if it is refused."""
        asked = json.dumps({"name": datastore, "texts": texts}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/datastores", asked, headers)
        try:
            urllib.request.urlopen(request, timeout=300).close()
        except urllib.error.HTTPError as error:
            told = error.read().decode(errors="replace")
            raise EndpointError(f"no datastore: {error.code} {told}\n{self.last_lines()}") from None


def settings() -> dict[str, Any]:
    """What `serve/config.yaml` tells the application."""
    return yaml.safe_load(CONFIG.read_text())["applications"][0]["args"]


@contextmanager
def running(changes: Mapping[str, Any], environment: Mapping[str, str]) -> Iterator[Endpoint]:
    """A service that is ready, with `changes` (dotted) to its settings; stopped whatever happens.

    Raises EndpointError if it does not get ready.
    """
    directory = Path(tempfile.mkdtemp(prefix="mmrag-"))  # short: sockets' paths go below it
    port, dashboard, fallback = free_ports(3)
    given = {"datastores": directory / "datastores", **changes}
    command = [sys.executable, "-m", "serve", "--port", str(port)]
    command += ["--dashboard-port", str(dashboard), *(f"{k}={v}" for k, v in given.items())]
    own = {
        "RAY_TMPDIR": str(directory),
        # Two services would share Ray's own choice: one then answers for the other that starts.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        **environment,
    }
    try:
        with _process(command, own, directory / "log") as process:
            endpoint = Endpoint(f"http://127.0.0.1:{port}", process, directory / "log")
            endpoint.wait()
            yield endpoint
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _process(command: list[str], own: Mapping[str, str], log: Path) -> Iterator[psutil.Process]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", *KEYS)}
    with log.open("wb") as file:
        started = subprocess.Popen(
            command,
            env={**inherited, **own},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=CONFIG.parents[1],
        )
    try:
        yield psutil.Process(started.pid)
    finally:
        _stop(started)


def _stop(started: subprocess.Popen) -> None:
    """End the service and every process that came of it."""
    family: set[psutil.Process] = set()
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(started.pid)
        family |= {process, *process.children(recursive=True)}
        started.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        started.wait(STOP_SECONDS)
    for one in list(family):
        with suppress(psutil.NoSuchProcess):
            family |= set(one.children(recursive=True))
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    started.wait()
    psutil.wait_procs(family, timeout=STOP_SECONDS)
