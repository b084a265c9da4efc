"""Arrays in, arrays out, between a caller and an actor's process, without Ray between them.

A call through Ray costs two processes a millisecond; a search of a small shard is no longer, and
every shard is asked at every token. So an actor also listens at its node's address (`Listener`),
and its callers hold connections to it (`Channel`). Ray tells them the port and a random token, with
which each connection begins; who lacks it gets no answer.

A channel is a short cut and no more: where it cannot be used (no port could be had, a firewall, an
actor that has just started), and for what an actor raises, callers ask through Ray.
"""

from __future__ import annotations

import hmac
import math
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from cluster.arrays import RefusedError, pack, receive, receive_arrays, send

TOKEN_BYTES = 32
CONNECT_SECONDS = 1.0
ACCEPT_SECONDS = 0.1
"""Between attempts to accept a connection, where one failed."""
BLOCKED_SECONDS = 60.0
"""How long nobody tries to connect where it failed otherwise than for the actor's end."""
GRACE_SECONDS = 0.1
"""For an answer that is there when its deadline has passed, since another one was waited for."""
KEEPALIVE = {"TCP_KEEPIDLE": 2, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3}
"""Seconds, seconds and times: a machine that vanished is noticed after five seconds."""


class BrokenError(Exception):
    """No answer came: the deadline passed, or the other process ended."""


@dataclass(frozen=True)
class Address:
    """Where an actor listens, and what a connection begins with."""

    host: str
    port: int
    token: bytes = field(repr=False)


class Listener:
    """Answers connections, each in a thread of its own, until the process ends."""

    def __init__(self, answer: Callable[..., Sequence[np.ndarray]]) -> None:
        """`answer` is called with the arrays of a message, in several threads at once. Raises
        OSError where this node's address cannot be listened on."""
        self._answer = answer
        self._socket = socket.create_server((ray.util.get_node_ip_address(), 0), backlog=128)
        host, port = self._socket.getsockname()[:2]
        self.address = Address(host, port, secrets.token_bytes(TOKEN_BYTES))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._socket.accept()
            except OSError:  # the caller has gone, or too many files are open
                time.sleep(ACCEPT_SECONDS)
                continue
            threading.Thread(target=self._serve, args=(caller,), daemon=True).start()

    def _serve(self, caller: socket.socket) -> None:
        with caller:
            try:
                _prepare(caller)
                token = receive(caller, TOKEN_BYTES, time.monotonic() + CONNECT_SECONDS)
                if hmac.compare_digest(token, self.address.token):
                    while True:
                        self._reply(caller, receive_arrays(caller, None))
            except (OSError, ValueError, RefusedError):
                return

    def _reply(self, caller: socket.socket, question: list[np.ndarray]) -> None:
        try:
            message = pack(self._answer(*question))
        except Exception:  # whatever it is: the caller asks through Ray, which raises it there
            message = None
        send(caller, message, None)


class Channel:
    """The connections of this process to one actor, which has a method `address`.

    Nobody waits for the address: until it is known, nothing can be asked here. A connection carries
    one question at a time; as many are open as were ever asked at once.
    """

    def __init__(self, actor: ActorHandle) -> None:
        self._actor = actor
        self._free: list[socket.socket] = []
        self._address: ray.ObjectRef | None = None
        self._blocked = -math.inf

    def ask(
        self, question: Sequence[np.ndarray], seconds: float
    ) -> Callable[[float], list[np.ndarray]] | None:
        """Send a question; what is returned waits so many seconds for the answer, and raises
        BrokenError or RefusedError. None where nothing can be asked now, or not sent in `seconds`.
        """
        try:
            message = pack(question)
        except ValueError:
            return None
        connection = self._connection()
        if connection is None:
            return None
        try:
            send(connection, message, seconds)
        except OSError:
            connection.close()
            return None

        def answer(seconds: float) -> list[np.ndarray]:
            deadline = time.monotonic() + max(seconds, GRACE_SECONDS)
            try:
                found = receive_arrays(connection, deadline)
            except RefusedError:
                self._free.append(connection)
                raise
            except (OSError, ValueError) as error:
                connection.close()
                self._address = None
                raise BrokenError(str(error)) from None
            self._free.append(connection)
            return found

        return answer

    def _connection(self) -> socket.socket | None:
        """A free one, or a new one."""
        while self._free:
            try:
                connection = self._free.pop()
            except IndexError:  # another thread took it
                break
            if _open(connection):
                return connection
            connection.close()
            self._address = None  # that process has ended; Ray may have started another
        if time.monotonic() < self._blocked:
            return None
        known = self._address = self._address or self._actor.address.remote()
        if not ray.wait([known], timeout=0)[0]:
            return None
        try:
            address = ray.get(known)
            if address is None:
                raise OSError("the actor does not listen")
            connection = socket.create_connection((address.host, address.port), CONNECT_SECONDS)
            _prepare(connection)
            connection.sendall(address.token)
            return connection
        except (RayError, ConnectionRefusedError):  # it ended meanwhile
            self._address = None
        except OSError:
            self._address, self._blocked = None, time.monotonic() + BLOCKED_SECONDS
        return None


_channels: WeakValueDictionary[ActorHandle, Channel] = WeakValueDictionary()
_sharing = threading.Lock()


def channel_to(actor: ActorHandle) -> Channel:
    """This process's channel to an actor, kept as long as somebody holds it."""
    with _sharing:
        found = _channels.get(actor)
        if found is None:
            found = _channels[actor] = Channel(actor)
        return found


def _prepare(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # not everywhere
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _open(connection: socket.socket) -> bool:
    """Whether the other end is there, and nothing was sent that nobody asked for."""
    connection.setblocking(False)
    try:
        connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
