"""Searches in threads of their own, while whoever asked does something else."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import faiss

T = TypeVar("T")
AT_ONCE = 4
"""Datastores searched at a time."""
WORTH_SECONDS = 3e-4
"""A search that takes less is done sooner than another thread has woken up."""


def worthwhile(seconds: float, elsewhere: bool) -> bool:
    """Whether a search that takes so long should have a thread, and there is a core for it.

    Only where search or language model compute `elsewhere`, in other processes or on a device: on
    the same cores each would slow the other down.
    """
    return elsewhere and seconds >= WORTH_SECONDS and len(os.sched_getaffinity(0)) > 1


def begin(search: Callable[[], T]) -> Future[T]:
    """Run `search` in another thread, which has as many of FAISS's threads as the caller.

    FAISS and sockets let other threads run; what a search raises is raised by `Future.result`.
    """
    return _searchers(os.getpid()).submit(_with_threads, faiss.omp_get_max_threads(), search)


def _with_threads(count: int, search: Callable[[], T]) -> T:
    if faiss.omp_get_max_threads() != count:  # a number that each thread has of its own
        faiss.omp_set_num_threads(count)
    return search()


@cache
def _searchers(process: int) -> ThreadPoolExecutor:
    """The threads of a process; a forked one has none of its parent's."""
    return ThreadPoolExecutor(AT_ONCE, f"search-{process}")
