"""Threads that stand in for processes that compute one thing together."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


class Member:
    """One of them, as `mmrag.processes.Processes` has it."""

    def __init__(self, rank: int, barrier: threading.Barrier, told: list) -> None:
        self.rank = rank
        self.count = barrier.parties
        self._barrier = barrier
        self._told = told

    def add(self, tensors: Sequence[Tensor]) -> None:
        self._told[self.rank] = [one.detach().clone() for one in tensors]
        self._barrier.wait()
        sums = [sum(each) for each in zip(*self._told, strict=True)]
        self._barrier.wait()
        for one, total in zip(tensors, sums, strict=True):
            one.copy_(total)

    def summed(self, values: Tensor) -> Tensor:
        """The same of one tensor, which stays as it is."""
        values = values.clone()
        self.add([values])
        return values


def together(count: int, work: Callable[[Member], T]) -> list[T]:
    """What `work` gives in each of `count` members; the error that the first to fail raised."""
    barrier, told = threading.Barrier(count, timeout=60), [None] * count
    failed: list[BaseException] = []

    def run(rank: int) -> T | None:
        try:
            return work(Member(rank, barrier, told))
        except BaseException as error:
            failed.append(error)
            barrier.abort()

    with ThreadPoolExecutor(count) as threads:
        answers = list(threads.map(run, range(count)))
    for error in failed:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    assert not failed
    return answers
