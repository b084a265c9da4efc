"""A Ray cluster as `ray start --head` makes one, with a token, and the jobs submitted to it."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests

from cluster.ports import free_ports
from serve.operations import environment

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SECONDS = 900
"""The longest that any one command may take."""
STARTED = "will now block forever"
"""What `ray start --block` says once everything is up."""


@dataclass(frozen=True)
class Head:
    """A cluster of one node, and what is set for who uses it."""

    dashboard: str
    variables: dict[str, str]

    def ray(self, *words: str, program: str = "ray") -> subprocess.CompletedProcess:
        """One of Ray's commands, to its end."""
        return subprocess.run(
            [BIN / program, *words],
            env=self.variables,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )

    def submit(self, name: str, *command: str, wait: bool = True) -> str:
        """Submit a job, the repository its working directory; what it said, if waited for."""
        words = ["job", "submit", "--address", self.dashboard, "--submission-id", name]
        words += [] if wait else ["--no-wait"]
        done = self.ray(*words, "--working-dir", str(ROOT), "--", *command)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def follow(self, name: str, pattern: str) -> str:
        """The first line of a job's log that fits, as soon as it is there."""
        words = [BIN / "ray", "job", "logs", "--follow", "--address", self.dashboard, name]
        with subprocess.Popen(
            words,
            env=self.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as following:
            said = []
            try:
                for line in following.stdout:
                    said.append(line)
                    if re.search(pattern, line):
                        return line.strip()
            finally:
                following.kill()
        raise AssertionError(f"no line of {name} fits {pattern}: {''.join(said)[-3000:]}")

    def stop(self, name: str) -> str:
        """Stop a job; what is said of its state then."""
        stopped = self.ray("job", "stop", "--address", self.dashboard, name)
        assert stopped.returncode == 0, stopped.stderr[-3000:]
        return self.ray("job", "status", "--address", self.dashboard, name).stdout


@contextmanager
def head(directory: Path, **variables: str) -> Iterator[Head]:
    """A head with two CPUs that asks for a token; it and all that it started end with the block."""
    port, dashboard, client, *serving = free_ports(3 + len(environment.PORTS))
    token = directory / "token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    own |= environment.VARIABLES | variables
    own |= {name: str(each) for name, each in zip(environment.PORTS, serving, strict=True)}
    own |= {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }
    temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets' names may not be long
    command = [BIN / "ray", "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2"]
    command += [f"--port={port}", f"--dashboard-port={dashboard}", "--node-ip-address=127.0.0.1"]
    command += [f"--ray-client-server-port={client}", f"--temp-dir={temporary}"]
    command += ["--object-store-memory=300000000"]
    with (directory / "head.log").open("wb") as log:
        process = subprocess.Popen(command, env=own, stdout=log, stderr=log)
    made = Head(f"http://127.0.0.1:{dashboard}", own)
    try:
        until(lambda: STARTED in (directory / "head.log").read_text(), process, directory)
        answering(f"{made.dashboard}/api/version", process, directory)
        yield made
    finally:
        end(process)
        shutil.rmtree(temporary, ignore_errors=True)


def end(process: subprocess.Popen) -> None:
    """End a process, and whatever it started."""
    family = psutil.Process(process.pid).children(True) if process.poll() is None else []
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(30)
    for one in [*family, *([psutil.Process(process.pid)] if process.poll() is None else [])]:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(family, timeout=20)


def answering(url: str, process: subprocess.Popen, directory: Path) -> None:
    """Return once something answers at `url`, be it that it wants a token."""

    def answers() -> bool:
        with suppress(requests.RequestException):
            return requests.get(url, timeout=5).status_code < 500
        return False

    until(answers, process, directory)


def until(happens: Callable[[], bool], process: subprocess.Popen, directory: Path) -> None:
    """Return once something happens, while a process that writes its log there is alive."""
    deadline = time.monotonic() + SECONDS
    while not happens():
        logs = "".join(log.read_text() for log in directory.glob("*.log"))
        assert process.poll() is None and time.monotonic() < deadline, logs[-3000:]
        time.sleep(0.5)


@contextmanager
def server(command: Sequence[str], directory: Path, url: str) -> Iterator[None]:
    """A server that answers at `url` within the block."""
    with (directory / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        answering(url, process, directory)
        yield
    finally:
        end(process)
