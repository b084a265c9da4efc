import itertools
from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_answer import Insistent, Silent
from plain_decoder import PhraseTree
from plain_retrieval import retrieve, retrieve_each
from random_entries import RandomEntries
from random_models import perturb
from scipy.stats import chisquare

from mmrag.config import KNN, Decode, LanguageModel
from mmrag.decoding.boost import Boost
from mmrag.decoding.candidates import likeliest, voters
from mmrag.decoding.decode import Batch, Choice, Clip, Hypothesis, decode
from mmrag.model.lm import LM
from mmrag.model.states import read_states
from mmrag.model.vocabulary import EOS, Vocabulary
from mmrag.records import NO_ENTRY, Neighbours
from mmrag.retrieval.interpolation import Retrieval

SHAPE = LanguageModel(width=16, layers=2, heads=4, kv_heads=2, feed_forward=24, tied=False)


class Pieces:
    """Pieces whose text plays no part."""

    unknown = None

    def __init__(self, size):
        self.size = size


VOCABULARY = Vocabulary(Pieces(9), units=6)
TINY = Vocabulary(Pieces(3), units=2)
FIRST, LAST = VOCABULARY.first_piece, VOCABULARY.first_unit - 1


def random_lm(vocabulary=VOCABULARY, seed=0, scale=0.3):
    """A model of strong opinions: weights large enough for every one of them to matter."""
    torch.manual_seed(seed)
    lm = LM(SHAPE, vocabulary.size)
    return perturb(lm, scale).eval().requires_grad_(False)


def clips(count, seed=0, vocabulary=VOCABULARY):
    random = np.random.default_rng(seed)
    return [
        random.integers(vocabulary.first_unit, vocabulary.size, length).tolist()
        for length in random.integers(1, 9, count)
    ]


def options(beams=1, length_penalty=0.6):
    return Decode(
        beams=beams,
        length_penalty=length_penalty,
        tokens_per_second=10,
        max_seconds=10,
    )


def knn(**changes):
    return KNN(**{"k": 2, "weight": 0.5, "temperature": 1.0, **changes})


class Store(RandomEntries):
    """It remembers what it was asked."""

    def __init__(self, entries=40, seed=0):
        super().__init__(FIRST, LAST, entries, seed)
        self.excluded = []

    def search(self, queries, k, exclude_documents=None):
        self.excluded.append(exclude_documents)
        return super().search(queries, k, exclude_documents)


def next_logp(lm, vocabulary, units, prefix, context=()):
    """The next token's log-probabilities (V,) after a whole prefix, without a cache."""
    ids = [*vocabulary.prompt(units, context), *prefix]
    logits = lm(torch.tensor([ids])).logits[-1]
    allowed = torch.zeros(vocabulary.size, dtype=torch.bool)
    allowed[[EOS, *range(vocabulary.first_piece, vocabulary.first_unit)]] = True
    return logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)


def choose(logp, lm_logp, neighbours, count, temperatures=None):
    """The candidates of each row as choices, likeliest first."""
    warmth = None if temperatures is None else np.array(temperatures)
    found, rows = likeliest(logp, lm_logp, count, warmth), []
    for row in range(len(logp)):
        columns = np.flatnonzero(found.logp[row] > -np.inf)
        entries, distances = voters(
            neighbours, np.full(len(columns), row), found.tokens[row, columns]
        )
        evidence = [
            one[row, columns].tolist()
            for one in (found.tokens, found.logp, found.lm_logp, found.lm_token)
        ]
        fields = zip(*evidence, entries.tolist(), distances.tolist(), strict=True)
        rows.append([Choice(*own) for own in fields])
    return rows


def agree(one, other, atol=1e-4):
    """The same tokens for the same reasons, up to rounding."""
    assert [c.token for c in one.choices] == [c.token for c in other.choices]
    assert [c.lm_token for c in one.choices] == [c.lm_token for c in other.choices]
    assert [c.entry for c in one.choices] == [c.entry for c in other.choices]
    for name in ("logp", "lm_logp", "distance"):
        mine, theirs = ([getattr(c, name) for c in h.choices] for h in (one, other))
        assert mine == pytest.approx(theirs, abs=atol)
    assert one.stopped == other.stopped


def test_greedy_search_takes_the_likeliest_token_at_every_step():
    lm, limit = random_lm(), 12
    for units, heard in zip(
        clips(6), decode(lm, VOCABULARY, clips(6), [limit] * 6, options()), strict=True
    ):
        prefix, logps = [], []
        while len(prefix) < limit and EOS not in prefix:
            logp = next_logp(lm, VOCABULARY, units, prefix)
            prefix.append(int(logp.argmax()))
            logps.append(float(logp.max()))
        assert [choice.token for choice in heard.choices] == prefix
        assert [choice.logp for choice in heard.choices] == pytest.approx(logps, abs=1e-4)
        assert heard.logp == pytest.approx(sum(logps), abs=1e-3)
        assert heard.stopped == (prefix[-1] == EOS)
        assert heard.tokens == [token for token in prefix if token != EOS]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("retrieves", [False, True])
