import math
import threading
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_retrieval import retrieve_each

from mmrag.config import KNN, Index
from mmrag.records import NO_ENTRY, Neighbours
from mmrag.retrieval import overlap, searching
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.interpolation import Retrieval
from mmrag.retrieval.retrievers import LocalRetriever, SubsetRetriever
from mmrag.retrieval.searching import RowSearches, Searches, pack, unpack
from mmrag.retrieval.segment import Description, Segment

WIDTH, VOCABULARY = 6, 11
COLUMNS = ("distances", "tokens", "entries", "documents")


def knn(**changes):
    return KNN(**{"k": 3, "weight": 0.5, "temperature": 1.0, **changes})


def datastore(utterances=8, length=5, seed=0):
    """Utterances of random keys and tokens, each a document of its own."""
    random = np.random.default_rng(seed)
    count = utterances * length
    segment = Segment(
        keys=random.standard_normal((count, WIDTH)).astype(np.float32),
        tokens=random.integers(0, VOCABULARY, count).astype(np.int32),
        windows=np.zeros((count, 2), np.int32),
        positions=np.arange(count) % length,
        utterances=np.arange(count) // length,
        names=[(f"u{number}", f"d{number}") for number in range(utterances)],
    )
    return Datastore.of(Description(WIDTH, 2, "l2", "none", {}), [segment])


class Counting:
    """A retriever that remembers how many queries it was asked, search by search."""

    def __init__(self, inner):
        self.inner, self.asked = inner, []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def search(self, queries, k, exclude_documents=None):
        self.asked.append(len(queries))
        return self.inner.search(queries, k, exclude_documents)


def flat(store):
    return LocalRetriever.build(store, Index(kind="flat", shards=1), seed=0)


def opened(seed=0, **sizes):
    return Counting(flat(datastore(seed=seed, **sizes)))


def a_step(rows, seed):
    """What a language model hands over: log-probabilities, some of them none, keys and choices."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, VOCABULARY, generator=generator)
    logits[:, 0] = -math.inf
    keys = torch.randn(rows, WIDTH, generator=generator)
    chosen = torch.randint(VOCABULARY, (rows,), generator=generator)
    return logits.log_softmax(1), keys, chosen.tolist()


def the_same(got, expected):
    """The same neighbours; probabilities up to the last bit or two, which depend on how many rows a
    processor's registers hold, and to the last bit where nothing was heard."""
    torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=2e-6)
    silent = (expected[1].entries == NO_ENTRY).all(1)
    assert torch.equal(got[0][silent], expected[0][silent])
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(got[1], name), getattr(expected[1], name))
    assert got[1].missing_shards == expected[1].missing_shards
    assert got[2] == expected[2]


