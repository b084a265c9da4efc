import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrag.config import KNN, Decode, LanguageModel
from mmrag.decode import Choice, Hypothesis, Retrieval, choose, decode, read_states, retrieve
from mmrag.lm import LM
from mmrag.records import NO_ENTRY, Neighbours
from mmrag.vocabulary import EOS, Vocabulary

SHAPE = LanguageModel(width=16, layers=2, heads=4, kv_heads=2, feed_forward=24, tied=False)


class Pieces:
    """Pieces whose text plays no part."""

    def __init__(self, size):
        self.size = size


VOCABULARY = Vocabulary(Pieces(9), units=6)
TINY = Vocabulary(Pieces(3), units=2)
FIRST, LAST = VOCABULARY.first_piece, VOCABULARY.first_unit - 1


def random_lm(vocabulary=VOCABULARY, seed=0, scale=0.3):
    """A model of strong opinions: weights large enough for every one of them to matter."""
    torch.manual_seed(seed)
    lm = LM(SHAPE, vocabulary.size)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return lm.eval().requires_grad_(False)


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
        batch_seconds=10,
        max_seconds=10,
    )


def knn(**changes):
    return KNN(**{"k": 2, "weight": 0.5, "temperature": 1.0, **changes})


class Store:
    """Entries with random keys, searched by brute force; it remembers what it was asked."""

    def __init__(self, entries=40, seed=0):
        random = np.random.default_rng(seed)
        self.keys = random.standard_normal((entries, 16)).astype(np.float32)
        self.tokens = random.integers(FIRST, LAST + 1, entries).astype(np.int32)
        self.documents = (np.arange(entries) % 4).astype(np.int32)
        self.excluded = []

    def search(self, queries, k, exclude_documents=None):
        self.excluded.append(exclude_documents)
        distances = ((queries[:, None] - self.keys) ** 2).sum(-1)
        if exclude_documents is not None:
            distances[self.documents == np.array(exclude_documents)[:, None]] = np.inf
        entries = np.argsort(distances, axis=1, kind="stable")[:, :k]
        distances = np.take_along_axis(distances, entries, 1)
        return Neighbours(
            distances=distances,
            tokens=self.tokens[entries],
            entries=np.where(np.isfinite(distances), entries, NO_ENTRY),
            documents=self.documents[entries],
        )


class Insistent:
    """Finds one entry for every query, always the same token at the same distance."""

    def __init__(self, token, distance=1.0, entry=77):
        self.answer = (token, distance, entry)

    def search(self, queries, k, exclude_documents=None):
        token, distance, entry = self.answer
        found = Neighbours.none(len(queries), k)
        found.distances[:, 0], found.tokens[:, 0], found.entries[:, 0] = distance, token, entry
        return found


class Silent:
    """All of its shards are missing."""

    def search(self, queries, k, exclude_documents=None):
        return Neighbours.none(len(queries), k, missing_shards=3)


def next_logp(lm, vocabulary, units, prefix):
    """The next token's log-probabilities (V,) after a whole prefix, without a cache."""
    ids = [*vocabulary.prompt(units), *prefix]
    logits = lm(torch.tensor([ids])).logits[-1]
    allowed = torch.zeros(vocabulary.size, dtype=torch.bool)
    allowed[[EOS, *range(vocabulary.first_piece, vocabulary.first_unit)]] = True
    return logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)


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
    short = Hypothesis((Choice(EOS, -1.0, -1.0, EOS),), -1.0, stopped=True)
    long = short
    for _ in range(3):
        long = long.then(Choice(FIRST, -0.5, -0.5, FIRST))
    assert long.logp == -2.5
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
