import json
import re
import socket
import threading
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain

import pytest

from mmrag import client
from mmrag.client import Answer, Service, ServiceError, events
from mmrag.records import Source, Transcript, Word
from mmrag.storage import located

SOURCE = {
    "entry": 12,
    "distance": None,
    "attention": 0.4,
    "document": "zoë kuri",
    "utterance": "phrase-0",
    "text": "call zoë kuri",
}
WORDS = [
    {
        "word": "call",
        "start": 0.1,
        "end": 0.4,
        "probability": 0.9,
        "lm_probability": 0.8,
        "changed": False,
        "source": None,
    },
    {
        "word": "zoë",
        "start": 0.42,
        "end": 0.81,
        "probability": 0.93,
        "lm_probability": 0.02,
        "changed": True,
        "source": SOURCE,
    },
]
DONE = {
    "type": "transcript.text.done",
    "text": "call zoë",
    "duration": 1.5,
    "usage": {"type": "duration", "seconds": 2},
    "words": WORDS,
    "missing_shards": 1,
}
DELTAS = ["call ", "so ", "we"]
"""What the model said first."""
ANSWER = Answer(
    Transcript(
        "call zoë",
        (
            Word("call", 0.9, 0.8, False, None, 0.1, 0.4),
            Word("zoë", 0.93, 0.02, True, Source(**SOURCE), 0.42, 0.81),
        ),
        end=1.5,
    ),
    missing_shards=1,
)


def sse(*said, end="\n"):
    """Server-sent events as bytes."""
    parts = [f"data: {json.dumps(one, ensure_ascii=False)}{end}{end}" for one in said]
    return "".join(parts).encode()


def delta(text):
    return {"type": "transcript.text.delta", "delta": text}


STREAM = sse(*map(delta, DELTAS), DONE)


def refusal(status, message, **headers):
    body = {"error": {"message": message, "type": "server_error", "param": None, "code": None}}
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return Canned([json.dumps(body).encode()], status, headers)


class Canned:
    """An answer to a request; unless `finished`, the connection breaks before its end."""

    def __init__(self, chunks, status=200, headers=None, finished=True):
        self.chunks, self.status, self.finished = chunks, status, finished
        self.headers = headers or {}