OWN = [
    None,
    Retrieval(opened(seed=1), knn()),
    Retrieval(opened(seed=2), knn(certain=0.6)),
    Retrieval(opened(seed=3), knn(gate=3.0, weight=0.9, temperature=4.0)),
    Retrieval(opened(seed=4), knn(weight=0.0)),
    Retrieval(SubsetRetriever(datastore(seed=5), np.arange(2)), knn()),
    Retrieval(SubsetRetriever(datastore(seed=5), np.arange(0)), knn(weight=1.0)),
    Retrieval(
        SimpleNamespace(search=lambda queries, k, _: Neighbours.none(len(queries), k, 2)), knn()
    ),
]
row_lists = st.lists(st.integers(0, len(OWN) - 1), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(row_lists, row_lists, st.data())
def test_rows_find_at_every_step_what_they_would_without_a_memory(own, more, data):
    retrievals = [OWN[number] for number in own]
    rows = RowSearches(retrievals)
    for step in range(4):
        lm_logp, keys, chosen = a_step(len(retrievals), step)
        documents = data.draw(st.none() | st.just([step - 1] * len(retrievals)))
        got = rows.retrieve(lm_logp, keys, chosen, documents)
        the_same(got, retrieve_each(lm_logp, keys, retrievals, documents))
        kept = data.draw(st.lists(st.integers(0, len(retrievals) - 1), min_size=1, max_size=6))
        rows.select(kept)
        retrievals = [retrievals[row] for row in kept]
        if step == 1:
            joining = [OWN[number] for number in more]
            rows.join(RowSearches(joining))
            retrievals += joining


def test_neighbours_of_different_counts_are_mixed_each_by_their_own():
    retrievals = [Retrieval(opened(seed=1), knn(k=2)), Retrieval(opened(seed=2), knn(k=5)), None]
    lm_logp, keys, chosen = a_step(3, 0)
    logp, found, _ = RowSearches(retrievals).retrieve(lm_logp, keys, chosen, None)
    expected, wanted, _ = retrieve_each(lm_logp, keys, retrievals, None)
    torch.testing.assert_close(logp, expected)
    np.testing.assert_array_equal(found.entries, wanted.entries)
    assert found.entries.shape == (3, 5)


def test_rows_that_hear_nothing_get_the_language_models_own_tensor():
    lm_logp, keys, chosen = a_step(2, 0)
    for retrieval in (None, OWN[4], Retrieval(opened(), knn(gate=1e-9))):
        assert RowSearches([retrieval] * 2).retrieve(lm_logp, keys, chosen, None)[0] is lm_logp


@pytest.mark.parametrize("vocabulary", [8, 11, 16, 17])
def test_one_copy_from_a_device_carries_queries_rules_and_what_can_be_said(vocabulary):
    random = torch.Generator().manual_seed(vocabulary)
    queries = torch.randn(3, WIDTH, generator=random)
    rules = torch.rand(3, 2, generator=random) > 0.5
    logp = torch.randn(3, vocabulary, generator=random)
    logp[torch.rand(3, vocabulary, generator=random) > 0.5] = -math.inf
    got, got_rules, bits = unpack(pack(queries, rules, logp), WIDTH)
    assert np.array_equal(got, queries.numpy()) and np.array_equal(got_rules, rules.numpy())
    tokens = np.tile(np.arange(vocabulary), (4, 1)).astype(np.int32)
    sayable = searching._set(bits, np.array([0, 2, 3]), tokens)
    np.testing.assert_array_equal(sayable[[0, 2, 3]], logp.isfinite().numpy())
    assert not sayable[1].any()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.05, 0.1, 0.2, 0.3, 0.45]))
def test_a_settled_choice_is_the_one_that_a_search_would_have_left(seed, weight):
    store = flat(datastore())
    lm_logp, keys, chosen = a_step(12, seed)
    plain = [Retrieval(store, knn(weight=weight))] * 12
    sparing = Counting(store)
    spared = [Retrieval(sparing, knn(weight=weight, settled=True))] * 12
    expected, *_ = RowSearches(plain).retrieve(lm_logp, keys, chosen, None)
    rows = RowSearches(spared, greedy=[True] * 12)
    got, found, _ = rows.retrieve(lm_logp, keys, chosen, None)
    assert got.argmax(1).tolist() == expected.argmax(1).tolist()
    skipped = (got == lm_logp).all(1).numpy()
    assert rows.searches.settled + sum(sparing.asked) == 12
    assert (found.entries[skipped] == NO_ENTRY).all()
    assert torch.equal(got[~skipped], expected[~skipped])


def test_beams_are_searched_for_whatever_is_settled():
    retriever = opened()
    sure = torch.full((2, VOCABULARY), -20.0).index_fill(1, torch.tensor([3]), 0.0).log_softmax(1)
    _, keys, chosen = a_step(2, 0)
    rows = RowSearches([Retrieval(retriever, knn(weight=0.1, settled=True))] * 2, [False, True])
    rows.retrieve(sure, keys, chosen, None)
    assert retriever.asked == [1]
    assert rows.searches == Searches(asked=2, searched=1, settled=1)


