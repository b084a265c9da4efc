import json
import sys
import threading
from pathlib import Path

import pytest

from cluster import progress
from cluster.progress import METRICS, MetricsWriter, bar, following, last_record, records


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
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    assert not sys.stderr.isatty()
    with bar(2, "speaking") as count:
        count()
        count()
    assert capsys.readouterr().err.splitlines() == [
        "  speaking: 1/2 parts",
        "  speaking: 2/2 parts",
    ]
