"""A store that goes away while a stage runs."""

import http.server
import os
import re
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient

from cluster import delivery, store
from cluster.delivery import Delivery
from cluster.tracking import run
from jobs import stage
from mmrag.config import Experiment, Tracking


class Store:
    """Takes numbers, or raises."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.asked = 0
        self.error: Exception | None = None

    def take(self, number: int):
        def message() -> None:
            self.asked += 1
            if self.error is not None:
                raise self.error
            self.taken.append(number)

        return message


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(delivery.time, "monotonic", lambda: now[0])
    return now


def test_what_a_store_did_not_take_is_told_once_and_sent_in_order_when_it_answers(clock, capsys):
    store, sent = Store(), Delivery("sqlite:///x", lambda error: True)
    sent.send(store.take(1))
    store.error = OSError("Connection refused\nand more")
    for number in (2, 3, 4):
        sent.send(store.take(number))
    assert store.asked == 2, "a store that did not answer is left alone for a while"
    said = capsys.readouterr().err
    assert said == (
        "warning: sqlite:///x does not take this run's log (Connection refused); the work goes "
        "on, and the log is sent when it does\n"
    )
    clock[0] += delivery.REST_SECONDS
    sent.send(store.take(5))
    assert capsys.readouterr().err == ""
    store.error = None
    clock[0] += delivery.REST_SECONDS
    sent.send(store.take(6))
    assert store.taken == [1, 2, 3, 4, 5, 6]
    sent.finish()
    assert capsys.readouterr().err == ""


def test_what_is_never_taken_is_counted_at_the_end(clock, capsys):
    store, sent = Store(), Delivery("sqlite:///x", lambda error: True)
    store.error = OSError("gone")
    for number in range(3):
        sent.send(store.take(number))
    capsys.readouterr()
    sent.finish()
    assert capsys.readouterr().err == (
        "warning: 3 entries of this run's log could not be delivered to sqlite:///x; what the "
        "stage made is whole\n"
    )


def test_what_is_refused_for_good_does_not_hold_up_the_rest(clock, capsys):
    store, sent = Store(), Delivery("sqlite:///x", lambda error: False)
    store.error = ValueError("too long")
    sent.send(store.take(1))
    sent.send(store.take(2))
    store.error = None
    sent.send(store.take(3))
    assert store.taken == [3]
    said = capsys.readouterr().err
    assert said == "warning: sqlite:///x refused an entry of this run's log: too long\n"


class Server:
    """An MLflow server's doorman: passes every request on to a real store until it is shut."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.calls.append(self.path)
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self._answer(b'{"run": {"info": {"run_id": "r1", "run_uuid": "r1"}}}')

            def do_GET(self) -> None:
                outer.calls.append(self.path)
                self._answer(
                    b'{"experiment": {"experiment_id": "7", "name": "trial", '
                    b'"lifecycle_stage": "active"}}'
                )

            def _answer(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server():
    started = Server()
    yield started
    started.stop()


@pytest.fixture
def own(experiment: Experiment, tmp_path: Path) -> Experiment:
    at = Tracking(uri=experiment.tracking.uri, experiment="trial")
    return experiment.model_copy(update={"workspace": tmp_path / "w", "tracking": at})


def test_a_server_that_dies_in_the_middle_does_not_take_the_stage_with_it(own, server, capsys):
    remote = own.model_copy(update={"tracking": Tracking(uri=server.uri, experiment="trial")})

    def work(draft, tracked) -> None:
        tracked.log({"loss": 3.0}, 1)
        server.stop()
        for step in range(2, 6):
            tracked.log({"loss": 1.0 / step}, step)
        (draft.path / "weights").write_text("trained")
        draft.summary["steps"] = 5

    started = time.monotonic()
    made = stage.make(remote, "lm", "lm", {"width": 1}, {}, work)
    assert time.monotonic() - started < 60
    assert (made.path / "weights").read_text() == "trained"
    assert made.summary == {"steps": 5}
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2, said
    assert said[0].startswith(f"warning: {server.uri} does not take this run's log (")
    assert re.search(r"^warning: \d+ entries of this run's log could not be delivered", said[1])


def test_a_stage_that_fails_while_the_server_is_gone_says_why_it_failed(own, server):
    remote = own.model_copy(update={"tracking": Tracking(uri=server.uri, experiment="trial")})

    def work(draft, tracked) -> None:
        server.stop()
        raise ValueError("no audio")

    with pytest.raises(ValueError, match="no audio"):
        stage.make(remote, "lm", "lm", {"width": 1}, {}, work)


def test_a_deleted_experiment_is_named_with_the_command_that_brings_it_back(own, tmp_path):
    from mlflow.cli import cli  # takes a while

    at = Tracking(uri=own.tracking.uri, experiment=tmp_path.name)
    with run(at, "first", {}):
        pass
    uri = store.tracking_uri(at)
    client = MlflowClient(tracking_uri=uri)
    number = client.get_experiment_by_name(at.experiment).experiment_id
    client.delete_experiment(number)
    with pytest.raises(ValueError) as raised, run(at, "second", {}):
        raise AssertionError("a run of a deleted experiment was started")
    said = str(raised.value)
    assert said == (
        f"the MLflow experiment {at.experiment!r} in {uri} is deleted. Bring it back with "
        f"`MLFLOW_TRACKING_URI={uri} mlflow experiments restore --experiment-id {number}`, or "
        "name another in tracking.experiment."
    )
    restore = re.search(r"mlflow (experiments restore --experiment-id \d+)", said)[1]
    ran = CliRunner().invoke(cli, restore.split(), env={"MLFLOW_TRACKING_URI": uri})
    assert ran.exit_code == 0, ran.output
    with run(at, "second", {}):
        pass


def test_a_server_that_is_down_at_the_start_is_named_in_seconds_and_nothing_is_made(
    own, server, monkeypatch
):
    server.stop()

    def attempt(experiment: Experiment) -> str:
        started = time.monotonic()
        with pytest.raises(ConnectionError) as raised:
            stage.make(experiment, "lm", "lm", {"width": 1}, {}, lambda draft, tracked: None)
        assert time.monotonic() - started < 15
        assert not (experiment.workspace / "lm").exists()
        return str(raised.value)

    remote = own.model_copy(update={"tracking": Tracking(uri=server.uri, experiment="trial")})
    expected = (
        f"the MLflow store {server.uri} does not answer: Connection refused. Start it, or name "
        "another in {}; sqlite:///FILE needs no server."
    )
    assert attempt(remote) == expected.format("tracking.uri")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    assert attempt(own) == expected.format("MLFLOW_TRACKING_URI")


def test_a_server_that_takes_calls_and_never_answers_is_given_up_in_seconds(own):
    import socket

    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        uri = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        started = time.monotonic()
        with (
            pytest.raises(ConnectionError, match=f"{uri} does not answer: .*timed out"),
            run(Tracking(uri=uri, experiment="trial"), "deaf", {}),
        ):
            raise AssertionError("a run was started that nobody keeps")
        assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("sqlite:////proc/nowhere/mlflow.db", "No such file or directory"),
        ("postgresql://me:secret@127.0.0.1:9/mlflow", "Connection refused"),
    ],
)
def test_a_database_that_cannot_be_reached_is_named_in_seconds(uri, reason):
    started = time.monotonic()
    with (
        pytest.raises(OSError, match=reason) as raised,
        run(Tracking(uri=uri, experiment="t"), "x", {}),
    ):
        raise AssertionError("a run was started that nobody keeps")
    assert time.monotonic() - started < 15
    assert "secret" not in str(raised.value)


def test_a_file_that_is_no_database_is_named_in_seconds(tmp_path):
    (tmp_path / "mlflow.db").write_text("not a database, but long enough to have a header " * 9)
    at = Tracking(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="t")
    with (
        pytest.raises(ConnectionError, match=r"mlflow\.db does not answer: file is not a database"),
        run(at, "x", {}),
    ):
        raise AssertionError("a run was started that nobody keeps")


def test_the_patience_of_the_shell_is_kept_and_ours_is_not_left_behind(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "99")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    with store.hurry(), store.hurry():
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "99"
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "99"
