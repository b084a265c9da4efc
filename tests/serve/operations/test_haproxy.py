"""What Ray tells HAProxy, made safe before HAProxy reads it."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from ray.exceptions import ActorDiedError

from cluster.ports import free_ports
from serve.errors import respond
from serve.operations import environment, haproxy

RAYS = """global
    stats socket /tmp/somewhere/admin.sock mode 666 level admin expose-fd listeners
    stats timeout 30s
defaults
    mode http
    errorfile 502 /tmp/somewhere/500.http
    errorfile 503 /tmp/somewhere/500.http
frontend prometheus
    bind :9101
    mode http
frontend http_frontend
    bind *:8000
backend default_backend
    http-request return status 404
listen stats
  bind *:8404
  stats enable
"""


def test_only_what_callers_need_stays_open():
    told = haproxy.closed(RAYS)
    binds = [line.split()[1] for line in told.splitlines() if line.split()[0] == "bind"]
    assert binds == ["127.0.0.1:9101", "*:8000", "127.0.0.1:8404"]
    assert "mode 600 level admin" in told and "666" not in told
    assert haproxy.closed(told) == told


def test_rays_own_template_has_what_is_closed():
    ray = Path(importlib.util.find_spec("ray").origin).parent
    written = (ray / "serve" / "_private" / "haproxy_templates.py").read_text()
    rays = written.partition('HAPROXY_CONFIG_TEMPLATE = """')[2]
    rays = rays.replace("{{ config.metrics_port }}", "1").replace("{{ config.stats_port }}", "2")
    told = haproxy.closed(rays)
    assert "bind 127.0.0.1:1\n" in told and "bind 127.0.0.1:2\n" in told
    assert "mode 600 level admin" in told
    file = Path("/tmp/unavailable.http")
    assert haproxy.answering(rays, file).count(f" {file}\n") == rays.count("errorfile 50") == 3
    told = haproxy.never_silent(rays)
    assert f"defaults\n{haproxy.ONE_REQUEST_EACH}    mode http\n" in told
    assert f"{haproxy.CALLERS}\n{haproxy.ERRORS_CLOSE}    bind " in told
    assert haproxy.never_silent(told) == told
    assert "http-reuse always" in rays, "which is why"


def test_what_callers_are_told_whose_replica_is_lost_is_what_the_service_says_itself():
    """Status, headers and body, as HAProxy sends them."""
    head, _, body = haproxy.lost().partition("\r\n\r\n")
    status, *lines = head.split("\r\n")
    headers = dict(line.lower().split(": ") for line in lines)
    own = respond(ActorDiedError())
    assert status == f"HTTP/1.1 {own.status_code} Service Unavailable"
    assert json.loads(body) == json.loads(own.body)
    assert int(headers["content-length"]) == len(body)
    for name in ("content-type", "retry-after"):
        assert headers[name] == own.headers[name]


REUSING = """global
    maxconn 100
defaults
    mode http
    timeout connect 5s
    timeout client 30s
    option redispatch 1
    retry-on conn-failure
    option idle-close-on-response
    errorfile 502 /tmp/somewhere/500.http
    errorfile 503 /tmp/somewhere/500.http
frontend http_frontend
    bind 127.0.0.1:{callers}
    default_backend replicas
backend replicas
    http-reuse always
    server one 127.0.0.1:{replica}
"""
"""What of Ray's configuration says how connections are used."""
REQUEST = b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 4\r\n\r\nclip"
REFUSED = b"/refused"


class Replica(threading.Thread):
    """Answers every other request, and is gone upon the ones between; refuses what it is sent to
    REFUSED before it has all of it."""

    def __init__(self):
        super().__init__(daemon=True)
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        self.asked = 0

    def run(self):
        with suppress(OSError):
            while True:
                connection, _ = self.listening.accept()
                threading.Thread(target=self.answer, args=(connection,), daemon=True).start()

    def answer(self, connection):
        with connection, suppress(OSError):
            while told := connection.recv(65536):
                if told.startswith(b"POST " + REFUSED):
                    connection.sendall(b"HTTP/1.1 429 Busy\r\nContent-Length: 4\r\n\r\nbusy")
                    while connection.recv(65536):
                        pass
                    return
                self.asked += 1
                if self.asked % 2 == 0:
                    return
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


