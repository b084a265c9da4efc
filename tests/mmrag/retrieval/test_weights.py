"""An entry's weight multiplies its odds: 1 changes nothing, 0 hides it, 2 doubles its votes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrag.config import KNN, Index
from mmrag.records import NO_ENTRY
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.interpolation import Retrieval
from mmrag.retrieval.knn import mix, votes_logp, weighed
from mmrag.retrieval.phrases import Phrases
from mmrag.retrieval.retrievers import SECOND, LocalRetriever, SubsetRetriever
from mmrag.retrieval.searching import RowSearches
from mmrag.retrieval.segment import Description, Segment
from mmrag.retrieval.weights import Weights
from mmrag.retrieval.wording import Entry

WIDTH, VOCABULARY, EACH = 4, 7, 3


def store(*weights, seed=0):
    """A datastore of a phrase a weight, EACH entries long."""
    random = np.random.default_rng(seed)
    count = EACH * len(weights)
    names = [(f"u{number}", f"d{number}") for number in range(len(weights))]
    segment = Segment(
        keys=random.standard_normal((count, WIDTH)).astype(np.float32),
        tokens=random.integers(1, VOCABULARY, count).astype(np.int32),
        windows=np.ones((count, 4), np.int32),
        positions=np.arange(count) % EACH,
        utterances=np.arange(count) // EACH,
        names=names,
        wordings={f"d{n}": Entry(f"d{n}", weight=weight) for n, weight in enumerate(weights)},
    )
    return Datastore.of(Description(WIDTH, 4, "l2", "none", {}), [segment])


def test_weights_are_those_of_entries_and_joined_ones_have_their_own():
    assert Weights.of(store(1, 1)) is None
    found = Weights.of(store(1, 0.5), store(2, 1))
    asked = np.array([0, 3, SECOND, SECOND + 3, NO_ENTRY])
    np.testing.assert_allclose(np.exp(found.of_entries(asked)), [1, 0.5, 2, 1, 1])
    assert found.heaviest == 2


def test_what_weighs_nothing_is_found_by_nobody():
    weighed_store = store(1, 0, 1)
    silent = np.arange(EACH, 2 * EACH)
    assert weighed_store.hidden.tolist() == silent.tolist() and not len(weighed_store.deleted)
    queries = weighed_store.keys_of(silent)
    for retriever in (
        LocalRetriever.build(weighed_store, Index(kind="flat", shards=1), seed=0),
        SubsetRetriever(weighed_store, np.arange(weighed_store.entries)),
    ):
        found = retriever.search(queries, k=9)
        assert not np.isin(found.entries, silent).any()
        assert (found.entries != NO_ENTRY).sum() == len(silent) * 2 * EACH
    named = Phrases(weighed_store)
    assert named.names == ["d0", "d2"]
    assert len(named.first_mentions(["d1"])) == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.1, 2), min_size=3, max_size=3),
    st.floats(0.05, 0.95),
    st.floats(0.2, 5),
    st.integers(0, 2**16),
)
def test_the_mixture_is_the_sum_of_weighed_votes_and_the_language_model(weights, share, heat, seed):
    random = np.random.default_rng(seed)
    distances = random.uniform(0, 5, (1, 3)).astype(np.float32)
    tokens = random.integers(0, VOCABULARY, (1, 3))
    lm = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed)).softmax(1)
    lean = np.log(np.array([weights], np.float32))
    heats, shares = np.array([heat], np.float32), np.array([share], np.float32)
    moved, mixed = weighed(distances, heats, lean, shares)
    votes = votes_logp(moved, tokens, heats)
    said = torch.full((1, VOCABULARY), -torch.inf)
    said[0, tokens[0]] = torch.from_numpy(votes[0])
    got = mix(lm.log(), said, torch.from_numpy(mixed)).exp()[0].numpy()

    each = np.exp(-(distances[0] - distances[0].min()) / heat)
    each = share * np.array(weights) * each / each.sum()
    expected = (1 - share) * lm[0].numpy().astype(np.float64)
    np.add.at(expected, tokens[0], each)
    np.testing.assert_allclose(got, expected / expected.sum(), rtol=2e-4, atol=1e-6)


def step(retrieval, seed=0):
    """A step of two rows, of which only the first looks anything up."""
    generator = torch.Generator().manual_seed(seed)
    lm_logp = torch.randn(2, VOCABULARY, generator=generator).log_softmax(1)
    keys = torch.randn(2, WIDTH, generator=generator)
    return lm_logp, RowSearches([retrieval, None]).retrieve(lm_logp, keys, [-1, -1], None)


def test_rows_hear_their_entries_by_weight_and_others_what_they_heard():
    knn = KNN(k=4, weight=0.5, temperature=1.0)
    told = {}
    for weight in (0.25, 1, 2):
        one = store(weight, weight)
        retrieval = Retrieval(SubsetRetriever(one, np.arange(one.entries)), knn, Weights.of(one))
        lm_logp, (mixed, _, _) = step(retrieval)
        assert torch.equal(mixed[1], lm_logp[1])
        assert mixed[0].exp().sum() == pytest.approx(1, abs=1e-5)
        told[weight] = float((mixed[0].exp() - lm_logp[0].exp()).abs().sum())
    assert told[0.25] < told[1] < told[2], "a list that weighs little changes little"


def test_a_settled_choice_reckons_with_the_heaviest_entry():
    one = store(2, 2)
    subset = SubsetRetriever(one, np.arange(one.entries))
    for seed in range(40):
        found = []
        for spared in (True, False):
            knn = KNN(k=4, weight=0.4, temperature=1.0, settled=spared)
            _, (mixed, _, _) = step(Retrieval(subset, knn, Weights.of(one)), seed)
            found.append(int(mixed[0].argmax()))
        assert found[0] == found[1]
