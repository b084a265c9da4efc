"""The likeliest next tokens of a batch's rows, and the evidence for them: arrays over all rows.

What the device found in a step comes to the host here, in one piece.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmrag.records import NO_ENTRY, Neighbours
from mmrag.retrieval.knn import best_neighbour


@dataclass(frozen=True)
class Candidates:
    """K next tokens of each of B rows, likeliest first; log-probabilities in nats.

    `tokens` (B, K) and `logp` (B, K), -inf for a token that is none; `lm_logp` (B, K) and
    `lm_token` (B, K) as in `Choice`. `first` (B,) are the first tokens where they were found.
    """

    tokens: np.ndarray
    logp: np.ndarray
    lm_logp: np.ndarray
    lm_token: np.ndarray
    first: Tensor


def likeliest(
    logp: Tensor, lm_logp: Tensor, count: int, temperatures: np.ndarray | None = None
) -> Candidates:
    """The `count` likeliest next tokens of each row by `logp` (B, V), which may be `lm_logp`.

    `temperatures` (B,), None for all 0: a row with one above 0 has a single candidate, drawn.
    """
    if count == 1:
        values, tokens = logp.max(-1, keepdim=True)
    else:
        values, tokens = logp.topk(min(count, logp.shape[1]))
    drawn = np.flatnonzero(temperatures > 0) if temperatures is not None else np.empty(0, int)
    if len(drawn):
        values, tokens = _draw(logp, values, tokens, temperatures, drawn)
    if logp is lm_logp and not len(drawn):
        alone, most, preferred = values, values[:, :1], tokens[:, :1]
    else:
        alone = lm_logp.gather(1, tokens)
        most, preferred = lm_logp.max(-1, keepdim=True)
    preferred = torch.where(alone == most, tokens, preferred)  # of equals, the one chosen
    if len(drawn):
        rows = torch.from_numpy(drawn).to(logp.device)
        untouched = (logp[rows] == lm_logp[rows]).all(-1, keepdim=True)
        own = torch.where(untouched, tokens[rows], preferred[rows])
        preferred = preferred.index_copy(0, rows, own)
    return Candidates(*download(tokens, values, alone, preferred), first=tokens[:, 0])


def _draw(
    logp: Tensor, values: Tensor, tokens: Tensor, temperatures: np.ndarray, drawn: np.ndarray
) -> tuple[Tensor, Tensor]:
    """`values` and `tokens` (B, K) with one token for each of the rows `drawn`, and no other."""
    rows = torch.from_numpy(drawn).to(logp.device)
    own = logp[rows]
    behind = own - own.amax(-1, keepdim=True)  # 0 for the best, however small the temperature
    warmth = torch.from_numpy(temperatures[drawn]).to(behind)[:, None]
    chosen = (behind / warmth).softmax(-1).multinomial(1)
    alone = torch.full_like(values[rows], -torch.inf)
    alone[:, :1] = own.gather(1, chosen)
    kept = tokens[rows].clone()
    kept[:, :1] = chosen
    return values.index_copy(0, rows, alone), tokens.index_copy(0, rows, kept)


def download(*columns: Tensor) -> list[np.ndarray]:
    """Tensors (B, K) of float32 or of ids as arrays, in one transfer from the device."""
    packed = [
        one.float().view(torch.int32) if one.is_floating_point() else one.int() for one in columns
    ]
    found = torch.stack(packed).cpu().numpy()
    return [
        own.view(np.float32) if one.is_floating_point() else own.astype(np.int64)
        for one, own in zip(columns, found, strict=True)
    ]


def voters(
    neighbours: Neighbours, rows: np.ndarray, tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest neighbour that voted for each of `tokens` (R,), of the `rows` (R,) of a search.

    Returns entries (R,) and their distances (R,): NO_ENTRY at +inf where none did.
    """
    distances, voted = neighbours.distances[rows], neighbours.tokens[rows]
    column = best_neighbour(*map(torch.from_numpy, (distances, voted, tokens))).numpy()
    places = np.arange(len(rows)), column
    return (
        np.where(column < 0, NO_ENTRY, neighbours.entries[rows][places]),
        np.where(column < 0, np.float32(np.inf), distances[places]),
    )
