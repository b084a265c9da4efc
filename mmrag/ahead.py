"""The next of a sequence is made while the one before is used: in another thread, and in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(make: Callable[[int], T], numbers: Iterable[int]) -> Iterator[T]:
    """`make` of each number, one of them ahead of who asks.

    An error that `make` raises comes where its number would have.
    """
    with ThreadPoolExecutor(1) as thread:
        made: deque[Future[T]] = deque()
        try:
            for number in numbers:
                made.append(thread.submit(make, number))
                if len(made) > 1:
                    yield made.popleft().result()
            for last in made:
                yield last.result()
        finally:
            thread.shutdown(cancel_futures=True)
