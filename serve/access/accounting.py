"""How a replica of the ingress and the ledger tell each other what they count, once a second."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol
from uuid import uuid4

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from cluster.shards import NAMESPACE
from serve.access.ledger import Ledger, LedgerActor
from serve.access.quotas import Quotas
from serve.access.usage import Others, Report, Used

SECONDS = 1.0
"""Between two reports."""
ANSWER_SECONDS = 5.0
IDLE_SECONDS = 60.0
"""After which a ledger ends that nobody reports to: the service is gone."""
USAGE = ".usage"
"""The directory below the datastores with a file of each tenant's usage."""
log = logging.getLogger("ray.serve")


class Book(Protocol):
    """A ledger, wherever it is."""

    async def report(self, replica: str, number: int, report: Report) -> Others: ...
    async def usage(self, tenant: str) -> dict[str, Used]: ...


class Accounting:
    """Keeps the quotas of one replica and the ledger together."""

    def __init__(self, quotas: Quotas, book: Book) -> None:
        self._quotas = quotas
        self._book = book
        self._replica = uuid4().hex
        self._number = 0
        self._unanswered: Report | None = None
        self._one_at_a_time = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._silent = False

    def begin(self) -> None:
        """Report from now on, if that has not begun; to be called where an event loop runs."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._report())

    async def end(self) -> None:
        """Report for the last time."""
        if self._task is not None:
            self._task.cancel()
        await self._try()

    async def usage(self, tenant: str) -> dict[str, Used]:
        """Day -> what a tenant used, what was used here until now included; the last day first."""
        await self.exchange()
        return await self._book.usage(tenant)

    async def exchange(self) -> None:
        """Report what is counted here. A report that nobody answered is made again as it was, so
        that nothing counts twice."""
        async with self._one_at_a_time:
            if self._unanswered is None:
                self._number += 1
                self._unanswered = self._quotas.report()
            report = self._unanswered
            others = await self._book.report(self._replica, self._number, report)
            self._unanswered = None
            self._quotas.told(report, others)

    async def _report(self) -> None:
        while True:
            await self._try()
            await asyncio.sleep(SECONDS)

    async def _try(self) -> None:
        """Report, or say once that nobody takes it."""
        try:
            await self.exchange()
            self._silent = False
        except (RayError, TimeoutError, OSError) as error:
            if not self._silent:
                log.warning("the ledger of quotas does not answer: %s", type(error).__name__)
            self._silent = True


def application() -> str | None:
    """The name of the application that this process is a replica of; None: it is none."""
    try:
        return serve.get_replica_context().app_name
    except RayServeException:
        return None


def book(datastores: Path) -> Book:
    """The ledger of this application: an actor, or where no replica runs, one in this process that
    writes nothing down."""
    name = application()
    if name is None:
        return _Here(Ledger(None))
    return _Elsewhere(f"mmrag-ledger-{name}", datastores / USAGE)


class _Here:
    """A ledger of this process."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def report(self, replica: str, number: int, report: Report) -> Others:
        return self._ledger.report(replica, number, report)

    async def usage(self, tenant: str) -> dict[str, Used]:
        return self._ledger.usage(tenant)


class _Elsewhere:
    """The ledger's actor, started by whoever asks first, and again where it ended."""

    def __init__(self, name: str, directory: Path) -> None:
        self._name, self._directory = name, directory
        self._actor: ray.actor.ActorHandle | None = None

    async def report(self, replica: str, number: int, report: Report) -> Others:
        return await self._asked(lambda actor: actor.report.remote(replica, number, report))

    async def usage(self, tenant: str) -> dict[str, Used]:
        return await self._asked(lambda actor: actor.usage.remote(tenant))

    async def _asked(self, ask: Callable[[ray.actor.ActorHandle], Awaitable[object]]) -> object:
        if self._actor is None:
            self._actor = await asyncio.to_thread(self._start)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await ask(self._actor)
        except RayError:
            self._actor = None  # looked for, or started, the next time
            raise

    def _start(self) -> ray.actor.ActorHandle:
        options = {
            "name": self._name,
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "get_if_exists": True,
            "num_cpus": 0,
            "max_restarts": -1,
        }
        actor = ray.remote(LedgerActor).options(**options)
        return actor.remote(self._directory, IDLE_SECONDS)