def test_clips_decoded_together_are_decoded_as_if_alone(beams, retrieves):
    lm, speech = random_lm(), clips(5)
    limits = [3, 11, 6, 9, 1]
    retrieval = Retrieval(Store(), knn()) if retrieves else None
    together = decode(lm, VOCABULARY, speech, limits, options(beams), retrieval)
    assert len({len(one.choices) for one in together}) > 2, "rows leave the batch one by one"
    for units, limit, heard in zip(speech, limits, together, strict=True):
        [alone] = decode(lm, VOCABULARY, [units], [limit], options(beams), retrieval)
        agree(heard, alone)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    "retrieval",
    [
        Retrieval(Store(), knn(weight=0.0)),
        Retrieval(Insistent(FIRST, distance=2.0), knn(weight=0.9, gate=1.9)),
        Retrieval(Silent(), knn(weight=0.9)),
    ],
    ids=["weight 0", "gate shut", "shards missing"],
)
def test_retrieval_that_is_not_heard_changes_nothing_bit_for_bit(beams, retrieval):
    lm, speech, limits = random_lm(), clips(4), [10] * 4
    plain = decode(lm, VOCABULARY, speech, limits, options(beams))
    assert decode(lm, VOCABULARY, speech, limits, options(beams), retrieval) == plain
    assert {choice.entry for heard in plain for choice in heard.choices} == {NO_ENTRY}


def test_an_open_gate_is_heard_up_to_its_distance():
    lm, speech = random_lm(), clips(3)
    insistent = Insistent(FIRST, distance=2.0)
    gated, open_ = (
        decode(lm, VOCABULARY, speech, [5] * 3, options(), Retrieval(insistent, knn(gate=gate)))
        for gate in (2.0, None)
    )
    assert gated == open_
    assert gated != decode(lm, VOCABULARY, speech, [5] * 3, options())


def test_a_heavy_neighbour_pulls_its_token_and_is_named():
    lm, speech, token = random_lm(), clips(3), LAST
    retrieval = Retrieval(Insistent(token, distance=0.25, entry=77), knn(weight=0.99))
    for heard in decode(lm, VOCABULARY, speech, [4] * 3, options(), retrieval):
        assert heard.tokens == [token] * 4
        assert not heard.stopped
        for choice in heard.choices:
            assert (choice.entry, choice.distance) == (77, 0.25)
            expected = np.log(0.99 + 0.01 * np.exp(choice.lm_logp))
            assert choice.logp == pytest.approx(expected, abs=1e-5)
    alone = decode(lm, VOCABULARY, speech, [1] * 3, options())
    pulled = decode(lm, VOCABULARY, speech, [1] * 3, options(), retrieval)
    for one, other in zip(alone, pulled, strict=True):
        assert other.choices[0].lm_token == one.choices[0].token, "what it would have said alone"


def test_a_token_that_no_neighbour_named_has_no_entry():
    lm = random_lm()
    retrieval = Retrieval(Insistent(LAST), knn(weight=0.01))
    for heard in decode(lm, VOCABULARY, clips(4), [8] * 4, options(), retrieval):
        for choice in heard.choices:
            assert (choice.entry == 77) == (choice.token == LAST)
            assert np.isfinite(choice.distance) == (choice.token == LAST)


def test_the_entry_named_is_the_nearest_that_spoke_for_the_token():
    store, lm = Store(), random_lm()
    retrieval = Retrieval(store, knn(k=8, weight=0.7))
    named = 0
    for units, heard in zip(
        clips(4), decode(lm, VOCABULARY, clips(4), [6] * 4, options(), retrieval), strict=True
    ):
        for position, choice in enumerate(heard.choices):
            ids = [*VOCABULARY.prompt(units), *heard.tokens[:position]]
            found = store.search(lm(torch.tensor([ids])).keys[:, -1].numpy(), 8)
            agreeing = found.entries[0][found.tokens[0] == choice.token].tolist()
            assert choice.entry == (agreeing[0] if agreeing else NO_ENTRY)
            named += bool(agreeing)
    assert named > 3


def test_each_clip_excludes_its_own_document_while_others_leave_the_batch():
    store, lm, speech = Store(), random_lm(), clips(4)
    documents, limits = [3, -1, 0, 2], [2, 8, 5, 8]
    retrieval = Retrieval(store, knn(k=8, weight=0.9))
    together = decode(lm, VOCABULARY, speech, limits, options(2), retrieval, documents)
    for units, limit, document, heard in zip(speech, limits, documents, together, strict=True):
        [alone] = decode(lm, VOCABULARY, [units], [limit], options(2), retrieval, [document])
        agree(heard, alone)
        used = {store.documents[c.entry] for c in heard.choices if c.entry != NO_ENTRY}
        assert document not in used
    decode(lm, VOCABULARY, speech, limits, options(2), retrieval)
    assert store.excluded[-1] is None


def beam_by_hand(lm, units, limit, beams, length_penalty):
    """Beam search that reads every prefix from its start and ranks every continuation of it."""
    live, finished = [([], 0.0)], []
    for _ in range(limit):
        ranked = []
        for ids, logp in live:
            row = next_logp(lm, VOCABULARY, units, ids)
            allowed = row.isfinite().nonzero().flatten().tolist()
            ranked += [([*ids, token], logp + float(row[token])) for token in allowed]
        ranked.sort(key=lambda one: one[1], reverse=True)
        finished += [one for one in ranked[:beams] if one[0][-1] == EOS]
        live = [one for one in ranked if one[0][-1] != EOS][:beams]
        if len(finished) >= beams:
            break
    return max(finished or live, key=lambda one: one[1] / len(one[0]) ** length_penalty)


@pytest.mark.parametrize(("beams", "length_penalty"), [(2, 0.0), (3, 0.6), (5, 1.0)])
def test_beam_search_is_beam_search_by_hand(beams, length_penalty):
    lm, speech, limits = random_lm(scale=0.15), clips(6), [9, 4, 6, 9, 2, 5]
    together = decode(lm, VOCABULARY, speech, limits, options(beams, length_penalty))
    for units, limit, heard in zip(speech, limits, together, strict=True):
        ids, logp = beam_by_hand(lm, units, limit, beams, length_penalty)
        assert [choice.token for choice in heard.choices] == ids
        assert heard.logp == pytest.approx(logp, abs=1e-3)
    assert {one.stopped for one in together} == {True, False}