class Endpoint:
    """A small HTTP server with canned answers, one a request; the last one is given ever after."""

    def __init__(self):
        self.answers = [Canned([STREAM])]
        self.asked = []
        """Path, headers and form (name -> contents) of each request."""
        handler = type("Handler", (Handler,), {"endpoint": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        left, body = int(self.headers["Content-Length"]), b""
        while left:
            block = self.rfile.read(min(left, 2**16))
            left -= len(block)
            body = block if len(body) > 2**20 else body + block
        self.endpoint.asked.append((self.path, self.headers, form(self.headers, body)))
        answers = self.endpoint.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send_response(answer.status)
        for name, value in {"Transfer-Encoding": "chunked", **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        for chunk in chain(answer.chunks, [b""] * answer.finished):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            self.wfile.flush()
        self.close_connection = not answer.finished

    def log_message(self, *_):
        pass


def form(headers, body):
    """The parts of a multipart body: name -> contents."""
    boundary = headers["Content-Type"].partition("boundary=")[2].encode()
    parts = {}
    for part in body.split(b"--" + boundary)[1:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        name = re.search(b'name="(.*?)"', head)[1].decode()
        parts.setdefault(name, []).append(content.removesuffix(b"\r\n"))
    return parts


@pytest.fixture(scope="module")
def running():
    endpoint = Endpoint()
    thread = threading.Thread(target=endpoint.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


@pytest.fixture
def endpoint(running):
    running.answers, running.asked = [Canned([STREAM])], []
    return running


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.wav"
    path.write_bytes(bytes(range(256)) * 200 + b"\r\n--")
    return path


def transcribed(endpoint, path, key=None, **options):
    return list(Service(endpoint.url, key).transcribe(path, **options))


def refused(endpoint, path):
    """What is said of a file that cannot be transcribed."""
    with pytest.raises(ServiceError) as raised:
        transcribed(endpoint, path)
    return str(raised.value)


def test_text_comes_as_it_is_made_and_the_answer_last(endpoint, clip):
    assert transcribed(endpoint, clip) == [*DELTAS, ANSWER]


def test_the_first_words_are_there_before_the_last_are_made(endpoint, clip):
    more = threading.Event()

    def chunks():
        yield sse(delta("call "))
        assert more.wait(10)
        yield sse(DONE)

    endpoint.answers = [Canned(chunks())]
    parts = Service(endpoint.url).transcribe(clip)
    assert next(parts) == "call "
    more.set()
    assert list(parts) == [ANSWER]


@pytest.mark.parametrize("size", [1, 2, 7])
def test_events_are_read_however_their_bytes_are_cut(endpoint, clip, size):
    spoken = sse(delta("zoë "), delta("ünïcödé 🎉"), DONE)
    endpoint.answers = [Canned([spoken[n : n + size] for n in range(0, len(spoken), size)])]
    assert transcribed(endpoint, clip) == ["zoë ", "ünïcödé 🎉", ANSWER]


def test_events_keep_to_the_standard():
    lines = b': a comment\r\n\r\nevent: x\r\ndata: {"a":\r\ndata:1}\r\n\r\ndata: {"b": 2}\n\n'
    assert list(events([lines, b'data: {"cut": "off"}\n'])) == [{"a": 1}, {"b": 2}]


def test_events_of_a_kind_that_nobody_knows_are_passed_over(endpoint, clip):
    endpoint.answers = [Canned([sse({"type": "transcript.text.mood"}), STREAM])]
    assert transcribed(endpoint, clip) == [*DELTAS, ANSWER]


def test_the_form_holds_the_file_as_it_is_and_what_was_asked_for(endpoint, clip):
    asked = {"datastore": "contacts", "phrases": ["zoë kuri", "rome"], "retrieval": "both"}
    transcribed(endpoint, clip, **asked, shortlist=0)
    [(path, headers, sent)] = endpoint.asked
    assert path == "/v1/audio/transcriptions"
    assert "Authorization" not in headers
    assert sent == {
        "file": [clip.read_bytes()],
        "stream": [b"true"],
        "include[]": [b"retrieval"],
        "context[]": ["zoë kuri".encode(), b"rome"],
        "datastore": [b"contacts"],
        "retrieval": [b"both"],
        "shortlist": [b"0"],
    }


def test_what_was_not_asked_for_is_not_sent(endpoint, clip):
    transcribed(endpoint, clip)
    assert endpoint.asked[0][2].keys() == {"file", "stream", "include[]"}


def test_an_empty_file_is_the_endpoints_to_judge(endpoint, tmp_path):
    (tmp_path / "empty.wav").touch()
    transcribed(endpoint, tmp_path / "empty.wav")
    assert endpoint.asked[0][2]["file"] == [b""]


def test_a_recording_at_a_url_is_sent_as_one_on_disk_is(endpoint, clip):
    place = located("memory://clips/visit.wav")
    place.write_bytes(clip.read_bytes())
    transcribed(endpoint, place)
    assert endpoint.asked[0][2]["file"] == [clip.read_bytes()]


def test_a_large_file_is_never_in_memory_as_a_whole(endpoint, tmp_path):
    large = tmp_path / "large.wav"
    with large.open("wb") as file:
        file.truncate(2**25)
    tracemalloc.start()
    try:
        transcribed(endpoint, large)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**23
    assert int(endpoint.asked[0][1]["Content-Length"]) > 2**25


def test_the_key_is_a_bearer_token_whatever_netrc_says(endpoint, clip, tmp_path, monkeypatch):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else")
    monkeypatch.setenv("NETRC", str(netrc))
    transcribed(endpoint, clip, key="k-123")
    assert endpoint.asked[0][1]["Authorization"] == "Bearer k-123"


def test_a_url_may_end_in_v1(endpoint, clip):
    for url in (f"{endpoint.url}/", f"{endpoint.url}/v1", f"{endpoint.url}/v1/"):
        assert list(Service(url).transcribe(clip))[-1] == ANSWER
    assert {path for path, *_ in endpoint.asked} == {"/v1/audio/transcriptions"}


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://host", "http://", "http://me:secret@host", "http://host?x=1"]
)
def test_a_url_of_no_endpoint_is_refused_at_the_door(url):
    with pytest.raises(ValueError, match="URL") as raised:
        Service(url)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("key", ["se cret", "secret\n", "secrét"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(key):
    with pytest.raises(ValueError, match="API key") as raised:
        Service("http://127.0.0.1", key)
    assert "secr" not in str(raised.value)


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 500, 503, 504])
def test_a_refusal_is_told_in_the_endpoints_words_and_not_tried_again(endpoint, clip, status):
    endpoint.answers = [refusal(status, "not like this", Retry_After="1")]
    assert refused(endpoint, clip) == f"{endpoint.url} answers {status}: not like this"
    assert len(endpoint.asked) == 1


def test_a_refusal_by_somebody_in_between_is_told_too(endpoint, clip):
    endpoint.answers = [Canned([b"<h1>Oh no</h1>"], status=502)]
    assert refused(endpoint, clip) == f"{endpoint.url} answers 502: Bad Gateway"


def test_a_redirect_is_not_followed(endpoint, clip):
    endpoint.answers = [Canned([], 307, {"Location": "http://else.where/"})]
    said = refused(endpoint, clip)
    assert said == f"{endpoint.url} answers 307: moved to http://else.where/"


def test_a_busy_endpoint_is_asked_again_when_it_says(endpoint, clip, monkeypatch):
    waits = []
    monkeypatch.setattr(client.time, "sleep", waits.append)
    busy = [refusal(429, "busy", Retry_After=told) for told in ("3", "Wed, 21 Oct 2015", "86400")]
    endpoint.answers = [*busy, Canned([STREAM])]
    assert transcribed(endpoint, clip) == [*DELTAS, ANSWER]
    assert waits == [3, client.WAIT_SECONDS, client.LONGEST_WAIT_SECONDS]
    assert [sent["file"] for *_, sent in endpoint.asked] == [[clip.read_bytes()]] * 4


def test_an_endpoint_that_stays_busy_is_left_alone(endpoint, clip):
    endpoint.answers = [refusal(429, "busy", Retry_After="0")]
    assert refused(endpoint, clip) == f"{endpoint.url} answers 429: busy"
    assert len(endpoint.asked) == client.ATTEMPTS


def test_an_error_in_the_stream_ends_it(endpoint, clip):
    gone = {"error": {"message": "a part of the service does not answer", "type": "server_error"}}
    endpoint.answers = [Canned([sse(delta("call "), gone)])]
    parts = Service(endpoint.url).transcribe(clip)
    assert next(parts) == "call "
    with pytest.raises(ServiceError, match=r"^a part of the service does not answer$"):
        next(parts)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Canned([sse(delta("call "))]), "ended before the transcript did"),
        (Canned([sse(DONE)[:-1]]), "ended before the transcript did"),
        (Canned([b"<h1>Welcome</h1>"]), "ended before the transcript did"),
        (Canned([sse(delta("call "))], finished=False), "broke off"),
        (Canned([b"data: {oh\n\n"]), "cannot be understood"),
        (Canned([b"data: \xff\n\n"]), "cannot be understood"),
        (Canned([b'data: "oh"\n\n']), "cannot be understood"),
        (Canned([sse({"type": "transcript.text.done", "text": "call"})]), "cannot be understood"),
        (Canned([sse(DONE | {"words": [{"word": "call"}]})]), "cannot be understood"),
    ],
)
def test_an_answer_that_is_no_whole_transcript_is_an_error(endpoint, clip, answer, reason):
    endpoint.answers = [answer]
    assert reason in refused(endpoint, clip)


def test_where_nobody_listens_the_reason_is_a_short_one(clip):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ServiceError, match=f"^no answer from {url}: Connection refused$"):
        list(Service(url).transcribe(clip))


def test_an_endpoint_that_says_nothing_is_not_waited_for_forever(clip, monkeypatch):
    monkeypatch.setattr(client, "READ_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ServiceError, match=f"^no answer from {url} in 0.1 s$"):
            list(Service(url).transcribe(clip))


def test_an_endpoint_that_falls_silent_is_not_waited_for_forever(endpoint, clip, monkeypatch):
    monkeypatch.setattr(client, "READ_SECONDS", 0.1)
    go = threading.Event()

    def chunks():
        yield sse(delta("call "))
        go.wait(10)

    endpoint.answers = [Canned(chunks(), finished=False)]
    parts = Service(endpoint.url).transcribe(clip)
    assert next(parts) == "call "
    with pytest.raises(ServiceError, match="broke off: timed out"):
        next(parts)
    go.set()


def test_a_file_that_cannot_be_read_is_the_callers_error(endpoint, tmp_path):
    for path in (tmp_path / "gone.wav", tmp_path):
        with pytest.raises(OSError):
            transcribed(endpoint, path)
    assert endpoint.asked == []
