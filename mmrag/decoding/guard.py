"""Whether to believe a transcript: likelihood and repetition."""

from __future__ import annotations

from collections.abc import Sequence

from mmrag.decoding.hypotheses import Hypothesis

LOOPS = 4
"""Repetitions that nobody says on purpose."""


def credible(heard: Hypothesis, agreement: float, begun: int = 0) -> bool:
    """Whether the language model agrees with a transcript, of which so many tokens were given.

    It does where the mean of its own log-probabilities of the others is at least `agreement`, and
    no run of tokens is repeated LOOPS times.
    """
    straight, alone = trust(heard, begun)
    return straight and alone >= agreement


def trust(heard: Hypothesis, begun: int = 0) -> tuple[bool, float]:
    """How far to believe a transcript, the larger the more: whether it does not loop, and what the
    language model alone thinks of what follows its first `begun` tokens (mean log-probability a
    token, nats)."""
    chosen = heard.choices[begun:]
    alone = sum(choice.lm_logp for choice in chosen) / max(1, len(chosen))
    return not loops(heard.tokens), alone


def loops(tokens: Sequence[int]) -> bool:
    """Whether a run of tokens is repeated LOOPS times in a row."""
    for length in range(1, len(tokens) // LOOPS + 1):
        same = 0
        for place in range(length, len(tokens)):
            same = same + 1 if tokens[place] == tokens[place - length] else 0
            if same == length * (LOOPS - 1):
                return True
    return False