def every_sequence(lm, vocabulary, units, limit):
    """Each finished sequence of at most `limit` tokens with its log-probability."""
    pieces = range(vocabulary.first_piece, vocabulary.first_unit)
    for length in range(limit):
        for text in itertools.product(pieces, repeat=length):
            ids = [*text, EOS]
            logp = sum(
                float(next_logp(lm, vocabulary, units, ids[:i])[token])
                for i, token in enumerate(ids)
            )
            yield ids, logp


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_a_beam_as_wide_as_the_search_finds_the_best_sequence_there_is(length_penalty):
    greedy_was_best = []
    for seed in range(4):
        lm, [units] = random_lm(TINY, seed), clips(1, seed, TINY)
        ids, logp = max(
            every_sequence(lm, TINY, units, limit=4),
            key=lambda one: one[1] / len(one[0]) ** length_penalty,
        )
        [heard] = decode(lm, TINY, [units], [4], options(100, length_penalty))
        assert [choice.token for choice in heard.choices] == ids
        assert heard.logp == pytest.approx(logp, abs=1e-4)
        [greedy] = decode(lm, TINY, [units], [4], options(1, length_penalty))
        greedy_was_best.append(greedy.tokens == heard.tokens and greedy.stopped)
    assert not all(greedy_was_best), "otherwise this shows nothing"


def test_a_wider_beam_finds_likelier_transcripts():
    lm, speech, limits = random_lm(scale=0.15), clips(20), [30] * 20
    greedy, wide = (
        decode(lm, VOCABULARY, speech, limits, options(beams, length_penalty=0.0))
        for beams in (1, 10)
    )
    # A greedy transcript that ran into the limit is no likelihood to compare with.
    gains = [w.logp - g.logp for g, w in zip(greedy, wide, strict=True) if g.stopped]
    assert len(gains) > 5
    assert all(one.stopped for one in wide)
    assert min(gains) > -1e-4
    assert max(gains) > 1


def test_a_length_penalty_prefers_longer_transcripts():
    end, piece = Choice(EOS, -1.0, -1.0, EOS), Choice(FIRST, -0.5, -0.5, FIRST)
    short = Hypothesis((end,), -1.0, stopped=True)
    long = Hypothesis((end, piece, piece, piece), -2.5)
    assert short.score(0.0) > long.score(0.0)
    assert short.score(1.0) < long.score(1.0) == pytest.approx(-2.5 / 4)


@pytest.mark.parametrize("beams", [1, 4])
def test_a_transcript_stops_at_its_limit(beams):
    retrieval = Retrieval(Insistent(FIRST), knn(weight=1.0))  # never the end
    limits = [1, 2, 7]
    heard = decode(random_lm(), VOCABULARY, clips(3), limits, options(beams), retrieval)
    assert [len(one.choices) for one in heard] == limits
    assert not any(one.stopped for one in heard)


def test_a_transcript_that_ended_is_preferred_to_a_likelier_one_that_did_not():
    retrieval = Retrieval(Insistent(FIRST), knn(weight=0.99))
    for heard in decode(random_lm(), VOCABULARY, clips(3), [7] * 3, options(20), retrieval):
        assert heard.stopped
        assert heard.logp < 7 * np.log(0.99), "seven times the neighbour's token is likelier"


@pytest.mark.parametrize("beams", [1, 2, 20])
def test_neighbours_alone_never_lead_to_an_impossible_token(beams):
    """With weight 1 most of the vocabulary is impossible, and fewer than `beams` tokens are not."""
    lm = random_lm()
    for token, said in ((FIRST, [FIRST] * 5), (EOS, [])):
        retrieval = Retrieval(Insistent(token), knn(weight=1.0))
        for heard in decode(lm, VOCABULARY, clips(2), [5] * 2, options(beams), retrieval):
            assert heard.tokens == said
            assert heard.stopped == (token == EOS)
            assert heard.logp == pytest.approx(0.0, abs=1e-6)


class Lossy(Pieces):
    """Pieces of which one stands for what none of them writes."""

    unknown = 3


LOSSY = Vocabulary(Lossy(9), units=6)
UNKNOWN = LOSSY.first_piece + LOSSY.pieces.unknown


@pytest.mark.parametrize("beams", [1, 2, 20])
@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_a_datastore_of_the_unknown_piece_is_no_datastore(beams, weight):
    lm, speech = random_lm(), clips(3)
    asked = Retrieval(Insistent(UNKNOWN, distance=0.1), knn(weight=weight))
    alone = decode(lm, LOSSY, speech, [6] * 3, options(beams))
    assert decode(lm, LOSSY, speech, [6] * 3, options(beams), asked) == alone
    assert all(choice.entry == NO_ENTRY for heard in alone for choice in heard.choices)


def test_entries_of_the_unknown_piece_have_no_vote_beside_others():
    lm, speech, store = random_lm(), clips(4), Store()
    without, damaged = Store(), Store()
    kept = store.tokens != UNKNOWN
    assert not kept.all()
    without.keys, without.tokens = store.keys[kept], store.tokens[kept]
    without.documents = store.documents[kept]
    heard = [
        decode(lm, LOSSY, speech, [6] * 4, options(), Retrieval(one, knn(k=40, weight=0.9)))
        for one in (damaged, without)
    ]
    assert [one.tokens for one in heard[0]] == [one.tokens for one in heard[1]]
    for one, other in zip(*heard, strict=True):
        assert UNKNOWN not in one.tokens
        assert one.logp == pytest.approx(other.logp, abs=1e-4)


