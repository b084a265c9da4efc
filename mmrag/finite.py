"""A loss that is no number: the step is not taken, and it is said what was read.

A weight that is not a number never becomes one again, so a step is not taken on such a loss. A
batch may be to blame for one; three in a row are the run's own fault. Knows neither models nor
audio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SHOWN = 20
"""Utterances that a message names; a micro-batch has seldom more."""
IN_A_ROW = 3
"""Steps not taken, one after the other, that end a training."""


class NonFiniteLoss(ValueError):
    """A loss or its gradient is infinite or not a number; the message names what was read."""


@dataclass(frozen=True)
class Lost:
    """A step that is not taken."""

    step: int
    """Counted from 0."""
    what: str
    """What is wrong: `the loss is not finite`."""
    where: str
    """For a person to read: `step 3, micro-batch 1 of 4`, counted from 1."""
    read: tuple[str, ...]
    """The utterances, by id, that were read before it."""

    def __str__(self) -> str:
        return f"{self.where}: {self.what} after reading {_named(self.read)}"


class Guard:
    """Counts the steps in a row that are not taken.

    A training that goes on from a checkpoint goes on with the count (`in_a_row`), so that it ends
    where the one that was not stopped does.
    """

    def __init__(self, leave_out: str, in_a_row: int = 0) -> None:
        """`leave_out` is the key that passes over some utterances."""
        self.in_a_row = in_a_row
        self._leave_out = leave_out

    def taken(self) -> None:
        """A step was taken."""
        self.in_a_row = 0

    def skip(self, lost: Lost) -> None:
        """A step was not; raises NonFiniteLoss if it is one too many."""
        self.in_a_row += 1
        if self.in_a_row >= IN_A_ROW:
            what = f"{lost.what}, in the third step in a row,"
            raise non_finite(what, lost.where, lost.read, self._leave_out)


def non_finite(what: str, where: str, read: Sequence[str], leave_out: str) -> NonFiniteLoss:
    """The error of a step, for whoever has to find what is wrong with which utterance.

    `what` went wrong `where` (`step 3`, counted from 1), after utterances `read` by id;
    `leave_out` is the key that passes over some.
    """
    return NonFiniteLoss(
        f"{where}: {what} after reading {_named(read)}. Nothing was saved from this step on. See "
        f"what is wrong with them; {leave_out}=[ID] passes over one, and the run then goes on "
        "from its last checkpoint."
    )


def _named(read: Sequence[str]) -> str:
    more = f" and {len(read) - SHOWN} more" if len(read) > SHOWN else ""
    return ", ".join(read[:SHOWN]) + more
