"""The middleware around every route: who a caller is and what he may do, how much at a time, and
what every answer carries.

HEAD is answered like GET. Every answer gets security headers, a request id, and is counted in the
metrics, which know of no tenant: anybody may read them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import Any

from ray.serve.metrics import Counter, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.access import bodies, origins, roles
from serve.access.accounting import Accounting
from serve.access.audit import Audit
from serve.access.bodies import FORM, JSON, TRANSCRIBE, Body
from serve.access.keys import Caller, Keys
from serve.access.places import Places
from serve.access.quotas import Quotas
from serve.access.request_ids import HEADER, request_id
from serve.access.security import secure
from serve.errors import ApiError, respond
from serve.gauges import Gauge
from serve.settings import Cors, Limits

__all__ = ["FORM", "JSON", "TRANSCRIBE", "AccessRules", "AdmissionMiddleware", "RequestMetrics"]

GUARDED = "/v1/"
"""Paths below it need a key, where there are any."""
SECRETS = "/v1/realtime/client_secrets"
"""Where keys are made that expire: that is written down too."""
KEY_PROTOCOL = "openai-insecure-api-key."
"""How a browser, which sends no headers with a WebSocket, sends the key: among subprotocols."""
PROTOCOL = "realtime"
"""The subprotocol that is chosen where it is offered."""
POLICY_VIOLATION = 4000
"""Added to a status where a server can only close a WebSocket that it refuses: 4401."""
log = logging.getLogger("ray.serve")


@dataclass
class AccessRules:
    """Who may send requests, how many at a time, how large and how slowly."""

    limits: Limits
    keys: Keys
    quotas: Quotas = field(default_factory=Quotas)
    cors: Cors = field(default_factory=Cors)
    audit: Audit | None = None
    draining: bool = False
    """Whether the service is about to stop: new requests are refused."""
    numbered: bool = False
    """Whether somebody outside writes the request's id into its answer."""
    accounting: Accounting | None = None
    """Whom the other replicas hear of what is counted here."""
    receiving: Places = field(init=False)
    """Requests whose body is still coming in."""
    working: Places = field(init=False)
    """Requests that are being worked on."""

    def __post_init__(self) -> None:
        self.receiving = Places(self.limits.receiving, lambda: self.keys.tenants)
        self.working = Places(self.limits.requests, lambda: self.keys.tenants)

    @property
    def in_flight(self) -> int:
        """Requests that have begun and have not been answered."""
        return self.receiving.taken + self.working.taken

    def known(self, scope: Scope) -> Caller:
        """Who sends a request. Raises ApiError (401)."""
        if self.accounting is not None:
            self.accounting.begin()
        caller = self.keys.caller(_key(scope))
        if caller is None:
            message = "this needs a valid API key: Authorization: Bearer KEY"
            raise ApiError(401, message, "invalid_api_key")
        return caller

    def require(self, scope: Scope, caller: Caller) -> None:
        """Raises ApiError (403, 413, 415, 429, 503) where a caller may not send a request."""
        socket = scope["type"] == "websocket"
        method = "GET" if socket else scope["method"]
        if socket or method not in ("GET", "OPTIONS"):
            origins.require_allowed(Headers(scope=scope), self.cors)
        caller.require(roles.needed(method, scope["path"]))
        if (socket or method == "POST") and self.draining:
            raise ApiError(503, "the service is stopping", "unavailable")
        if method == "POST":
            self._require_room(scope, caller)

    def _require_room(self, scope: Scope, caller: Caller) -> None:
        """Raises ApiError where a body would come in for nothing."""
        if not self.working.has_room(caller.tenant.name):
            raise ApiError(429, bodies.BUSY, "busy")
        if not self.receiving.has_room(caller.tenant.name):
            raise ApiError(429, bodies.BUSY_UPLOADS, "busy")
        if refusal := bodies.refusal(scope, self.limits):
            raise refusal


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
        if scope["type"] == "http":
            await self._answer(_Request(scope, self._access, send), receive)
        elif scope["type"] == "websocket":
            await self._connect(_Request(scope, self._access, send), receive)
        else:
            await self._app(scope, receive, send)

    async def _answer(self, request: _Request, receive: Receive) -> None:
        """An HTTP request."""
        access, metrics, scope = self._access, self._metrics, request.scope
        body = Body(receive, access.limits, access.receiving, access.working)
        try:
            asked = origins.preflight(scope["method"], request.headers, access.cors)
            if asked is not None:
                await asked(scope, receive, request.send)
            elif not request.guarded:
                await self._app(scope, body, request.send)
            else:
                caller = request.admitted()
                with access.quotas.request(caller):
                    if scope["method"] == "POST":
                        body.begin(caller.tenant.name, bodies.largest(scope, access.limits))
                    await self._app(scope, body, request.send)
        except Exception as error:  # here, so that its answer is like the others
            if request.status is not None:
                raise
            await respond(error)(scope, receive, request.send)
        finally:
            body.end()
            path = getattr(scope.get("route"), "path", "other")
            metrics.requests.inc(tags={"path": path, "status": str(request.status or 500)})
            metrics.seconds.observe(time.perf_counter() - request.started, tags={"path": path})
            metrics.in_flight.set(access.working.taken)
            metrics.receiving.set(access.receiving.taken)

    async def _connect(self, request: _Request, receive: Receive) -> None:
        """A WebSocket, which lives as long as its session."""
        scope = request.scope
        try:
            request.admitted()
            await self._app(scope, receive, request.send)
        except ApiError as error:  # the route's own too: it counts its sessions
            if request.status is not None:
                raise
            await receive()  # websocket.connect
            if "websocket.http.response" in scope.get("extensions", {}):
                await respond(error)(scope, receive, request.send)
            else:
                code = POLICY_VIOLATION + error.status
                reason = error.message[:120]
                await request.send({"type": "websocket.close", "code": code, "reason": reason})