def test_a_model_that_wants_to_say_the_unknown_piece_says_another():
    lm = random_lm()
    with torch.no_grad():
        lm.head.weight[UNKNOWN] += 5 * lm(torch.tensor([[1]])).hidden[0, 0]
    for heard in decode(lm, LOSSY, clips(4), [6] * 4, options(3)):
        assert UNKNOWN not in heard.tokens


@pytest.mark.parametrize("beams", [1, 3, 30])
def test_no_unit_and_no_control_token_is_ever_said(beams):
    lm = random_lm()
    with torch.no_grad():  # a model that wants to say nothing else
        wanted = [i for i in range(VOCABULARY.size) if i != EOS and not FIRST <= i <= LAST]
        lm.head.weight[wanted] += 5 * lm(torch.tensor([[1]])).hidden[0, 0]
    limits = [6] * 4
    for heard in decode(lm, VOCABULARY, clips(4), limits, options(beams)):
        assert all(FIRST <= token <= LAST for token in heard.tokens)
        assert all(choice.lm_token not in wanted for choice in heard.choices)
        assert np.isfinite(heard.logp)


def test_no_clips_give_no_transcripts_and_a_clip_without_units_gives_one():
    lm = random_lm()
    assert decode(lm, VOCABULARY, [], [], options()) == []
    [heard] = decode(lm, VOCABULARY, [[]], [4], options())
    assert 0 < len(heard.choices) <= 4


def test_retrieval_asks_with_the_keys_of_the_last_position():
    lm, [units] = random_lm(), clips(1)
    asked = []

    class Listening(Silent):
        def search(self, queries, k, exclude_documents=None):
            asked.append(queries)
            return super().search(queries, k)

    [heard] = decode(lm, VOCABULARY, [units], [4], options(), Retrieval(Listening(), knn()))
    ids = torch.tensor([[*VOCABULARY.prompt(units), *heard.tokens]])
    keys = lm(ids).keys[0, len(units) + 2 :][: len(asked)]
    assert all(one.dtype == np.float32 for one in asked)
    torch.testing.assert_close(torch.from_numpy(np.concatenate(asked)), keys, atol=1e-4, rtol=1e-3)


def test_what_a_shut_gate_keeps_out_is_no_evidence():
    lm_logp = torch.randn(2, VOCABULARY.size).log_softmax(-1)
    retrieval = Retrieval(Insistent(FIRST, distance=2.0), knn(gate=1.0))
    logp, neighbours = retrieve(lm_logp, torch.zeros(2, 16), retrieval)
    assert torch.equal(logp, lm_logp)
    assert (neighbours.entries == NO_ENTRY).all()
    choices = choose(logp, lm_logp, neighbours, VOCABULARY.size)
    assert {choice.entry for row in choices for choice in row} == {NO_ENTRY}


def test_where_the_model_is_certain_nothing_is_looked_up():
    lm_logp = (4 * torch.randn(6, VOCABULARY.size)).log_softmax(-1)
    keys, documents = torch.randn(6, 16), [0, 1, 2, 3, 0, -1]
    best = lm_logp.exp().amax(1)
    certain = float(best.median()) + 1e-6
    asking = [row for row in range(6) if best[row] < certain]
    assert 0 < len(asking) < 6
    store = Store()
    logp, found = retrieve(lm_logp, keys, Retrieval(store, knn(certain=certain)), documents)
    assert store.excluded == [[documents[row] for row in asking]]
    everywhere, all_found = retrieve(lm_logp, keys, Retrieval(store, knn()), documents)
    for row in range(6):
        wanted = everywhere if row in asking else lm_logp
        assert torch.equal(logp[row], wanted[row])
        entries = all_found.entries[row] if row in asking else [NO_ENTRY] * 2
        assert found.entries[row].tolist() == list(entries)


def test_a_model_certain_of_everything_asks_nobody():
    lm_logp, store = torch.randn(3, VOCABULARY.size).log_softmax(-1), Store()
    retrieval = Retrieval(store, knn(certain=1e-6))
    logp, found = retrieve(lm_logp, torch.randn(3, 16), retrieval)
    assert torch.equal(logp, lm_logp) and (found.entries == NO_ENTRY).all()
    assert store.excluded == []


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=4))
def test_reading_whole_transcripts_gives_the_state_before_each_of_their_tokens(plan):
    lm = random_lm()
    random = np.random.default_rng(len(plan))
    texts = [random.integers(FIRST, LAST + 1, length).tolist() for length, _ in plan]
    speech = [clip if spoken else None for clip, (_, spoken) in zip(clips(4), plan, strict=False)]
    keys, tokens, slices, logp = read_states(lm, VOCABULARY, texts, speech, logits=True)
    assert slices[-1].stop == len(keys) == len(tokens) == len(logp)
    for text, units, stretch in zip(texts, speech, slices, strict=True):
        assert tokens[stretch].tolist() == [*text, EOS]
        for offset in range(len(text) + 1):
            ids = torch.tensor([[*VOCABULARY.prompt(units), *text[:offset]]])
            here = stretch.start + offset
            torch.testing.assert_close(keys[here], lm(ids).keys[0, -1], atol=1e-4, rtol=1e-3)
            expected = next_logp(lm, VOCABULARY, units, text[:offset])
            torch.testing.assert_close(logp[here], expected, atol=1e-4, rtol=1e-3)
    without = read_states(lm, VOCABULARY, texts, speech, logits=False)
    assert without[3].shape == (0, VOCABULARY.size)
    assert torch.equal(without[0], keys)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_clip_with_a_retrieval_of_its_own_is_decoded_as_if_alone(beams):
    lm, speech, limits = random_lm(), clips(6), [3, 11, 6, 9, 1, 8]
    shared = Retrieval(Store(seed=1), knn(k=3, weight=0.8))
    own = [
        shared,
        Retrieval(Store(seed=2), knn(k=7, weight=0.6, temperature=3.0)),
        None,
        shared,
        Retrieval(Store(seed=3), knn(k=1, weight=0.9, gate=20.0)),
        Retrieval(Store(seed=4), knn(weight=0.0)),
    ]
    for documents in (None, [3, -1, 0, 2, 1, 0]):
        together = decode(lm, VOCABULARY, speech, limits, options(beams), own, documents)
        for index, heard in enumerate(together):
            excluded = documents and [documents[index]]
            alone = decode(
                lm,
                VOCABULARY,
                [speech[index]],
                [limits[index]],
                options(beams),
                own[index],
                excluded,
            )
            agree(heard, alone[0])
        plain = decode(lm, VOCABULARY, speech, limits, options(beams))
        agree(together[2], plain[2])
        agree(together[5], plain[5])
        used = [{choice.entry for choice in heard.choices} - {NO_ENTRY} for heard in together]
        assert used[1] and used[3], "otherwise this shows nothing"


