"""Who is next where one thing can be done at a time, and some ask for more than others."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """A lock that is passed round among names, not among those that wait.

    However many wait under one name, somebody under another waits for one of them at most, and for
    one of each other name; under the same name, first come, first served.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = False
        self._waiting: OrderedDict[str, deque[threading.Event]] = OrderedDict()
        """By name, the one whose turn is next first."""

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Hold the lock in the block; not to be asked for again in there."""
        own = threading.Event()
        with self._lock:
            if self._taken:
                self._waiting.setdefault(name, deque()).append(own)
            else:
                self._taken = True
                own.set()
        own.wait()
        try:
            yield
        finally:
            self._pass_on()

    def waiting(self) -> dict[str, int]:
        """How many wait under each name, in the order of their turns."""
        with self._lock:
            return {name: len(queue) for name, queue in self._waiting.items()}

    def _pass_on(self) -> None:
        with self._lock:
            if not self._waiting:
                self._taken = False
                return
            name, queue = self._waiting.popitem(last=False)
            queue.popleft().set()
            if queue:
                self._waiting[name] = queue  # its next turn comes after everybody else's
