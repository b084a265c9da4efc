"""Going over from one version of a registered model to the next, while callers are served.

Each version has deployments of its own (encoder, retriever, decoder) in an application of its own,
without a route: units of one codebook never meet another's language model. The ingress gives each
request to the version that is served when it comes, and the request stays with it to its end. When
the alias is moved, the new version's application starts beside the old one's, which takes room for
both; once every part of it has transcribed its probe, the ingress goes over, and the old one ends
when no ingress has a request with it any more. A version that does not start leaves the old one
serving: the log says why, `/metrics` and `/v1/models` what is served.

Ray Serve's own rolling update would not do: it replaces one replica of each deployment after the
other, so that a request's encoder and decoder may be of different versions.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.serve.api import RunTarget
from ray.serve.metrics import Counter
from ray.serve.schema import ApplicationStatus

from serve.gauges import Gauge
from serve.model import described, pinned, version
from serve.operations.deployments import parts
from serve.settings import Settings

START_SECONDS = 900.0
"""How long the deployments of a version may take to get ready."""
POLL_SECONDS = 0.5
SILENT_SECONDS = 30.0
"""An ingress that has not asked for so long is gone."""
LONGEST_PAUSE_SECONDS = 3600.0
"""Before a version that did not start is tried again; the first time after `model_check_s`."""
QUIET = {"log_level": "WARNING", "enable_access_log": False}
log = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Served:
    """A version that is served."""

    application: str
    """Whose deployments are its parts."""
    model: str
    """`models:/NAME/VERSION`."""


class StartError(RuntimeError):
    """A version's deployments do not get ready; the message says why."""