class _Request:
    """A request on its way in, and its answer on the way out."""

    def __init__(self, scope: Scope, access: AccessRules, send: Send) -> None:
        self.started = time.perf_counter()
        self.headers = Headers(scope=scope)
        self.status: int | None = None
        self._access, self._send = access, send
        self._id = request_id(self.headers)
        self._caller: Caller | None = None
        self._changes: dict[str, Any] = {}
        self._offered = scope.get("subprotocols", ())
        state = scope.get("state", {}) | {"request_id": self._id, "audit": self._changes}
        self.scope = {**scope, "state": state}
        if scope.get("method") == "HEAD":  # the server sends no body, whatever it is given
            self.scope["method"] = "GET"

    @property
    def guarded(self) -> bool:
        """Whether it is for somebody with a key."""
        return self.scope["path"].startswith(GUARDED)

    def admitted(self) -> Caller:
        """The caller, whom routes find in the request's state. Raises ApiError."""
        self._caller = self._access.known(self.scope)
        self._access.require(self.scope, self._caller)
        self.scope["state"] |= {"caller": self._caller, "quotas": self._access.quotas}
        if "subprotocols" in self.scope:
            kept = [one for one in self._offered if not one.startswith(KEY_PROTOCOL)]
            self.scope["subprotocols"] = kept
        return self._caller

    async def send(self, message: Message) -> None:
        """Send a part of the answer; the first one is completed."""
        kind = message["type"]
        if kind in ("http.response.start", "websocket.http.response.start"):
            self.status = message["status"]
            self._complete(MutableHeaders(scope=message))
            await self._audited()
        elif kind == "websocket.accept":
            self.status = 101
            self._accept(message)
        elif kind == "websocket.close":
            self.status = self.status or 403
        await self._send(message)

    def _complete(self, headers: MutableHeaders) -> None:
        asked = self.scope.get("method", "GET"), self.scope["path"]
        secure(headers, *asked, self.headers.get("host", ""))
        origins.mark(headers, self.headers, self._access.cors)
        if not self._access.numbered:
            headers[HEADER] = self._id
        if self.guarded:
            passed = (time.perf_counter() - self.started) * 1000
            headers["openai-processing-ms"] = str(round(passed))
        if self._caller is not None:
            headers.update(self._access.quotas.headers(self._caller))

    def _accept(self, message: Message) -> None:
        if message.get("subprotocol") is None and PROTOCOL in self._offered:
            message["subprotocol"] = PROTOCOL
        message.setdefault("headers", [])
        headers = MutableHeaders(scope=message)
        headers[HEADER] = self._id

    async def _audited(self) -> None:
        """Write down what was changed before anybody is told that it was."""
        audit, caller, method = self._access.audit, self._caller, self.scope.get("method", "GET")
        if audit is None or caller is None or method in ("GET", "OPTIONS"):
            return
        path = self.scope["path"]
        if roles.needed(method, path) == "transcribe" and path != SECRETS:
            return
        who = {"request_id": self._id, "tenant": caller.tenant.name, "key": caller.key}
        what = {"method": method, "path": path[:300], "status": self.status, **self._changes}
        try:
            await asyncio.to_thread(audit.write, **who, **what)
        except OSError as error:  # what was changed stays so
            log.error("the audit log cannot be written: %s", error)


def _key(scope: Scope) -> str | None:
    """The key that comes with a request, if any."""
    scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    offered = [one for one in scope.get("subprotocols", ()) if one.startswith(KEY_PROTOCOL)]
    return offered[0].removeprefix(KEY_PROTOCOL) if offered else None
