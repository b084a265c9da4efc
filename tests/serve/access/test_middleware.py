"""Who is let in, with how much, and what everybody is told: the application without its models."""

import asyncio
import json
import socket
import threading
import time
from types import SimpleNamespace

import openai
import pytest
import requests
from application import TRANSCRIBE, Handle, client, made, served, transcribe
from openai import OpenAI
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError
from starlette.datastructures import Headers

from serve.access import bodies

FORM = "multipart/form-data; boundary=x"
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def keys(monkeypatch):
    """`keys(*them)`: what the environment says of API keys."""
    for name in ("MMRAG_API_KEYS", "MMRAG_API_KEYS_FILE"):
        monkeypatch.delenv(name, raising=False)
    return lambda *them: monkeypatch.setenv("MMRAG_API_KEYS", ",".join(them))


def test_without_keys_nobody_is_asked_for_one(keys):
    assert client(made()).get("/v1/models").status_code == 200


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Basic one",
        "one",
        "Bearer one two",
        "Bearer é",
    ],
)
def test_with_keys_everything_below_v1_asks_for_one(keys, refused, header):
    keys("one", "two")
    asked = client(made())
    headers = {} if header is None else {"Authorization": header.encode()}
    for method, path in [
        ("GET", "/v1/models"),
        ("GET", "/v1/datastores"),
        ("DELETE", "/v1/datastores/a"),
        ("POST", TRANSCRIBE),
        ("GET", "/v1/nothing"),
    ]:
        refused(asked.request(method, path, headers=headers), 401, "invalid_api_key")


@pytest.mark.parametrize("key", ["one", "two", "three"])
def test_any_of_the_keys_lets_in(keys, monkeypatch, tmp_path, key):
    keys("one", " two ")
    (tmp_path / "keys").write_text("\nthree\n")
    monkeypatch.setenv("MMRAG_API_KEYS_FILE", str(tmp_path / "keys"))
    asked = client(made())
    for scheme in ("Bearer", "bearer"):
        headers = {"Authorization": f"{scheme} {key}"}
        assert asked.get("/v1/models", headers=headers).status_code == 200


def test_the_page_and_the_health_of_the_service_are_open(keys):
    keys("one")
    asked = client(made())
    for path in ("/", "/page/page.js", "/page/page.css", "/healthz", "/docs", "/openapi.json"):
        assert asked.get(path).status_code == 200, path


def test_openais_client_needs_its_key(keys, second):
    keys("secret")
    with served(made()) as url:
        with pytest.raises(openai.AuthenticationError, match="valid API key"):
            OpenAI(base_url=f"{url}/v1", api_key="guess").models.list()
        known = OpenAI(base_url=f"{url}/v1", api_key="secret")
        assert [model.id for model in known.models.list()] == ["mmrag"]
        told = known.audio.transcriptions.create(model="mmrag", **second)
        assert told.text == "a word"


def given(app, body, path=TRANSCRIBE, kind=FORM, **headers):
    """The status of an answer to a body that arrives block by block, and how many were taken."""
    taken, statuses = [], []
    blocks = [{"type": "http.request", "body": block, "more_body": True} for block in body]
    blocks[-1]["more_body"] = False

    async def receive():
        taken.append(True)
        return blocks[len(taken) - 1]

    async def send(message):
        statuses.append(message.get("status"))

    fields = {"content-type": kind, **headers}
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in fields.items()],
    }
    asyncio.run(app(scope, receive, send))
    return statuses[0], len(taken)


def test_what_says_that_it_is_too_large_is_refused_and_never_read():
    size = {"content-length": "100001"}
    assert given(made(), [bytes(9)], **size) == (413, 0)
    assert given(made(), [bytes(9)], "/v1/datastores", "application/json", **size) == (413, 0)


