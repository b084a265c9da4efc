"""Several teams and their browsers share one service: what each may do, sees and is told. The
application without its models.
"""

import asyncio
import json
import logging
import re
import threading
from dataclasses import replace

import pytest
import requests
import websockets.exceptions
from application import TRANSCRIBE, Handle, client, made, served, transcribe
from fastapi import WebSocket
from starlette.testclient import TestClient, WebSocketDenialResponse
from websockets.sync.client import connect

from serve import logs
from serve.access.request_ids import RequestIds
from serve.messages import DatastoreSummary, QuotaExceeded, UnknownDatastore

KEYS = """
tenants:
  acme:
    keys:
      - {key: acme-admin, role: admin, name: boss}
      - {key: acme-writer, role: write, name: clerk}
      - {key: acme-kiosk, role: transcribe, name: kiosk}
    quotas: {requests: 2, audio_seconds: 2, sessions: 1, entries: 50, datastores: 3}
  globex:
    keys: [{key: globex-admin, role: admin}]
"""
PAGE = "https://app.example"
BOSS, CLERK, KIOSK, OTHER = (
    {"Authorization": f"Bearer {key}"}
    for key in ("acme-admin", "acme-writer", "acme-kiosk", "globex-admin")
)


@pytest.fixture
def tenants(monkeypatch, tmp_path):
    """The keys of two tenants."""
    (tmp_path / "keys.yaml").write_text(KEYS)
    monkeypatch.setenv("MMRAG_API_KEYS_FILE", str(tmp_path / "keys.yaml"))
    monkeypatch.delenv("MMRAG_API_KEYS", raising=False)


class Shelf:
    """A retriever's directory: it knows datastores by their whole names."""

    def __init__(self) -> None:
        self.held: dict[str, list[str]] = {}
        self.rooms = []

    def handle(self) -> Handle:
        names = "stored", "describe", "create", "add", "delete", "documents", "remove", "resolve"
        names += ("preview",)
        return Handle(**{name: getattr(self, name) for name in names})

    def _found(self, name):
        if name not in self.held:
            raise UnknownDatastore(f"no datastore {name.rpartition('/')[2]!r}")
        return DatastoreSummary(name.rpartition("/")[2], len(self.held[name]), 1, "spoken")

    async def stored(self, tenant):
        own = [name for name in self.held if (name.rpartition("/")[0] or "default") == tenant]
        return [self._found(name) for name in own]

    async def describe(self, name):
        return self._found(name)

    async def create(self, name, entries, room):
        self.rooms.append(room)
        self.held[name] = [one.text for one in entries]
        return self._found(name)

    async def add(self, name, entries, room):
        self._found(name)
        if len(entries) > 1:
            raise QuotaExceeded("entries", "50 of 50 entries are there already")
        self.held[name] += [one.text for one in entries]
        return len(entries), len(self.held[name])

    async def preview(self, name, entries):
        self._found(name)
        return []

    async def delete(self, name):
        self._found(name)
        del self.held[name]

    async def documents(self, name, after, limit):
        self._found(name)
        return [(text, 1, None) for text in self.held[name]]

    async def remove(self, name, document):
        self._found(name)
        return 1, 0

    async def resolve(self, name):
        self._found(name)
        raise AssertionError("only ever asked for what is not there")


def test_two_tenants_have_datastores_of_one_name(tenants):
    shelf = Shelf()
    asked = client(made(retriever=shelf.handle()))
    for whose, text in ((BOSS, "zanab kuri"), (OTHER, "olaf")):
        given = {"name": "names", "texts": [text]}
        answer = asked.post("/v1/datastores", json=given, headers=whose)
        assert answer.status_code == 201 and answer.json()["id"] == "names"
    assert sorted(shelf.held) == ["acme/names", "globex/names"]
    assert [(room.datastores, room.entries) for room in shelf.rooms] == [(3, 50), (None, None)]
    for whose, text in ((BOSS, "zanab kuri"), (OTHER, "olaf")):
        listed = asked.get("/v1/datastores", headers=whose).json()["data"]
        assert [one["id"] for one in listed] == ["names"]
        entries = asked.get("/v1/datastores/names/entries", headers=whose).json()["data"]
        assert [one["document"] for one in entries] == [text]
    assert asked.delete("/v1/datastores/names", headers=BOSS).json()["id"] == "names"
    assert list(shelf.held) == ["globex/names"]