@pytest.fixture
def caller(tmp_path):
    """`caller()`: a connection to a HAProxy that is configured as ours is, before a Replica."""
    replica, told = Replica(), tmp_path / haproxy.LOST_FILE
    replica.start()
    [port] = free_ports(1)
    rays = REUSING.format(callers=port, replica=replica.port)
    told.write_bytes(haproxy.lost().encode())
    file = tmp_path / "haproxy.cfg"
    file.write_text(haproxy.never_silent(haproxy.answering(rays, told)))
    process = subprocess.Popen([haproxy.find(), "-db", "-f", str(file)])
    opened = []

    def connect():
        deadline = time.monotonic() + 30
        while True:
            try:
                opened.append(socket.create_connection(("127.0.0.1", port), timeout=30))
                return opened[-1]
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)

    yield connect
    for connection in opened:
        connection.close()
    process.kill()
    process.wait(10)
    replica.listening.close()


def status(connection):
    """The status of the answer to a request; None where the connection was closed instead."""
    connection.sendall(REQUEST)
    answer = connection.recv(65536)
    return int(answer.split()[1]) if answer else None


def test_whose_replica_is_gone_before_an_answer_is_told_so_whatever_came_before(caller):
    """Over a connection that had an answer before, and over a new one after another caller's."""
    kept = caller()
    assert [status(kept), status(kept)] == [200, 503]
    assert [status(caller()), status(caller())] == [200, 503]


def test_who_is_refused_amid_his_request_is_told_to_open_another_connection_for_the_next(caller):
    """What came over this one might never be passed on."""
    refused, size = caller(), 1_000_000
    refused.sendall(REQUEST.replace(b"/ ", REFUSED + b" ").replace(b" 4", b" %d" % size))
    told = b""
    while not told.endswith(b"busy"):
        more = refused.recv(65536)
        assert more, told
        told += more
    assert told.startswith(b"HTTP/1.1 429") and b"\r\nconnection: close\r\n" in told.lower()
    assert [status(caller()), status(caller())] == [200, 503], "others are served"


@pytest.fixture
def stand_in(tmp_path):
    """A program that takes HAProxy's place and stays; the command that starts it is returned."""
    program = tmp_path / "stand-in"
    program.write_text(
        f"#!/bin/sh\nexec {sys.executable} -c 'import time; time.sleep(60)' \"$@\"\n"
    )
    program.chmod(0o755)
    (tmp_path / "haproxy.cfg").write_text(RAYS)
    return [str(environment.HAPROXY), "-db", "-f", str(tmp_path / "haproxy.cfg")], {
        **os.environ,
        "MMRAG_PYTHON": sys.executable,
        haproxy.BINARY: str(program),
    }


def ends(process, seconds=10):
    _, alive = psutil.wait_procs([process], timeout=seconds)
    return not alive


def test_it_becomes_haproxy_and_ends_with_whoever_started_it(stand_in, tmp_path):
    command, variables = stand_in
    parent = f"import subprocess, time; print(subprocess.Popen({command}).pid, flush=True)"
    parent = subprocess.Popen(
        [sys.executable, "-c", f"{parent}; time.sleep(60)"], stdout=subprocess.PIPE, env=variables
    )
    child = psutil.Process(int(parent.stdout.readline()))
    try:
        deadline = time.monotonic() + 20
        while "time.sleep(60)" not in " ".join(child.cmdline()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert child.cmdline()[-3:] == command[1:], "Ray knows HAProxy by its command line"
        told = tmp_path / haproxy.LOST_FILE
        written = haproxy.never_silent(haproxy.answering(haproxy.closed(RAYS), told))
        assert (tmp_path / "haproxy.cfg").read_text() == written
        assert written.count(f"{told}\n") == 2
        assert told.read_bytes().decode() == haproxy.lost()
        parent.send_signal(signal.SIGKILL)
        parent.wait(10)
        assert ends(child)
    finally:
        parent.stdout.close()
        if child.is_running():
            child.kill()


def test_where_there_is_none_it_says_what_to_do(monkeypatch):
    monkeypatch.delenv(haproxy.BINARY, raising=False)
    monkeypatch.setattr(haproxy.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(haproxy.shutil, "which", lambda _: None)
    with pytest.raises(FileNotFoundError, match="install ray"):
        haproxy.find()


def test_the_program_may_be_run():
    assert os.access(environment.HAPROXY, os.X_OK)
    assert environment.VARIABLES["RAY_SERVE_HAPROXY_BINARY_PATH"] == str(environment.HAPROXY)
    assert Path(environment.VARIABLES["MMRAG_PYTHON"]).exists()
