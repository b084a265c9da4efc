import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from random_models import perturb

from mmrag.config import KNN, LanguageModel, RetrievedAttention, Tune
from mmrag.decoding.tune import (
    ATTENTION,
    BOTH,
    SETTINGS,
    Decoded,
    Scored,
    best,
    chosen,
    chosen_attention,
    distance_scale,
    finalists,
    score_grid,
)
from mmrag.model.lm import LM
from mmrag.model.states import read_states
from mmrag.model.vocabulary import SentencePieces, Vocabulary
from mmrag.records import NO_ENTRY, Neighbours, Units, Utterance
from mmrag.speech.tokenized import Tokenized

SHAPE = LanguageModel(width=16, layers=1, heads=2, kv_heads=2, feed_forward=24, tied=True)
TEXTS = ["turn on the light", "the door", "light the red lamp", "off"]
VOCABULARY = Vocabulary(SentencePieces.train(TEXTS, 45), units=6)
GRID = Tune(k=(1, 4), weight=(0.0, 0.3, 0.9), temperature=(0.1, 1.0), finalists=1)


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    return perturb(LM(SHAPE, VOCABULARY.size), 1 / 4).eval()


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
        first = VOCABULARY.first_piece + VOCABULARY.pieces.unknown + 1
        tokens = random.integers(first, VOCABULARY.first_unit, k)
        return distances, tokens


def by_hand(lm, store, k, weight, multiple, gate=None, query="speech", certain=None):
    """Nats a token, one token at a time in float64."""
    spoken = development()
    texts = [VOCABULARY.encode(one.utterance.text) for one in spoken]
    speech = [VOCABULARY.encode_units(one.units) for one in spoken]
    keys, tokens, _, logp = read_states(lm, VOCABULARY, texts, speech, logits=True)
    if query == "text":
        keys, *_ = read_states(lm, VOCABULARY, texts, [None] * len(texts), logits=False)
    found = store.search(keys.numpy(), max(GRID.k))
    nearest = found.distances[:, 0]
    distance_scale = np.median(np.abs(nearest[np.isfinite(nearest)]))
    temperature = multiple * distance_scale
    total = 0.0
    for row, token in enumerate(tokens):
        distances = found.distances[row, :k].astype(np.float64)
        p = math.exp(logp[row, token])
        heard = np.isfinite(distances).any() and (
            gate is None or distances[0] <= gate * distance_scale
        )
        if heard and (certain is None or logp[row].max() < math.log(certain)):
            votes = np.exp(-(distances - distances.min()) / temperature)
            share = votes[found.tokens[row, :k] == token].sum() / votes.sum()
            p = weight * share + (1 - weight) * p
        total -= math.log(p)
    return total / len(tokens)


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["distances", "inner products"])
def test_every_setting_is_scored_as_computed_by_hand(lm, sign):
    store, spoken = Store(sign=sign), development()
    scored = score_grid(lm, VOCABULARY, [spoken[:3], spoken[3:]], store, GRID)
    distance_scale = min(one.knn.temperature for one in scored) / 0.1
    losses = {
        (one.knn.k, one.knn.weight, round(one.knn.temperature / distance_scale, 4)): one.loss
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


def test_what_the_vocabulary_cannot_write_is_not_scored_and_has_no_vote(lm):
    class Damaged(Store):
        """Behind each row's entries, one of the unknown piece that is nearer than all."""

        def search(self, queries, k, exclude_documents=None):
            found, more = super().search(queries, k - 1), Neighbours.none(len(queries), 1)
            more.tokens[:] = VOCABULARY.first_piece + VOCABULARY.pieces.unknown
            more.distances[:], more.entries[:] = 0.5, 7
            columns = ("distances", "tokens", "entries", "documents")
            return Neighbours(
                *(np.concatenate((getattr(found, c), getattr(more, c)), 1) for c in columns)
            )

    spoken = development()
    grid = GRID.model_copy(update={"k": (max(GRID.k) + 1,)})
    one = GRID.model_copy(update={"k": (max(GRID.k),)})
    plain = score_grid(lm, VOCABULARY, [spoken], Store(), one)
    foreign = replace(spoken[0].utterance, id="foreign", text="日本語")
    told = [[Tokenized(foreign, spoken[0].units)], [*spoken, Tokenized(foreign, spoken[0].units)]]
    damaged = score_grid(lm, VOCABULARY, told, Damaged(), grid)
    assert [one.loss for one in damaged] == pytest.approx([one.loss for one in plain], rel=1e-5)


def test_the_batches_make_no_difference(lm):
    spoken = development()
    whole = score_grid(lm, VOCABULARY, [spoken], Store(), GRID)
    single = score_grid(lm, VOCABULARY, [[one] for one in spoken], Store(), GRID)
    for one, other in zip(whole, single, strict=True):
        assert one.knn.temperature == pytest.approx(other.knn.temperature)
        assert one.loss == pytest.approx(other.loss, rel=1e-4)


def test_certainty_is_scored_as_computed_by_hand(lm):
    store, certain = Store(), (None, 0.1, 0.16)
    grid = GRID.model_copy(update={"certain": certain})
    scored = score_grid(lm, VOCABULARY, [development()], store, grid)
    distance_scale = min(one.knn.temperature for one in scored) / 0.1
    for one in scored:
        knn = one.knn
        wanted = by_hand(
            lm, store, knn.k, knn.weight, knn.temperature / distance_scale, certain=knn.certain
        )
        assert one.loss == pytest.approx(wanted, rel=1e-4), knn
    losses = {one.knn.certain: one.loss for one in scored if one.knn.weight == 0.9}
    assert len(set(losses.values())) == len(certain)


GATED = GRID.model_copy(update={"gate": (None, 0.7, 1.0, 1.3)})


def settings_of(scored):
    """Each setting, as the grid names it -> its loss; the distance scale is each query's own."""
    units = {
        query: min(one.knn.temperature for one in scored if one.knn.query == query) / 0.1
        for query in {one.knn.query for one in scored}
    }
    named = {}
    for one in scored:
        knn, distance_scale = one.knn, units[one.knn.query]
        gate = None if knn.gate is None else round(knn.gate / distance_scale, 4)
        temperature = round(knn.temperature / distance_scale, 4)
        named[knn.k, knn.weight, temperature, gate, knn.query] = one.loss
    return named


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["distances", "inner products"])
def test_every_gate_is_scored_as_computed_by_hand(lm, sign):
    store, spoken = Store(sign=sign), development()
    scored = score_grid(lm, VOCABULARY, [spoken[:3], spoken[3:]], store, GATED)
    named = settings_of(scored)
    everything = itertools.product(
        GATED.k, GATED.weight, GATED.temperature, GATED.gate, ("speech",)
    )
    assert len(scored) == len(named) and named.keys() == set(everything)
    for setting, loss in named.items():
        assert loss == pytest.approx(by_hand(lm, store, *setting), rel=1e-4), setting
    if sign > 0:
        assert len({named[4, 0.9, 1.0, gate, "speech"] for gate in GATED.gate}) > 2


