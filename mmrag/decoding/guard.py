"""Whether to believe a transcript that retrieval had a part in: likelihood and repetition."""

from __future__ import annotations

from collections.abc import Sequence

from mmrag.decoding.decode import Hypothesis

LOOPS = 4
"""Repetitions that nobody says on purpose."""


def credible(heard: Hypothesis, agreement: float) -> bool:
    """Whether the language model agrees with a transcript that retrieval had a part in.

    It does where the mean of its own log-probabilities of the tokens is at least `agreement`, and
    no run of tokens is repeated LOOPS times.
    """
    alone = sum(choice.lm_logp for choice in heard.choices) / max(1, len(heard.choices))
    return alone >= agreement and not loops(heard.tokens)


def loops(tokens: Sequence[int]) -> bool:
    """Whether a run of tokens is repeated LOOPS times in a row."""
    for length in range(1, len(tokens) // LOOPS + 1):
        same = 0
        for place in range(length, len(tokens)):
            same = same + 1 if tokens[place] == tokens[place - length] else 0
            if same == length * (LOOPS - 1):
                return True
    return False
