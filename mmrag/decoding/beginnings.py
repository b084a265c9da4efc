"""What transcripts are given to begin with: read with the prompt, in one pass, and kept with the
same evidence as what is chosen after it.

A row has a place for each token of its beginning, where that is what comes next, and a last one,
where the first token is chosen. Knows ids and numbers alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmrag.decoding.candidates import download

LEAST_LOGP = -100.0
"""Of a token that the model would never write, in nats: whoever gave it meant it."""


@dataclass(frozen=True, eq=False)
class Beginnings:
    """The beginnings of B rows, laid out a row after the other: N places in all."""

    rows: np.ndarray
    """The row of each place (N,)."""
    tokens: np.ndarray
    """What comes next at each place (N,); -1 at a row's last."""
    counts: np.ndarray
    """Places of each row (B,): one more than its beginning has tokens."""

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]]) -> Beginnings:
        """Those of rows that begin with `texts`, of which some may be empty."""
        counts = np.array([len(text) + 1 for text in texts])
        tokens = np.concatenate([np.array([*text, -1], np.int64) for text in texts])
        return cls(np.repeat(np.arange(len(texts)), counts), tokens, counts)

    @property
    def last(self) -> np.ndarray:
        """The last place of each row (B,)."""
        return np.cumsum(self.counts) - 1

    @property
    def given(self) -> np.ndarray:
        """The other places: those whose next token is given (G,)."""
        return np.flatnonzero(self.tokens >= 0)

    @property
    def offsets(self) -> np.ndarray:
        """How many places of its row come before each (N,)."""
        return np.arange(len(self.rows)) - (np.cumsum(self.counts) - self.counts)[self.rows]

    def of_rows(self, chosen: np.ndarray) -> np.ndarray:
        """The places of the rows that are `chosen` (B,) bool."""
        return np.flatnonzero(chosen[self.rows])

    def positions(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column (N,) each of every place, in what rows of `lengths` (B,) have read last
        of all."""
        rows = torch.from_numpy(self.rows).to(lengths.device)
        behind = torch.from_numpy(self.counts[self.rows] - self.offsets).to(lengths.device)
        return rows, lengths[rows] - behind

    def without_a_word_gone_on_with(self, logp: Tensor, starts: Tensor, end: int) -> Tensor:
        """`logp` (B, V) of the first tokens that are chosen, -inf for those that would go on with
        the last word of a beginning: which are not among `starts` (V,) bool. The `end` stays
        possible."""
        behind = torch.from_numpy(self.counts > 1).to(logp.device)[:, None]
        logp = logp.masked_fill(behind & ~starts, -torch.inf)
        least = torch.where(behind[:, 0], LEAST_LOGP, -torch.inf).to(logp)
        return logp.index_copy(
            1, torch.tensor([end], device=logp.device), logp[:, end].maximum(least)[:, None]
        )


def evidence(
    tokens: np.ndarray, logp: Tensor, lm_logp: Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of `tokens` (G,), which come next whatever `logp` and `lm_logp` (G, V) say: these of them,
    and what the language model alone would have chosen, (G,) each."""
    column = torch.from_numpy(tokens).to(logp.device)[:, None]
    own, alone = logp.gather(1, column), lm_logp.gather(1, column)
    most, preferred = lm_logp.max(1, keepdim=True)
    preferred = torch.where(alone == most, column, preferred)
    own, alone = own.clamp(min=LEAST_LOGP), alone.clamp(min=LEAST_LOGP)
    return tuple(one[:, 0] for one in download(own, alone, preferred))
