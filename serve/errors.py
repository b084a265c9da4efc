"""Every error of the API in OpenAI's shape; only this module, the middleware and the routes know
status codes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from mmrag.retrieval.segment import DatastoreError
from mmrag.speech.audio import AudioError
from serve.messages import (
    DatastoreExists,
    InvalidRequest,
    QuotaExceeded,
    Unavailable,
    UnknownDatastore,
)

RETRY_SECONDS = 1
QUOTA_SECONDS = 3600
"""Until asking again might make sense where something has to be deleted first."""
TYPES = {401: "authentication_error", 429: "rate_limit_error"}
log = logging.getLogger("ray.serve")


class ApiError(Exception):
    """An answer that is not a success."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`headers` go with it, over those that go with every answer of its status."""
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}


class RefusedBody(HTTPException):
    """An answer given while a body comes in: FastAPI lets an HTTPException through then."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.status, error.message)
        self.error = error


def body(error: ApiError) -> dict[str, Any]:
    """The JSON of an error."""
    kind = TYPES.get(error.status, "server_error" if error.status >= 500 else None)
    return {
        "error": {
            "message": error.message,
            "type": kind or "invalid_request_error",
            "param": error.param,
            "code": error.code,
        }
    }


def headers(error: ApiError) -> dict[str, str]:
    """The HTTP headers that go with it."""
    usual = {
        401: {"WWW-Authenticate": "Bearer"},
        408: {"Connection": "close"},
        429: {"Retry-After": str(RETRY_SECONDS)},
        503: {"Retry-After": str(RETRY_SECONDS)},
    }
    return usual.get(error.status, {}) | error.headers


def explained(error: Exception) -> ApiError:
    """An error as callers see it. One that nobody foresaw is logged and not shown."""
    match error:
        case ApiError():
            return error
        case AudioError():
            return ApiError(400, str(error), "unreadable_audio", "file")
        case UnknownDatastore():
            return ApiError(404, str(error.args[0]), "datastore_not_found", "datastore")
        case DatastoreExists():
            return ApiError(409, str(error), "datastore_exists", "name")
        case ClientDisconnect():
            return ApiError(400, "the upload broke off")
        case InvalidRequest():
            return ApiError(400, str(error), None, error.param)
        case QuotaExceeded():
            # Waiting does not help: OpenAI's clients are told not to try again.
            more = {"x-should-retry": "false", "Retry-After": str(QUOTA_SECONDS)}
            return ApiError(429, error.message, f"quota_{error.quota}", headers=more)
        case TimeoutError():
            return ApiError(504, "the request took too long", "timeout")
        case BackPressureError():
            return ApiError(429, "the service is busy: try again", "busy")
        case Unavailable():
            return ApiError(503, str(error), "unavailable")
        case RayError() | RayServeException():
            log.warning("a part of the service is gone: %s", type(error).__name__)
            return ApiError(503, "a part of the service does not answer: try again", "unavailable")
        case DatastoreError():
            log.error("%s", error)
            return ApiError(503, "the datastore cannot be used with this model", "unusable")
        case _:
            log.error("unforeseen", exc_info=error)
            return ApiError(500, "something went wrong here")


def respond(error: Exception) -> JSONResponse:
    """The response to an error."""
    shown = explained(error)
    return JSONResponse(body(shown), shown.status, headers(shown))


def install(app: FastAPI) -> None:
    """Let `app` answer every foreseen error like that; the middleware answers the others.

    OPTIONS is answered here too: it is the method that no route knows.
    """

    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        problem = error.errors()[0]
        place = [str(part) for part in problem["loc"] if part not in ("body", "query", "path")]
        param = ".".join(place) or None
        # Where a file should be and is none, FastAPI speaks of its own classes.
        reason = "send a file" if problem["type"] == "value_error" else problem["msg"]
        named = param or ("body" if "body" in problem["loc"] else None)
        message = f"{named}: {reason}" if named else reason
        return respond(ApiError(422, message, problem["type"], param))

    async def refused(request: Request, error: HTTPException) -> Response:
        if isinstance(error, RefusedBody):
            return respond(error.error)
        answer = respond(ApiError(error.status_code, str(error.detail)))
        answer.headers.update(error.headers or {})
        if error.status_code == 405:
            answer.headers["Allow"] = _allowed(request, answer.headers.get("Allow", "GET"))
            if request.method == "OPTIONS":
                return Response(status_code=204, headers={"Allow": answer.headers["Allow"]})
        return answer

    async def any_other(_: Request, error: Exception) -> JSONResponse:
        return respond(error)

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, refused)
    foreseen = (
        ApiError,
        AudioError,
        UnknownDatastore,
        DatastoreExists,
        InvalidRequest,
        QuotaExceeded,
        TimeoutError,
    )
    for kind in (*foreseen, BackPressureError, Unavailable, RayError, DatastoreError):
        app.add_exception_handler(kind, any_other)


def _allowed(request: Request, known: str) -> str:
    """The methods of a path. Its first route knows its own alone: the description has them all."""
    path = getattr(request.scope.get("route"), "path", None)
    described = request.app.openapi()["paths"].get(path, {})
    methods = [method.upper() for method in described] or re.split(r",\s*", known)
    more = ["HEAD"] if "GET" in methods else []
    return ", ".join(dict.fromkeys([*methods, *more, "OPTIONS"]))
