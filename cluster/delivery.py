"""Messages to a store that may go away while a stage runs: kept, tried again, never in the way.

A day's training is worth more than its log. The first message that cannot be delivered is told to
the user, and the work goes on; what is kept goes out when the store answers again.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable

REST_SECONDS = 60.0
"""How long a store that did not answer is left alone."""


class Delivery:
    """Sends one run's messages. May be used by several threads; blocks for one attempt at most."""

    def __init__(self, store: str, passing: Callable[[Exception], bool]) -> None:
        """`store` is what messages call it; `passing` says if an error may be over at another try.

        A message that is refused for good is dropped, and the user told so.
        """
        self._store = store
        self._passing = passing
        self._kept: deque[Callable[[], object]] = deque()
        self._lock = threading.Lock()
        self._rested = 0.0
        """When the store may be asked again, by the monotonic clock."""
        self._told: set[str] = set()

    def send(self, message: Callable[[], object]) -> None:
        """Deliver `message`, a call that may raise, after those that are kept; or keep it."""
        with self._lock:
            self._kept.append(message)
            if time.monotonic() >= self._rested:
                self._deliver()

    def finish(self) -> None:
        """A last attempt; what is left is counted on standard error and forgotten."""
        with self._lock:
            self._deliver()
            if self._kept:
                warn(
                    f"{len(self._kept)} entries of this run's log could not be delivered to "
                    f"{self._store}; what the stage made is whole"
                )
                self._kept.clear()

    def _deliver(self) -> None:
        while self._kept:
            try:
                self._kept[0]()
            except Exception as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
                if self._passing(error):
                    self._tell(
                        "kept",
                        f"{self._store} does not take this run's log ({reason}); the work goes on, "
                        f"and the log is sent when it does",
                    )
                    self._rested = time.monotonic() + REST_SECONDS
                    return
                self._tell("dropped", f"{self._store} refused an entry of this run's log: {reason}")
            self._kept.popleft()
        self._told.discard("kept")

    def _tell(self, kind: str, message: str) -> None:
        """Once, or the same line would come with every metric."""
        if kind not in self._told:
            self._told.add(kind)
            warn(message)


def warn(message: str) -> None:
    """Say it where errors are said, at once."""
    print(f"warning: {message}", file=sys.stderr, flush=True)