def test_what_does_not_say_how_large_it_is_is_read_up_to_the_limit():
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    blocks = [head, *[bytes(10_000)] * 1000]
    assert given(made(), blocks) == (413, 11)
    assert given(made(), blocks, "/v1/datastores") == (413, 11)
    assert given(made(), blocks, "/v1/datastores", "application/json") == (413, 11)
    assert given(made(), blocks, **{"content-length": "7"}) == (413, 11), "it lied"


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/json", "image/png", "multipart/mixed"]
)
def test_a_recording_comes_in_a_form(refused, kind):
    answer = client(made()).post(TRANSCRIBE, content=b"x", headers={"Content-Type": kind})
    assert "multipart/form-data" in refused(answer, 415)


def test_texts_come_as_json_or_in_a_form(refused):
    answer = client(made()).post("/v1/datastores", content=b"a=1", headers={"Content-Type": "a/b"})
    assert "application/json or multipart/form-data, not a/b" in refused(answer, 415)


def test_a_task_may_come_without_a_body(refused):
    async def tend(name, task, options):
        return {"done": task}

    asked = client(made(retriever=Handle(tend=tend)))
    place = "/v1/datastores/names/upkeep"
    assert asked.post(f"{place}/overview").json() == {"done": "overview"}
    refused(asked.post(f"{place}/create_snapshot"), 422, "missing", "name")
    refused(asked.post(TRANSCRIBE), 422, "missing", "file")
    needed = ("datastores", "datastores/a/entries", "datastores/a/search", "datastores/a/preview")
    for path in (*needed, "realtime/client_secrets"):
        answer = asked.post(f"/v1/{path}")
        assert answer.json()["error"]["message"].startswith("body: "), path
        assert answer.status_code == 422, path
    answer = asked.post(f"{place}/overview", content=iter([b"{}"]))
    assert "not nothing" in refused(answer, 415), "it is sent in chunks"


def test_a_form_without_a_boundary_is_refused(refused):
    for kind in ("multipart/form-data", FORM):
        for path in (TRANSCRIBE, "/v1/datastores"):
            answer = client(made()).post(path, content=b"?", headers={"Content-Type": kind})
            refused(answer, 400)


def test_whom_the_service_has_no_room_for_is_asked_to_come_again(refused, second):
    inside, free = threading.Event(), threading.Event()

    async def slow(order):
        inside.set()
        await asyncio.to_thread(free.wait, 10)
        return await transcribe(order)

    with served(made(Handle(transcribe=slow), requests=1)) as url:
        first = threading.Thread(
            target=requests.post, args=(url + TRANSCRIBE,), kwargs={"files": second}
        )
        first.start()
        assert inside.wait(10)
        refused(requests.post(url + TRANSCRIBE, files=second, timeout=10), 429, "busy")
        theirs = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.RateLimitError):
            theirs.audio.transcriptions.create(model="mmrag", **second)
        assert requests.get(f"{url}/v1/models", timeout=10).status_code == 200
        free.set()
        first.join()
        assert requests.post(url + TRANSCRIBE, files=second, timeout=10).status_code == 200


def test_who_leaves_a_stream_makes_room(second):
    gone = threading.Event()

    async def trickle(order):
        yield "a"
        try:
            await asyncio.sleep(60)
        finally:
            gone.set()

    with served(made(Handle(stream=trickle), requests=1)) as url:
        with requests.post(
            url + TRANSCRIBE, files=second, data={"stream": "true"}, stream=True, timeout=10
        ) as response:
            next(response.iter_lines())
        assert gone.wait(5)
        again = requests.post(url + TRANSCRIBE, files={"file": ("a.wav", b"?")}, timeout=10)
        assert again.status_code == 400


def failing(error):
    async def fail(*_):
        raise error

    async def fail_amid(_):
        yield "a"
        raise error

    return Handle(transcribe=fail, stream=fail_amid)


SECRET = "/opt/mmrag/serve/decoder.py"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (BackPressureError(num_queued_requests=1, max_queued_requests=1), 429, "busy"),
        (ActorDiedError(), 503, "unavailable"),
        (TimeoutError(SECRET), 504, "timeout"),
        (ValueError(SECRET), 500, None),
        (KeyError(SECRET), 500, None),
        (MemoryError(), 500, None),
    ],
)
def test_what_fails_inside_is_told_without_the_inside(
    refused, second, monkeypatch, error, status, code
):
    monkeypatch.setattr("serve.pipeline.PAUSE_SECONDS", 0.001)
    asked = client(made(failing(error)))
    message = refused(asked.post(TRANSCRIBE, files=second), status, code)
    assert SECRET not in message
    streamed = asked.post(TRANSCRIBE, files=second, data={"stream": "true"})
    assert streamed.status_code == 200 and SECRET not in streamed.text
    last = streamed.text.strip().split("\n\n")[-1]
    assert '"error"' in last and (code is None or code in last)


