"""The audit log: who changed what and when, and never what was said or written."""

from __future__ import annotations

import json
import os
import socket
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmrag import durable


class Audit:
    """A directory of JSON lines, a file a day and process: `audit-2026-11-27-HOST-PID.jsonl`.

    A line is on the disk when `write` returns. Files are never deleted here.
    """

    def __init__(self, directory: Path) -> None:
        """Raises OSError where no file can be made."""
        durable.make_directory(directory)
        self._directory = directory
        self._whose = f"{socket.gethostname()}-{os.getpid()}"
        self._lock = threading.Lock()

    def write(self, **about: Any) -> None:
        """Add a line, with the time. Raises OSError."""
        now = datetime.now(UTC)
        line = json.dumps({"time": now.isoformat(timespec="milliseconds"), **about}) + "\n"
        path = self._directory / f"audit-{now.date().isoformat()}-{self._whose}.jsonl"
        with self._lock:
            new = not path.exists()
            handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(handle, line.encode())
                os.fsync(handle)
            finally:
                os.close(handle)
            if new:
                durable.sync(self._directory)