def test_anothers_datastore_is_as_one_that_is_not_there(tenants, refused, second):
    """Answer by answer alike, whatever spelling of the name is tried."""
    shelf = Shelf()
    shelf.held = {"globex/names": ["olaf"], "plain": ["of the default tenant"]}
    asked = client(made(retriever=shelf.handle()))

    def answers(name):
        one = f"/v1/datastores/{name}"
        tried = [
            asked.get(one, headers=BOSS),
            asked.get(f"{one}/entries", headers=BOSS),
            asked.post(f"{one}/entries", json={"texts": ["a"]}, headers=BOSS),
            asked.delete(f"{one}/entries?document=olaf", headers=BOSS),
            asked.delete(one, headers=BOSS),
            asked.post(f"{one}/search", json={"text": "olaf"}, headers=BOSS),
            asked.post(f"{one}/preview", json={"entries": ["olaf"]}, headers=BOSS),
            asked.post(TRANSCRIBE, files=second, data={"datastore": name}, headers=BOSS),
        ]
        return [(one.status_code, one.text.replace(name, "NAME")) for one in tried]

    nowhere = answers("nowhere")
    assert {status for status, _ in nowhere} == {404}
    assert answers("names") == answers("plain") == nowhere
    for name in ("globex%2Fnames", "..%2Fglobex%2Fnames", "@globex%2Fnames", "globex/names"):
        for path in (f"/v1/datastores/{name}", f"/v1/datastores/{name}/entries"):
            assert asked.get(path, headers=BOSS).status_code == 404
        refused_form = asked.post(TRANSCRIBE, files=second, data={"datastore": name}, headers=BOSS)
        assert refused_form.status_code in (404, 422)
    assert list(shelf.held) == ["globex/names", "plain"]


def test_a_role_that_does_not_suffice_is_told_which_would(tenants, refused, second):
    shelf = Shelf()
    shelf.held = {"acme/names": ["a"]}
    asked = client(made(retriever=shelf.handle()))
    new = {"json": {"name": "towns", "texts": ["a"]}}
    more = {"json": {"texts": ["b"]}}
    denied = [
        (KIOSK, "POST", "/v1/datastores/names/entries", more, "write"),
        (KIOSK, "POST", "/v1/datastores", new, "admin"),
        (KIOSK, "DELETE", "/v1/datastores/nowhere", {}, "admin"),
        (CLERK, "POST", "/v1/datastores", new, "admin"),
        (CLERK, "DELETE", "/v1/datastores/names", {}, "admin"),
        (CLERK, "POST", "/v1/datastores/names/upkeep/compact", {"json": {}}, "admin"),
        (CLERK, "GET", "/v1/usage", {}, "admin"),
    ]
    for whose, method, path, given, role in denied:
        answer = asked.request(method, path, headers=whose, **given)
        assert f"a key of the role {role}" in refused(answer, 403, "insufficient_role")
    assert shelf.held == {"acme/names": ["a"]}
    for whose in (KIOSK, CLERK, BOSS):
        assert asked.get("/v1/datastores/names", headers=whose).status_code == 200
    assert asked.post(TRANSCRIBE, files=second, headers=KIOSK).status_code == 200
    assert asked.post("/v1/datastores/names/entries", headers=CLERK, **more).status_code == 200


def test_a_quota_is_named_where_it_is_exceeded(tenants, refused, second):
    shelf = Shelf()
    shelf.held = {"acme/names": ["a"]}
    asked = client(made(retriever=shelf.handle()))
    for left in ("1", "0"):
        answer = asked.post(TRANSCRIBE, files=second, headers=KIOSK)
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-limit-audio-seconds"] == "2"
        assert answer.headers["x-ratelimit-remaining-audio-seconds"] == left
    answer = asked.post(TRANSCRIBE, files=second, headers=KIOSK)
    refused(answer, 429, "quota_audio_seconds")
    assert 25 <= int(answer.headers["Retry-After"]) <= 30
    assert asked.post(TRANSCRIBE, files=second, headers=OTHER).status_code == 200
    answer = asked.post("/v1/datastores/names/entries", json={"texts": ["b", "c"]}, headers=CLERK)
    assert "50 of 50 entries" in refused(answer, 429, "quota_entries")
    assert answer.headers["x-should-retry"] == "false"


