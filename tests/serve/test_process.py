"""`python -m serve`: the service as people start it, with HAProxy in front, and as they stop it."""

import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import openai
import psutil
import pytest
import requests
from openai import OpenAI
from service_process import serving, start
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from cluster.ports import free_ports
from serve.operations.listening import require_port

SENTENCE = "please call priya raghavan tomorrow"
NAME = "priya raghavan"
KEY = "a-key"
SECONDS = 60

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """The service in a process of its own, with a key; it is stopped by the last test."""
    settings = ("limits.upload_mb=2", "limits.timeout_seconds=300")
    with serving(tmp_path_factory.mktemp("process"), *settings, MMRAG_API_KEYS=KEY) as process:
        yield process


@pytest.fixture
def theirs(process):
    return OpenAI(base_url=f"{process.url}/v1", api_key=KEY, max_retries=0, timeout=SECONDS)


def test_it_says_where_it_is(process):
    told = process.log.read_text()
    assert f"ready: {process.url} (the page)" in told
    assert requests.get(f"{process.url}/readyz", timeout=SECONDS).json() == {"status": "ok"}
    assert "Traceback" not in told


def test_only_who_has_the_key_comes_in(process, theirs, refused, clip):
    answer = requests.get(f"{process.url}/v1/models", timeout=SECONDS)
    refused(answer, 401, "invalid_api_key")
    with pytest.raises(openai.AuthenticationError):
        OpenAI(base_url=f"{process.url}/v1", api_key="guess", max_retries=0).models.list()
    assert [model.id for model in theirs.models.list()] == ["mmrag"]


def test_whatever_id_a_request_comes_with_its_answer_has_one(process):
    for given, kept in (("order-7", True), ("a b", False), ("a" * 200, False)):
        answer = requests.get(
            f"{process.url}/healthz", headers={"X-Request-ID": given}, timeout=SECONDS
        )
        [one] = answer.raw.headers.getlist("x-request-id")
        assert one == given if kept else re.fullmatch("[0-9a-f]{32}", one)


def test_a_websocket_without_the_key_is_told_so_over_http(process):
    address = process.url.replace("http", "ws") + "/v1/realtime"
    for offered in (["realtime"], ["realtime", "openai-insecure-api-key.guess"]):
        with pytest.raises(InvalidStatus) as refused_with, connect(address, subprotocols=offered):
            pass
        assert refused_with.value.response.status_code == 401
        assert b"invalid_api_key" in refused_with.value.response.body


def test_a_name_that_is_added_is_heard(process, theirs, clip):
    def transcribe(**more):
        file = ("a.flac", clip(SENTENCE))
        return theirs.audio.transcriptions.create(model="mmrag", file=file, **more)

    assert transcribe().text != SENTENCE
    headers = {"Authorization": f"Bearer {KEY}"}
    made = requests.post(
        f"{process.url}/v1/datastores",
        json={"name": "names", "texts": [NAME]},
        headers=headers,
        timeout=SECONDS,
    )
    assert made.status_code == 201, made.text
    looks_up = {"extra_body": {"datastore": "names"}}
    assert transcribe(**looks_up).text == SENTENCE
    *deltas, done = transcribe(stream=True, **looks_up)
    assert "".join(event.delta for event in deltas) == done.text == SENTENCE and len(deltas) > 3


def test_haproxy_hands_uploads_on_as_they_come(process, tmp_path):
    (tmp_path / "large").write_bytes(bytes(20_000_000))
    command = ["curl", "-sS", "-m", "30", "--limit-rate", "8M", "-o", str(tmp_path / "answer")]
    command += ["-H", f"Authorization: Bearer {KEY}", "-H", "Transfer-Encoding: chunked"]
    command += ["-F", f"file=@{tmp_path / 'large'}", "-w", "%{http_code} %{size_upload}"]
    command.append(f"{process.url}/v1/audio/transcriptions")
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    status, taken = map(int, told.stdout.split())
    assert status == 413 and '"too_large"' in (tmp_path / "answer").read_text()
    assert taken < 4_000_000


