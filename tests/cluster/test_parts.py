"""Parts of a stage's work, and what becomes of a worker's failure."""

import errno
import pickle
import sys
import time

import pytest
import ray
import ray.cloudpickle
from hypothesis import given
from hypothesis import strategies as st

from cluster.parts import Part, _Failure, _Stage, parts, work_off
from mmrag.config import Workers

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
