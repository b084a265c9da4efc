"""The middleware around every route: API keys, admission, the size and the pace of a body.

A request takes one of the places for work when its body is complete; while it comes in, it takes
one of the places for uploads. So slow uploads shut nobody out. HEAD is answered like GET. Every
answer gets security headers and is counted in the metrics.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ray.serve.metrics import Counter, Gauge, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ApiError, RefusedBody, respond
from serve.settings import Limits

GUARDED = "/v1/"
"""Paths below it need a key, where there are any."""
TRANSCRIBE, TRANSLATE = "/v1/audio/transcriptions", "/v1/audio/translations"
FORM, JSON = "multipart/form-data", "application/json"
GRACE_SECONDS = 10.0
"""Time that every upload has before its pace counts."""
JSON_BYTES = 4_000_000
"""The largest body that is no upload: it is kept in memory while it comes in."""
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
    """Who may send requests, how many at a time, how large and how slowly."""

    limits: Limits
    keys: Sequence[str]
    receiving: int = 0
    """Requests whose body is still coming in."""
    working: int = 0
    """Requests that are being worked on."""
    draining: bool = False
    """Whether the service is about to stop: new requests are refused."""
    digests: list[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.digests = [_digest(key) for key in self.keys]

    @property
    def in_flight(self) -> int:
        """Requests that have begun and have not been answered."""
        return self.receiving + self.working

    @property
    def busy(self) -> ApiError | None:
        """Why no further request is worked on just now."""
        if self.working < self.limits.requests:
            return None
        return ApiError(429, "too many requests at a time: try again", "busy")

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
        self.receiving = Gauge("mmrag_requests_receiving", "Requests whose body is coming in.")


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

        if scope["method"] == "HEAD":  # the server sends no body, whatever it is given
            scope = {**scope, "method": "GET"}
        body = _Body(receive, access)
        try:
            refusal = _refusal(scope, access)
            if refusal:
                await respond(refusal)(scope, receive, answer)
                return
            if _works(scope):
                body.begin(_largest(scope, access.limits))
            await self._app(scope, body, answer)
        except Exception as error:  # here, so that its answer is like the others
            if status is not None:
                raise
            await respond(error)(scope, receive, answer)
        finally:
            body.end()
            path = getattr(scope.get("route"), "path", "other")
            metrics.requests.inc(tags={"path": path, "status": str(status or 500)})
            metrics.seconds.observe(time.perf_counter() - started, tags={"path": path})
            metrics.in_flight.set(access.working)
            metrics.receiving.set(access.receiving)


class _Body:
    """The body of a request: so many bytes and no further, in time, and then a place for work.

    Raises RefusedBody (413, 408, 429).
    """

    def __init__(self, receive: Receive, access: AccessRules) -> None:
        self._receive = receive
        self._access = access
        self._largest = 0.0
        self._received = 0
        self._started = 0.0
        self._state: Literal["free", "receiving", "working"] = "free"

    def begin(self, largest: float) -> None:
        """Take a place for uploads; `largest` is the most bytes that may come."""
        self._largest, self._started = largest, time.monotonic()
        self._access.receiving += 1
        self._state = "receiving"

    def end(self) -> None:
        """Leave whatever place it has."""
        self._access.receiving -= self._state == "receiving"
        self._access.working -= self._state == "working"
        self._state = "free"

    async def __call__(self) -> Message:
        if self._state != "receiving":
            return await self._receive()
        message = await self._next()
        self._received += len(message.get("body", b""))
        if self._received > self._largest:
            raise RefusedBody(_too_large(self._largest))
        if message["type"] == "http.request" and not message.get("more_body"):
            self._work()
        return message

    async def _next(self) -> Message:
        limits = self._access.limits
        pace = GRACE_SECONDS + self._received / limits.receive_bytes_per_second
        left = self._started + min(pace, limits.receive_seconds) - time.monotonic()
        try:
            async with asyncio.timeout(left):
                return await self._receive()
        except TimeoutError:
            if pace < limits.receive_seconds:
                slowest = limits.receive_bytes_per_second
                message = f"the upload came in at less than {slowest:g} bytes a second"
            else:
                message = f"the upload took longer than {limits.receive_seconds:g} s"
            raise RefusedBody(ApiError(408, message, "slow_upload")) from None

    def _work(self) -> None:
        """Exchange the place for uploads for one for work."""
        if busy := self._access.busy:
            raise RefusedBody(busy)
        self.end()
        self._access.working += 1
        self._state = "working"


def _works(scope: Scope) -> bool:
    """Whether a request has a body that is worked on."""
    return scope["method"] == "POST" and scope["path"].startswith(GUARDED)


def _kind(scope: Scope) -> str:
    return Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()


def _largest(scope: Scope, limits: Limits) -> float:
    """Bytes that a body may have."""
    upload = limits.upload_mb * 1e6
    return min(upload, JSON_BYTES) if _kind(scope) == JSON else upload


def _too_large(largest: float) -> ApiError:
    return ApiError(413, f"the upload is larger than {largest / 1e6:g} MB", "too_large")


def _refusal(scope: Scope, access: AccessRules) -> ApiError | None:
    """Why a request is not let in."""
    headers = Headers(scope=scope)
    if not scope["path"].startswith(GUARDED):
        return None
    if not access.knows(headers.get("authorization")):
        message = "this needs a valid API key: Authorization: Bearer KEY"
        return ApiError(401, message, "invalid_api_key")
    if not _works(scope):
        return None
    if access.draining:
        return ApiError(503, "the service is stopping", "unavailable")
    if access.busy:
        return access.busy
    if access.receiving >= access.limits.receiving:
        return ApiError(429, "too many uploads at a time: try again", "busy")
    stated, largest = headers.get("content-length", "0"), _largest(scope, access.limits)
    if stated.isdigit() and int(stated) > largest:
        return _too_large(largest)
    kind = _kind(scope)
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
