"""The ingress: the HTTP application, its page, its health and its metrics.

The outer of three layers: HTTP here and in the modules of the routes, a typed request in
`pipeline`, the engine in `decoder`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any
from weakref import WeakSet

import ray
import requests
from fastapi import APIRouter, Depends, FastAPI
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp

from serve import errors, forms, logs, schema
from serve.access import middleware
from serve.access.accounting import Accounting, application, book
from serve.access.audit import Audit
from serve.access.keys import Keys
from serve.access.quotas import Quotas
from serve.access.usage_route import UsageRoute
from serve.datastores import Datastores
from serve.model import described, version
from serve.operations.readiness import Readiness
from serve.operations.replacement import Served, of_version
from serve.operations.switching import Switch
from serve.pipeline import Pipeline
from serve.realtime.route import Realtime
from serve.settings import Settings
from serve.transcriptions import Transcriptions

PAGE = Path(__file__).parent / "page"
LEAVING_SECONDS = 0.1
FOLLOW_SECONDS = 1.0
"""How often an ingress asks which version of the model is served."""
log = logging.getLogger("ray.serve")


@serve.ingress()
class Api:
    """The deployment that HTTP reaches."""

    def __init__(
        self,
        settings: Settings,
        encoder: DeploymentHandle | None = None,
        retriever: DeploymentHandle | None = None,
        decoder: DeploymentHandle | None = None,
        models: DeploymentHandle | None = None,
    ) -> None:
        """The parts of one model, or `models`, which knows whose parts are served."""
        self._settings = settings
        self._models = models
        logs.install(settings.logs)
        self._access = _access_rules(settings)
        self._realtime: WeakSet[Realtime] = WeakSet()
        """Of every version that has sessions."""
        self._started = int(time.time())
        self._warm = False
        self._readiness = Readiness(self._alive)
        if models is None:
            self._pipeline = Pipeline(settings, encoder, retriever, decoder)
            self._model = described(settings)

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application, as `serve.ingress` asks for it."""
        if self._models is None:
            return self._application()
        self._replica = serve.get_replica_context().replica_id.unique_id
        self._served = await self._models.current.remote(self._replica)
        await self._take_up(self._served)
        self._switch = Switch(self._served.application, self._application())
        self._following = asyncio.create_task(self._follow())
        return self._switch

    async def check_health(self) -> None:
        """Transcribe a clip before anybody's: what is slow the first time is slow then."""
        if not self._warm:
            await self._pipeline.warm_up()
            self._warm = True

    async def _take_up(self, served: Served) -> None:
        """Have the parts of a version, and what is known of it."""
        settings = of_version(self._settings, served)
        known = await asyncio.to_thread(described, settings)
        parts = (
            serve.get_deployment_handle(part, served.application)
            for part in ("encoder", "retriever", "decoder")
        )
        pipeline = Pipeline(settings, *parts)
        await pipeline.warm_up()
        self._settings, self._pipeline, self._model, self._warm = settings, pipeline, known, True

    async def _follow(self) -> None:
        """Give requests to whatever version is served, for ever."""
        while True:
            await asyncio.sleep(FOLLOW_SECONDS)
            try:
                served = await self._models.current.remote(self._replica, self._switch.in_use)
                if served != self._served:
                    await self._take_up(served)
                    self._switch.to(served.application, self._application())
                    self._served = served
            except Exception as error:  # what is served stays, until the next time
                log.warning("%s stays for now: %s", self._served.model, error)

    def _application(self) -> FastAPI:
        """The routes, answered by the model that is served now."""
        app = FastAPIOffline(
            title="mmrag",
            version="1",
            description="Speech recognition that looks things up: OpenAI's transcription API, and "
            "datastores to look things up in.",
            redoc_url=None,
            responses={"default": {"model": schema.ErrorReply, "description": "An error"}},
            form_limits={"max_fields": self._settings.limits.phrases + forms.MORE_FIELDS},
        )
        app.add_middleware(
            middleware.AdmissionMiddleware, access=self._access, metrics=middleware.RequestMetrics()
        )
        errors.install(app)
        app.mount("/page", StaticFiles(directory=PAGE), name="page")
        app.get("/", include_in_schema=False)(self.page)
        app.get("/healthz")(self.healthz)
        app.get("/readyz", response_model=schema.Status)(self.readyz)
        app.get("/metrics", response_class=PlainTextResponse)(self.metrics)
        bearer = HTTPBearer(auto_error=False)
        guarded = APIRouter(dependencies=[Depends(bearer), Depends(forms.query_parameters)])
        guarded.get("/v1/models")(self.models)
        guarded.get("/v1/models/{model:path}")(self.model)
        vocabulary = self._model.vocabulary
        for part in (Transcriptions, Datastores):
            guarded.include_router(part(self._settings, self._pipeline, vocabulary).router())
        guarded.include_router(UsageRoute(self._pipeline, self._access.accounting).router())
        keys, quotas = self._access.keys, self._access.quotas
        realtime = Realtime(self._settings, self._pipeline, vocabulary, keys, quotas)
        self._realtime.add(realtime)
        guarded.include_router(realtime.secrets())
        app.include_router(guarded)
        app.include_router(realtime.sockets())
        return app

    async def drain(self) -> None:
        """Let nobody new in, and return when everybody is out; after `drain_s` at the latest.

        The deployments behind would otherwise end while somebody still waits for them.
        """
        self._access.draining = True
        deadline = time.monotonic() + self._settings.ingress.drain_s
        await asyncio.gather(*(one.drain() for one in self._realtime))
        while self._access.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(LEAVING_SECONDS)
        await self._access.accounting.end()

    async def page(self) -> FileResponse:
        """The page for people."""
        return FileResponse(PAGE / "index.html")

    async def healthz(self) -> schema.Status:
        """Whether the ingress answers."""
        return schema.Status(status="ok")

    async def readyz(self) -> Any:
        """Whether every part of the service answers; 503 while one does not."""
        if self._access.draining or not await self._readiness.ready():
            status = "stopping" if self._access.draining else "starting"
            told = schema.Status(status=status).model_dump()
            return JSONResponse(told, 503, {"Retry-After": "1"})
        return schema.Status(status="ok")

    def _alive(self) -> list[Awaitable[None]]:
        """Calls to every part."""
        pipeline = self._pipeline
        parts = (pipeline.encoder, pipeline.retriever, pipeline.decoder)
        return [part.alive.remote() for part in parts]

    async def metrics(self) -> PlainTextResponse:
        """The service's metrics on every machine, as Prometheus reads them."""
        return PlainTextResponse(await run_in_threadpool(_metrics))

    async def models(self) -> schema.Models:
        """The model that is served."""
        return schema.Models(data=[self._described()])

    async def model(self, model: str) -> schema.Model:
        """The model, by its id or an alias."""
        forms.check_model(model, self._settings)
        return self._described(model)

    def _described(self, name: str | None = None) -> schema.Model:
        spots = ["spotting"] if self._model.spells else []
        reads = ["cross_attention", "both"] if self._model.adapted else []
        own, *aliases = self._settings.names
        return schema.Model(
            id=name or own,
            version=version(self._settings),
            created=self._started,
            root=own,
            aliases=aliases,
            languages=list(self._settings.languages),
            retrieval=["none", *spots, "knn", *reads],
            fingerprints=self._model.fingerprints,
        )


def _access_rules(settings: Settings) -> middleware.AccessRules:
    """Who may send what, as the settings and the keys say. Raises ConfigError, or OSError where no
    audit log can be written."""
    quotas = Quotas()
    return middleware.AccessRules(
        settings.limits,
        Keys(settings.limits.tenant, settings.datastores),
        quotas,
        cors=settings.cors,
        audit=settings.logs.audit and Audit(settings.logs.audit),
        numbered=application() is not None,
        accounting=Accounting(quotas, book(settings.datastores)),
    )


def _metrics() -> str:
    """What every machine's metrics agent says of this service."""
    found = []
    for node in ray.nodes():
        if node["Alive"]:
            address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            text = requests.get(address, timeout=5).text
            found += [line for line in text.splitlines() if "ray_mmrag_" in line]
    # A metric's help may come from several machines, and may be given once.
    comments = dict.fromkeys(line for line in found if line.startswith("#"))
    return "\n".join([*comments, *(line for line in found if line not in comments), ""])