@pytest.mark.parametrize("beams", [1, 3])
def test_one_retrieval_named_for_every_clip_is_one_retrieval(beams):
    lm, speech, limits, documents = random_lm(), clips(4), [5, 9, 2, 7], [1, 0, -1, 2]
    one = Retrieval(Store(), knn(k=4, weight=0.8))
    shared = decode(lm, VOCABULARY, speech, limits, options(beams), one, documents)
    named = decode(lm, VOCABULARY, speech, limits, options(beams), [one] * 4, documents)
    assert named == shared
    nobody = decode(lm, VOCABULARY, speech, limits, options(beams), [None] * 4, documents)
    assert nobody == decode(lm, VOCABULARY, speech, limits, options(beams))


def test_rows_that_share_a_retrieval_are_searched_together():
    lm_logp, keys = torch.randn(5, VOCABULARY.size).log_softmax(-1), torch.randn(5, 16)
    one, other = Store(seed=1), Store(seed=2)
    first, second = Retrieval(one, knn(k=3)), Retrieval(other, knn(k=5))
    own, documents = [first, None, second, first, second], [0, 1, 2, 3, -1]
    logp, found, _ = retrieve_each(lm_logp, keys, own, documents)
    assert (one.excluded, other.excluded) == ([[0, 3]], [[2, -1]])
    assert found.entries.shape == (5, 5)
    assert torch.equal(logp[1], lm_logp[1]) and (found.entries[1] == NO_ENTRY).all()
    assert (found.entries[[0, 3], 3:] == NO_ENTRY).all()
    assert np.isinf(found.distances[[0, 3], 3:]).all()
    for row in (0, 2, 3, 4):
        alone, apart = retrieve(
            lm_logp[row : row + 1], keys[row : row + 1], own[row], documents[row : row + 1]
        )
        torch.testing.assert_close(logp[row], alone[0])
        k = apart.entries.shape[1]
        for name in ("distances", "tokens", "entries", "documents"):
            np.testing.assert_array_equal(getattr(found, name)[row, :k], getattr(apart, name)[0])


CONTEXTS = [[FIRST, FIRST + 3], [], [LAST] * 5, [FIRST + 1]]


@pytest.mark.parametrize("beams", [1, 3])
def test_each_clip_is_read_after_its_own_context(beams):
    lm, speech, limits = random_lm(), clips(4), [5, 9, 2, 7]
    together = decode(lm, VOCABULARY, speech, limits, options(beams), contexts=CONTEXTS)
    for units, limit, context, heard in zip(speech, limits, CONTEXTS, together, strict=True):
        [alone] = decode(lm, VOCABULARY, [units], [limit], options(beams), contexts=[context])
        agree(heard, alone)
        if beams == 1:
            prefix = []
            for choice in heard.choices:
                logp = next_logp(lm, VOCABULARY, units, prefix, context)
                assert choice.token == int(logp.argmax())
                assert choice.logp == pytest.approx(float(logp.max()), abs=1e-4)
                prefix.append(choice.token)
    plain = decode(lm, VOCABULARY, speech, limits, options(beams))
    assert [heard.tokens for heard in together] != [heard.tokens for heard in plain]
    assert decode(lm, VOCABULARY, speech, limits, options(beams), contexts=[()] * 4) == plain


def test_a_context_too_few_is_refused():
    with pytest.raises(ValueError):
        decode(random_lm(), VOCABULARY, clips(2), [3, 3], options(), contexts=[[FIRST]])


STARTS = torch.zeros(VOCABULARY.size, dtype=torch.bool)
STARTS[[EOS, FIRST, FIRST + 1, FIRST + 2]] = True
PHRASE = [FIRST + 1, LAST, FIRST, LAST - 1]


@pytest.mark.parametrize("beams", [1, 3])
def test_a_heavy_boost_makes_a_phrase_win_and_a_weightless_one_nothing(beams):
    lm, speech = random_lm(), clips(3)
    heavy = [Boost([PHRASE], 50.0, STARTS)] * 3
    # A wider beam prefers what has ended, and this never does.
    for heard in decode(lm, VOCABULARY, speech, [4] * 3, options(), boosts=heavy):
        assert heard.tokens == PHRASE
        assert heard.logp == pytest.approx(200 + sum(c.lm_logp for c in heard.choices), abs=1e-2)
    limits = [9, 4, 12]
    plain = decode(lm, VOCABULARY, speech, limits, options(beams))
    assert all(heard.tokens[:4] != PHRASE for heard in plain)
    for nothing in (Boost([PHRASE], 0.0, STARTS), Boost([], 50.0, STARTS)):
        heard = decode(lm, VOCABULARY, speech, limits, options(beams), boosts=[nothing] * 3)
        assert heard == plain


