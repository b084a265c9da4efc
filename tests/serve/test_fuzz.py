"""Whatever is sent: an answer in time, never one that says that the service is at fault."""

import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from uuid import uuid4

import malformed
import psutil
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from service_process import serving

from mmrag import shipped
from serve.access.accounting import USAGE
from serve.access.keys import SIGNING

TRANSCRIBE, DATASTORES = "/v1/audio/transcriptions", "/v1/datastores"
EXPECTED = {200, 201, 400, 404, 405, 409, 413, 415, 422, 429}
BOUNDARY = "a-line-that-nothing-else-holds"


@pytest.fixture(scope="module", autouse=True)
def healthy_afterwards(service):
    """Nothing that was made here stays, and every process is the one that it was."""
    parts = ("encoder", "retriever", "decoder", "api")
    before = [process.pid for part in parts for process in service.processes(part)]
    assert len(before) == len(parts)
    yield
    for made in service.request("GET", DATASTORES).json()["data"]:
        service.request("DELETE", f"{DATASTORES}/{made['id']}")
    assert [process.pid for part in parts for process in service.processes(part)] == before
    there = {path.name for path in service.directory.iterdir() if not path.name.startswith("@")}
    assert there <= {USAGE, SIGNING}


ROUTES = [
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("POST", TRANSCRIBE),
    ("POST", "/v1/audio/translations"),
    ("GET", DATASTORES),
    ("POST", DATASTORES),
    ("GET", f"{DATASTORES}/{{name}}"),
    ("DELETE", f"{DATASTORES}/{{name}}"),
    ("GET", f"{DATASTORES}/{{name}}/entries"),
    ("POST", f"{DATASTORES}/{{name}}/entries"),
    ("DELETE", f"{DATASTORES}/{{name}}/entries"),
]


@pytest.fixture(scope="module")
def description(service):
    return schemathesis.openapi.from_url(f"{service.url}/openapi.json")


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_what_the_description_allows_is_answered(description, method, path):
    @given(description[path][method].as_strategy())
    @settings(
        max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
    )
    def answered(case):
        response = case.call(timeout=60)
        case.validate_response(response, checks=[not_a_server_error])
        assert response.status_code in EXPECTED

    answered()


def body(fields: dict[str, str], files: list[tuple[str, bytes]]) -> bytes:
    """A form as a browser sends it."""
    parts = [(f'name="{name}"', value.encode()) for name, value in fields.items()]
    parts += [(f'name="file"; filename="{name}"', data) for name, data in files]
    blocks = [
        f"--{BOUNDARY}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + data + b"\r\n"
        for head, data in parts
    ]
    return b"".join(blocks) + f"--{BOUNDARY}--\r\n".encode()


def damaged(data: bytes, draw: random.Random, reach: int) -> bytes:
    """`data` with a few bytes changed, lost, added or doubled, most of them among the first."""
    data = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 4, 16])):
        at = draw.randrange(min(len(data), reach) if draw.random() < 0.7 else len(data))
        length = draw.randrange(1, 64)
        match draw.randrange(6):
            case 0 | 1:
                data[at] = draw.choice([0, 10, 13, 34, 45, 127, 128, 255, draw.randrange(256)])
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = draw.randbytes(length)
            case 4:
                data[at:at] = data[at : at + length]
            case 5 if draw.random() < 0.3:
                del data[at:]
        if len(data) < 2:
            break
    return bytes(data)