def test_after_searches_that_found_nothing_near_as_many_steps_pass_without_one():
    retriever = opened()
    rows = RowSearches([Retrieval(retriever, knn(gate=1e-6, patience=2))])
    asked = []
    for step in range(24):
        before = len(retriever.asked)
        rows.retrieve(*a_step(1, step), None)
        asked.append(len(retriever.asked) - before)
    assert asked == [1, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert rows.searches == Searches(asked=24, searched=6, distant=18)


def test_a_near_neighbour_ends_the_patience():
    store = datastore()
    retriever = Counting(flat(store))
    rows = RowSearches([Retrieval(retriever, knn(gate=1e-3, patience=2))])
    far, near = torch.full((1, WIDTH), 50.0), torch.from_numpy(store.keys(3, 4))
    lm_logp, _, chosen = a_step(1, 0)
    for keys in (far, near, far, near, far, near):
        rows.retrieve(lm_logp, keys, chosen, None)
    assert rows.searches == Searches(asked=6, searched=6)


def test_a_shard_that_is_silent_says_nothing_of_distances():
    rows = RowSearches([Retrieval(OWN[7].retriever, knn(patience=1))])
    for step in range(4):
        rows.retrieve(*a_step(1, step), None)
    assert rows.searches == Searches(asked=4, searched=4)


def test_entries_are_followed_while_they_say_what_is_chosen():
    store = datastore()
    retriever = Counting(flat(store))
    rows = RowSearches([Retrieval(retriever, knn(k=1, follow=2, agreeing=1))])
    lm_logp = a_step(1, 0)[0]
    said = [-1, *store.tokens[np.arange(5)].tolist()]
    for entry in range(5):
        keys = torch.from_numpy(store.keys(entry, entry + 1)) + 0.01
        _, found, _ = rows.retrieve(lm_logp, keys, said[entry : entry + 1], None)
        if said[entry + 1]:  # token 0 cannot be said: no neighbour is heard
            assert found.entries.tolist() == [[entry]]
            assert found.documents.tolist() == [[0]]
            assert found.tokens.tolist() == [[said[entry + 1]]]
            assert found.distances[0, 0] == pytest.approx(WIDTH * 1e-4, rel=1e-2)
    assert 0 not in said, "otherwise this shows less"
    assert rows.searches == Searches(asked=5, searched=2, followed=3)
    assert retriever.asked == [1, 1]


@pytest.mark.parametrize(
    "changes", [{"agreeing": 2}, {"gate": 1e-9}, {"k": 1, "agreeing": 1}], ids=str
)
def test_entries_are_not_followed_if_they_are_few_or_far_or_said_something_else(changes):
    store = datastore()
    retriever = Counting(flat(store))
    rows = RowSearches([Retrieval(retriever, knn(**{"k": 1, "follow": 9, **changes}))])
    lm_logp = a_step(1, 0)[0]
    other = 1 + int(store.tokens[0]) % (VOCABULARY - 1)
    said = [-1, other if changes.get("agreeing") == 1 else int(store.tokens[0])]
    for entry in range(2):
        keys = torch.from_numpy(store.keys(entry, entry + 1))
        rows.retrieve(lm_logp, keys + 0.1, said[entry : entry + 1], None)
    assert rows.searches.followed == 0


def test_what_a_certain_model_passes_over_is_still_followed():
    store = datastore()
    retriever = Counting(flat(store))
    rows = RowSearches([Retrieval(retriever, knn(k=1, follow=4, agreeing=1, certain=0.9))])
    unsure = a_step(1, 0)[0]
    sure = torch.full((1, VOCABULARY), -20.0).index_fill(1, torch.tensor([3]), 0.0).log_softmax(1)
    said = [-1, *store.tokens[np.arange(3)].tolist()]
    for entry, lm_logp in enumerate((unsure, sure, unsure)):
        keys = torch.from_numpy(store.keys(entry, entry + 1))
        logp, found, _ = rows.retrieve(lm_logp, keys, said[entry : entry + 1], None)
        if lm_logp is sure:
            assert logp is lm_logp and (found.entries == NO_ENTRY).all()
    assert found.entries.tolist() == [[2]] and found.distances.tolist() == [[0.0]]
    assert rows.searches == Searches(asked=3, searched=1, certain=1, followed=1)


def test_the_same_question_again_is_not_searched_for():
    retriever = opened()
    retrieval = Retrieval(retriever, knn(recent=8))
    lm_logp, keys, chosen = a_step(3, 0)
    first, again = RowSearches([retrieval] * 3), RowSearches([retrieval] * 3)
    expected = first.retrieve(lm_logp, keys, chosen, [0, 1, 2])
    the_same(again.retrieve(lm_logp, keys, chosen, [0, 1, 2]), expected)
    assert (first.searches.searched, again.searches.recent) == (3, 3)
    again.retrieve(lm_logp, keys, chosen, [0, 4, 2])
    assert again.searches == Searches(asked=6, recent=5, searched=1)
    first.join(again)
    assert first.searches == Searches(asked=9, recent=5, searched=4)


def test_a_slow_search_goes_on_in_another_thread_and_says_what_went_wrong(monkeypatch):
    monkeypatch.setattr(overlap, "WORTH_SECONDS", 0)
    monkeypatch.setattr(overlap.os, "sched_getaffinity", lambda process: {0, 1})
    threads, release = [], threading.Event()

    class Slow(Counting):
        remote = True

        def search(self, queries, k, exclude_documents=None):
            threads.append(threading.current_thread())
            assert release.wait(10)
            if len(threads) == 3:
                raise ValueError("no such width")
            return super().search(queries, k, exclude_documents)

    retrievals = [Retrieval(Slow(flat(datastore())), knn())] * 2
    rows = RowSearches(retrievals)
    lm_logp, keys, chosen = a_step(2, 0)
    release.set()
    expected = rows.retrieve(lm_logp, keys, chosen, None)
    release.clear()
    pending = rows.begin(lm_logp, keys, chosen, None)  # returns while the search goes on
    release.set()
    the_same(rows.finish(pending), expected)
    assert threads[0] is threading.main_thread() and threads[1] is not threading.main_thread()
    with pytest.raises(ValueError, match="no such width"):
        rows.finish(rows.begin(lm_logp, keys, chosen, None))
    Slow.remote = False  # the language model is on the cores that would search
    rows.finish(rows.begin(lm_logp, keys, chosen, None))
    assert threads[-1] is threading.main_thread()
    assert rows.searches.searched == 6


def test_a_search_elsewhere_has_the_callers_number_of_threads():
    faiss = overlap.faiss
    before = faiss.omp_get_max_threads()
    try:
        for count in (1, 2):
            faiss.omp_set_num_threads(count)
            assert overlap.begin(faiss.omp_get_max_threads).result() == count
    finally:
        faiss.omp_set_num_threads(before)


def test_counts_add_up_to_what_was_asked():
    retrieval = Retrieval(
        opened(), knn(follow=3, agreeing=1, certain=0.7, settled=True, patience=1, recent=4)
    )
    rows = RowSearches([retrieval, None] * 4, greedy=[True] * 8)
    for step in range(12):
        rows.retrieve(*a_step(8, step % 7), None)
    counts = [getattr(rows.searches, field.name) for field in fields(Searches)]
    assert counts[0] == 48 == sum(counts[1:])


@pytest.mark.parametrize("spared", ["settled", "patience", "follow", "recent"])
def test_each_way_of_sparing_is_off_where_nothing_says_otherwise(spared):
    assert not getattr(knn(), spared)
    assert replace(Retrieval(None, knn()), settings=knn()).settings == knn()
