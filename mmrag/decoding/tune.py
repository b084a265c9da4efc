"""How far to trust a datastore: a grid of kNN settings, scored on a development split.

One pass retrieves for every reference token; each setting is then arithmetic over what was found.
The loss is that of the reference given its speech, which ranks settings far more cheaply than
decoding with each of them; the best few are worth decoding.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmrag import artifact
from mmrag.config import KNN, RetrievedAttention, Tune
from mmrag.model.lm import LM
from mmrag.model.states import read_states
from mmrag.model.vocabulary import Vocabulary
from mmrag.records import Neighbours, Retriever
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.interpolation import interpolate, sayable
from mmrag.retrieval.knn import unsure
from mmrag.retrieval.phrases import untuned
from mmrag.speech.tokenized import Tokenized
from mmrag.storage import Location

SETTINGS = "knn.json"
"""The file that holds what was chosen for a datastore."""
ATTENTION, BOTH = "attention.json", "both.json"
"""How an adapter reads it, and kNN settings for use beside that."""
DEFAULTS = "retrieval"
"""The directory in which models have settings for datastores that nobody tuned any for."""
PLAIN = KNN(k=16, weight=0.5, temperature=1.0, certain=0.99)
READ = RetrievedAttention(k=8, stride=1, whole=300)
"""Where the models have none; the temperature is then each datastore's own."""
TRUE, OTHER = 0, 1


@dataclass(frozen=True)
class Scored:
    """A setting and its loss on the development split, in nats a token."""

    knn: KNN
    loss: float
    distance_scale: float
    """Median distance of the dev queries' nearest entry, of which the grid counts multiples."""


@dataclass(frozen=True)
class Decoded:
    """A setting's word error rates on the development split, and what a decoy does to it."""

    settings: KNN | RetrievedAttention
    wer: float
    decoy_wer: float | None = None
    """With a datastore that has nothing to say; None if none was tried."""


Answers = tuple[Tensor, Neighbours, Tensor]
"""Of N queries: log-probabilities (N, 2) of `_two_tokens`, its neighbours, and the language model's
log-probability of its best token (N,)."""


def chosen(directory: Path, file: str = SETTINGS) -> KNN:
    """The kNN settings in a directory that `jobs.tune` made; `BOTH` for those beside reading."""
    fields = json.loads((directory / file).read_text())
    return KNN(**{name: fields[name] for name in KNN.model_fields if name in fields})


def chosen_attention(directory: Path) -> RetrievedAttention | None:
    """How to read the datastore; None where there was no adapter to tune for."""
    if not (directory / ATTENTION).exists():
        return None
    fields = json.loads((directory / ATTENTION).read_text())
    return RetrievedAttention(**{name: fields[name] for name in RetrievedAttention.model_fields})


@dataclass(frozen=True)
class Tuned:
    """What was chosen for a datastore: kNN-LM alone, beside reading, and how to read."""

    knn: KNN
    both: KNN
    attention: RetrievedAttention | None
    """None where there was no adapter to tune for."""


def tuned(models: Location, datastore: Path) -> Tuned | None:
    """What `jobs.tune` chose for a datastore, in `tuned/<its name>` below `models`, if it did.

    Raises ArtifactError if that was for another datastore of the name.
    """
    directory = models / "tuned" / datastore.name
    if not directory.is_dir():
        return None
    made = artifact.load(datastore, "datastore")
    chosen_for = artifact.load(directory, "tuned")
    chosen_for.require("datastore", made)
    return _all_chosen(chosen_for.path)


def default(models: Location, datastore: Datastore) -> Tuned:
    """Settings for a datastore that nobody tuned any for: the models' own, in DEFAULTS below them.

    Distances are those of one language model; where it comes without settings, the temperature is
    a share of the datastore's own distances. Raises ArtifactError if they are another model's.
    """
    directory = models / DEFAULTS
    if not directory.is_dir():
        knn = untuned(PLAIN, datastore)
        return Tuned(knn, knn, READ)
    chosen_for = artifact.load(directory, "tuned")
    chosen_for.require("lm", artifact.load(models / "lm", "lm"))
    own = _all_chosen(chosen_for.path)
    return replace(own, attention=own.attention or READ)


def _all_chosen(directory: Path) -> Tuned:
    both = BOTH if (directory / BOTH).exists() else SETTINGS
    return Tuned(chosen(directory), chosen(directory, both), chosen_attention(directory))


def distance_scale(directory: Path) -> float:
    """The distance of which the grid's gates and temperatures are multiples."""
    return json.loads((directory / SETTINGS).read_text())["distance_scale"]


