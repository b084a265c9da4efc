"""Neighbours into next-token probabilities: pure functions of tensors.

Knows nothing about language models, datastores or search: distances and tokens come in,
log-probabilities go out. The method is kNN-LM (arXiv 1911.00172), with the temperature of kNN-MT
(arXiv 2010.00710). A missing neighbour is at distance +inf and weighs nothing.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

ROUNDING = 1e-5
"""Of probabilities, larger than that of float32: what is nearer to a tie is not decided here."""


def knn_logp(distances: Tensor, tokens: Tensor, temperature: float, vocabulary: int) -> Tensor:
    """What the neighbours alone say of the next token (arXiv 1911.00172, eq. 2).

    Neighbour i has weight softmax(-distance / temperature); a token's probability is the sum over
    the neighbours that it followed. `distances` (B, K), `tokens` (B, K) integers below
    `vocabulary` -> (B, V) float32; -inf for a token that no neighbour names, so all -inf in a row
    without neighbours. Raises ValueError if the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} is not positive")
    distances, tokens = distances.float(), tokens.long()
    rows = len(distances)
    if not distances.shape[1]:
        return distances.new_full((rows, vocabulary), -math.inf)
    # Distances from the nearest, so that not even an overflow takes a row's every weight.
    nearest = distances.amin(1, keepdim=True)
    found = nearest.isfinite()
    farther = distances - torch.where(found, nearest, 0.0)
    weights_logp = torch.where(found, (-farther / temperature).log_softmax(1), -math.inf)
    # Log-sum-exp by token, each around its own token's largest weight.
    largest = distances.new_full((rows, vocabulary), -math.inf)
    largest = largest.scatter_reduce(1, tokens, weights_logp, "amax")
    largest = torch.where(largest.isfinite(), largest, 0.0)
    terms = (weights_logp - largest.gather(1, tokens)).exp()
    return largest + torch.zeros_like(largest).scatter_add(1, tokens, terms).log()


def mix(lm_logp: Tensor, knn_logp: Tensor, weight: float | Tensor) -> Tensor:
    """w * p_kNN + (1 - w) * p_LM as log-probabilities (arXiv 1911.00172, eq. 3).

    `lm_logp`, `knn_logp` (B, V), `weight` one number or one a row (B,), in [0, 1]. A row of weight
    0, and a row without any neighbour (all -inf), is the language model's own, bit for bit.
    Raises ValueError for a single weight outside [0, 1].
    """
    if not isinstance(weight, Tensor):
        if not 0 <= weight <= 1:
            raise ValueError(f"weight {weight} is not between 0 and 1")
        if weight == 0:
            return lm_logp
        weight = lm_logp.new_tensor(weight)
    weight = weight.to(lm_logp).expand(len(lm_logp)).unsqueeze(1)
    mixed = torch.logaddexp(torch.log1p(-weight) + lm_logp, weight.log() + knn_logp)
    heard = (weight > 0) & knn_logp.isfinite().any(1, keepdim=True)
    return torch.where(heard, mixed.to(lm_logp.dtype), lm_logp)


def votes_logp(distances: np.ndarray, tokens: np.ndarray, temperature: np.ndarray) -> np.ndarray:
    """`knn_logp` at the neighbours' own tokens: (B, K) float32, -inf for one that is missing.

    `distances` (B, K) float32, `tokens` (B, K), `temperature` (B,), a row's own. Worked out where
    searches end, in main memory: what is sent to a device is then ready to be mixed in.
    """
    nearest = distances.min(1, keepdims=True, initial=np.inf)
    found = np.isfinite(nearest)
    with np.errstate(all="ignore"):  # what is missing, or farther than numbers go, has no vote
        weights = (distances - np.where(found, nearest, np.float32(0))) / -temperature[:, None]
        total = np.exp(weights).sum(1, keepdims=True)
        # Log-sum-exp of the neighbours that name the same token, around the largest of them.
        named = tokens[:, :, None] == tokens[:, None]
        same = np.where(named, weights[:, None], np.float32(-np.inf))
        largest = same.max(2)
        largest = np.where(np.isfinite(largest), largest, np.float32(0))
        said = largest + np.log(np.exp(same - largest[:, :, None]).sum(2) / total)
    return np.where(found, said, np.float32(-np.inf))


