"""The id of each request: the caller's, if it is one, else made here. It is in the answer and in
every line that the service logs about the request, in whatever process (Ray Serve carries it).
"""

from __future__ import annotations

import re
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

HEADER = "x-request-id"
SANE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


def request_id(headers: Headers) -> str:
    """The id of a request, or a new one."""
    given = headers.get(HEADER, "")
    return given if SANE.fullmatch(given) else uuid4().hex


class RequestIds:
    """ASGI middleware around Ray Serve's own, which takes whatever stands there for the id: sees to
    it that something sane does."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            headers = MutableHeaders(raw=list(scope["headers"]))
            one = request_id(headers)
            del headers[HEADER]
            headers[HEADER] = one
            scope = {**scope, "headers": headers.raw}
        await self._app(scope, receive, send)


def outermost() -> list[Middleware]:
    """What Ray Serve puts around its own (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH)."""
    return [Middleware(RequestIds)]