def test_boosting_adds_to_what_the_language_model_says_at_every_step():
    lm, speech, limits = random_lm(scale=0.15), clips(6), [12] * 6
    weighted = [([PHRASE, [FIRST, LAST], [FIRST + 2]][: 1 + i % 3], 0.7 * i) for i in range(6)]
    boosts = [Boost(phrases, weight, STARTS) for phrases, weight in weighted]
    trees = [PhraseTree(phrases, weight, STARTS) for phrases, weight in weighted]
    together = decode(lm, VOCABULARY, speech, limits, options(), boosts=boosts)
    plain = decode(lm, VOCABULARY, speech, limits, options())
    for units, tree, heard in zip(speech, trees, together, strict=True):
        prefix = []
        for choice in heard.choices:
            alone = next_logp(lm, VOCABULARY, units, prefix)
            logp = alone + tree.bonus(prefix)
            assert choice.token == int(logp.argmax())
            assert choice.logp == pytest.approx(min(float(logp.max()), 0), abs=1e-4)
            assert choice.lm_logp == pytest.approx(float(alone[choice.token]), abs=1e-4)
            assert choice.lm_token == int(alone.argmax()), "what it would have said alone"
            prefix.append(choice.token)
    assert sum(one.tokens != other.tokens for one, other in zip(together, plain, strict=True)) > 2


@pytest.mark.parametrize("beams", [1, 3])
def test_clips_with_boosts_of_their_own_are_decoded_as_if_alone(beams):
    lm, speech, limits = random_lm(), clips(5), [3, 11, 6, 9, 1]
    phrases = ([PHRASE], [], [[FIRST, LAST], [FIRST + 2, FIRST]], [[FIRST + 2]], [PHRASE])
    boosts = [Boost(own, 2.0, STARTS) for own in phrases]
    retrieval = Retrieval(Store(), knn())
    together = decode(
        lm,
        VOCABULARY,
        speech,
        limits,
        options(beams),
        retrieval,
        boosts=boosts,
        contexts=[*CONTEXTS, []],
    )
    for units, limit, boost, context, heard in zip(
        speech, limits, boosts, [*CONTEXTS, []], together, strict=True
    ):
        [alone] = decode(
            lm,
            VOCABULARY,
            [units],
            [limit],
            options(beams),
            retrieval,
            boosts=[boost],
            contexts=[context],
        )
        agree(heard, alone)


@pytest.mark.parametrize("begun", [0, 2])
def test_what_phrases_earn_makes_no_choice_likelier_than_certain(begun, monkeypatch):
    monkeypatch.setattr(VOCABULARY, "word_starts", STARTS.numpy)
    lm, speech, heavy = random_lm(), clips(3), [Boost([PHRASE], 50.0, STARTS)] * 3
    begins = [PHRASE[:begun]] * 3
    plain = decode(lm, VOCABULARY, speech, [4] * 3, options(), beginnings=begins)
    boosted = decode(lm, VOCABULARY, speech, [4] * 3, options(), boosts=heavy, beginnings=begins)
    for heard, alone in zip(boosted, plain, strict=True):
        assert heard.tokens == PHRASE and heard.logp > 0
        assert all(choice.logp <= 0 for choice in heard.choices) and heard.mean_logp <= 0
        assert alone.logp == pytest.approx(alone.mean_logp * len(alone.choices), abs=1e-4)
    assert Hypothesis().mean_logp == 0


def test_a_boost_makes_no_unit_and_no_control_token_possible():
    boost = Boost([[VOCABULARY.first_unit], [1]], 100.0, STARTS)
    for heard in decode(random_lm(), VOCABULARY, clips(3), [5] * 3, options(3), boosts=[boost] * 3):
        assert all(FIRST <= token <= LAST for token in heard.tokens)


class Listening(Silent):
    """Finds nothing; remembers the queries of each search."""

    def __init__(self):
        self.asked = []

    def search(self, queries, k, exclude_documents=None):
        self.asked.append(queries)
        return super().search(queries, k)


