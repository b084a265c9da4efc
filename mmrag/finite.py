"""A loss that is no number: the run stops before it takes the step, and says what was read.

A weight that is not a number never becomes one again, so a step is not taken on such a loss, and
nothing is saved after it. Knows neither models nor audio.
"""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 20
"""Utterances that a message names; a micro-batch has seldom more."""


class NonFiniteLoss(ValueError):
    """A loss or its gradient is infinite or not a number; the message names what was read."""


def non_finite(what: str, where: str, read: Sequence[str], leave_out: str) -> NonFiniteLoss:
    """The error of a step, for whoever has to find what is wrong with which utterance.

    `what` went wrong `where` (`step 3`, counted from 1), after utterances `read` by id;
    `leave_out` is the key that passes over some.
    """
    more = f" and {len(read) - SHOWN} more" if len(read) > SHOWN else ""
    named = ", ".join(read[:SHOWN])
    return NonFiniteLoss(
        f"{where}: {what} after reading {named}{more}. Nothing was saved from this step on. See "
        f"what is wrong with them; {leave_out}=[ID] passes over one, and the run then goes on "
        "from its last checkpoint."
    )
