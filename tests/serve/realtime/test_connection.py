"""How a connection ends: the service stops, its time is over, nobody reads, there is no room."""

import json
import time
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from spoken_levels import LevelDetector, Levels, base64_of, said
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect

from serve import errors
from serve.access.keys import Caller, Keys
from serve.access.quotas import Quotas
from serve.realtime import route
from serve.realtime import session as sessions
from serve.realtime.route import PATH, POLICY, Realtime, _Connection
from serve.settings import read

VOCABULARY = SimpleNamespace(refusal=lambda text: None)
MANUAL = {"type": "session.update", "session": {"audio": {"input": {"turn_detection": None}}}}


@pytest.fixture(autouse=True)
def by_loudness(monkeypatch):
    monkeypatch.setattr(sessions, "TurnDetector", LevelDetector)


@pytest.fixture
def serving(tmp_path):
    """`serving(**limits)`: a client of the routes, with nothing behind them but a fake; `clock`
    tells how long its sessions have lasted."""
    opened = []

    def start(clock=time.monotonic, **limits):
        settings = read({"limits": limits, "datastores": str(tmp_path), "decode.max_seconds": 2})
        keys, app = Keys(settings.limits.tenant, settings.datastores), FastAPI()
        start.quotas = Quotas()
        realtime = Realtime(settings, Levels(), VOCABULARY, keys, start.quotas, clock)
        errors.install(app)
        app.include_router(realtime.sockets())
        app.include_router(realtime.secrets())
        app.post("/drain")(realtime.drain)
        opened.append(TestClient(known(app)))
        return opened[-1].__enter__()

    yield start
    for client in opened:
        client.__exit__(None, None, None)


def known(app):
    """The application behind a middleware that lets everybody in."""

    async def admitted(scope, receive, send):
        await app({**scope, "state": {"caller": Caller()}}, receive, send)

    return admitted


@contextmanager
def connected(client, **more):
    """A session. The test client may cancel what it has closed before that has ended."""
    with suppress(CancelledError), client.websocket_connect(PATH, **more) as socket:
        yield socket


def append(*levels):
    return {"type": "input_audio_buffer.append", "audio": base64_of(said(*levels))}


def told(socket):
    """Every event until the connection is closed, and how it was."""
    found = []
    try:
        while True:
            found.append(socket.receive_json())
    except WebSocketDisconnect as closed:
        return found, closed


def test_a_service_that_stops_finishes_what_was_said_and_says_why(serving):
    client = serving()
    with connected(client) as socket:
        for event in (MANUAL, append(1, 2)):
            socket.send_json(event)
        assert client.post("/drain").status_code == 200
        found, closed = told(socket)
    assert closed.code == 1001
    [completed] = [event for event in found if event["type"].endswith("completed")]
    assert completed["transcript"] == "word1 word2"
    assert found[-1]["error"]["code"] == "server_shutting_down"
    assert serving.quotas.report().used["default"].tokens == 2, "one a word"
    with pytest.raises(WebSocketDenialResponse) as refused, client.websocket_connect(PATH):
        pass
    assert refused.value.status_code == 503


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


LIMITS = [("session_seconds", "session_expired"), ("silent_seconds", "session_silent")]


@pytest.mark.parametrize(("limit", "code"), LIMITS)
def test_a_session_whose_time_is_over_is_told_so_and_by_which_limit(serving, limit, code):
    with connected(serving(**{limit: 0.3})) as socket:
        found, closed = told(socket)
    assert closed.code == 1000
    assert [event["type"] for event in found] == ["session.created", "error"]
    error = found[-1]["error"]
    assert error["code"] == code and "0.3 s" in error["message"]
    assert f"limits.{limit}" in error["message"] and error["message"] in closed.reason


def test_what_was_said_when_the_time_is_over_has_its_transcript(serving):
    clock = Clock()
    with connected(serving(clock)) as socket:
        for event in (MANUAL, append(1, 2), MANUAL):
            socket.send_json(event)
        kinds = []
        while kinds.count("session.updated") < 2:  # then the audio between them has come
            kinds.append(socket.receive_json()["type"])
        clock.now = 7201.0
        found, closed = told(socket)
    assert closed.code == 1000 and found[-1]["error"]["code"] == "session_silent"
    [completed] = [event for event in found if event["type"].endswith("completed")]
    assert completed["transcript"] == "word1 word2"


def test_who_is_silent_for_an_hour_is_listened_to_and_for_two_is_let_go(serving, monkeypatch):
    monkeypatch.setattr(route, "LOOK_SECONDS", 0.01)
    clock = Clock()
    with connected(serving(clock)) as socket:
        assert socket.receive_json()["type"] == "session.created"
        clock.now = 3600.0
        time.sleep(0.1)  # it is looked at some ten times
        for event in (MANUAL, append(1), {"type": "input_audio_buffer.commit"}):
            socket.send_json(event)
        while not (event := socket.receive_json())["type"].endswith("completed"):
            assert event["type"] != "error"
        assert event["transcript"] == "word1"
        clock.now = 2 * 3600.0 + 1
        time.sleep(0.1)  # an hour after the last audio it goes on
        socket.send_json(MANUAL)
        while (event := socket.receive_json())["type"] != "session.updated":
            assert event["type"] != "error"
        clock.now = 3 * 3600.0 + 1
        found, closed = told(socket)
    assert [event["error"]["code"] for event in found] == ["session_silent"]
    assert "7200 s" in found[-1]["error"]["message"] and closed.code == 1000


@pytest.mark.parametrize("audio", ["", "no base64"])
def test_events_without_audio_do_not_keep_a_session(serving, monkeypatch, audio):
    monkeypatch.setattr(route, "LOOK_SECONDS", 0.01)
    clock = Clock()
    with connected(serving(clock)) as socket:
        clock.now = 7199.0
        socket.send_json({"type": "input_audio_buffer.append", "audio": audio})
        socket.send_json(MANUAL)
        while socket.receive_json()["type"] != "session.updated":
            pass
        clock.now = 7201.0
        found, closed = told(socket)
    assert found[-1]["error"]["code"] == "session_silent" and closed.code == 1000


def test_there_are_so_many_sessions_and_no_more(serving):
    client = serving(sessions=1)
    with connected(client):
        with pytest.raises(WebSocketDenialResponse) as refused, client.websocket_connect(PATH):
            pass
        assert refused.value.status_code == 429
        assert json.loads(refused.value.content)["error"]["code"] == "busy"
    with connected(client) as again:
        assert again.receive_json()["type"] == "session.created"


def test_a_fault_of_ours_is_told_and_its_words_are_not(serving, monkeypatch):
    def broken(self, wave):
        raise RuntimeError("a secret")

    monkeypatch.setattr(LevelDetector, "push", broken)
    with connected(serving()) as socket:
        socket.send_json(append(1))
        found, closed = told(socket)
    assert closed.code == 1011 and "secret" not in json.dumps(found)
    assert found[-1]["error"]["type"] == "server_error"


def test_who_does_not_read_has_to_go(monkeypatch):
    monkeypatch.setattr(route, "UNREAD", 3)
    connection = _Connection(SimpleNamespace(), SimpleNamespace(limits=None))
    for number in range(5):
        connection.tell({"number": number})
    assert connection._closing[0] == POLICY and connection._unsent.qsize() == 3


def test_the_subprotocol_is_confirmed_where_it_is_offered(serving):
    client = serving()
    for offered, confirmed in ((["other", "realtime"], "realtime"), ([], None)):
        with connected(client, subprotocols=offered) as socket:
            assert socket.accepted_subprotocol == confirmed
            assert socket.receive_json()["type"] == "session.created"
