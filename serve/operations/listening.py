"""Whether this machine lets the service listen; imports nothing slow, so it is asked first."""

from __future__ import annotations

import errno
import socket


class ListenError(RuntimeError):
    """Nobody can listen there; the message says why, and which option chooses another place."""


def require_port(host: str, port: int, option: str = "--port") -> None:
    """Raises ListenError if the address is not this machine's, or the port is taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise ListenError(f"{host}: no such address; choose another with --host") from None
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        reasons = {
            errno.EADDRINUSE: f"another program listens there; choose another port with {option}",
            errno.EACCES: f"this user may not listen there; choose another port with {option}",
            errno.EADDRNOTAVAIL: "this machine has no such address; choose another with --host",
        }
        reason = reasons.get(error.errno, error.strerror)
        raise ListenError(f"{host}:{port}: {reason}") from None