def test_who_leaves_makes_room(process, write, wave):
    """More callers leave amid a long transcript than there is room for at a time."""
    sentence = np.pad(wave("is the helmet still on the old farm"), (0, 8000))
    minutes, headers = write(np.tile(sentence, 60), "OGG"), {"Authorization": f"Bearer {KEY}"}
    for form in ({}, {"stream": "true"}):
        for _ in range(20):  # one at a time: if they stayed inside, the seventeenth were refused
            files = {"file": ("a.ogg", minutes)}
            try:
                with requests.post(
                    f"{process.url}/v1/audio/transcriptions",
                    files=files,
                    data=form,
                    headers=headers,
                    stream=True,
                    timeout=0.7,
                ) as answer:
                    assert answer.status_code == 200, answer.text
            except requests.Timeout:
                pass
    short = {"file": ("a.flac", write(wave("is the helmet still on the old farm")))}
    started = time.monotonic()
    answer = requests.post(
        f"{process.url}/v1/audio/transcriptions", files=short, headers=headers, timeout=SECONDS
    )
    assert answer.json()["text"] == "is the helmet still on the old farm"
    assert time.monotonic() - started < 20, "what was given up is still being transcribed"


def listening(process):
    """The addresses on which HAProxy listens, of a service's processes."""
    family = psutil.Process(process.pid).children(recursive=True)
    programs = [one for one in family if Path(one.cmdline()[0] or "-").name == "haproxy"]
    assert programs
    return {
        (found.laddr.ip, found.laddr.port)
        for one in programs
        for found in one.net_connections("tcp")
        if found.status == psutil.CONN_LISTEN
    }


def test_haproxy_listens_to_this_machine_alone_but_for_callers(process):
    addresses = listening(process)
    assert len(addresses) == 3 and {ip for ip, _ in addresses} == {"127.0.0.1"}
    assert ("127.0.0.1", int(process.url.rpartition(":")[2])) in addresses


def test_nothing_is_left_behind_by_kill_9(tmp_path):
    with serving(tmp_path, "--host", "0.0.0.0") as killed:
        port = int(killed.url.rpartition(":")[2])
        open_to_all = {at for at in listening(killed) if at[0] != "127.0.0.1"}
        assert open_to_all == {("0.0.0.0", port)}
        family = psutil.Process(killed.pid).children(recursive=True)
        assert len(family) > 6
        killed.process.kill()
        killed.process.wait()
        _, alive = psutil.wait_procs(family, timeout=30)
        assert alive == []
        require_port("0.0.0.0", port)


def test_a_wrong_setting_is_named_in_one_line(tmp_path):
    for settings, named in [
        (("decoder.row=8",), "decoder.row"),
        (("model=mmrag:huge",), "mmrag:huge"),
        (("model=/nowhere",), "/nowhere"),
        (("decoder.rows=[",), "config.yaml"),
    ]:
        process = start(free_ports(1)[0], tmp_path, *settings)
        assert process.wait(60) == 1
        told = (tmp_path / "log").read_text()
        assert named in told and "error: " in told and "Traceback" not in told, told


def test_large_requests_reach_every_part(process, theirs, write, wave):
    """Far beyond the 4 MiB of a message: recordings, and the keys of 200 phrases."""
    sentence = wave(SENTENCE)
    data = write(sentence)
    count = int(75 * 16_000 / len(sentence)) + 1
    answer = requests.post(
        f"{process.url}/v1/datastores",
        files=[("file", ("a.flac", data))] * count,
        data={"name": "recorded", "text": [SENTENCE] * count},
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=5 * SECONDS,
    )
    assert answer.status_code == 201, answer.text
    letters = "abcdefghijklmnopqrst"
    phrases = [NAME, *(f"{a}ar{b}on moss" for a in letters for b in letters)][:200]
    said = theirs.audio.transcriptions.create(
        model="mmrag",
        file=("a.flac", data),
        extra_body={"context": phrases},
        timeout=5 * SECONDS,
    )
    assert said.text == SENTENCE


