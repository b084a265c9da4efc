"""Gauges that keep their value as long as their process lives.

Ray tells nothing more of a gauge that nobody has set for two of its reports (twenty seconds): what
is set once, as the version that is served, would be missing soon, and so would all that is idle.
"""

from __future__ import annotations

import threading
import time
from weakref import WeakSet

from ray.serve import metrics

AGAIN_SECONDS = 1.0
"""How often every gauge is set again to what it is; Ray reports no oftener."""
_gauges: WeakSet[Gauge] = WeakSet()
_lock = threading.Lock()
"""Held by whoever sets a gauge: a new value is not replaced by the one before."""
_thread: threading.Thread | None = None


class Gauge(metrics.Gauge):
    """As Serve's; it is set again until its process ends."""

    def __init__(
        self, name: str, description: str = "", tag_keys: tuple[str, ...] | None = None
    ) -> None:
        super().__init__(name, description, tag_keys)
        self._told: dict[frozenset[tuple[str, str]], float] = {}
        with _lock:
            _gauges.add(self)
            _begin()

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        """Set it, for these tags."""
        with _lock:
            self._told[frozenset((tags or {}).items())] = value
            super().set(value, dict(tags or {}))

    def again(self) -> None:
        """Set it to all that it was set to, for all tags."""
        for tags, value in self._told.items():
            super().set(value, dict(tags))


def _begin() -> None:
    """Start the thread that sets gauges again, where there is none."""
    global _thread
    if _thread is None:
        _thread = threading.Thread(target=_repeat, name="gauges", daemon=True)
        _thread.start()


def _repeat() -> None:
    while True:
        time.sleep(AGAIN_SECONDS)
        with _lock:
            for gauge in _gauges:
                gauge.again()