def test_a_gate_that_lets_everything_through_is_no_gate_and_one_that_shuts_is_the_model(lm):
    grid = GRID.model_copy(update={"gate": (None, 1e-6, 1e6)})
    named = settings_of(score_grid(lm, VOCABULARY, [development()], Store(), grid))
    for k, weight, temperature in itertools.product(GRID.k, GRID.weight, GRID.temperature):
        free, shut, wide = (named[k, weight, temperature, g, "speech"] for g in (None, 0.0, 1e6))
        assert wide == free
        assert shut == named[k, 0.0, temperature, None, "speech"]


def check_queries(lm, grid, store):
    spoken = development()
    scored = score_grid(lm, VOCABULARY, [spoken[:3], spoken[3:]], store, grid)
    named = settings_of(scored)
    assert {setting[-1] for setting in named} == set(grid.query)
    assert len(named) == len(grid.query) * len(grid.k) * len(grid.weight) * len(
        grid.temperature
    ) * len(grid.gate)
    assert [one.loss for one in scored] == sorted(named.values())
    for setting, loss in named.items():
        assert loss == pytest.approx(by_hand(lm, store, *setting), rel=1e-4), setting


@pytest.mark.parametrize("query", [("text",), ("speech", "text")])
def test_every_query_is_scored_as_computed_by_hand_in_units_of_its_own(lm, query):
    check_queries(lm, GATED.model_copy(update={"query": query}), Store())


def test_queries_may_be_listed_in_any_order(lm):
    check_queries(lm, GATED.model_copy(update={"query": ("text", "speech")}), Store())


def test_what_was_chosen_is_read_back(tmp_path):
    knn = KNN(k=3, weight=0.25, temperature=7.5, gate=2.0, query="text")
    fields = {**knn.model_dump(), "loss": 1.5, "wer": 0.2}
    (tmp_path / SETTINGS).write_text(json.dumps(fields))
    assert chosen(tmp_path) == knn


