"""The ingress: the HTTP application, its page, its health and its metrics.

The outer of three layers: HTTP here and in the modules of the routes, a typed request in
`pipeline`, the engine in `decoder`.
"""

from __future__ import annotations

import asyncio
import time
from asyncio import timeout
from pathlib import Path
from typing import Any

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

from serve import errors, forms, middleware, schema
from serve.datastores import Datastores
from serve.keys import Keys
from serve.model import described
from serve.pipeline import Pipeline
from serve.quotas import Quotas
from serve.realtime.route import Realtime
from serve.settings import Settings, api_keys
from serve.transcriptions import Transcriptions

PAGE = Path(__file__).parent / "page"
READY_SECONDS = 5
LEAVING_SECONDS = 0.1


@serve.ingress()
class Api:
    """The deployment that HTTP reaches."""

    def __init__(
        self,
        settings: Settings,
        encoder: DeploymentHandle,
        retriever: DeploymentHandle,
        decoder: DeploymentHandle,
    ) -> None:
        self._settings = settings
        self._pipeline = Pipeline(settings, encoder, retriever, decoder)
        self._access = middleware.AccessRules(settings.limits, api_keys())
        self._model = described(settings)
        self._keys = Keys(settings.limits.tenant, settings.datastores)
        self._quotas = Quotas()
        self._realtime = Realtime(
            settings, self._pipeline, self._model.vocabulary, self._keys, self._quotas
        )
        self._started = int(time.time())

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application, as `serve.ingress` asks for it."""
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
        guarded.include_router(self._realtime.secrets())
        app.include_router(guarded)
        app.include_router(self._realtime.sockets())
        return app

    async def drain(self) -> None:
        """Let nobody new in, and return when everybody is out; after `drain_s` at the latest.

        The deployments behind would otherwise end while somebody still waits for them.
        """
        self._access.draining = True
        deadline = time.monotonic() + self._settings.ingress.drain_s
        await self._realtime.drain()
        while self._access.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(LEAVING_SECONDS)

    async def page(self) -> FileResponse:
        """The page for people."""
        return FileResponse(PAGE / "index.html")

    async def healthz(self) -> schema.Status:
        """Whether the ingress answers."""
        return schema.Status(status="ok")

    async def readyz(self) -> Any:
        """Whether every part of the service answers; 503 while one does not."""
        pipeline = self._pipeline
        parts = (pipeline.encoder, pipeline.retriever, pipeline.decoder)
        try:
            async with timeout(READY_SECONDS):
                for part in parts:
                    await part.check_health.remote()
        except Exception:  # whatever it is, the service is not ready
            return JSONResponse({"status": "starting"}, 503, {"Retry-After": "1"})
        return schema.Status(status="ok")

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
        reads = ["cross_attention", "both"] if self._model.adapted else []
        own, *aliases = self._settings.names
        return schema.Model(
            id=name or own,
            created=self._started,
            root=own,
            aliases=aliases,
            languages=list(self._settings.languages),
            retrieval=["none", "knn", *reads],
            fingerprints=self._model.fingerprints,
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
