"""The middleware around every route: API keys, admission, the size of a body.

Every answer gets security headers and is counted in the metrics.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ray.serve.metrics import Counter, Gauge, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ApiError, respond
from serve.settings import Limits

GUARDED = "/v1/"
"""Paths below it need a key, where there are any."""
TRANSCRIBE = "/v1/audio/transcriptions"
FORM, JSON = "multipart/form-data", "application/json"
POLICY = (
    "default-src 'self'; media-src 'self' blob:; worker-src 'self' blob:; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page's; that of the API's own pages (/docs) allows the inline script they consist of."""
DOCS_POLICY = POLICY.replace(
    "default-src 'self';",
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:;",
)


@dataclass
class AccessRules:
    """Who may send requests, how many at a time, and how large."""

    limits: Limits
    keys: Sequence[str]
    in_flight: int = 0
    """Requests that are being worked on."""
    draining: bool = False
    """Whether the service is about to stop: new requests are refused."""
    digests: list[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.digests = [_digest(key) for key in self.keys]

    def knows(self, authorization: str | None) -> bool:
        """Whether the header holds one of the keys; every key is compared, in constant time."""
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, digest) for digest in self.digests]
        return not self.digests or (scheme.lower() == "bearer" and any(matches))


class RequestMetrics:
    """Requests as Prometheus shows them."""

    def __init__(self) -> None:
        tags = ("path", "status")
        self.requests = Counter("mmrag_requests_total", "Requests by path and status.", tags)
        self.seconds = Histogram(
            "mmrag_request_seconds",
            "Time from a request's first byte to its answer's last, seconds.",
            boundaries=[0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 120],
            tag_keys=("path",),
        )
        self.in_flight = Gauge("mmrag_requests_in_flight", "Requests being worked on.")


class AdmissionMiddleware:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, access: AccessRules, metrics: RequestMetrics) -> None:
        self._app = app
        self._access = access
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        access, metrics = self._access, self._metrics
        started, status = time.perf_counter(), None

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _secure(message, scope["path"])
            await send(message)

        works = scope["method"] == "POST" and scope["path"].startswith(GUARDED)
        access.in_flight += works
        try:
            refusal = _refusal(scope, access, works)
            if refusal:
                await respond(refusal)(scope, receive, answer)
                return
            limited = _Limited(receive, access.limits)
            await self._app(scope, limited, answer)
        except Exception as error:  # here, so that its answer is like the others
            if status is not None:
                raise
            await respond(error)(scope, receive, answer)
        finally:
            access.in_flight -= works
            path = getattr(scope.get("route"), "path", "other")
            metrics.requests.inc(tags={"path": path, "status": str(status or 500)})
            metrics.seconds.observe(time.perf_counter() - started, tags={"path": path})
            metrics.in_flight.set(access.in_flight)


class _Limited:
    """The body of a request, up to the limit and not a byte further."""

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self._receive = receive
        self._mb = limits.upload_mb
        self._left = round(limits.upload_mb * 1e6)

    async def __call__(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:  # FastAPI lets an HTTPException through while it reads a form
            raise HTTPException(413, f"the upload is larger than {self._mb:g} MB")
        return message


def _refusal(scope: Scope, access: AccessRules, works: bool) -> ApiError | None:
    """Why a request is not let in."""
    headers = Headers(scope=scope)
    if not scope["path"].startswith(GUARDED):
        return None
    if not access.knows(headers.get("authorization")):
        message = "this needs a valid API key: Authorization: Bearer KEY"
        return ApiError(401, message, "invalid_api_key")
    if not works:
        return None
    if access.draining:
        return ApiError(503, "the service is stopping", "unavailable")
    if access.in_flight > access.limits.requests:
        return ApiError(429, "too many requests at a time: try again", "busy")
    stated = headers.get("content-length", "0")
    if stated.isdigit() and int(stated) > access.limits.upload_mb * 1e6:
        message = f"the upload is larger than {access.limits.upload_mb:g} MB"
        return ApiError(413, message, "too_large")
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    known = (FORM,) if scope["path"] == TRANSCRIBE else (JSON, FORM)
    if kind not in known:
        return ApiError(415, f"send {' or '.join(known)}, not {kind or 'nothing'}")
    return None


def _secure(message: Message, path: str) -> None:
    headers = MutableHeaders(scope=message)
    headers["X-Content-Type-Options"] = "nosniff"
    headers["Referrer-Policy"] = "no-referrer"
    headers["Content-Security-Policy"] = DOCS_POLICY if path in ("/docs", "/redoc") else POLICY


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
