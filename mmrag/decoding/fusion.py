"""What an n-gram model says of the next tokens of a batch's rows, beside the language model.

Shallow fusion: a token's score is the language model's, plus a weight times the log-probability of
the n-gram model. What was retrieved makes a token likelier than the language model alone has it; by
as much it is made likelier here, as text that nobody counted would else be held against it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from mmrag.model.ngram import NGram


class FusedRows:
    """The contexts of the rows of a batch, from step to step."""

    def __init__(self, ngrams: Sequence[NGram | None], weights: Sequence[float]) -> None:
        """One a row; a row without, or of weight 0, is left to the language model. ValueError for
        several models."""
        used = [w if one is not None else 0.0 for one, w in zip(ngrams, weights, strict=True)]
        self.weight = np.array(used, np.float32)
        """Of what the n-gram model says of each row (B,)."""
        self._ngram = _the_one(one for one, w in zip(ngrams, used, strict=True) if w)
        self._nodes = self._ngram.start(len(used)) if self._ngram else np.zeros((len(used), 0))

    @property
    def share(self) -> np.ndarray:
        """How much all that weighs in a token's score weighs together (B,)."""
        return 1 + self.weight

    def logp(self, like: Tensor) -> Tensor | None:
        """What the rows' next tokens get (B, V), nats, as a tensor `like` the language model's;
        None where no row has a model."""
        if self._ngram is None:
            return None
        said = torch.from_numpy(self._ngram.logp(self._nodes) * self.weight[:, None])
        return said.to(like.device, like.dtype, non_blocking=True)

    def with_retrieved(self, fused: Tensor, logp: Tensor, lm_logp: Tensor) -> Tensor:
        """`fused` (B, V), with what was retrieved: `logp` (B, V) has it, `lm_logp` (B, V) not."""
        gain = (logp - lm_logp).nan_to_num_(0.0, 0.0, 0.0).clamp_(min=0)
        return gain.mul_(torch.from_numpy(self.weight).to(gain)[:, None]).add_(fused).clamp_(max=0)

    def begin(self, row: int, tokens: Sequence[int]) -> np.ndarray:
        """A row goes on with `tokens` (T,); what each of them gets (T,), nats."""
        earned = np.zeros(len(tokens), np.float32)
        if self._ngram is not None:
            for place, token in enumerate(tokens):
                nodes = self._nodes[row : row + 1]
                earned[place] = self._ngram.logp(nodes)[0, token] * self.weight[row]
                self._nodes[row] = self._ngram.advance(nodes, np.array([token]))[0]
        return earned

    def advance(self, tokens: np.ndarray) -> None:
        """Every row goes on with its token, of `tokens` (B,)."""
        if self._ngram is not None:
            self._nodes = self._ngram.advance(self._nodes, tokens)

    def select(self, rows: np.ndarray) -> None:
        """Keep these rows (R,), which may repeat."""
        self.weight, self._nodes = self.weight[rows], self._nodes[rows]
        if not self.weight.any():
            self._ngram, self._nodes = None, self._nodes[:, :0]

    def require(self, other: FusedRows) -> None:
        """ValueError where the rows of `other` have another model."""
        _the_one(one for one in (self._ngram, other._ngram) if one is not None)

    def join(self, other: FusedRows) -> None:
        """Go on with the rows of `other`, too, which have the same model or none."""
        for one, model in ((self, other._ngram), (other, self._ngram)):
            if one._ngram is None and model is not None:
                one._ngram, one._nodes = model, model.start(len(one.weight))
        self.weight = np.concatenate((self.weight, other.weight))
        self._nodes = np.concatenate((self._nodes, other._nodes))


def _the_one(models: Iterable[NGram]) -> NGram | None:
    each = {id(model): model for model in models}
    if len(each) > 1:
        raise ValueError("clips that are decoded together are weighed by one n-gram model")
    return next(iter(each.values()), None)
