"""Whether every part of the service answers: cheap to ask, however many ask, and it tells no more.

Serve itself makes each replica transcribe a probe, and ends one that cannot (`check_health`). What
is asked here is only whether there is a replica of each part that takes calls.
"""

from __future__ import annotations

import asyncio
import time
from asyncio import timeout
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from contextvars import Context

from ray.serve.exceptions import BackPressureError

FRESH_SECONDS = 1.0
"""How long an answer is given again."""
ANSWER_SECONDS = 5.0
"""How long the parts may take."""


class Readiness:
    """Asks the parts at most once at a time, and once in FRESH_SECONDS."""

    def __init__(self, parts: Callable[[], Iterable[Awaitable[None]]]) -> None:
        """`parts` calls each part; what it returns has to be awaited."""
        self._parts = parts
        self._asking: asyncio.Task[bool] | None = None
        self._answered, self._answer = -FRESH_SECONDS, False

    async def ready(self) -> bool:
        """Whether all of them answer, or did a moment ago."""
        if self._asking is None:
            if time.monotonic() - self._answered < FRESH_SECONDS:
                return self._answer
            # In a context of its own: Serve ends the calls of a caller that leaves.
            self._asking = asyncio.create_task(self._ask(), context=Context())
        return await asyncio.shield(self._asking)

    async def _ask(self) -> bool:
        try:
            async with timeout(ANSWER_SECONDS):
                self._answer = all(await asyncio.gather(*map(_answers, self._parts())))
        except (Exception, asyncio.CancelledError):  # whatever it is, the service is not ready
            self._answer = False
        finally:
            self._answered, self._asking = time.monotonic(), None
        return self._answer


async def _answers(call: Awaitable[None]) -> bool:
    with suppress(BackPressureError):  # as many calls wait as may: it is busy, and there
        await call
    return True