@pytest.mark.parametrize("bodies", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_bodies_are_answered(service, wave, write, clip, bodies):
    """Forms that are damaged anywhere, and whole forms with damaged audio in them."""
    sentence = "is the helmet still on the old farm"
    kinds = ("FLAC", "WAV", "OGG", "MP3", "AIFF", "AU", "CAF")
    audio = [write(wave(sentence)[:16_000], kind) for kind in kinds]
    fields = {
        "model": "mmrag",
        "prompt": "priya raghavan, mira kapoor",
        "temperature": "0.2",
        "response_format": "verbose_json",
        "timestamp_granularities[]": "word",
        "context[]": "imogen varga",
        "include[]": "retrieval",
        "retrieval": "both",
    }

    def send(seed: int) -> None:
        draw = random.Random(seed)
        path, kind = TRANSCRIBE, f"multipart/form-data; boundary={BOUNDARY}"
        chosen = {name: fields[name] for name in fields if draw.random() < 0.4}
        recording = draw.choice(audio)
        match draw.randrange(5):
            case 0 | 1:
                data = body(chosen, [("a.wav", damaged(recording, draw, 200))])
            case 2:
                data = damaged(body(chosen, [("a.wav", recording)]), draw, 1500)
            case 3:
                path = draw.choice([DATASTORES, f"{DATASTORES}/nothing/entries"])
                form = {"name": f"fuzz-{uuid4().hex[:8]}", "text": "one two"}
                data = damaged(body(form, [("a.wav", recording)]), draw, 400)
            case 4:
                path, kind = DATASTORES, "application/json"
                made = {"name": f"fuzz-{uuid4().hex[:8]}", "texts": ["mira kapoor", "a b"]}
                data = damaged(json.dumps(made).encode(), draw, 60)
        answer = service.request("POST", path, data=data, headers={"Content-Type": kind})
        assert answer.status_code in EXPECTED, (seed, path, answer.status_code, answer.text)
        if answer.status_code >= 400:
            assert set(answer.json()) == {"error"}, (seed, answer.text)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(send, range(bodies)))
    assert service.text(clip(sentence)) == sentence


HEADERS = [
    {"Content-Type": "multipart/form-data; boundary=" + "x" * 5000},
    {"Content-Type": "multipart/form-data; boundary=\xe9".encode("latin-1")},
    {"Content-Type": "multipart/form-data; boundary"},
    {"Content-Type": "multipart/form-data; charset=utf-7; boundary=x"},
    {"Content-Type": "multipart/form-data; boundary=x", "Content-Encoding": "gzip"},
    {"Content-Type": "multipart/form-data; boundary=x", "Authorization": "Bearer " + "k" * 5000},
    {"Content-Type": "application/json; charset=ebcdic"},
    {"Content-Type": "application/json", "Accept": "image/png"},
]


@pytest.mark.parametrize("headers", HEADERS, ids=range(len(HEADERS)))
@pytest.mark.parametrize("path", [TRANSCRIBE, DATASTORES])
def test_strange_headers_are_refused_like_anything_else(service, path, headers):
    for data in (b"", b"--x\r\n\r\n--x--", b"{}"):
        answer = service.request("POST", path, data=data, headers=headers)
        assert answer.status_code in EXPECTED - {200, 201}, answer.text
        assert set(answer.json()) == {"error"}


def test_a_thousand_parts_in_a_form_are_too_many(service):
    fields = [("context[]", (None, f"name {n}")) for n in range(1200)]
    answer = service.request("POST", TRANSCRIBE, files=[("file", ("a", b"?")), *fields])
    assert answer.status_code == 400 and set(answer.json()) == {"error"}


def test_malformed_requests_are_refused_or_dropped(service):
    host, _, port = service.url.removeprefix("http://").partition(":")

    def answered(sent: bytes) -> bool:
        return malformed.answered(host, int(port), sent)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(answered, malformed.requests(60)))
    assert sum(answers) >= 50, "few are never whole"
    service.ready()


def commands(pid: int) -> dict[int, str]:
    """What the processes below one are, by number."""
    found = {}
    for one in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found[one.pid] = " ".join(one.cmdline())
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_thousand_malformed_requests_leave_a_service_healthy(tmp_path, clip):
    """Through HAProxy, as callers' requests come, eight at a time."""
    sentence = "is the helmet still on the old farm"
    with serving(tmp_path, f"model={shipped.TINY}", "decode.max_seconds=4") as process:
        port = int(process.url.rpartition(":")[2])
        family = commands(process.pid)

        def answered(sent: bytes) -> bool:
            return malformed.answered("127.0.0.1", port, sent)

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(answered, malformed.requests(2000)))
        assert sum(answers) >= 1900, "few are never whole"
        assert requests.get(f"{process.url}/readyz", timeout=60).json() == {"status": "ok"}
        files = {"file": ("a.flac", clip(sentence))}
        url = f"{process.url}/v1/audio/transcriptions"
        assert requests.post(url, files=files, timeout=60).json()["text"] == sentence
        left = commands(process.pid)
        # Serve has HAProxy take up other replicas in a new process, which names the one before it.
        taken_over = {int(pid) for one in left.values() for pid in re.findall(r" -sf (\d+)", one)}
        ended = family.keys() - left.keys() - taken_over
        assert [family[one] for one in ended if "ray::IDLE" not in family[one]] == []
