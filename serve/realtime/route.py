"""WS /v1/realtime, and POST /v1/realtime/client_secrets for browsers that open one.

A connection is a session. Whatever a client does, what is kept for it is bounded: the audio that
waits (`session`), the events that it does not read, and the time that it may last or be silent.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from asyncio import QueueEmpty, QueueFull
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, WebSocket
from starlette.websockets import WebSocketDisconnect, WebSocketState

from mmrag.model.vocabulary import Vocabulary
from serve import errors, schema
from serve.access.keys import Caller, Keys
from serve.access.places import Places
from serve.access.quotas import Quotas
from serve.answers import token_logprobs
from serve.errors import ApiError
from serve.messages import DecodeResult
from serve.pipeline import Pipeline
from serve.realtime import events
from serve.realtime.events import Refused, Session
from serve.realtime.load import Load
from serve.realtime.options import options
from serve.realtime.session import Over, RealtimeSession
from serve.settings import Settings

log = logging.getLogger("ray.serve")
PATH, SECRETS = "/v1/realtime", "/v1/realtime/client_secrets"
SUBPROTOCOL = "realtime"
UNREAD = 2000
"""Events that a client may leave unread."""
LOOK_SECONDS = 0.25
"""How often a session's time is looked at."""
LEAVING_SECONDS = 10.0
"""How long the last turns may take when a session is ended."""
NORMAL, GOING_AWAY, POLICY, FAULT = 1000, 1001, 1008, 1011
"""Codes of WebSocket's closing."""
PARAMETERS = ("intent", "model")