def test_what_is_refused_takes_nothing_of_the_minute(tenants, second):
    asked = client(made(retriever=Shelf().handle()))
    for _ in range(5):
        form = {"datastore": "nowhere"}
        assert asked.post(TRANSCRIBE, files=second, data=form, headers=KIOSK).status_code == 404
    assert asked.post(TRANSCRIBE, files=second, headers=KIOSK).status_code == 200


def test_one_tenants_load_leaves_room_for_others(tenants, refused, second):
    """Four places: one tenant holds what it gets, and another still comes in."""
    inside, free = threading.Semaphore(0), threading.Event()

    async def slow(order):
        inside.release()
        while not free.is_set():
            await asyncio.sleep(0.01)
        return await transcribe(order)

    with served(made(Handle(transcribe=slow), requests=4)) as url:
        asked = TestClientOf(url)
        held = [asked.later(TRANSCRIBE, second, OTHER) for _ in range(3)]
        for _ in held:
            assert inside.acquire(timeout=10)
        refused(asked.now(TRANSCRIBE, second, OTHER), 429, "busy")
        held.append(asked.later(TRANSCRIBE, second, KIOSK))
        assert inside.acquire(timeout=10)
        refused(asked.now(TRANSCRIBE, second, OTHER), 429, "busy")
        free.set()
        assert [one() for one in held] == [200] * 4


class TestClientOf:
    """Requests to a server, at once or in a thread."""

    __test__ = False

    def __init__(self, url):
        self._url = url

    def now(self, path, files, headers):
        return requests.post(self._url + path, files=files, headers=headers, timeout=20)

    def later(self, path, files, headers):
        told = []
        thread = threading.Thread(
            target=lambda: told.append(self.now(path, files, headers).status_code)
        )
        thread.start()

        def status():
            thread.join(20)
            return told[0]

        return status


def test_usage_tells_a_tenant_of_itself_alone(tenants, second):
    shelf = Shelf()
    shelf.held = {"acme/names": ["a", "b"], "globex/names": ["c"]}
    asked = client(made(retriever=shelf.handle()))
    for whose in (KIOSK, BOSS, OTHER):
        assert asked.post(TRANSCRIBE, files=second, headers=whose).status_code == 200
    told = asked.get("/v1/usage", headers=BOSS).json()
    [day] = told.pop("data")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", day.pop("day"))
    assert day == {"requests": 3, "sessions": 0, "audio_seconds": 2.0, "tokens": 4}
    assert told["quotas"]["audio_seconds"] == 2 and told["tenant"] == "acme"
    assert (told["datastores"], told["entries"]) == (1, 2)
    assert asked.get("/v1/usage", headers=OTHER).json()["data"][0]["requests"] == 2


def test_metrics_know_no_tenant_and_no_name(tenants, second):
    """Anybody may read them."""
    labels = []

    class Watched:
        def __init__(self, *_, **__): ...

        def inc(self, *_, tags):
            labels.append(tags)

        def observe(self, *_, tags):
            labels.append(tags)

        def set(self, *_): ...

    shelf = Shelf()
    shelf.held = {"acme/names": ["a"]}
    app = made(retriever=shelf.handle())
    [middle] = [one for one in app.user_middleware if "metrics" in one.kwargs]
    for name in ("requests", "seconds", "in_flight", "receiving"):
        setattr(middle.kwargs["metrics"], name, Watched())
    asked = client(app)
    asked.get("/v1/datastores/names", headers=BOSS)
    asked.get("/v1/datastores/nowhere", headers=BOSS)
    asked.post(TRANSCRIBE, files=second, data={"datastore": "nowhere"}, headers=BOSS)
    assert {one["path"] for one in labels} == {"/v1/datastores/{name}", TRANSCRIBE}
    assert {name for one in labels for name in one} == {"path", "status"}


# Browsers.


def cross(app):
    return TestClient(app, raise_server_exceptions=False, base_url="http://asr.example")


def test_a_page_elsewhere_may_call_the_service_once_its_origin_is_listed(second):
    asked = cross(made(cors={"origins": [PAGE]}))
    asks = {
        "Origin": PAGE,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,x-stainless-os",
    }
    preflight = asked.options(TRANSCRIBE, headers=asks)
    assert preflight.status_code == 204
    assert preflight.headers["Access-Control-Allow-Origin"] == PAGE
    assert preflight.headers["Access-Control-Allow-Headers"] == "authorization,x-stainless-os"
    assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
    answer = asked.post(TRANSCRIBE, files=second, headers={"Origin": PAGE})
    assert answer.status_code == 200
    for one in (preflight, answer):
        assert one.headers["Access-Control-Allow-Origin"] == PAGE
        assert "Origin" in one.headers["Vary"]
        assert "Access-Control-Allow-Credentials" not in one.headers


