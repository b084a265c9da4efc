"""The body of a request while it comes in: its kind, its size and its pace; then a place for work.

A request takes one of the places for work when its body is complete; while it comes in, it takes
one of the places for uploads. So slow uploads shut nobody out.
"""

from __future__ import annotations

import asyncio
import time
from typing import Literal

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope

from serve.access.places import Places
from serve.errors import ApiError, RefusedBody
from serve.settings import Limits

TRANSCRIBE, TRANSLATE = "/v1/audio/transcriptions", "/v1/audio/translations"
FORM, JSON = "multipart/form-data", "application/json"
AUDIO = "/v1/audio/"
"""What comes to routes below it is a form."""
GRACE_SECONDS = 10.0
"""Time that every upload has before its pace counts."""
BUSY = "too many requests at a time: try again"
BUSY_UPLOADS = "too many uploads at a time: try again"
JSON_BYTES = 4_000_000
"""The largest body that is no upload: it is kept in memory while it comes in."""


class Body:
    """The body of a request: so many bytes and no further, in time, and then a place for work.

    Raises RefusedBody (413, 408, 429).
    """

    def __init__(
        self, receive: Receive, limits: Limits, receiving: Places, working: Places
    ) -> None:
        self._receive = receive
        self._limits = limits
        self._places = {"receiving": receiving, "working": working}
        self._tenant = ""
        self._largest = 0.0
        self._received = 0
        self._started = 0.0
        self._state: Literal["free", "receiving", "working"] = "free"

    def begin(self, tenant: str, largest: float) -> None:
        """Take a place for uploads; `largest` is the most bytes that may come."""
        self._tenant, self._largest, self._started = tenant, largest, time.monotonic()
        self._move("receiving")

    def end(self) -> None:
        """Leave whatever place it has."""
        self._move("free")

    async def __call__(self) -> Message:
        if self._state != "receiving":
            return await self._receive()
        message = await self._next()
        self._received += len(message.get("body", b""))
        if self._received > self._largest:
            raise RefusedBody(too_large(self._largest))
        if message["type"] == "http.request" and not message.get("more_body"):
            if not self._places["working"].has_room(self._tenant):
                raise RefusedBody(ApiError(429, BUSY, "busy"))
            self._move("working")
        return message

    def _move(self, state: Literal["free", "receiving", "working"]) -> None:
        """Exchange one place for another."""
        if self._state != "free":
            self._places[self._state].leave(self._tenant)
        if state != "free":
            self._places[state].take(self._tenant)
        self._state = state

    async def _next(self) -> Message:
        limits = self._limits
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


def largest(scope: Scope, limits: Limits) -> float:
    """Bytes that a body may have."""
    upload = limits.upload_mb * 1e6
    return min(upload, JSON_BYTES) if _kind(scope) == JSON else upload


def refusal(scope: Scope, limits: Limits) -> ApiError | None:
    """Why a body is not read at all, by what its headers say."""
    headers, most = Headers(scope=scope), largest(scope, limits)
    stated = headers.get("content-length", "0")
    if stated.isdigit() and int(stated) > most:
        return too_large(most)
    if stated == "0" and not {"content-type", "transfer-encoding"} & set(headers):
        return None  # there is none; a route that needs one says so
    kind = _kind(scope)
    known = (FORM,) if scope["path"].startswith(AUDIO) else (JSON, FORM)
    if kind not in known:
        return ApiError(415, f"send {' or '.join(known)}, not {kind or 'nothing'}")
    return None


def too_large(most: float) -> ApiError:
    """The answer to a body that is larger than it may be."""
    return ApiError(413, f"the upload is larger than {most / 1e6:g} MB", "too_large")


def _kind(scope: Scope) -> str:
    return Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
