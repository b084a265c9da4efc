"""One ASGI application in the place of several, of which the newest gets what comes."""

from __future__ import annotations

from collections import Counter

from starlette.types import ASGIApp, Receive, Scope, Send


class Switch:
    """ASGI: a request, or a WebSocket, stays to its end with the application that it began with."""

    def __init__(self, name: str, app: ASGIApp) -> None:
        self._name, self._app = name, app
        self._users: Counter[str] = Counter()

    def to(self, name: str, app: ASGIApp) -> None:
        """Let `app` have whatever comes from now on."""
        self._name, self._app = name, app

    @property
    def in_use(self) -> frozenset[str]:
        """Names of the applications that have somebody to answer, and of the newest."""
        return frozenset(name for name, users in self._users.items() if users) | {self._name}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name, app = self._name, self._app
        if scope["type"] == "lifespan":  # of the process, not of a caller
            await app(scope, receive, send)
            return
        self._users[name] += 1
        try:
            await app(scope, receive, send)
        finally:
            self._users[name] -= 1