def test_how_to_read_and_both_at_once_are_read_back_beside_it(tmp_path):
    alone = KNN(k=3, weight=0.25, temperature=7.5)
    beside = alone.model_copy(update={"weight": 0.1})
    read = RetrievedAttention(k=4, stride=2, whole=100, gate=1.5)
    files = {SETTINGS: alone, BOTH: beside, ATTENTION: read}
    for name, settings in files.items():
        fields = {**settings.model_dump(), "wer": 0.2, "distance_scale": 3.5}
        (tmp_path / name).write_text(json.dumps(fields))
    assert (chosen(tmp_path), chosen(tmp_path, BOTH)) == (alone, beside)
    assert chosen_attention(tmp_path) == read
    assert distance_scale(tmp_path) == 3.5
    (tmp_path / ATTENTION).unlink()
    assert chosen_attention(tmp_path) is None, "no adapter was there to tune"


@pytest.mark.parametrize("query", ["speech", "text"])
def test_a_setting_knows_the_distance_that_its_multiples_count(lm, query):
    spoken, store = development(), Store()
    texts = [VOCABULARY.encode(one.utterance.text) for one in spoken]
    heard = [VOCABULARY.encode_units(one.units) for one in spoken]
    speech = heard if query == "speech" else [None] * len(spoken)
    keys, *_ = read_states(lm, VOCABULARY, texts, speech, logits=False)
    nearest = store.search(keys.numpy(), max(GRID.k)).distances[:, 0]
    median = np.median(nearest[np.isfinite(nearest)])
    grid = GATED.model_copy(update={"query": (query,)})
    scored = score_grid(lm, VOCABULARY, [spoken], store, grid)
    for one in scored:
        assert one.distance_scale == pytest.approx(median, rel=1e-4)
        assert one.knn.temperature / one.distance_scale == pytest.approx(0.1) or (
            one.knn.temperature / one.distance_scale == pytest.approx(1.0)
        )
        assert one.knn.gate is None or any(
            one.knn.gate / one.distance_scale == pytest.approx(gate) for gate in GATED.gate if gate
        )


def test_nothing_to_score_and_nothing_found_are_errors(lm):
    with pytest.raises(ValueError, match="holds no utterance"):
        score_grid(lm, VOCABULARY, [], Store(), GRID)

    class Empty:
        def search(self, queries, k, exclude_documents=None):
            return Neighbours.none(len(queries), k)

    with pytest.raises(ValueError, match="no entry for any token"):
        score_grid(lm, VOCABULARY, [development()], Empty(), GRID)


def test_finalists_are_the_best_of_each_weight_gate_and_way_to_ask_best_first():
    scored = [
        Scored(
            KNN(k=k, weight=weight, temperature=1, gate=gate, query=query), loss, distance_scale=1.0
        )
        for loss, (k, weight, gate, query) in enumerate(
            itertools.product((4, 8), (0.2, 0.8), (None, 3.0), ("speech", "text"))
        )
    ]
    kept = finalists(scored[::-1], 100)
    assert kept == [one for one in scored if one.knn.k == 4]
    assert finalists(scored, 3) == kept[:3]


def decoded(wer, decoy_wer=None, weight=0.5):
    return Decoded(KNN(k=1, weight=weight, temperature=1), wer, decoy_wer)


def test_the_best_setting_is_that_of_least_wer_where_no_decoy_was_tried():
    tried = [decoded(0.3), decoded(0.1), decoded(0.2)]
    assert best(tried, plain_wer=0.05, harm=0.0) is tried[1]


def test_a_setting_that_lets_the_decoy_do_harm_is_passed_over_for_a_worse_one():
    tempting, harmless, timid = decoded(0.1, 0.24), decoded(0.15, 0.21), decoded(0.19, 0.2)
    tried = [tempting, harmless, timid]
    for order in itertools.permutations(tried):
        assert best(order, plain_wer=0.2, harm=0.1) is harmless
        assert best(order, plain_wer=0.2, harm=0.0) is timid
        assert best(order, plain_wer=0.2, harm=0.3) is tempting


def test_harm_is_relative_to_the_wer_without_retrieval_and_its_bound_is_still_allowed():
    bound, over = decoded(0.3, 0.5), decoded(0.1, 0.51)
    assert best([over, bound], plain_wer=0.4, harm=0.25) is bound
    assert best([over, bound], plain_wer=0.5, harm=0.25) is over


def test_where_every_setting_does_harm_the_least_harmful_is_the_best():
    tried = [decoded(0.1, 0.9), decoded(0.4, 0.5), decoded(0.3, 0.6)]
    assert best(tried, plain_wer=0.2, harm=0.01) is tried[1]
