"""Which pages may call the service from a browser: its own, and those of the origins in the
settings. A browser lets a page send a form anywhere without asking, so what changes something is
refused here, and not only hidden from the page.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response

from serve.errors import ApiError
from serve.settings import Cors

KEPT_SECONDS = 600
"""How long a browser need not ask again."""
METHODS = "GET, HEAD, POST, DELETE, OPTIONS"
SHOWN = (
    "X-Request-ID, Retry-After, OpenAI-Processing-Ms, "
    "X-RateLimit-Limit-Requests, X-RateLimit-Remaining-Requests, X-RateLimit-Reset-Requests, "
    "X-RateLimit-Limit-Audio-Seconds, X-RateLimit-Remaining-Audio-Seconds, "
    "X-RateLimit-Reset-Audio-Seconds"
)
"""Headers of an answer that a page of another origin may read."""


def require_allowed(headers: Headers, cors: Cors) -> None:
    """Raises ApiError (403) for a request of a page that may not call the service; programs name no
    origin."""
    origin = headers.get("origin")
    if origin is None or _listed(origin, cors) or _own(origin, headers):
        return
    message = f"pages of {origin[:100]} may not call this service: cors.origins names who may"
    raise ApiError(403, message, "origin_not_allowed")


def preflight(method: str, headers: Headers, cors: Cors) -> Response | None:
    """The answer to a browser that asks before it sends a page's request; None if it is not asking,
    or the page may not."""
    asks = method == "OPTIONS" and "access-control-request-method" in headers
    if not asks or not _listed(headers.get("origin", ""), cors):
        return None
    answer = Response(status_code=204)
    answer.headers["Access-Control-Allow-Methods"] = METHODS
    asked = headers.get("access-control-request-headers", "authorization, content-type")
    answer.headers["Access-Control-Allow-Headers"] = asked[:2000]
    answer.headers["Access-Control-Max-Age"] = str(KEPT_SECONDS)
    return answer


def mark(answer: MutableHeaders, headers: Headers, cors: Cors) -> None:
    """Let a page of another origin read an answer. Cookies and the like are never taken."""
    if not cors.origins:
        return
    answer.add_vary_header("Origin")
    origin = headers.get("origin")
    if origin is not None and _listed(origin, cors):
        answer["Access-Control-Allow-Origin"] = origin
        answer["Access-Control-Expose-Headers"] = SHOWN


def _listed(origin: str, cors: Cors) -> bool:
    return origin.lower() in cors.origins or ("*" in cors.origins and bool(origin))


def _own(origin: str, headers: Headers) -> bool:
    """Whether a page is this service's own, as the browser says or as its address does."""
    own = headers.get("host", "").lower()
    same = headers.get("sec-fetch-site") == "same-origin"
    return same or (bool(own) and urlsplit(origin).netloc.lower() == own)
