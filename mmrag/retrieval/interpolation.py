"""What neighbours do to the next token: who has a vote, gated, and mixed in."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mmrag.config import KNN
from mmrag.records import NO_ENTRY, Neighbours, Retriever
from mmrag.retrieval.knn import gate, knn_logp, mix
from mmrag.retrieval.weights import Weights


@dataclass(frozen=True)
class Retrieval:
    """A datastore to ask at every step, and how far to trust it."""

    retriever: Retriever
    settings: KNN
    weights: Weights | None = None
    """What its entries weigh; None where each weighs one."""


def sayable(found: Neighbours, lm_logp: Tensor) -> Neighbours:
    """`found` without the neighbours whose token no transcript may hold (`lm_logp` (B, V) is -inf).

    They have no vote: a datastore may hold the unknown piece, or tokens of another use.
    """
    tokens = torch.from_numpy(found.tokens).long().to(lm_logp.device)
    allowed = lm_logp.gather(1, tokens).isfinite().cpu().numpy()
    return replace(
        found,
        distances=np.where(allowed, found.distances, np.float32(np.inf)),
        entries=np.where(allowed, found.entries, NO_ENTRY),
    )


def interpolate(lm_logp: Tensor, found: Neighbours, knn: KNN) -> Tensor:
    """`lm_logp` (B, V) mixed with what the neighbours say."""
    distances = torch.from_numpy(found.distances).to(lm_logp.device)
    tokens = torch.from_numpy(found.tokens).to(lm_logp.device)
    said = knn_logp(distances, tokens, knn.temperature, lm_logp.shape[1])
    return mix(lm_logp, said, knn.weight * gate(distances, knn.gate))