class Models:
    """The deployment, of one replica, that starts and ends the applications of the versions."""

    async def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._app = serve.get_replica_context().app_name
        self._users: dict[str, tuple[float, frozenset[str]]] = {}
        """Ingress -> when it asked last, and the applications that it has requests with."""
        self._given_up: dict[Served, tuple[float, float]] = {}
        """What did not start -> when it is tried again, and the pause before the time after."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._replaced = Counter(
            "mmrag_model_replacements_total", "Versions gone over to, or refused.", ("outcome",)
        )
        self._shown = Gauge("mmrag_model_version", "1 for the version that is served.", ("model",))
        self._refused = Gauge(
            "mmrag_model_refused", "1 while the alias means a version that does not start."
        )
        self._refused.set(0)
        self._served = await self._first()
        self._shown.set(1, tags={"model": self._served.model})
        self._spawn(self._watch())

    async def __del__(self) -> None:
        """Ends the versions with the service, and leaves them to the replica that comes after this
        one where the service goes on."""
        for task in self._tasks:
            task.cancel()
        own = (await asyncio.to_thread(_applications)).get(self._app)
        if own in (None, ApplicationStatus.DELETING):
            for name in await self._running():
                await asyncio.to_thread(serve.delete, name, _blocking=False)

    async def current(self, ingress: str, in_use: frozenset[str] = frozenset()) -> Served:
        """What is served; an ingress says which applications it has requests with."""
        self._users[ingress] = time.monotonic(), in_use
        return self._served

    async def alive(self) -> None:
        """Returns: it is there."""

    async def _first(self) -> Served:
        """What is served at the start: what runs already, where this replica's forerunner died."""
        running = await self._running()
        try:
            wanted = await self._wanted()
        except (ConnectionError, ValueError):
            if not running:
                raise
            wanted = next(iter(running.values()))
        if wanted.application not in running and running:
            wanted = next(iter(running.values()))  # the watch goes over to the other
        if wanted.application not in running:
            await self._start(wanted)
        for name in running:
            if name != wanted.application:
                self._spawn(self._end(name))
        return wanted

    async def _watch(self) -> None:
        """Go over to whatever the alias means, for ever."""
        while True:
            await asyncio.sleep(self._settings.model_check_s)
            try:
                wanted = await self._wanted()
            except Exception as error:  # whatever it is: the watch does not end
                log.warning("the registry is asked again later: %s", error)
                continue
            if wanted == self._served:
                self._given_up.clear()
                self._refused.set(0)
                continue
            again, pause = self._given_up.get(wanted, (0.0, self._settings.model_check_s))
            if time.monotonic() >= again:
                await self._go_over(wanted, pause)

    async def _go_over(self, wanted: Served, pause: float) -> None:
        """Serve another version, or say why not and go on with this one."""
        before = self._served
        log.warning("going over from %s to %s", before.model, wanted.model)
        try:
            await self._start(wanted)
        except Exception as error:  # whatever is wrong with it, the other one serves
            log.error("%s stays: %s cannot be served: %s", before.model, wanted.model, error)
            with suppress(Exception):
                await asyncio.to_thread(serve.delete, wanted.application)
            self._replaced.inc(tags={"outcome": "refused"})
            self._refused.set(1)
            longer = min(2 * pause, LONGEST_PAUSE_SECONDS)
            self._given_up[wanted] = time.monotonic() + pause, longer
            return
        self._served = wanted
        self._given_up.clear()
        self._refused.set(0)
        self._replaced.inc(tags={"outcome": "replaced"})
        self._shown.set(0, tags={"model": before.model})
        self._shown.set(1, tags={"model": wanted.model})
        log.warning("%s is served", wanted.model)
        self._spawn(self._end(before.application))

    async def _start(self, wanted: Served) -> None:
        """Start the parts of a version, and return when each has transcribed its probe.

        Raises StartError, or ValueError, ArtifactError or OSError for a model that is not whole.
        """
        settings = self._of(wanted)
        await asyncio.to_thread(described, settings)
        await asyncio.to_thread(_run, settings, wanted.application)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            found = (await asyncio.to_thread(serve.status)).applications.get(wanted.application)
            if found is not None and found.status == ApplicationStatus.RUNNING:
                return
            if found is not None and found.status == ApplicationStatus.DEPLOY_FAILED:
                raise StartError(reason(found))
            await asyncio.sleep(POLL_SECONDS)
        raise StartError(f"not ready after {START_SECONDS:g} s: is there room for a second one?")

    async def _end(self, application: str) -> None:
        """End a version's application once no ingress has a request with it; at the latest when a
        request would be given up anyway."""
        started = time.monotonic()
        while time.monotonic() - started < self._settings.ingress.drain_s:
            await asyncio.sleep(POLL_SECONDS)
            now = time.monotonic()
            there = [one for one in self._users.values() if now - one[0] < SILENT_SECONDS]
            if there and all(at > started and application not in used for at, used in there):
                break
        log.warning("%s ends", application)
        await asyncio.to_thread(serve.delete, application)

    async def _wanted(self) -> Served:
        """What the alias means now."""
        model = (await asyncio.to_thread(pinned, self._settings)).model
        return Served(self._name(model), model)

    async def _running(self) -> dict[str, Served]:
        """The versions whose applications run, by application."""
        found = {}
        name = self._settings.model.partition("@")[0]
        for application, status in (await asyncio.to_thread(_applications)).items():
            match = re.fullmatch(rf"{re.escape(self._app)}-v(\d+)-[0-9a-f]{{8}}", application)
            if match and status == ApplicationStatus.RUNNING:
                found[application] = Served(application, f"{name}/{match[1]}")
        return found

    def _name(self, model: str) -> str:
        """An application of this version with these settings: others are another's."""
        settings = self._settings.model_copy(update={"model": model})
        digest = hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:8]
        return f"{self._app}-v{version(settings)}-{digest}"

    def _of(self, wanted: Served) -> Settings:
        return of_version(self._settings, wanted)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def of_version(settings: Settings, served: Served) -> Settings:
    """The settings with which a version is served."""
    return settings.model_copy(update={"model": served.model, "model_check_s": 0})


def reason(found: Any) -> str:
    """Why an application failed: the last line of what its deployments say."""
    said = [one.message for one in found.deployments.values() if one.message] or [found.message]
    lines = [line.strip() for line in said[0].splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"


def _run(settings: Settings, application: str) -> None:
    """Begin to start the parts; nobody waits for them here. The retriever, which has handles of the
    two others, is what Serve calls the application's ingress: it has no route."""
    _, retriever, _ = parts(settings)
    target = RunTarget(retriever, name=application, route_prefix=None, logging_config=QUIET)
    serve.run_many(
        [target],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )


def _applications() -> Mapping[str, ApplicationStatus]:
    return {name: one.status for name, one in serve.status().applications.items()}