def test_what_takes_too_long_is_given_up(refused, second):
    given_up = threading.Event()

    async def slow(order):
        try:
            await asyncio.sleep(60)
        finally:
            given_up.set()

    started = time.monotonic()
    answer = client(made(Handle(transcribe=slow), timeout_seconds=0.2)).post(
        TRANSCRIBE, files=second
    )
    refused(answer, 504, "timeout")
    assert given_up.wait(5) and time.monotonic() - started < 5


def test_a_part_that_is_replaced_meanwhile_is_asked_again(second, monkeypatch):
    monkeypatch.setattr("serve.pipeline.PAUSE_SECONDS", 0.001)
    calls = []

    async def dies_twice(order):
        calls.append(order)
        if len(calls) < 3:
            raise ActorDiedError()
        return await transcribe(order)

    async def breaks_twice(order):
        calls.append(order)
        yield "a "
        if len(calls) < 3:
            raise ActorDiedError()
        yield "word"
        yield await transcribe(order)

    asked = client(made(Handle(transcribe=dies_twice, stream=breaks_twice)))
    assert asked.post(TRANSCRIBE, files=second).json()["text"] == "a word"
    calls.clear()
    told = asked.post(TRANSCRIBE, files=second, data={"stream": "true"}).text
    assert told.count('"delta": "a "') == told.count('"delta": "word"') == 1
    assert '"text": "a word"' in told and len(calls) == 3


def test_a_part_that_stays_away_is_asked_for_in_vain(refused, second, monkeypatch):
    monkeypatch.setattr("serve.pipeline.PAUSE_SECONDS", 0.001)
    refused(
        client(made(failing(ActorDiedError()))).post(TRANSCRIBE, files=second), 503, "unavailable"
    )


def test_the_service_is_ready_when_all_of_it_is():
    async def well():
        return None

    async def ill():
        raise RuntimeError(SECRET)

    parts = {name: Handle(alive=well) for name in ("encoder", "retriever", "decoder")}
    assert client(made(**parts)).get("/readyz").json() == {"status": "ok"}
    for name in parts:
        answer = client(made(**parts | {name: Handle(alive=ill)})).get("/readyz")
        assert answer.status_code == 503 and answer.json() == {"status": "starting"}
        assert "Retry-After" in answer.headers


def test_every_answer_carries_the_security_headers(second):
    asked = client(made())
    for answer in [
        asked.get("/"),
        asked.get("/docs"),
        asked.get("/page/page.js"),
        asked.get("/v1/models"),
        asked.get("/nothing"),
        asked.post(TRANSCRIBE, files=second),
        asked.post(TRANSCRIBE, files=second, data={"stream": "true"}),
        asked.post(TRANSCRIBE, content=b"", headers={"Content-Type": "a/b"}),
        client(made(failing(ValueError()))).post(TRANSCRIBE, files=second),
    ]:
        assert answer.headers["X-Content-Type-Options"] == "nosniff", answer.url
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy
        assert ("unsafe-inline" in policy) == answer.url.path.startswith("/docs")


def paused(head=b""):
    """A body that begins with `head` and then brings nothing more."""

    async def body():
        yield head
        await asyncio.sleep(60)

    return body()


def upload(app, body, **headers):
    """The answer to a body that comes in slowly, and the seconds until it was there."""
    fields = {"content-type": FORM, **headers}
    sent = []

    async def send(message):
        sent.append(message)

    async def call():
        blocks = aiter(body)

        async def receive():
            async for block in blocks:
                return {"type": "http.request", "body": block, "more_body": True}
            await asyncio.sleep(60)

        scope = {
            "type": "http",
            "method": "POST",
            "path": TRANSCRIBE,
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in fields.items()],
        }
        await app(scope, receive, send)

    started = time.monotonic()
    asyncio.run(call())
    text = b"".join(message.get("body", b"") for message in sent[1:])
    return SimpleNamespace(
        status_code=sent[0]["status"],
        headers=Headers(raw=sent[0]["headers"]),
        text=text.decode(),
        json=lambda: json.loads(text),
        seconds=time.monotonic() - started,
    )


