"""Requests as long as a recogniser's, and a language model with random weights to answer them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mmrag.config import LanguageModel
from mmrag.decoding.decode import Batch, Clip
from mmrag.decoding.engine import Engine
from mmrag.model.lm import LM
from mmrag.model.precision import computed_in

FIRST = 5
"""The first id that prompts are drawn from: those below are control tokens."""
JITTER = 0.15
"""Of a transcript's length, as a share of the range, beside what the prompt's length says."""

GAIN = 4.0
"""By how much the blocks' weights are larger than untrained ones: what comes next then depends on
all that came before, and two ways to compute it that differ are seen to differ."""


@dataclass(frozen=True)
class Request:
    """A prompt's ids, and how many tokens are wanted."""

    prompt: tuple[int, ...]
    tokens: int


class Ids:
    """As much of a vocabulary as a batch asks for: any id may follow, and none ends a transcript,
    so that one is as long as its limit."""

    eos = -1

    def __init__(self, size: int) -> None:
        self.size = size

    def transcript_ids(self) -> np.ndarray:
        """All of them: (V,) bool."""
        return np.ones(self.size, bool)

    first_ids = transcript_ids

    def prompt(self, speech: Sequence[int] | None, context: Sequence[int] = ()) -> list[int]:
        """The speech as it is."""
        return [*context, *(speech or ())]


def requests(
    count: int, prompts: tuple[int, int], outputs: tuple[int, int], vocabulary: int, seed: int
) -> list[Request]:
    """Prompts and transcripts between these lengths, in no order of them; who speaks for longer
    says more."""
    random = np.random.default_rng(seed)
    shares = random.random(count)
    said = np.clip(shares + JITTER * random.standard_normal(count), 0, 1)
    drawn = []
    for share, more in zip(shares, said, strict=True):
        length, tokens = (
            round(low + part * (high - low))
            for part, (low, high) in ((share, prompts), (more, outputs))
        )
        drawn.append(Request(tuple(random.integers(FIRST, vocabulary, length).tolist()), tokens))
    return drawn


def language_model(config: LanguageModel, vocabulary: int, dtype: torch.dtype, seed: int) -> LM:
    """Random weights, in a format that this machine computes in."""
    torch.manual_seed(seed)
    lm = LM(config, vocabulary).eval().requires_grad_(False)
    for parameter in lm.blocks.parameters():
        if parameter.dim() > 1:
            parameter *= GAIN
    return lm.to(computed_in(dtype, "cpu"))


def answered(engine: Engine, asked: Sequence[Request], **how: object) -> list[list[int]]:
    """Every request's tokens, all handed in at once; `how` is as in `Clip`."""
    jobs = [engine.submit(Clip(list(one.prompt), one.tokens, **how)) for one in asked]
    return [job.future.result().hypothesis.tokens for job in jobs]


def stepped(
    lm: LM,
    asked: Sequence[Request],
    clock: Callable[[], float],
    warm: int = 2,
    **how: object,
) -> tuple[float, list[float]]:
    """Seconds that a batch takes to read its prompts, and those of each of its later steps but for
    the first `warm`; as many steps as the first request has tokens."""
    batch = Batch(lm, Ids(lm.vocabulary))
    tokens = asked[0].tokens
    clips = [Clip(list(one.prompt), tokens, **how) for one in asked]
    started = clock()
    batch.join(clips)
    read, times = clock() - started, []
    for _ in range(tokens - 1):
        started = clock()
        batch.step()
        times.append(clock() - started)
    return read, times[warm:]