def score_grid(
    lm: LM,
    vocabulary: Vocabulary,
    batches: Iterable[Sequence[Tokenized]],
    retriever: Retriever,
    grid: Tune,
) -> list[Scored]:
    """Every setting of the grid, lowest loss first.

    Temperatures are the grid's multiples of the median distance to the nearest entry, so that one
    grid serves every metric and model. What the vocabulary cannot write is not scored. ValueError
    if there is no token to score, or nothing is found for any of them.
    """
    read: dict[str, list[Answers]] = {query: [] for query in grid.query}
    for batch in batches:
        batch = [one for one in batch if not vocabulary.unspeakable(one.utterance.text)]
        if not batch:
            continue
        texts = [vocabulary.encode(one.utterance.text) for one in batch]
        speech = [vocabulary.speech_input(one.units) for one in batch]
        heard, tokens, _, logp = read_states(lm, vocabulary, texts, speech, logits=True)
        for query, found in read.items():
            keys = heard
            if query == "text":
                keys, *_ = read_states(lm, vocabulary, texts, [None] * len(batch), logits=False)
            neighbours = sayable(retriever.search(keys.cpu().numpy(), max(grid.k)), logp)
            found.append((*_two_tokens(logp, tokens, neighbours), logp.amax(1).cpu()))
    scored = [each for query, found in read.items() for each in _score(found, grid, query)]
    return sorted(scored, key=lambda one: one.loss)


def finalists(scored: Sequence[Scored], count: int) -> list[Scored]:
    """The `count` best, one for each weight, gate, certainty and way to ask.

    The loss is that of a reader who never errs, and so it trusts the datastore too much: a
    decoder that follows a neighbour into another sentence does not come back. Settings of all
    weights have to be decoded to know.
    """
    kept: dict[tuple, Scored] = {}
    for one in sorted(scored, key=lambda one: one.loss):
        knn = one.knn
        kept.setdefault((knn.weight, knn.gate, knn.certain, knn.query), one)
    return list(kept.values())[:count]


def best(decoded: Sequence[Decoded], plain_wer: float, harm: float) -> Decoded:
    """The setting of least WER among those whose decoy raises the WER without retrieval by no more
    than `harm` (relative); if every one does more, that of the least harm."""
    harmless = [
        one for one in decoded if one.decoy_wer is None or one.decoy_wer <= (1 + harm) * plain_wer
    ]
    if harmless:
        return min(harmless, key=lambda one: one.wer)
    return min(decoded, key=lambda one: one.decoy_wer)


def _score(read: Sequence[Answers], grid: Tune, query: str) -> Iterator[Scored]:
    """The settings that ask in one way."""
    if not read:
        raise ValueError("the development split holds no utterance to score")
    nearest = np.concatenate([found.distances[:, 0] for _, found, _ in read])
    nearest = nearest[np.isfinite(nearest)]
    if not len(nearest):
        raise ValueError("the datastore has no entry for any token of the development split")
    # An inner product's distances may be negative; only their size matters to a temperature.
    distance_scale = max(float(np.median(np.abs(nearest))), 1e-6)
    count = sum(len(logp) for logp, _, _ in read)
    for k, multiple, weight, gate, certain in itertools.product(
        grid.k, grid.temperature, grid.weight, grid.gate, grid.certain
    ):
        knn = KNN(
            k=k,
            weight=weight,
            temperature=distance_scale * multiple,
            gate=None if gate is None else distance_scale * gate,
            certain=certain,
            query=query,
        )
        mixed = [_mixed(*each, knn) for each in read]
        yield Scored(knn, -float(torch.cat(mixed).sum()) / count, distance_scale)


def _mixed(logp: Tensor, found: Neighbours, best: Tensor, knn: KNN) -> Tensor:
    """The true tokens' log-probabilities (N,) after retrieval."""
    asking = unsure(best[:, None], knn.certain)
    return torch.where(asking, interpolate(logp, found.top(knn.k), knn)[:, TRUE], logp[:, TRUE])


def _two_tokens(logp: Tensor, tokens: np.ndarray, found: Neighbours) -> tuple[Tensor, Neighbours]:
    """The same question over a vocabulary of two, the true token and any other.

    `logp` (N, V) and `tokens` (N,) -> (N, 2): the true token's mixture does not depend on how the
    rest is shared out, and a development split of whole rows would not fit in memory.
    """
    true = logp.gather(1, torch.from_numpy(tokens).long().to(logp.device)[:, None])
    other = torch.log1p(-true.exp().clamp(max=1))
    says = np.where(found.tokens == tokens[:, None], TRUE, OTHER)
    return torch.cat((true, other), 1).cpu(), replace(found, tokens=says)