HEAD = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'


def test_an_upload_that_stops_is_given_up(refused, monkeypatch):
    monkeypatch.setattr(bodies, "GRACE_SECONDS", 0.2)
    for head in (b"", HEAD):
        answer = upload(made(receive_bytes_per_second=1000), paused(head))
        message = refused(answer, 408, "slow_upload")
        assert message == "the upload came in at less than 1000 bytes a second"
        assert answer.headers["Connection"] == "close" and answer.seconds < 5


def test_an_upload_that_keeps_its_pace_may_take_its_time_up_to_a_limit(refused, monkeypatch):
    monkeypatch.setattr(bodies, "GRACE_SECONDS", 0.3)

    async def steady():
        yield HEAD
        while True:
            await asyncio.sleep(0.05)
            yield bytes(200)

    answer = upload(made(receive_bytes_per_second=1000, receive_seconds=1), steady())
    assert refused(answer, 408, "slow_upload") == "the upload took longer than 1 s"
    assert 0.9 < answer.seconds < 5


def test_what_is_answered_may_take_longer_than_what_comes_in(second):
    """A body that is there has all the time that work has."""

    async def slow(request):
        await asyncio.sleep(0.6)
        return await transcribe(request)

    app = made(Handle(transcribe=slow), receive_seconds=0.3)
    assert client(app).post(TRANSCRIBE, files=second).status_code == 200


def half_sent(url, count):
    """Connections that have sent a header and the beginning of a body."""
    head = f"POST {TRANSCRIBE} HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n".encode()
    head += b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
    host, port = url.removeprefix("http://").split(":")
    slow = [socket.create_connection((host, int(port)), timeout=20) for _ in range(count)]
    for one in slow:
        one.sendall(head)
    return slow


def test_40_slow_uploads_take_nobodys_place(second, monkeypatch):
    monkeypatch.setattr(bodies, "GRACE_SECONDS", 2)
    with served(made(requests=2)) as url:
        slow = half_sent(url, 40)
        for _ in range(5):
            assert requests.post(url + TRANSCRIBE, files=second, timeout=10).status_code == 200
        answers = [one.recv(4096) for one in slow]
        assert all(answer.startswith(b"HTTP/1.1 408 ") for answer in answers)
        for one in slow:
            one.close()


def test_uploads_have_their_own_limit(refused, second):
    with served(made(receiving=3)) as url:
        slow = half_sent(url, 3)
        deadline = time.monotonic() + 10
        while (answer := requests.post(url + TRANSCRIBE, files=second, timeout=10)).ok:
            assert time.monotonic() < deadline
        assert refused(answer, 429, "busy") == "too many uploads at a time: try again"
        for one in slow:
            one.close()
        while not requests.post(url + TRANSCRIBE, files=second, timeout=10).ok:
            assert time.monotonic() < deadline, "their places stay taken"


def test_texts_in_json_are_no_upload(refused):
    app = made(upload_mb=25)
    body = b'{"name": "a", "texts": ["' + b"a" * 4_000_000 + b'"]}'
    answer = client(app).post("/v1/datastores", content=body, headers=JSON)
    assert refused(answer, 413, "too_large") == "the upload is larger than 4 MB"


def test_a_service_that_stops_says_so_as_its_schema_has_it():
    app = made()
    [middle] = [one for one in app.user_middleware if "access" in one.kwargs]
    middle.kwargs["access"].draining = True
    asked = client(app)
    answer = asked.get("/readyz")
    assert (answer.status_code, answer.json()) == (503, {"status": "stopping"})
    told = asked.get("/openapi.json").json()["components"]["schemas"]["Status"]
    assert "stopping" in told["properties"]["status"]["enum"]
