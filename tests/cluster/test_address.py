"""A RAY_ADDRESS where nobody answers is told in seconds."""

import socket
import subprocess
import sys
import time

import pytest

from cluster import address


@pytest.fixture
def closed() -> int:
    """A port at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def listening():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_where_nobody_listens_is_named_within_seconds(closed, monkeypatch, form):
    monkeypatch.setenv("RAY_ADDRESS", form.format(closed))
    started = time.monotonic()
    with pytest.raises(ConnectionError) as raised:
        address.check()
    assert time.monotonic() - started < 10
    assert str(raised.value) == (
        f"no Ray cluster answers at 127.0.0.1:{closed} (RAY_ADDRESS={form.format(closed)}): "
        "Connection refused. Start the cluster, correct RAY_ADDRESS, or unset it to use this "
        "machine alone."
    )


def test_a_host_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "head.invalid:6379")
    with pytest.raises(ConnectionError, match=r"answers at head\.invalid:6379 \(RAY_ADDRESS=head"):
        address.check()


def test_where_somebody_listens_is_left_to_ray(listening):
    address.check(f"127.0.0.1:{listening}")
    address.check(f"ray://127.0.0.1:{listening}")


@pytest.mark.parametrize("unset", ["", "local"])
def test_no_address_needs_nobody(unset):
    address.check(unset)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("http://head:8265", r"a dashboard's: it is for `ray job submit`"),
        ("head", "is none of HOST:PORT, ray://HOST:PORT, auto and local"),
        ("head:port", "is none of HOST:PORT"),
        ("redis://head:6379", "is none of HOST:PORT"),
    ],
)
def test_an_address_of_another_form_is_explained(wrong, said):
    with pytest.raises(ValueError, match=said) as raised:
        address.check(wrong)
    assert f"RAY_ADDRESS={wrong}" in str(raised.value)


def test_a_cluster_that_is_gone_since_it_was_started_here_is_named(closed, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    address.check("auto")  # nothing was started here: Ray says so itself, at once
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{closed}")
    with pytest.raises(ConnectionError, match=rf"auto, the cluster 127\.0\.0\.1:{closed} that"):
        address.check("auto")


@pytest.mark.parametrize("door", [["jobs.synthesize"], ["serve"]])
def test_every_door_ends_with_one_line(closed, monkeypatch, tmp_path, door):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed}")
    job = subprocess.run(
        [sys.executable, "-m", *door], cwd=tmp_path, capture_output=True, text=True, timeout=280
    )
    assert job.returncode == 1
    assert job.stderr.splitlines()[-1].startswith(
        f"error: no Ray cluster answers at 127.0.0.1:{closed} (RAY_ADDRESS="
    )
    assert "Traceback" not in job.stderr
