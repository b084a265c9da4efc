import json
import sys
import threading
from pathlib import Path

import pytest

from cluster import progress
from cluster.progress import (
    METRICS,
    MetricsReader,
    MetricsWriter,
    bar,
    following,
    last_record,
    records,
)
from mmrag import terminal


def write(directory: Path, steps: range, **fields) -> None:
    writer = MetricsWriter(directory, steps.start)
    for step in steps:
        writer.write({"step": step, **fields})


def steps(directory: Path) -> list[int]:
    return [record["step"] for record in records(directory)]


def test_a_resumed_run_is_cut_back_to_where_it_goes_on(tmp_path):
    write(tmp_path, range(7), run="killed")
    write(tmp_path, range(4, 9), run="resumed")
    assert steps(tmp_path) == list(range(9))
    assert [one["run"] for one in records(tmp_path)] == ["killed"] * 4 + ["resumed"] * 5


def test_a_run_from_the_start_forgets_the_one_before(tmp_path):
    write(tmp_path, range(5))
    write(tmp_path, range(2))
    assert steps(tmp_path) == [0, 1]


def test_a_line_cut_short_by_a_kill_is_no_record_and_no_obstacle(tmp_path):
    write(tmp_path, range(3))
    with (tmp_path / METRICS).open("a") as stream:
        stream.write('{"step": 3, "lo')
    assert steps(tmp_path) == [0, 1, 2]
    write(tmp_path, range(3, 5))
    assert steps(tmp_path) == [0, 1, 2, 3, 4]


def test_the_last_record_is_found_though_this_run_wrote_none(tmp_path):
    write(tmp_path, range(3), loss=1.5)
    MetricsWriter(tmp_path, 3)
    assert last_record(tmp_path) == {"step": 2, "loss": 1.5}


def test_following_reports_every_new_record_once_and_none_of_an_earlier_run(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.01)
    write(tmp_path, range(3), run="killed")
    seen, arrived = [], threading.Event()

    def log(record: dict) -> None:
        seen.append(record)
        if len(seen) == 2:
            arrived.set()

    with following(tmp_path, log):
        writer = MetricsWriter(tmp_path, 3)
        writer.write({"step": 3})
        writer.write({"step": 4})
        assert arrived.wait(10), "records are reported while the block still runs"
        writer.write({"step": 5})
    assert seen == [{"step": 3}, {"step": 4}, {"step": 5}]


def test_following_begins_after_what_was_told_already_and_tells_the_rest(tmp_path):
    """A process that was killed may not have told all that was written."""
    seen: list[dict] = []
    write(tmp_path, range(6), run="killed")
    with following(tmp_path, seen.append, after=3):
        write(tmp_path, range(5, 8), run="resumed")
    assert [one["step"] for one in seen] in ([4, 5, 6, 7],)
    everything: list[dict] = []
    with following(tmp_path, everything.append, after=-1):
        pass
    assert [one["step"] for one in everything] == list(range(8))


def test_following_reports_what_was_written_before_a_failure(tmp_path):
    seen: list[dict] = []

    def fail() -> None:
        MetricsWriter(tmp_path, 0).write({"step": 0, "loss": 2.0})
        raise RuntimeError("worker died")

    with pytest.raises(RuntimeError, match="worker died"), following(tmp_path, seen.append):
        fail()
    assert seen == [{"step": 0, "loss": 2.0}]


def test_metrics_are_one_json_object_a_line(tmp_path):
    write(tmp_path, range(2), phase="text")
    lines = (tmp_path / METRICS).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 0, "phase": "text"},
        {"step": 1, "phase": "text"},
    ]


def test_without_a_terminal_progress_is_told_in_lines(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "LINE_SECONDS", 0.0)
    assert not sys.stderr.isatty()
    with bar(2, "speaking") as count:
        count()
        count()
    assert capsys.readouterr().err.splitlines() == [
        "  speaking: 1/2 parts",
        "  speaking: 2/2 parts",
    ]


def test_a_growing_file_is_read_once_and_a_half_written_line_waits_for_its_end(
    tmp_path, monkeypatch
):
    read, opened = [], Path.open

    class Counting:
        def __init__(self, stream) -> None:
            self._stream = stream

        def read(self, *size: int) -> bytes:
            read.append(self._stream.read(*size))
            return read[-1]

        def __getattr__(self, name: str):
            return getattr(self._stream, name)

        def __enter__(self):
            return self

        def __exit__(self, *_) -> None:
            self._stream.close()

    def counting(path, mode="r", *how, **hows):
        stream = opened(path, mode, *how, **hows)
        return Counting(stream) if mode == "rb" else stream

    writer, reader = MetricsWriter(tmp_path, 0), MetricsReader(tmp_path)
    monkeypatch.setattr(Path, "open", counting)
    found = []
    for step in range(200):
        writer.write({"step": step})
        found += reader.new()
    assert [record["step"] for record in found] == list(range(200))
    size = (tmp_path / METRICS).stat().st_size
    assert sum(map(len, read)) == size
    assert reader.new() == [] and sum(map(len, read)) == size

    with opened(tmp_path / METRICS, "a") as stream:
        stream.write('{"step": 2')
        stream.flush()
        assert reader.new() == []
        stream.write("00}\n")
    assert reader.new() == [{"step": 200}]
    assert sum(map(len, read)) <= size + 2 * len('{"step": 200}\n')


def test_a_file_that_was_cut_back_is_read_from_its_beginning(tmp_path):
    reader = MetricsReader(tmp_path)
    assert reader.new() == []
    write(tmp_path, range(9), run="killed")
    assert len(reader.new()) == 9
    write(tmp_path, range(4, 40), run="resumed, and by now longer than before")
    assert [record["step"] for record in reader.new()] == list(range(40))


def test_following_says_nothing_twice_where_a_worker_failed_and_went_back(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.01)
    seen, arrived = [], threading.Event()

    def log(record: dict) -> None:
        seen.append(record["step"])
        if len(seen) == 5:
            arrived.set()

    with following(tmp_path, log):
        write(tmp_path, range(5))
        assert arrived.wait(10)
        write(tmp_path, range(2, 8))
    assert seen == list(range(8))


def test_metrics_that_are_cut_back_are_never_gone_in_between(tmp_path, monkeypatch):
    write(tmp_path, range(5))

    def killed(*_) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            MetricsWriter(tmp_path, 3)
    assert steps(tmp_path) == list(range(5))
