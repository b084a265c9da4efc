"""The HTTP application without Ray and without models: a test says what each deployment answers."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import uvicorn
from starlette.testclient import TestClient

from mmrag.records import Units
from serve.api import Api
from serve.messages import DecodeResult, EncodedSegment
from serve.settings import read

TRANSCRIBE = "/v1/audio/transcriptions"
UNITS = Units(ids=np.arange(3), durations=np.ones(3, int))
HEARD = EncodedSegment(UNITS, np.ones(3, bool), start=0.0)


class Handle:
    """A deployment of which a test says what each method does."""

    def __init__(self, **methods: Callable) -> None:
        self._methods = methods

    def options(self, **_: Any) -> "Handle":
        return self

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=self._methods[name])


async def encode(wave):
    return HEARD


async def transcribe(order):
    return DecodeResult(
        text="a word",
        words=(),
        tokens=(1, 2),
        ends=(),
        mean_logp=0.0,
        stopped=True,
        confidence=None,
        unclear=False,
        logps=(-0.1, -0.2),
        heard=3,
    )


async def stream(order):
    yield "a "
    yield "word"
    yield await transcribe(order)


async def describe():
    return None, frozenset({"knn"})


async def stored(tenant):
    return []


def made(decoder=None, retriever=None, encoder=None, settings=None, cors=None, logs=None, **limits):
    """The application with these parts and limits, and these other settings."""
    more = {"cors": cors or {}, "logs": logs or {}, **(settings or {})}
    settings = read({"limits": {"upload_mb": 0.1, **limits}, **more})
    api = Api.__wrapped__(
        settings,
        encoder or Handle(encode=encode),
        retriever or Handle(stored=stored),
        decoder or Handle(transcribe=transcribe, stream=stream, describe=describe),
    )
    return asyncio.run(api.__serve_build_asgi_app__())


@contextmanager
def served(app) -> Iterator[str]:
    """The application behind a real server of this process."""
    config = uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


def client(app) -> TestClient:
    return TestClient(app, raise_server_exceptions=False)
