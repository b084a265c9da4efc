"""A batch's lookups of one step, retrieval by retrieval and without a memory of the steps before:
what `searching.RowSearches` is held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mmrag.records import NO_ENTRY, Neighbours
from mmrag.retrieval.interpolation import Retrieval, interpolate, sayable
from mmrag.retrieval.knn import gate, unsure


def retrieve(
    lm_logp: Tensor,
    keys: Tensor,
    retrieval: Retrieval,
    exclude_documents: Sequence[int] | None = None,
) -> tuple[Tensor, Neighbours]:
    """The next-token log-probabilities (B, V) after retrieval with `keys` (B, D).

    With weight 0, where the model is certain and behind a shut gate they are `lm_logp` itself, and
    the neighbours are none: what was not heard is no evidence.
    """
    knn = retrieval.settings
    logp, neighbours = lm_logp, Neighbours.none(len(lm_logp), knn.k)
    if knn.weight == 0:
        return logp, neighbours
    rows = unsure(lm_logp, knn.certain).nonzero()[:, 0]
    if len(rows):
        queries = keys[rows].float().cpu().numpy()
        excluded = exclude_documents and [exclude_documents[row] for row in rows.tolist()]
        found = sayable(retrieval.retriever.search(queries, knn.k, excluded), lm_logp[rows])
        logp = lm_logp.index_copy(0, rows, interpolate(lm_logp[rows], found, knn))
        neighbours = _placed(neighbours, rows.tolist(), _gated(found, knn.gate))
    return logp, neighbours


def retrieve_each(
    lm_logp: Tensor,
    keys: Tensor,
    retrievals: Sequence[Retrieval | None],
    exclude_documents: Sequence[int] | None = None,
) -> tuple[Tensor, Neighbours, list[int]]:
    """`retrieve` with each row's own retrieval, or none; and how many of its shards did not answer.

    Rows that share a retrieval are searched together.
    """
    k = max((one.settings.k for one in retrievals if one is not None), default=1)
    logp, neighbours = lm_logp.clone(), Neighbours.none(len(lm_logp), k)
    missing = [0] * len(lm_logp)
    for retrieval in {id(one): one for one in retrievals if one is not None}.values():
        rows = [row for row, one in enumerate(retrievals) if one is retrieval]
        excluded = exclude_documents and [exclude_documents[row] for row in rows]
        logp[rows], found = retrieve(lm_logp[rows], keys[rows], retrieval, excluded)
        neighbours = _placed(neighbours, rows, found)
        for row in rows:
            missing[row] = found.missing_shards
    return logp, neighbours, missing


def _placed(neighbours: Neighbours, rows: Sequence[int], found: Neighbours) -> Neighbours:
    """`neighbours` with what was `found` for some of its rows."""
    for name in ("distances", "tokens", "entries", "documents"):
        column = getattr(found, name)
        getattr(neighbours, name)[rows, : column.shape[1]] = column
    return replace(neighbours, missing_shards=max(neighbours.missing_shards, found.missing_shards))


def _gated(found: Neighbours, largest: float | None) -> Neighbours:
    """`found`, with nothing in the rows whose gate is shut."""
    near = gate(torch.from_numpy(found.distances), largest).numpy()[:, None]
    return replace(
        found,
        distances=np.where(near, found.distances, np.float32(np.inf)),
        entries=np.where(near, found.entries, NO_ENTRY),
    )
