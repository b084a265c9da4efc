"""What a killed service leaves is ended, and what only looks on is not."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from serve.operations import guardian

WRITE = "import sys, time; file = open(sys.argv[1], 'w'); print(flush=True); time.sleep(60)"


@pytest.fixture
def started():
    """`started(title, file)`: a process of that title that has the file open."""
    made = []

    def start(title: str, file: Path) -> subprocess.Popen:
        file.parent.mkdir(parents=True, exist_ok=True)
        command = [title, "-c", WRITE, str(file)]
        made.append(subprocess.Popen(command, executable=sys.executable, stdout=subprocess.PIPE))
        made[-1].stdout.readline()
        return made[-1]

    yield start
    for process in made:
        process.kill()
        process.wait()
        process.stdout.close()


def test_only_rays_processes_of_that_session_are_left_over(started, tmp_path):
    session = tmp_path / "session_1"
    own = started("ray::Worker", session / "logs" / "a.out")
    started("tail", session / "logs" / "b.out")
    started("ray::Worker", tmp_path / "session_10" / "logs" / "a.out")
    assert [process.pid for process in guardian.left(session)] == [own.pid]


def test_it_kills_them_if_the_service_says_nothing_and_else_does_not(
    started, tmp_path, monkeypatch
):
    monkeypatch.setattr(guardian, "SECONDS", 0.1)
    own = started("ray::Worker", tmp_path / "logs" / "a.out")
    for said, ended in ((guardian.ALL_IS_WELL, False), (b"", True)):
        with (tmp_path / "pipe").open("w+b") as pipe:
            pipe.write(said)
            pipe.seek(0)
            monkeypatch.setattr(guardian.sys, "stdin", type("Input", (), {"buffer": pipe}))
            guardian.main(str(tmp_path))
        _, alive = psutil.wait_procs([psutil.Process(own.pid)], timeout=10 if ended else 0.2)
        assert bool(alive) is not ended
