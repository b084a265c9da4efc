"""The headers by which a browser keeps the page, and what it is told, to themselves."""

from __future__ import annotations

import re

from starlette.datastructures import MutableHeaders

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
PERMISSIONS = (
    "microphone=(self), camera=(), geolocation=(), payment=(), usb=(), serial=(), bluetooth=(), "
    "display-capture=()"
)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Permissions-Policy": PERMISSIONS,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
HOST = re.compile(r"[a-z0-9.-]+(:\d+)?|\[[0-9a-f:]+\](:\d+)?", re.IGNORECASE)


def secure(headers: MutableHeaders, method: str, path: str, host: str) -> None:
    """Complete the headers of an answer to a request; `host` is where it says that it was sent."""
    headers.update(HEADERS)
    policy = DOCS_POLICY if path in ("/docs", "/redoc") else POLICY
    # Not every browser counts a WebSocket to the page's own address as 'self'.
    sockets = f" ws://{host} wss://{host}" if HOST.fullmatch(host) else ""
    headers["Content-Security-Policy"] = f"{policy}; connect-src 'self'{sockets}"
    if method == "GET" and path.startswith("/v1/"):  # nobody keeps an answer to anything else
        headers["Cache-Control"] = "no-store"