def test_a_query_of_text_is_the_state_of_the_transcript_read_alone():
    lm = random_lm()
    for units, context in zip(clips(4), CONTEXTS, strict=True):
        listening = Listening()
        retrieval = Retrieval(listening, knn(query="text"))
        [heard] = decode(lm, VOCABULARY, [units], [8], options(), retrieval, contexts=[context])
        asked = torch.from_numpy(np.concatenate(listening.asked))
        assert len(asked) == len(heard.choices)
        keys, *_ = read_states(lm, VOCABULARY, [heard.tokens], [None], logits=False)
        torch.testing.assert_close(asked, keys[: len(asked)], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("apart", [False, True])
def test_clips_that_ask_with_text_are_decoded_as_if_alone(beams, apart):
    lm, speech, limits = random_lm(scale=0.2), clips(5), [3, 11, 6, 9, 1]
    settings = knn(k=5, weight=0.7, query="text")
    retrievals = [Retrieval(Store(seed=seed * apart), settings) for seed in range(5)]
    if apart:
        retrievals[1] = None
    together = decode(
        lm, VOCABULARY, speech, limits, options(beams), retrievals if apart else retrievals[0]
    )
    for units, limit, own, heard in zip(speech, limits, retrievals, together, strict=True):
        [alone] = decode(lm, VOCABULARY, [units], [limit], options(beams), own)
        agree(heard, alone)
    by_speech = Retrieval(Store(), knn(k=5, weight=0.7))
    spoken = decode(lm, VOCABULARY, speech, limits, options(beams), by_speech)
    assert [one.tokens for one in spoken] != [one.tokens for one in together]


def test_what_asks_with_text_and_finds_nothing_changes_nothing():
    lm, speech, limits = random_lm(), clips(4), [10] * 4
    plain = decode(lm, VOCABULARY, speech, limits, options(3))
    unheard = Retrieval(Silent(), knn(weight=0.9, query="text"))
    assert decode(lm, VOCABULARY, speech, limits, options(3), unheard) == plain


def test_clips_that_ask_with_speech_and_with_text_are_decoded_together():
    by_speech, by_text = (Retrieval(Store(), knn(query=query)) for query in ("speech", "text"))
    lm, speech, asked = random_lm(), clips(3), [by_speech, None, by_text]
    together = decode(lm, VOCABULARY, speech, [3] * 3, options(), asked)
    alone = [
        decode(lm, VOCABULARY, [one], [3], options(), how)[0]
        for one, how in zip(speech, asked, strict=True)
    ]
    assert [one.tokens for one in together] == [one.tokens for one in alone]


def staggered(lm, clips, arrivals, departures=None):
    """The searches of clips that join at the step `arrivals` names, and leave at that of
    `departures` (clip -> step) unless they are done."""
    batch, searches, gone = Batch(lm, VOCABULARY), {}, set()
    for step in itertools.count():
        for index in [index for index, when in (departures or {}).items() if when == step]:
            batch.leave(searches[index])
            gone.add(index)
        batch.step()
        joining = [index for index, arrival in enumerate(arrivals) if arrival == step]
        searches |= zip(joining, batch.join([clips[index] for index in joining]), strict=True)
        staying = [one for index, one in searches.items() if index not in gone and not one.over]
        assert set(batch.searches) == set(staying)
        assert batch.rows == sum(len(search.live) for search in staying)
        if step >= max(arrivals) and not staying:
            return [searches[index] for index in range(len(clips))]


def apart(lm, clip):
    """A clip's search in a batch of its own."""
    [search] = staggered(lm, [clip], [0])
    return search


BY_SPEECH = Retrieval(Store(seed=1), knn(k=3, weight=0.7))
BY_TEXT = Retrieval(Store(seed=2), knn(k=5, weight=0.6, query="text"))
OWN = [
    {"retrieval": BY_SPEECH, "exclude_document": 2},
    {"retrieval": BY_TEXT, "context": CONTEXTS[0]},
    {},
    {"boost": Boost([PHRASE, [FIRST, LAST]], 2.0, STARTS), "context": CONTEXTS[2]},
    {"retrieval": Retrieval(Silent(), knn())},
    {"retrieval": BY_TEXT, "exclude_document": 1, "boost": Boost([PHRASE], 1.0, STARTS)},
    {"retrieval": BY_SPEECH},
]
"""What a clip has that its neighbours in the batch may not have."""


def kinds(beams=1):
    limits = [7, 12, 9, 5, 11, 8, 1]
    return [
        Clip(units, limit, beams=beams, length_penalty=0.6, **own)
        for units, limit, own in zip(clips(len(OWN), seed=3), limits, OWN, strict=True)
    ]


def same(one, other):
    """Two searches that found the same."""
    agree(one.best(), other.best())
    assert one.missing_shards == other.missing_shards


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_clip_that_joins_a_running_batch_is_decoded_as_if_alone(beams, reverse):
    lm, asked = random_lm(), kinds(beams)
    asked = asked[::-1] if reverse else asked
    arrivals = [0, 1, 1, 2, 4, 5, 5]
    for clip, search in zip(asked, staggered(lm, asked, arrivals), strict=True):
        assert search.over
        same(search, apart(lm, clip))


def test_clips_with_wide_and_narrow_beams_join_one_batch():
    lm = random_lm(scale=0.2)
    beams = [1, 4, 2, 1, 3, 5, 2]
    asked = [replace(clip, beams=own) for clip, own in zip(kinds(), beams, strict=True)]
    for clip, search in zip(asked, staggered(lm, asked, [2, 0, 1, 3, 1, 0, 2]), strict=True):
        same(search, apart(lm, clip))


@pytest.mark.parametrize("beams", [1, 3])
def test_a_clip_that_leaves_changes_nothing_for_the_others(beams):
    lm, asked, arrivals = random_lm(), kinds(beams), [0, 0, 1, 1, 2, 0, 2]
    undisturbed = staggered(lm, asked, arrivals)
    for leaver in range(len(asked)):
        disturbed = staggered(lm, asked, arrivals, {leaver: 3})
        for index in set(range(len(asked))) - {leaver}:
            same(disturbed[index], undisturbed[index])


def test_a_search_that_has_left_stays_as_it_was():
    lm, asked = random_lm(), kinds(2)
    batch = Batch(lm, VOCABULARY)
    first, second = batch.join(asked[1:3])
    batch.step()
    batch.leave(first)
    before = list(first.live)
    batch.step()
    assert first.live == before and not first.over
    assert batch.searches == [second]
    batch.leave(first)
    batch.leave(second)
    assert (batch.searches, batch.rows) == ([], 0)
    batch.step()
    [third] = batch.join(asked[:1])
    while batch.searches:
        batch.step()
    same(third, apart(lm, asked[0]))


def test_a_clip_that_is_done_with_its_first_token_never_is_in_the_batch():
    lm, [*_, short] = random_lm(), kinds()
    batch = Batch(lm, VOCABULARY)
    assert batch.join([]) == []
    [search] = batch.join([short])
    assert search.over and not batch.searches and not batch.rows
    batch.leave(search)
    assert len(search.best().choices) == 1


def test_clips_of_any_length_share_a_batch():
    """A cache has room for the clips that it was made for: what joins may need more, or less."""
    lm = random_lm()
    never_ends = {"retrieval": Retrieval(Insistent(FIRST), knn(weight=0.9))}
    lengths, limits = [2, 60, 1, 30], [40, 3, 90, 10]
    asked = [
        Clip([VOCABULARY.first_unit + n % 6 for n in range(length)], limit, **never_ends)
        for length, limit in zip(lengths, limits, strict=True)
    ]
    for arrivals in ([0, 1, 2, 3], [3, 2, 1, 0], [30, 0, 5, 31]):
        for clip, search in zip(asked, staggered(lm, asked, arrivals), strict=True):
            assert len(search.best().choices) == clip.limit
            same(search, apart(lm, clip))


@cache
def undisturbed(kind, beams):
    return apart(random_lm(), kinds(beams)[kind])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(OWN) - 1),  # which of the kinds
            st.integers(1, 3),  # its beams
            st.integers(0, 8),  # when it joins
            st.none() | st.integers(1, 6),  # how long it stays
        ),
        min_size=1,
        max_size=6,
    )
)
def test_whoever_comes_and_goes_a_clip_is_decoded_as_if_alone(plan):
    asked = [kinds(beams)[kind] for kind, beams, *_ in plan]
    arrivals = [arrival for *_, arrival, _ in plan]
    departures = {
        index: arrival + stay for index, (*_, arrival, stay) in enumerate(plan) if stay is not None
    }
    searches = staggered(random_lm(), asked, arrivals, departures)
    for (kind, beams, *_), search in zip(plan, searches, strict=True):
        if search.over:
            same(search, undisturbed(kind, beams))