def test_a_browser_may_ask_before_it_has_shown_its_key(tenants):
    asked = cross(made(cors={"origins": [PAGE]}))
    asks = {"Origin": PAGE, "Access-Control-Request-Method": "GET"}
    assert asked.options("/v1/models", headers=asks).status_code == 204
    told = asked.get("/v1/models", headers={"Origin": PAGE})
    assert told.status_code == 401, "and a page may read why not"
    assert told.headers["Access-Control-Allow-Origin"] == PAGE


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://asr.example:81", ""])
def test_a_page_elsewhere_changes_nothing(refused, second, origin):
    """A browser sends a form anywhere without asking first."""
    shelf = Shelf()
    asked = cross(made(retriever=shelf.handle(), cors={"origins": [PAGE]}))
    elsewhere = {"Origin": origin}
    for answer in [
        asked.post("/v1/datastores", files=second, data={"name": "a"}, headers=elsewhere),
        asked.post(TRANSCRIBE, files=second, headers=elsewhere),
        asked.delete("/v1/datastores/a", headers=elsewhere),
    ]:
        refused(answer, 403, "origin_not_allowed")
        assert "Access-Control-Allow-Origin" not in answer.headers
    asks = elsewhere | {"Access-Control-Request-Method": "POST"}
    preflight = asked.options(TRANSCRIBE, headers=asks)
    assert "Access-Control-Allow-Origin" not in preflight.headers


def test_the_services_own_page_needs_no_setting(second):
    asked = cross(made())
    for own in (
        {"Origin": "http://asr.example"},
        {"Origin": "https://ASR.example"},
        {"Origin": "https://outside.example", "Sec-Fetch-Site": "same-origin"},
        {},
    ):
        assert asked.post(TRANSCRIBE, files=second, headers=own).status_code == 200


def test_every_page_may_where_the_setting_says_so(second):
    answer = cross(made(cors={"origins": ["*"]})).post(
        TRANSCRIBE, files=second, headers={"Origin": "https://any.example"}
    )
    assert answer.headers["Access-Control-Allow-Origin"] == "https://any.example"


def test_the_page_keeps_itself_to_itself():
    headers = cross(made()).get("/").headers
    policy = headers["Content-Security-Policy"]
    assert "connect-src 'self' ws://asr.example wss://asr.example" in policy
    assert "frame-ancestors 'none'" in policy and headers["X-Frame-Options"] == "DENY"
    assert headers["Permissions-Policy"].startswith("microphone=(self), camera=()")
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"


@pytest.mark.parametrize("host", ["a b", "a;script-src *", "x'y", "", "a\tb"])
def test_no_host_writes_the_policy(host):
    policy = client(made()).get("/", headers={"Host": host}).headers["Content-Security-Policy"]
    assert policy.endswith("connect-src 'self'")


def test_what_the_api_tells_is_not_kept():
    asked = client(made())
    for path in ("/v1/models", "/v1/datastores"):
        assert asked.get(path).headers["Cache-Control"] == "no-store"
    assert "Cache-Control" not in asked.get("/page/page.js").headers


# Request ids, logs, audit.


def test_every_answer_has_the_callers_id_or_one_of_its_own(tenants, second):
    asked = client(made())
    own = {"X-Request-ID": "order-7.b:1"}
    for answer in [
        asked.get("/", headers=own),
        asked.get("/nothing", headers=own),
        asked.get("/v1/models", headers=own),
        asked.post(TRANSCRIBE, files=second, headers=own | KIOSK),
        asked.post(TRANSCRIBE, headers=own | KIOSK),
    ]:
        assert answer.headers.get_list("x-request-id") == ["order-7.b:1"]
    made_here = {asked.get("/healthz").headers["x-request-id"] for _ in range(5)}
    assert len(made_here) == 5


@pytest.mark.parametrize("given", ["", "a b", "é".encode(), "a" * 129, "<b>", "a\tb", "-a"])
def test_an_insane_id_is_replaced(given):
    answer = client(made()).get("/healthz", headers={"X-Request-ID": given})
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])


