"""Parts of a stage's work, and what becomes of a worker's failure."""

import errno
import pickle
import sys
import time
import tracemalloc
from functools import partial
from pathlib import Path

import pytest
import ray
import ray.cloudpickle
from hypothesis import given
from hypothesis import strategies as st

from cluster.parts import AHEAD, NOTED, Part, _Failure, _Stage, cut, parts, work_off
from cluster.rejections import Unread
from mmrag.config import Workers
from mmrag.records import Rejection

# The workers cannot import this file: its classes travel whole.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

WORKERS = Workers(count=1, num_cpus=0.5)


class Double:
    def __call__(self, part: Part[int]) -> Part[int]:
        return Part(part.name, [2 * one for one in part.work])


class FillDisk:
    def __call__(self, part: Part[int]) -> None:
        with open("/dev/full", "w") as disk:
            disk.write("x")


class FillDiskFirst(FillDisk):
    """Fails at part a; would be busy with any other for its number of seconds."""

    def __call__(self, part: Part[int]) -> None:
        if part.name == "a":
            super().__call__(part)
        time.sleep(part.work[0])


class Name:
    def __call__(self, part: Part[int]) -> str:
        return part.name


def numbers(count: int, read: Path | None = None):
    """Reads parts of one number each, and notes how many it has read."""
    for number in range(count):
        if read is not None:
            read.write_text(f"{number + 1}")
        yield Part(f"part-{number:05d}", [number])


def texts(count: int):
    """Reads parts of a hundred texts of a hundred letters."""
    rows = (f"{number:0100d}" for number in range(count))
    yield from cut(rows, lambda _: 1, 100)


def half_broken():
    yield Unread("part", 0, [Rejection("line 1", "no JSON")])
    yield Part("part-00000", [1])
    raise ValueError("the disk is gone")


def finished(part: Part[int]) -> str | None:
    return f"{part.name} was there" if part.work[0] % 2 else None


class Unbuildable:
    def __init__(self) -> None:
        raise ValueError("no such voice")

    def __call__(self, part: Part[int]) -> None:
        raise NotImplementedError


def answer(stage: type, value: object) -> object:
    """What a worker sends back, without Ray."""
    [packed] = _Stage(stage, {}, WORKERS)({"value": [pickle.dumps(value)]})["value"]
    return pickle.loads(packed)


@given(st.lists(st.floats(0.1, 50)), st.floats(0.1, 60))
def test_parts_hold_everything_once_in_order_and_within_the_limit(sizes, limit):
    work = list(enumerate(sizes))
    shares = parts(work, lambda one: one[1], limit)
    assert [one for share in shares for one in share.work] == work
    assert all(share.work for share in shares)
    assert len({share.name for share in shares}) == len(shares)
    assert [share.name for share in shares] == sorted(share.name for share in shares)
    for share in shares:
        total = 0.0
        for _, size in share.work:
            total += size
        assert total <= limit or len(share.work) == 1


def test_a_stage_answers_for_its_part():
    assert answer(Double, Part("a", [1, 2])) == Part("a", [2, 4])


def test_what_a_worker_raises_travels_with_its_traceback():
    failed = answer(FillDisk, Part("a", [1]))
    assert isinstance(failed, _Failure)
    assert isinstance(failed.error, OSError) and failed.error.errno == errno.ENOSPC
    assert "in __call__" in failed.error.__notes__[0]


def test_a_stage_that_cannot_be_built_fails_like_one_that_cannot_work():
    failed = answer(Unbuildable, Part("a", [1]))
    assert isinstance(failed, _Failure)
    assert repr(failed.error) == "ValueError('no such voice')"


def test_a_failure_passes_through_the_stages_that_follow():
    failed = answer(Double, _Failure(ValueError("no such voice")))
    assert repr(failed.error) == "ValueError('no such voice')"


@pytest.mark.ray
def test_a_full_disk_in_a_worker_is_an_os_error_here_and_leaves_no_worker_behind(ray_cluster):
    todo = [Part("a", [0]), Part("b", [0]), Part("c", [600])]
    with pytest.raises(OSError) as raised:
        list(work_off([(FillDiskFirst, {})], todo, WORKERS, "writing", "test.workers"))
    assert raised.value.errno == errno.ENOSPC
    for _ in range(200):  # the exception, still held, must not keep the workers
        if ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]:
            break
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]


def test_nothing_to_do_needs_no_cluster():
    assert list(work_off([(Double, {})], [], WORKERS, "nothing", "test.workers")) == []


def test_what_is_rejected_among_the_rows_is_told_and_changes_no_part():
    rows = [n if n % 3 else Rejection(f"line {n}", "odd") for n in range(4 * NOTED)]
    told = list(cut(rows, lambda _: 1, 10))
    assert [one for one in told if isinstance(one, Part)] == parts(
        [row for row in rows if isinstance(row, int)], lambda _: 1, 10
    )
    unread = [one for one in told if isinstance(one, Unread)]
    assert [one.number for one in unread] == [0, 1]
    listed = [row for row in rows if isinstance(row, Rejection)]
    assert [row for one in unread for row in one.rejected] == listed


@pytest.mark.ray
def test_parts_are_read_no_further_ahead_of_their_answers_than_is_said(ray_cluster, tmp_path):
    """In order, each once; one that is done is not worked off again."""
    source = partial(numbers, 200, tmp_path / "read")
    options = {"ordered": True, "done": finished}
    stages = [(Double, {}), (Double, {})]
    answers = work_off(stages, source, WORKERS, "x", "test.workers", **options)
    for number, answer in enumerate(answers):
        name = f"part-{number:05d}"
        assert answer == (f"{name} was there" if number % 2 else Part(name, [4 * number]))
        ahead = int((tmp_path / "read").read_text() or 0) - (number + 1)
        assert ahead <= AHEAD * (1 + WORKERS.count)
    assert number == 199


@pytest.mark.ray
def test_what_reading_raises_is_raised_here_after_what_was_read(ray_cluster):
    seen = []
    answers = work_off([(Name, {})], half_broken, WORKERS, "x", "test.workers", ordered=True)
    with pytest.raises(ValueError, match="the disk is gone") as raised:
        seen.extend(answers)
    assert seen == [Unread("part", 0, [Rejection("line 1", "no JSON")]), "part-00000"]
    assert "while reading" in raised.value.__notes__[0]


@pytest.mark.ray
def test_the_drivers_memory_does_not_grow_with_what_is_read(ray_cluster):
    def most(count: int) -> int:
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        source = partial(texts, count)
        assert sum(1 for _ in work_off([(Name, {})], source, WORKERS, "x", "w")) == count / 100
        return tracemalloc.get_traced_memory()[1] - before

    tracemalloc.start()
    few, many = most(1_000), most(20_000)
    tracemalloc.stop()
    assert (many - few) / 19_000 < 50, "bytes an utterance, of texts of a hundred letters"