def test_shards_that_do_not_answer_are_missed_by_the_clips_that_ask_them():
    lm, speech = random_lm(), clips(3)
    asked = [Retrieval(Silent(), knn()), Retrieval(Store(), knn()), None]
    batch = Batch(lm, VOCABULARY)
    searches = batch.join(
        [Clip(one, 5, retrieval=how) for one, how in zip(speech, asked, strict=True)]
    )
    while batch.searches:
        batch.step()
    assert [search.missing_shards for search in searches] == [3, 0, 0]


def test_without_a_temperature_and_with_next_to_none_the_likeliest_token_is_taken():
    torch.manual_seed(0)
    logp, nothing = torch.randn(5, VOCABULARY.size) - 20, Neighbours.none(5, 1)
    greedy = choose(logp, logp, nothing, 2)
    assert choose(logp, logp, nothing, 2, temperatures=[0.0] * 5) == greedy
    for tiny in (1e-4, 2e-38):
        drawn = choose(logp, logp, nothing, 2, temperatures=[tiny] * 5)
        assert drawn == [row[:1] for row in greedy], "one of each, and the same"


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_drawn_as_often_as_the_distribution_says(temperature):
    torch.manual_seed(0)
    draws, logp = 4000, torch.randn(VOCABULARY.size).log_softmax(-1)
    logp[[0, 5, 9]] = -torch.inf
    rows = logp.expand(draws, -1)
    choices = choose(rows, rows, Neighbours.none(draws, 1), 2, temperatures=[temperature] * draws)
    assert {len(row) for row in choices} == {1}
    counts = Counter(choice.token for [choice] in choices)
    assert not counts.keys() & {0, 5, 9}
    wanted = torch.softmax(logp.double() / temperature, -1) * draws
    possible = [token for token in range(len(logp)) if wanted[token] > 0]
    drawn = [counts[token] for token in possible]
    assert chisquare(drawn, wanted[possible].numpy()).pvalue > 1e-3


def test_a_drawn_token_comes_with_its_own_evidence():
    torch.manual_seed(0)
    lm_logp, keys = torch.randn(30, VOCABULARY.size).log_softmax(-1), torch.randn(30, 16)
    logp, found = retrieve(lm_logp, keys, Retrieval(Store(), knn(k=8)))
    everything = choose(logp, lm_logp, found, VOCABULARY.size)
    temperatures = [3.0 * (row % 2) for row in range(30)]
    drawn = choose(logp, lm_logp, found, 4, temperatures=temperatures)
    for row, temperature in enumerate(temperatures):
        if temperature == 0:
            assert drawn[row] == everything[row][:4], "the rows beside are as they were"
        else:
            [choice] = drawn[row]
            assert choice in everything[row], "with the log-probability that it has without"
    firsts = [(row[0], best[0]) for row, best in zip(drawn, everything, strict=True)]
    assert any(mine != likeliest for mine, likeliest in firsts)


def test_a_clip_with_a_temperature_is_drawn_token_by_token_and_the_others_are_not():
    lm, asked = random_lm(scale=0.15), kinds()
    drawn = Clip(asked[2].speech, 8, temperature=1.5)
    torch.manual_seed(1)
    first, other, second = (
        search.best() for search in staggered(lm, [drawn, asked[0], drawn], [0, 1, 2])
    )
    agree(other, apart(lm, asked[0]).best())
    assert first.tokens != second.tokens, "the same clip, twice"
    likeliest = []
    for heard in (first, second):
        tokens = [choice.token for choice in heard.choices]
        for step, choice in enumerate(heard.choices):
            logp = next_logp(lm, VOCABULARY, drawn.speech, tokens[:step])
            likeliest.append(choice.token == int(logp.argmax()))
            assert choice.logp == pytest.approx(float(logp[choice.token]), abs=1e-4)
            assert choice.lm_token == choice.token, "nothing was retrieved: nothing was changed"
        assert EOS not in tokens[:-1]
    assert not all(likeliest)
    torch.manual_seed(1)
    again = staggered(lm, [drawn, asked[0], drawn], [0, 1, 2])[0].best()
    assert again == first
