"""Several processes that compute one thing together: which one this is, and what they add up to.

How they talk to each other is the business of whoever starts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Processes(Protocol):
    """Those that train one model together; each has all of its weights."""

    rank: int
    """Which of them this one is, from 0."""
    count: int

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, the same number in each of them.

        Each of them calls this as often, with tensors of the same shapes.
        """
        ...


class Alone:
    """One process."""

    rank, count = 0, 1

    def add(self, tensors: Sequence[Tensor]) -> None:
        """They are the sum."""