def test_ray_serve_is_given_a_sane_id():
    """What it would else take for one, and log."""
    seen = []

    async def inner(scope, receive, send):
        seen.append([v for k, v in scope["headers"] if k == b"x-request-id"])

    for given in ([b"sane"], [], [b"a b"], [b"one", b"two"]):
        headers = [(b"x-request-id", one) for one in given]
        scope = {"type": "http", "headers": headers}
        asyncio.run(RequestIds(inner)(scope, None, None))
        assert len(scope["headers"]) == len(given), "the caller's own are left as they are"
    assert seen[0] == [b"sane"] and seen[3] == [b"one"]
    assert all(len(one) == 1 and re.fullmatch(rb"[0-9a-f]{32}", one[0]) for one in seen[1:3])


def test_who_changed_what_is_written_down_without_the_words(tenants, tmp_path):
    shelf = Shelf()
    asked = client(made(retriever=shelf.handle(), logs={"audit": str(tmp_path / "audit")}))
    own = {"X-Request-ID": "order-7"}
    more = {"texts": ["secret word"]}
    asked.post("/v1/datastores", json={"name": "names", **more}, headers=BOSS | own)
    asked.post("/v1/datastores/names/entries", json=more, headers=CLERK)
    asked.delete("/v1/datastores/names/entries?document=secret+word", headers=CLERK)
    asked.post("/v1/datastores/names/entries", json=more, headers=KIOSK)
    asked.get("/v1/datastores/names/entries", headers=KIOSK)
    asked.delete("/v1/datastores/names", headers=OTHER)
    [file] = (tmp_path / "audit").iterdir()
    text = file.read_text()
    assert "secret" not in text and "acme-admin" not in text
    lines = [json.loads(line) for line in text.splitlines()]
    assert re.fullmatch(r"audit-\d{4}-\d\d-\d\d-.+\.jsonl", file.name)
    assert file.name[6:16] == lines[0]["time"][:10] and lines[0]["time"].endswith("+00:00")
    fields = ("tenant", "key", "method", "path", "status")
    told = [tuple(one[field] for field in fields) for one in lines]
    entries = "/v1/datastores/names/entries"
    assert told[:4] == [
        ("acme", "boss", "POST", "/v1/datastores", 201),
        ("acme", "clerk", "POST", entries, 200),
        ("acme", "clerk", "DELETE", entries, 200),
        ("acme", "kiosk", "POST", entries, 403),
    ]
    assert told[4][0] == "globex" and told[4][2:] == ("DELETE", "/v1/datastores/names", 404)
    assert len(told) == 5
    assert lines[0]["request_id"] == "order-7" and lines[0]["datastore"] == "names"
    assert (lines[1]["added"], lines[2]["deleted"]) == (1, 1)


