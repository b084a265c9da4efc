"""A process that ends what a killed service leaves of its Ray cluster, and nothing else.

Ray's own processes mostly end with whoever started them, but a few go on for minutes when it is
killed (`kill -9`). The guardian waits at a pipe whose other end only the service holds: however the
service ends, the pipe closes. A service that ends as it should says so first.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ALL_IS_WELL = b"."
PROGRAMS = f"{Path(importlib.util.find_spec('ray').origin).parent}/"
"""Where Ray's programs lie."""
SECONDS = 20.0
"""How long processes of the cluster are looked for: some are just being started."""
POLL_SECONDS = 0.5


@contextmanager
def guarded(session: Path) -> Iterator[None]:
    """Have the block's Ray cluster, whose session directory this is, watched over."""
    guardian = subprocess.Popen(
        [sys.executable, "-m", "serve.operations.guardian", str(session)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[1],
        start_new_session=True,  # Ctrl-C is the service's alone
    )
    try:
        yield
    finally:
        with suppress(OSError):  # somebody has killed it
            guardian.communicate(ALL_IS_WELL)


def left(session: Path) -> list[psutil.Process]:
    """Ray's processes of a session: those that name its directory, or have a file of it open."""
    below, found = f"{session}/", []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            said = process.cmdline()
            if _rays(said) and (_names(said, below) or _opened(process, below)):
                found.append(process)
    return found


def _rays(said: list[str]) -> bool:
    """Whether a command line is Ray's: a titled process, or one of its programs."""
    return bool(said) and (
        said[0].startswith("ray::") or any(word.startswith(PROGRAMS) for word in said[:3])
    )


def _names(said: list[str], below: str) -> bool:
    return any(below in f"{word}/" for word in said)


def _opened(process: psutil.Process, below: str) -> bool:
    return any(file.path.startswith(below) for file in process.open_files())


def main(session: str) -> None:
    """Wait for the service to end; kill what it leaves behind, unless it says that all is well."""
    if sys.stdin.buffer.read() == ALL_IS_WELL:
        return
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        for process in left(Path(session)):
            with suppress(psutil.Error):
                process.kill()
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main(*sys.argv[1:])