def weighed(
    distances: np.ndarray, temperature: np.ndarray, weights_logp: np.ndarray, mixed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours whose votes count by a weight each: what `votes_logp` and `mix_votes` are to be
    given instead of `distances` (B, K) float32 and the weights `mixed` (B,) in.

    With v_i = softmax(-distance / temperature) and W = sum w_i v_i, the mixture is proportional to
    (1 - m) p_LM + m sum w_i v_i: a weight multiplies the odds of its token against the language
    model, whoever else votes. `weights_logp` (B, K) are the logarithms of w, `temperature` (B,).
    """
    lean = np.where(np.isfinite(distances), weights_logp, np.float32(0))
    moved = distances - temperature[:, None] * lean
    nearest = distances.min(1, keepdims=True, initial=np.inf)
    found = np.isfinite(nearest)
    with np.errstate(all="ignore"):
        votes = np.exp((distances - np.where(found, nearest, 0)) / -temperature[:, None])
        votes = np.where(found, votes, 0)
        total = np.maximum(votes.sum(1), np.finfo(np.float32).tiny)
        heard = mixed * (votes * np.exp(lean)).sum(1) / total
    share = heard / np.maximum(1 - mixed + heard, np.finfo(np.float32).tiny)
    return moved.astype(np.float32), np.where(found[:, 0], share, mixed).astype(np.float32)


def mix_votes(lm_logp: Tensor, votes_logp: Tensor, tokens: Tensor, weight: Tensor) -> Tensor:
    """`mix` where neighbours are all that has votes: `votes_logp` (B, K) of their `tokens` (B, K).

    To every other token's logarithm that of (1 - w) is added. `weight` (B,), 0 for a row without
    neighbours.
    """
    weight = weight.to(lm_logp)[:, None]
    kept = torch.log1p(-weight)
    mixed = kept + lm_logp
    voted = torch.logaddexp(mixed.gather(1, tokens), weight.log() + votes_logp)
    return mixed.scatter_(1, tokens, voted.to(lm_logp.dtype))


def gate(distances: Tensor, largest: float | None) -> Tensor:
    """Which queries should hear their neighbours: (B, K) -> (B,) bool.

    True where the nearest neighbour is no farther than `largest`; None asks only that there is
    one. Multiply it with a weight to close retrieval off row by row.
    """
    near = distances.isfinite()
    if largest is not None:
        near &= distances <= largest
    return near.any(1)


def unsure(lm_logp: Tensor, certain: float | None) -> Tensor:
    """Which rows have something to ask: (B, V) -> (B,) bool.

    True where the language model's best token is less probable than `certain`; None asks always.
    """
    if certain is None:
        return torch.ones_like(lm_logp[:, 0], dtype=torch.bool)
    return lm_logp.amax(1) < math.log(certain)


def settled(lm_logp: Tensor, weight: Tensor) -> Tensor:
    """In which rows no neighbour can change which token is the likeliest: (B, V) -> (B,) bool.

    Neighbours of `weight` w (B,) take (1 - w) of the language model's probabilities and add at most
    w to another token's, so the best one stays where (1 - w) * (best - second best) > w.
    """
    best, second = lm_logp.float().topk(2).values.exp().unbind(1)
    return (1 - weight) * (best - second) > weight + ROUNDING


def best_neighbour(distances: Tensor, tokens: Tensor, chosen: Tensor) -> Tensor:
    """The neighbour that spoke loudest for a token: column index (B,) int64, -1 for none.

    `distances`, `tokens` (B, K), `chosen` (B,). The nearest neighbour with the chosen token is the
    one of the largest weight, whatever the temperature.
    """
    agreeing = (tokens == chosen.unsqueeze(1)) & distances.isfinite()
    if not distances.shape[1]:
        return torch.full_like(chosen, -1, dtype=torch.long)
    nearest = torch.where(agreeing, distances, math.inf).argmin(1)
    return torch.where(agreeing.any(1), nearest, -1)