def test_what_is_written_down_is_there_before_the_answer(tenants, tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr("serve.access.audit.os.fsync", lambda _: order.append("on the disk"))
    app = made(retriever=Shelf().handle(), logs={"audit": str(tmp_path)})
    with served(app) as url:
        given = {"name": "names", "texts": ["a"]}
        requests.post(f"{url}/v1/datastores", json=given, headers=BOSS, timeout=10)
        assert order[0] == "on the disk"


SAID = "confidential diagnosis"


async def says(order):
    result = await transcribe(order)
    return replace(result, text=SAID)


async def quotes(order):
    raise ValueError(SAID)


@pytest.mark.parametrize("asked_for", [False, True])
def test_the_log_holds_what_was_said_only_where_that_is_asked_for(caplog, second, asked_for):
    log = logging.getLogger("ray.serve")
    kept = list(log.filters)
    try:
        caplog.set_level(0)
        for decoder in (Handle(transcribe=says), Handle(transcribe=quotes)):
            app = made(decoder, logs={"transcripts": asked_for})
            client(app).post(TRANSCRIBE, files=second, headers={"X-Request-ID": "seven"})
        text = caplog.text + "".join(str(one.exc_text) for one in caplog.records)
        assert (SAID in text) == asked_for
        assert "ValueError" in text and "in quotes" in text, "but where it arose is told"
    finally:
        log.filters = kept


def test_a_log_line_tells_the_kinds_of_an_error_and_its_causes():
    try:
        try:
            raise KeyError(SAID)
        except KeyError as error:
            raise RuntimeError(SAID) from error
    except RuntimeError as error:
        told = logs.places(error)
    assert told.startswith("RuntimeError from KeyError\n") and SAID not in told
    assert "test_sharing.py" in told


# WebSockets.


@pytest.fixture
def talking(tenants):
    """`talking(**settings)`: an application that says on /v1/realtime who calls."""

    def make(**settings):
        app = made(**settings)

        async def realtime(websocket: WebSocket):
            caller = websocket.state.caller
            with websocket.state.quotas.session(caller):
                await websocket.accept()
                offered = websocket.scope["subprotocols"]
                await websocket.send_json([caller.tenant.name, caller.role, offered])
                await websocket.receive_text()
                await websocket.close()

        app.add_api_websocket_route("/v1/realtime", realtime)
        app.router.routes.insert(0, app.router.routes.pop())  # before the one that serves
        return app

    return make


def told(url, **more):
    with connect(url.replace("http", "ws") + "/v1/realtime", **more) as socket:
        answer = json.loads(socket.recv(timeout=10))
        socket.send("bye")
        return answer, socket.subprotocol, socket.response.headers


def test_a_websocket_brings_its_key_in_a_header_or_as_a_browser_does(talking):
    with served(talking()) as url:
        answer, chosen, headers = told(url, additional_headers=KIOSK)
        assert (answer, chosen) == (["acme", "transcribe", []], None)
        assert headers["x-request-id"]
        offered = ["realtime", "openai-insecure-api-key.globex-admin", "openai-beta.realtime-v1"]
        answer, chosen, headers = told(url, subprotocols=offered)
        assert answer == ["globex", "admin", ["realtime", "openai-beta.realtime-v1"]]
        assert chosen == "realtime" and "globex-admin" not in str(headers)


@pytest.mark.parametrize(
    ("more", "status", "code"),
    [
        ({}, 401, "invalid_api_key"),
        ({"additional_headers": {"Authorization": "Bearer wrong"}}, 401, "invalid_api_key"),
        ({"subprotocols": ["realtime", "openai-insecure-api-key.x"]}, 401, "invalid_api_key"),
        (
            {"additional_headers": KIOSK, "origin": "https://evil.example"},
            403,
            "origin_not_allowed",
        ),
    ],
)
def test_a_websocket_that_is_refused_is_told_why(talking, more, status, code):
    with served(talking()) as url:
        with pytest.raises(websockets.exceptions.InvalidStatus) as refused_with:
            told(url, **more)
        response = refused_with.value.response
        assert response.status_code == status
        assert json.loads(response.body)["error"]["code"] == code
        assert response.headers["x-request-id"]


def test_a_websocket_of_a_listed_page_and_of_the_own_one_comes_in(talking):
    with served(talking(cors={"origins": [PAGE]})) as url:
        for origin in (PAGE, url):
            assert told(url, additional_headers=KIOSK, origin=origin)[0][0] == "acme"


def test_so_many_sessions_of_a_tenant_and_no_more(talking):
    with served(talking()) as url:
        address = url.replace("http", "ws") + "/v1/realtime"
        with connect(address, additional_headers=KIOSK) as held:
            held.recv(timeout=10)
            with pytest.raises(websockets.exceptions.InvalidStatus) as refused_with:
                told(url, additional_headers=KIOSK)
            body = json.loads(refused_with.value.response.body)
            assert body["error"]["code"] == "quota_sessions"
            assert told(url, additional_headers=OTHER)[0][0] == "globex"
        for _ in range(100):
            try:
                assert told(url, additional_headers=KIOSK)[0][0] == "acme"
                return
            except websockets.exceptions.InvalidStatus:  # the server has not seen it leave yet
                threading.Event().wait(0.05)
        raise AssertionError("the place did not become free")


def test_a_server_that_can_only_close_closes_with_a_code(talking):
    sent = []

    async def receive():
        return {"type": "websocket.connect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "websocket", "path": "/v1/realtime", "headers": [], "query_string": b""}
    asyncio.run(talking()(scope, receive, send))
    assert (sent[0]["type"], sent[0]["code"]) == ("websocket.close", 4401)


def test_a_service_that_is_stopping_takes_no_new_session(talking):
    app = talking()
    [middle] = [one for one in app.user_middleware if "access" in one.kwargs]
    middle.kwargs["access"].draining = True
    session = client(app).websocket_connect("/v1/realtime", headers=KIOSK)
    with pytest.raises(WebSocketDenialResponse) as refused_with, session:
        pass
    assert refused_with.value.status_code == 503
