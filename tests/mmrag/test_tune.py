import itertools
import math

import numpy as np
import pytest
import torch

from mmrag.config import LanguageModel, Tune
from mmrag.decode import read_states
from mmrag.lm import LM
from mmrag.records import NO_ENTRY, Neighbours, Units, Utterance
from mmrag.tokens import Tokenized
from mmrag.tune import score_grid
from mmrag.vocabulary import SentencePieces, Vocabulary

SHAPE = LanguageModel(width=16, layers=1, heads=2, kv_heads=2, feed_forward=24, tied=True)
TEXTS = ["turn on the light", "the door", "light the red lamp", "off"]
VOCABULARY = Vocabulary(SentencePieces.train(TEXTS, 45), units=6)
GRID = Tune(k=(1, 4), weight=(0.0, 0.3, 0.9), temperature=(0.1, 1.0), finalists=1)


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    lm = LM(SHAPE, VOCABULARY.size)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    return lm.eval()


def development():
    random = np.random.default_rng(0)
    spoken = []
    for number, text in enumerate(TEXTS):
        units = Units(random.integers(0, 6, 5).astype(np.int32), np.ones(5, np.int32))
        spoken.append(Tokenized(Utterance(id=f"u{number}", text=text), units))
    return spoken


class Store:
    """Distances and tokens drawn from the query itself; some neighbours, or all, are missing."""

    def __init__(self, missing=0.2, sign=1.0):
        self.missing, self.sign = missing, sign

    def search(self, queries, k, exclude_documents=None):
        rows = [self._row(np.random.default_rng(int(abs(q[:4]).sum() * 1e4)), k) for q in queries]
        distances, tokens = (np.stack(column) for column in zip(*rows, strict=True))
        found = np.isfinite(distances)
        return Neighbours(
            distances=distances,
            tokens=np.where(found, tokens, 0).astype(np.int32),
            entries=np.where(found, 1, NO_ENTRY),
            documents=np.where(found, 0, -1),
        )

    def _row(self, random, k):
        distances = np.sort(self.sign * random.uniform(1, 9, k)).astype(np.float32)
        if random.random() < self.missing:
            distances[random.integers(k) :] = np.inf
        tokens = random.integers(VOCABULARY.first_piece, VOCABULARY.first_unit, k)
        return distances, tokens


def by_hand(lm, store, k, weight, multiple):
    """Nats a token, one token at a time in float64."""
    spoken = development()
    texts = [VOCABULARY.encode(one.utterance.text) for one in spoken]
    speech = [VOCABULARY.encode_units(one.units) for one in spoken]
    keys, tokens, _, logp = read_states(lm, VOCABULARY, texts, speech, logits=True)
    found = store.search(keys.numpy(), max(GRID.k))
    nearest = found.distances[:, 0]
    temperature = multiple * np.median(np.abs(nearest[np.isfinite(nearest)]))
    total = 0.0
    for row, token in enumerate(tokens):
        distances = found.distances[row, :k].astype(np.float64)
        p = math.exp(logp[row, token])
        if np.isfinite(distances).any():
            votes = np.exp(-(distances - distances.min()) / temperature)
            share = votes[found.tokens[row, :k] == token].sum() / votes.sum()
            p = weight * share + (1 - weight) * p
        total -= math.log(p)
    return total / len(tokens)


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["distances", "inner products"])
def test_every_setting_is_scored_as_computed_by_hand(lm, sign):
    store, spoken = Store(sign=sign), development()
    scored = score_grid(lm, VOCABULARY, [spoken[:3], spoken[3:]], store, GRID)
    unit = min(one.knn.temperature for one in scored) / 0.1
    losses = {
        (one.knn.k, one.knn.weight, round(one.knn.temperature / unit, 4)): one.loss
        for one in scored
    }
    grid = list(itertools.product(GRID.k, GRID.weight, GRID.temperature))
    assert losses.keys() == set(grid)
    for setting in grid:
        assert losses[setting] == pytest.approx(by_hand(lm, store, *setting), rel=1e-4)
    assert [one.loss for one in scored] == sorted(losses.values()), "lowest loss first"
    assert len(set(losses.values())) > 6, "settings differ"


def test_weight_zero_is_the_loss_of_the_language_model(lm):
    spoken = development()
    texts = [VOCABULARY.encode(one.utterance.text) for one in spoken]
    speech = [VOCABULARY.encode_units(one.units) for one in spoken]
    _, tokens, _, logp = read_states(lm, VOCABULARY, texts, speech, logits=True)
    alone = -logp[torch.arange(len(tokens)), torch.from_numpy(tokens).long()].mean()
    losses = [
        one.loss
        for one in score_grid(lm, VOCABULARY, [spoken], Store(), GRID)
        if one.knn.weight == 0
    ]
    assert len(losses) == 4
    assert losses == pytest.approx([alone.item()] * 4, rel=1e-5)


def test_the_batches_make_no_difference(lm):
    spoken = development()
    whole = score_grid(lm, VOCABULARY, [spoken], Store(), GRID)
    single = score_grid(lm, VOCABULARY, [[one] for one in spoken], Store(), GRID)
    for one, other in zip(whole, single, strict=True):
        assert one.knn.temperature == pytest.approx(other.knn.temperature)
        assert one.loss == pytest.approx(other.loss, rel=1e-4)


def test_nothing_to_score_and_nothing_found_are_errors(lm):
    with pytest.raises(ValueError, match="holds no utterance"):
        score_grid(lm, VOCABULARY, [], Store(), GRID)

    class Empty:
        def search(self, queries, k, exclude_documents=None):
            return Neighbours.none(len(queries), k)

    with pytest.raises(ValueError, match="no entry for any token"):
        score_grid(lm, VOCABULARY, [development()], Empty(), GRID)
