"""Actors that end themselves once nobody has asked them anything for long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

import ray


def asked(method: Callable) -> Callable:
    """A method that counts as a call: an idle actor ends itself, but never amid one."""

    @wraps(method)
    def call(self: Any, *arguments: Any) -> Any:
        with self._counting:
            self._calls += 1
        try:
            return method(self, *arguments)
        finally:
            with self._counting:
                self._calls -= 1
                self._last_asked = time.monotonic()

    return call


class Idling:
    """An actor that ends itself for good where nobody asks it anything for long."""

    def _end_when_idle(self, seconds: float | None) -> None:
        """Begin to wait for that; None to live on."""
        self._counting = threading.Lock()
        self._calls = 0
        self._last_asked = time.monotonic()
        if seconds is not None:
            threading.Thread(target=self._wait, args=(seconds,), daemon=True).start()

    def _wait(self, seconds: float) -> None:
        while True:
            with self._counting:
                left = self._last_asked + seconds - time.monotonic()
                if self._calls:
                    left = seconds
                if left <= 0:
                    ray.kill(ray.get_runtime_context().current_actor, no_restart=True)
                    return
            time.sleep(left)