def test_slow_uploads_are_answered_through_haproxy(process, theirs, clip):
    head = b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n"
    head += f"Authorization: Bearer {KEY}\r\n".encode()
    head += b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
    address = ("127.0.0.1", int(process.url.rpartition(":")[2]))
    slow = [socket.create_connection(address, timeout=SECONDS) for _ in range(40)]
    for one in slow:
        one.sendall(head)
    file = ("a.flac", clip("is the helmet still on the old farm"))
    said = theirs.audio.transcriptions.create(model="mmrag", file=file)
    assert said.text == "is the helmet still on the old farm"
    for one in slow:
        assert one.recv(4096).startswith(b"HTTP/1.1 408 ")
        one.close()


def cluster_of(process):
    """The address of the Ray cluster that a process started."""
    for child in psutil.Process(process.pid).children(recursive=True):
        for word in child.cmdline():
            if word.startswith("--gcs-address="):
                return word.partition("=")[2]
    raise LookupError("no cluster")


def test_a_second_service_in_the_same_cluster_is_refused(process, tmp_path):
    second = start(
        free_ports(1)[0], tmp_path, RAY_AUTH_MODE="token", RAY_ADDRESS=cluster_of(process)
    )
    assert second.wait(120) == 1
    said = (tmp_path / "log").read_text()
    assert f"serves mmrag already (running), at {process.url}" in said and said.count("\n") == 1
    assert requests.get(f"{process.url}/readyz", timeout=SECONDS).json() == {"status": "ok"}


def test_a_taken_port_is_named_before_anything_starts(process, tmp_path):
    port = int(process.url.rpartition(":")[2])
    second, started = start(port, tmp_path), time.monotonic()
    assert second.wait(SECONDS) == 1 and time.monotonic() - started < 15
    said = (tmp_path / "log").read_text()
    assert said == (
        f"error: 127.0.0.1:{port}: another program listens there; choose another port with --port\n"
    )


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("decoder.num_gpus=64", "Lower decoder.num_gpus, or use a larger cluster"),
        ("encoder.num_cpus=4096", "encoder: 1 worker of 4096 CPUs cannot be placed"),
    ],
)
def test_a_deployment_that_fits_on_no_machine_is_named(tmp_path, setting, named):
    process = start(free_ports(1)[0], tmp_path, setting)
    assert process.wait(120) == 1
    said = (tmp_path / "log").read_text()
    assert named in said and said.count("\n") == 1, said


@pytest.mark.parametrize("seconds", [0.5, 6, 14])
def test_an_interrupt_is_quiet_while_it_starts(tmp_path, seconds):
    process = start(free_ports(1)[0], tmp_path)
    time.sleep(seconds)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) in (0, 130)
    said = (tmp_path / "log").read_text()
    assert "Traceback" not in said and "stop" in said, said
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []


def test_it_finishes_what_it_has_begun_when_it_is_stopped(process, theirs, clip, at_once):
    """The last test of this file: afterwards the service is gone, and all its processes are."""
    family = psutil.Process(process.pid).children(recursive=True)
    sentences = ("is the helmet still on the old farm",) * 20

    def call(number):
        if number:
            time.sleep(0.5)
            process.process.send_signal(signal.SIGTERM)
            return None
        file = ("a.flac", clip(*sentences))
        return theirs.audio.transcriptions.create(model="mmrag", file=file).text

    [told, _] = at_once(call, [0, 1])
    assert told.startswith(sentences[0]) and told.count("helmet") >= len(sentences) / 2
    assert process.process.wait(60) == 0
    assert "stopping" in process.log.read_text()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{process.url}/healthz", timeout=5)