class Realtime:
    """The routes, and the sessions that are open."""

    def __init__(
        self,
        settings: Settings,
        pipeline: Pipeline,
        vocabulary: Vocabulary,
        keys: Keys,
        quotas: Quotas,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock` tells the seconds by which a session's time is over."""
        self._clock = clock
        self._settings, self._pipeline, self._vocabulary = settings, pipeline, vocabulary
        self._keys, self._quotas = keys, quotas
        self._load = Load()
        self._open: set[_Connection] = set()
        self._places = Places(settings.limits.sessions, lambda: keys.tenants)
        self._draining = False

    def secrets(self) -> APIRouter:
        """The route over HTTP."""
        router = APIRouter()
        router.post(SECRETS, response_model=schema.ClientSecret)(self.client_secrets)
        return router

    def sockets(self) -> APIRouter:
        """The route over a WebSocket."""
        router = APIRouter()
        router.websocket(PATH)(self.realtime)
        return router

    async def drain(self) -> None:
        """End every session, once what was said has its transcript; let no new one begin."""
        self._draining = True
        message = "the service is stopping: connect again"
        error = Refused(message, "server_shutting_down", kind="server_error")
        await asyncio.gather(*(one.leave(error) for one in list(self._open)))

    async def client_secrets(
        self, request: Request, asked: schema.ClientSecretRequest
    ) -> schema.ClientSecret:
        """A key for one who may only open a session, and with what that session begins."""
        caller: Caller = request.state.caller
        try:
            session = events.session_of(asked.session)
            options(session, caller, self._settings, self._vocabulary)
        except Refused as error:
            raise ApiError(400, error.message, error.code, error.param) from None
        value, expires = self._keys.issue(caller, asked.expires_after.seconds, asked.session)
        told = session.told(id=events.new_id("sess"), expires_at=expires)
        return schema.ClientSecret(value=value, expires_at=expires, session=told)

    async def realtime(self, websocket: WebSocket) -> None:
        """A session, from the first event to the last."""
        caller: Caller = websocket.state.caller
        with ExitStack() as admitted:
            try:
                given = self._given(websocket, caller)
                admitted.enter_context(self._quotas.session(caller))
            except ApiError as error:
                await websocket.send_denial_response(errors.respond(error))
                return
            offered = websocket.scope.get("subprotocols", ())
            await websocket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
            connection = _Connection(websocket, self._settings, self._clock)
            connection.session = self._session(connection, caller, given)
            self._open.add(connection)
            self._places.take(caller.tenant.name)
            self._load.open(len(self._open))
            try:
                await connection.serve()
            finally:
                self._open.discard(connection)
                self._places.leave(caller.tenant.name)
                self._load.open(len(self._open))
                log.info("%s", connection.session.summary)

    def _given(self, websocket: WebSocket, caller: Caller) -> Session:
        """With what a session begins. Raises ApiError for one that cannot."""
        query = websocket.query_params
        for name in query:
            if name not in PARAMETERS:
                listed = ", ".join(PARAMETERS)
                message = f"{name[:40]!r} is no parameter here, which are: {listed}"
                raise ApiError(400, message, "unknown", name)
        if query.get("intent", "transcription") != "transcription":
            raise ApiError(400, "intent: only 'transcription' is served", None, "intent")
        if self._draining:
            raise ApiError(503, "the service is stopping", "unavailable")
        if not self._places.has_room(caller.tenant.name):
            raise ApiError(429, "too many sessions at a time: try again", "busy")
        model = {"model": query["model"]} if "model" in query else {}
        asked = {"audio": {"input": {"transcription": model}}}
        usual = {"audio": {"input": {"transcription": {"model": self._settings.name}}}}
        try:
            given = Session.model_validate(usual)
            for one in (caller.session or {}, asked):
                given = given.updated(events.session_of(one))
            options(given, caller, self._settings, self._vocabulary)
        except Refused as error:
            status = 404 if error.code == "model_not_found" else 400
            param = "model" if status == 404 else error.param
            raise ApiError(status, error.message, error.code, param) from None
        return given

    def _session(self, connection: _Connection, caller: Caller, given: Session) -> RealtimeSession:
        settings = self._settings
        return RealtimeSession(
            self._pipeline,
            self._load,
            connection.tell,
            lambda session: options(session, caller, settings, self._vocabulary),
            lambda seconds: self._quotas.audio(caller, seconds),
            longest=settings.decode.max_seconds,
            buffered=settings.limits.session_buffer_seconds,
            patience=settings.limits.timeout_seconds,
            given=given,
            logprobs=self._logprobs,
            expires=int(time.time() + settings.limits.session_seconds),
            count=lambda tokens: self._quotas.tokens(caller, tokens),
            clock=self._clock,
        )

    def _logprobs(self, result: DecodeResult, words: int) -> list[dict[str, Any]]:
        """Of the tokens of the first words of a transcript, as the wire has them."""
        count = result.ends[words - 1]
        first = replace(result, tokens=result.tokens[:count], logps=result.logps[:count])
        return [one.model_dump() for one in token_logprobs(first, self._vocabulary)]


class _Connection:
    """A WebSocket and its session."""

    def __init__(
        self, websocket: WebSocket, settings: Settings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.session: RealtimeSession
        self._websocket = websocket
        self._limits = settings.limits
        self._unsent: asyncio.Queue[dict[str, Any]] = asyncio.Queue(UNREAD)
        self._clock, self._began = clock, clock()
        self._closing: tuple[int, str] | None = None
        self._done = asyncio.Event()
        self._left = asyncio.Event()

    def tell(self, event: dict[str, Any]) -> None:
        """Send an event, after those before it. Who does not read has to go."""
        try:
            self._unsent.put_nowait(event)
        except QueueFull:
            self._close(POLICY, "the client does not read what it is sent")

    async def serve(self) -> None:
        """Until either side has enough."""
        self.session.begin()
        hearing = asyncio.create_task(self.session.run())
        parts = (self._read(), self._write(), self._watch(), self._done.wait())
        tasks = [hearing, *map(asyncio.create_task, parts)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if hearing.done():  # it never ends by itself
                self._end(events.refusal(hearing.exception()), FAULT)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._say_goodbye()
            self._left.set()

    async def leave(self, error: Refused) -> None:
        """End the session for the service's sake."""
        await self._finish()
        self._end(error, GOING_AWAY)
        await self._left.wait()

    async def _finish(self) -> None:
        """Give what was said until now its transcript, if it comes soon."""
        try:
            async with asyncio.timeout(LEAVING_SECONDS):
                await self.session.finish()
        except TimeoutError:
            pass

    async def _read(self) -> None:
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                self._closing = None
                raise WebSocketDisconnect(message.get("code", NORMAL))
            text = message.get("text")
            try:
                self.session.receive(message.get("bytes") if text is None else text)
            except Over as over:
                self._close(POLICY, str(over))
                return

    async def _write(self) -> None:
        while True:
            await self._websocket.send_text(json.dumps(await self._unsent.get()))

    async def _watch(self) -> None:
        """End the session when its time is over, once what was said has its transcript."""
        while (error := self._overdue()) is None:
            await asyncio.sleep(LOOK_SECONDS)
        await self._finish()
        self._end(error, NORMAL)

    def _overdue(self) -> Refused | None:
        """The limit that the session has reached."""
        now, longest, silent = (
            self._clock(),
            self._limits.session_seconds,
            self._limits.silent_seconds,
        )
        if now - self._began > longest:
            why = f"a session lasts {longest:g} s at most (limits.session_seconds): connect again"
            return Refused(why, "session_expired")
        if now - self.session.last_audio > silent:
            why = f"no audio came for {silent:g} s (limits.silent_seconds): connect again"
            return Refused(why, "session_silent")
        return None

    def _end(self, error: Refused, code: int) -> None:
        """Say why, and close."""
        self.tell({"event_id": events.new_id("event"), **events.error_event(error)})
        self._close(code, error.message)

    def _close(self, code: int, reason: str) -> None:
        self._closing = self._closing or (code, reason)
        self._done.set()

    async def _say_goodbye(self) -> None:
        """Send what is left, and close, if the client is still there."""
        if self._closing is None or self._websocket.client_state != WebSocketState.CONNECTED:
            return
        code, reason = self._closing
        try:
            async with asyncio.timeout(1):
                while True:
                    try:
                        event = self._unsent.get_nowait()
                    except QueueEmpty:
                        break
                    await self._websocket.send_text(json.dumps(event))
                await self._websocket.close(code, reason[:100])
        except (TimeoutError, RuntimeError, WebSocketDisconnect, OSError):
            pass  # it is gone, or reads nothing
