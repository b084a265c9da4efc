"""How far to trust a datastore: a grid of kNN settings, scored on a development split.

One pass retrieves for every reference token; each setting is then arithmetic over what was found.
The loss is that of the reference given its speech, which ranks settings far more cheaply than
decoding with each of them; the best few are worth decoding.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mmrag.config import KNN, Tune
from mmrag.decode import interpolate, read_states
from mmrag.lm import LM
from mmrag.records import Retriever
from mmrag.tokens import Tokenized
from mmrag.vocabulary import Vocabulary


@dataclass(frozen=True)
class Scored:
    """A setting and its loss on the development split, in nats a token."""

    knn: KNN
    loss: float


def score_grid(
    lm: LM,
    vocabulary: Vocabulary,
    batches: Iterable[Sequence[Tokenized]],
    retriever: Retriever,
    grid: Tune,
) -> list[Scored]:
    """Every setting of the grid, lowest loss first.

    Temperatures are the grid's multiples of the median distance to the nearest entry, so that one
    grid serves every metric and model. ValueError if nothing is found for any token.
    """
    read = []
    for batch in batches:
        texts = [vocabulary.encode(one.utterance.text) for one in batch]
        speech = [vocabulary.encode_units(one.units) for one in batch]
        keys, tokens, _, logp = read_states(lm, vocabulary, texts, speech, logits=True)
        found = retriever.search(keys.cpu().numpy(), max(grid.k))
        read.append((found, logp, torch.from_numpy(tokens).long().to(logp.device)))
    nearest = np.concatenate([found.distances[:, 0] for found, *_ in read])
    nearest = nearest[np.isfinite(nearest)]
    if not len(nearest):
        raise ValueError("the datastore has no entry for any token of the development split")
    # An inner product's distances may be negative; only their size matters to a temperature.
    unit = max(float(np.median(np.abs(nearest))), 1e-6)
    settings = [
        KNN(k=k, weight=weight, temperature=unit * multiple)
        for k, multiple, weight in itertools.product(grid.k, grid.temperature, grid.weight)
    ]
    count = sum(len(tokens) for _, _, tokens in read)
    scored = []
    for knn in settings:
        total = 0.0
        for found, logp, tokens in read:
            mixed = interpolate(logp, found.top(knn.k), knn)
            total -= float(mixed.gather(1, tokens[:, None]).sum())
        scored.append(Scored(knn, total / count))
    return sorted(scored, key=lambda one: one.loss)
