"""Whether anybody answers where RAY_ADDRESS points: asked first, for Ray itself tries for minutes.

Knows nothing about Ray but how its addresses are written.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

VARIABLE = "RAY_ADDRESS"
CLIENT = "ray"
CLIENT_PORT = 10001
"""Of `ray://HOST`."""
PROBE_SECONDS = 5.0
ADVICE = f"Start the cluster, correct {VARIABLE}, or unset it to use this machine alone"


def check(address: str | None = None) -> None:
    """See that something listens at RAY_ADDRESS (or `address`), within seconds; unset is right too.

    Raises ConnectionError, in one line that names the address, if nothing does, and ValueError for
    an address of another form than Ray's.
    """
    address = os.environ.get(VARIABLE, "") if address is None else address
    if address in ("", "local"):
        return
    named = f"{VARIABLE}={address}"
    if address == "auto":
        started = _started_here()
        if started is None:
            return  # Ray looks for a cluster's processes, and says at once if there are none
        named, address = f"{named}, the cluster {started} that `ray start` left here", started
    host, port = _place(address)
    try:
        socket.create_connection((host, port), timeout=PROBE_SECONDS).close()
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise ConnectionError(
            f"no Ray cluster answers at {host}:{port} ({named}): {reason}. {ADVICE}."
        ) from None


def _place(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT or ray://HOST[:PORT]."""
    scheme, separator, _ = address.partition("://")
    parts = urlsplit(address if separator else f"//{address}")
    try:
        port = parts.port or (CLIENT_PORT if scheme == CLIENT else None)
    except ValueError:
        port = None
    if (separator and scheme != CLIENT) or not parts.hostname or port is None:
        hint = " (a dashboard's: it is for `ray job submit`)" if scheme.startswith("http") else ""
        raise ValueError(
            f"{VARIABLE}={address}{hint} is none of HOST:PORT, ray://HOST:PORT, auto and local. "
            f"{ADVICE}."
        )
    return parts.hostname, port


def _started_here() -> str | None:
    """The cluster that `ray start` last started or joined on this machine, if it left a note."""
    note = Path(os.environ.get("RAY_TMPDIR") or "/tmp") / "ray" / "ray_current_cluster"
    try:
        return note.read_text().strip() or None
    except OSError:
        return None
