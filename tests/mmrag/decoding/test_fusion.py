"""Text that was counted is written rather than what the language model would like to write."""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_answer import Insistent, Silent
from plain_ctc import random_letters
from random_entries import RandomEntries
from random_models import perturb

from mmrag.config import KNN, Decode, LanguageModel
from mmrag.decoding.boost import Boost
from mmrag.decoding.decode import Batch, Clip, decode
from mmrag.decoding.fusion import FusedRows
from mmrag.model.lm import LM
from mmrag.model.ngram import NGram
from mmrag.model.vocabulary import Heard, SentencePieces, Vocabulary
from mmrag.records import Units
from mmrag.retrieval.interpolation import Retrieval
from mmrag.transcribe import recognise

SENTENCES = ["turn on the light", "don't turn it off", "play the song again", "lights in the hall"]
VOCABULARY = Vocabulary(SentencePieces.train(SENTENCES, 60), units=6)
SHAPE = LanguageModel(width=16, layers=1, heads=2, kv_heads=1, feed_forward=24, tied=False)
SPEECH = [VOCABULARY.first_unit + n for n in (0, 3, 1)]
LIMIT = 16


def counted(*sentences, least=(1, 1, 1, 1, 1)):
    ids, heard = map(VOCABULARY.encode, sentences), int(VOCABULARY.transcript_ids().sum())
    return NGram.count(ids, least, VOCABULARY.size, heard, VOCABULARY.bos, VOCABULARY.eos)


def often(sentence):
    """Counts in which a sentence begins as nearly all do, and no text is a short one."""
    others = [word for other in SENTENCES for word in other.split() if word not in sentence]
    return counted(*[sentence] * 9, " ".join(others * 9))


ONE, ALL = counted(SENTENCES[0]), counted(*SENTENCES)


@cache
def babbling():
    """A language model that knows nothing."""
    torch.manual_seed(0)
    return perturb(LM(SHAPE, VOCABULARY.size), 0.3).eval().requires_grad_(False)


def options(weight=0.3, beams=1):
    return Decode(
        beams=beams, length_penalty=0.6, tokens_per_second=10, max_seconds=10, ngram_weight=weight
    )


def clip(weight=0.0, ngram=ALL, **changes):
    return replace(Clip(SPEECH, LIMIT, ngram=ngram, ngram_weight=weight), **changes)


def heard(*clips):
    """What clips that are decoded together are."""
    batch = Batch(babbling(), VOCABULARY)
    searches = batch.join(clips)
    while batch.searches:
        batch.step()
    return [search.best() for search in searches]


def written(hypothesis):
    return VOCABULARY.decode(hypothesis.tokens)


def lm_logp(prefix, speech=SPEECH):
    """What the language model alone says of the next token (V,), without a cache."""
    ids = [*VOCABULARY.prompt(speech), *prefix]
    logits = babbling()(torch.tensor([ids])).logits[-1]
    allowed = torch.from_numpy(VOCABULARY.transcript_ids())
    return logits.masked_fill(~allowed, -torch.inf).log_softmax(-1).numpy()


def ngram_logp(ngram, prefix):
    """What an n-gram model says of the next token (V,), step by step."""
    nodes = ngram.start(1)
    for token in prefix:
        nodes = ngram.advance(nodes, np.array([token]))
    return ngram.logp(nodes)[0]


def said(rows, count):
    """What each of `count` rows is given (R, V), 0 where no row is given anything."""
    like = torch.zeros(count, VOCABULARY.size)
    found = rows.logp(like)
    if found is None:
        return like.numpy()
    assert found.shape == like.shape and found.dtype == like.dtype
    return found.numpy()


def test_rows_without_a_model_and_rows_of_no_weight_are_given_nothing():
    for rows in (FusedRows([None, None], [0.3, 0.0]), FusedRows([ALL, None], [0.0, 1.0])):
        assert rows.logp(torch.zeros(2, VOCABULARY.size)) is None
        assert rows.share.tolist() == [1, 1]
        assert rows.begin(1, [5, 6, 7]).tolist() == [0, 0, 0]
        rows.advance(np.array([5, 6]))
        rows.select(np.array([1, 1, 0]))
        assert rows.logp(torch.zeros(3, VOCABULARY.size)) is None
    rows = FusedRows([None, ALL, ALL], [1.0, 0.5, 0.0])
    assert rows.share.tolist() == [1, 1.5, 1]
    found = said(rows, 3)
    assert not found[[0, 2]].any()
    assert found[1].tolist() == (0.5 * ngram_logp(ALL, [])).tolist()


def test_what_is_said_is_of_the_kind_that_the_language_model_says_it_in():
    like = torch.zeros(1, VOCABULARY.size, dtype=torch.float64)
    assert FusedRows([ALL], [0.5]).logp(like).dtype == torch.float64


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(st.sampled_from([None, 0.0, 0.5, 2.0]), st.integers(0, 3)),
        min_size=1,
        max_size=6,
    ),
    st.randoms(use_true_random=False),
)
def test_rows_are_given_what_was_counted_whatever_rows_stay_repeat_and_join(arrivals, random):
    """`arrivals`: the weight of each row, None for no model, and when it comes."""
    rows, texts = FusedRows([], []), []
    pieces = [token for sentence in SENTENCES for token in VOCABULARY.encode(sentence)]
    for step in range(5):
        new = [weight for weight, when in arrivals if when == step]
        models = [None if weight is None else ALL for weight in new]
        rows.join(FusedRows(models, [1.0 if weight is None else weight for weight in new]))
        texts += [(weight or 0.0, []) for weight in new]
        found = said(rows, len(texts))
        for row, (weight, tokens) in enumerate(texts):
            expected = weight * ngram_logp(ALL, tokens)
            np.testing.assert_allclose(found[row], expected, rtol=1e-6, atol=0)
        assert rows.share.tolist() == [1 + weight for weight, _ in texts]
        kept = [random.randrange(len(texts)) for _ in range(random.randint(0, len(texts)))]
        chosen = np.array([random.choice(pieces) for _ in kept], np.int64)
        rows.select(np.array(kept, np.int64))
        rows.advance(chosen)
        texts = [
            (texts[row][0], [*texts[row][1], token])
            for row, token in zip(kept, chosen.tolist(), strict=True)
        ]


@pytest.mark.parametrize(("one", "other"), [(None, ALL), (ALL, None), (ALL, ALL), (None, None)])
def test_batches_join_whichever_of_them_has_a_model(one, other):
    tokens = VOCABULARY.encode("play the song")
    rows, more = FusedRows([one], [0.5]), FusedRows([other], [0.25])
    rows.advance(np.array(tokens[:1]))
    for token in tokens[:2]:
        more.advance(np.array([token]))
    rows.join(more)
    rows.advance(np.array([tokens[1], tokens[2]]))
    found = said(rows, 2)
    expected = [
        weight * (ngram_logp(model, tokens[:end]) if model else np.zeros(VOCABULARY.size))
        for model, weight, end in ((one, 0.5, 2), (other, 0.25, 3))
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_rows_of_two_models_are_refused():
    with pytest.raises(ValueError, match="weighed by one n-gram model"):
        FusedRows([ONE, ALL], [0.3, 0.3])
    rows = FusedRows([ONE], [0.3])
    with pytest.raises(ValueError, match="weighed by one n-gram model"):
        rows.require(FusedRows([ALL], [0.3]))
    rows.join(FusedRows([ALL], [0.0]))
    assert said(rows, 2)[0].any() and not said(rows, 2)[1].any()
    rows.select(np.array([1]))
    rows.join(FusedRows([ALL], [0.5]))
    assert not said(rows, 2)[0].any() and said(rows, 2)[1].any()


def test_a_row_that_begins_with_tokens_is_where_stepping_would_have_it():
    tokens = VOCABULARY.encode("turn it off again")
    rows, stepped = FusedRows([ALL, ALL, None], [0.5, 2.0, 1.0]), FusedRows([ALL], [2.0])
    earned = rows.begin(1, tokens)
    assert rows.begin(2, tokens).tolist() == [0] * len(tokens)
    for token, found in zip(tokens, earned, strict=True):
        assert found == pytest.approx(said(stepped, 1)[0, token])
        stepped.advance(np.array([token]))
    assert said(rows, 3)[1].tolist() == said(stepped, 1)[0].tolist()
    assert said(rows, 3)[0].tolist() == (0.5 * ngram_logp(ALL, [])).tolist()


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_what_retrieval_makes_likelier_is_made_as_much_likelier_here(seed):
    torch.manual_seed(seed)
    weights = [0.5, 0.0, 2.0]
    rows, alone = FusedRows([ALL, ALL, ALL], weights), torch.randn(3, VOCABULARY.size)
    alone = (2 * alone).log_softmax(-1)
    gain = 3 * torch.randn(3, VOCABULARY.size)
    alone[:, :3] = -torch.inf
    mixed, fused = alone + gain, torch.from_numpy(said(rows, 3))
    mixed[:, 3] = -torch.inf
    kept = [one.clone() for one in (fused, mixed, alone)]
    found = rows.with_retrieved(fused, mixed, alone)
    for one, before in zip((fused, mixed, alone), kept, strict=True):
        assert torch.equal(one, before), "what is given is left as it was"
    assert torch.isfinite(found).all() and (found <= 0).all()
    assert torch.equal(found[:, :4], fused[:, :4]), "impossible without it, or with it"
    raised = gain[:, 4:].clamp(min=0) * torch.tensor(weights)[:, None]
    expected = (fused[:, 4:] + raised).clamp(max=0)
    torch.testing.assert_close(found[:, 4:], expected, atol=1e-4, rtol=1e-4)
    lowered = gain[:, 4:] < -1e-3
    assert torch.equal(found[:, 4:][lowered], fused[:, 4:][lowered])


@pytest.mark.parametrize("beams", [1, 4])
def test_without_a_model_or_a_weight_nothing_changes(beams):
    given = babbling(), VOCABULARY, [SPEECH, SPEECH[:1]], [LIMIT] * 2
    expected = decode(*given, options(0.3, beams))
    assert decode(*given, options(0.0, beams), ngram=ALL) == expected
    assert decode(*given, options(0.3, beams), ngram=None) == expected
    assert decode(*given, options(0.9, beams), ngram=ALL) != expected


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("sentence", SENTENCES)
def test_a_sentence_that_was_counted_often_is_written_whatever_is_heard(sentence, beams):
    given = babbling(), VOCABULARY, [SPEECH], [LIMIT + 10]
    [free] = decode(*given, options(0.0, beams))
    assert written(free) != sentence
    [found] = decode(*given, options(20.0, beams), ngram=often(sentence))
    assert written(found) == sentence
    assert found.stopped


@pytest.mark.parametrize("weight", [0.2, 1.0])
def test_each_token_is_the_best_of_both_and_keeps_what_the_language_model_thinks_of_it(weight):
    [found] = heard(clip(weight))
    total, prefix = 0.0, []
    for choice in found.choices:
        alone = lm_logp(prefix)
        both = alone + weight * ngram_logp(ALL, prefix)
        assert choice.token == both.argmax()
        assert choice.logp == pytest.approx(both.max() / (1 + weight), abs=1e-4)
        assert choice.lm_logp == pytest.approx(alone[choice.token], abs=1e-4)
        assert choice.lm_token == alone.argmax()
        total += both.max()
        prefix.append(choice.token)
    assert found.logp == pytest.approx(total, abs=1e-3)


def test_a_beam_search_ranks_by_both():
    weight, beams = 0.7, 3
    [found] = heard(clip(weight, beams=beams, limit=6))
    live, finished = [([], 0.0)], []
    for _ in range(6):
        ranked = []
        for prefix, logp in live:
            both = lm_logp(prefix) + weight * ngram_logp(ALL, prefix)
            ranked += [([*prefix, n], logp + both[n]) for n in np.flatnonzero(np.isfinite(both))]
        ranked.sort(key=lambda one: one[1], reverse=True)
        finished += [one for one in ranked[:beams] if one[0][-1] == VOCABULARY.eos]
        live = [one for one in ranked if one[0][-1] != VOCABULARY.eos][:beams]
        if len(finished) >= beams:
            break
    tokens, logp = max(finished or live, key=lambda one: one[1])
    assert [choice.token for choice in found.choices] == tokens
    assert found.logp == pytest.approx(logp, abs=1e-3)


def knn(retriever, **changes):
    return Retrieval(retriever, KNN(**{"k": 2, "weight": 0.6, "temperature": 1.0, **changes}))


def test_what_retrieval_finds_is_not_held_against_it_that_nobody_counted_it():
    silent = VOCABULARY.first_piece + int(VOCABULARY.pieces.unknown or 0)
    rare = next(
        piece
        for piece in range(VOCABULARY.first_unit - 1, VOCABULARY.first_piece, -1)
        if piece != silent and piece not in ONE.pieces
    )
    retrieval = knn(Insistent(rare), weight=0.99)
    for beams in (1, 3):
        [found] = heard(clip(1.0, ONE, retrieval=retrieval, limit=4, beams=beams))
        assert found.tokens == [rare] * 4
        assert {choice.entry for choice in found.choices} == {77}
        for place, choice in enumerate(found.choices):
            alone = lm_logp([rare] * place)[rare]
            mixed = np.log(0.99 + 0.01 * np.exp(alone))
            counted_as = min(0, ngram_logp(ONE, [rare] * place)[rare] + mixed - alone)
            assert choice.logp == pytest.approx((mixed + counted_as) / 2, abs=1e-3)
            assert choice.lm_logp == pytest.approx(alone, abs=1e-4)


@settings(deadline=None, max_examples=10)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "weight": st.sampled_from([0.0, 0.4, 3.0]),
                "ngram": st.sampled_from([None, ALL]),
                "beams": st.integers(1, 3),
                "limit": st.integers(1, 9),
                "when": st.integers(0, 3),
                "searches": st.booleans(),
                "favours": st.booleans(),
                "spelt": st.sampled_from([0.0, 0.5]),
                "begins": st.booleans(),
            }
        ),
        min_size=2,
        max_size=4,
    )
)
def test_clips_decoded_together_are_decoded_as_if_alone(kinds):
    """With and without a model, of any weight, with whatever else, coming and going."""
    first, last = VOCABULARY.first_piece + 1, VOCABULARY.first_unit - 1
    starts = torch.from_numpy(VOCABULARY.word_starts())
    favoured = Boost([VOCABULARY.encode("the song")], 0.8, starts)

    def of(kind):
        return clip(
            kind["weight"],
            kind["ngram"],
            speech=Heard(SPEECH, random_letters(20, seed=kind["limit"], sharp=3.0)),
            beams=kind["beams"],
            limit=kind["limit"],
            ctc_weight=kind["spelt"],
            retrieval=knn(RandomEntries(first, last)) if kind["searches"] else None,
            boost=favoured if kind["favours"] else None,
            beginning=VOCABULARY.encode("turn on") if kind["begins"] else (),
        )

    alone = [heard(of(kind))[0] for kind in kinds]
    batch, together = Batch(babbling(), VOCABULARY), {}
    for step in range(4):
        new = [number for number, kind in enumerate(kinds) if kind["when"] == step]
        together |= zip(new, batch.join([of(kinds[number]) for number in new]), strict=True)
        batch.step()
    while batch.searches:
        batch.step()
    for number, expected in enumerate(alone):
        found = together[number].best()
        assert found.tokens == expected.tokens and found.stopped == expected.stopped
        assert found.logp == pytest.approx(expected.logp, abs=1e-3)
        for one, other in zip(found.choices, expected.choices, strict=True):
            assert one.logp == pytest.approx(other.logp, abs=1e-3) and one.logp <= 0
            assert one.lm_logp == pytest.approx(other.lm_logp, abs=1e-3)
            assert one.entry == other.entry


@pytest.mark.parametrize("beams", [1, 3])
def test_a_beginning_is_counted_before_what_follows_it(beams):
    ngram = often(SENTENCES[0])
    begun = VOCABULARY.encode("turn on")
    [free] = heard(clip(20.0, ngram, beams=beams))
    [found] = heard(clip(20.0, ngram, beams=beams, beginning=begun))
    assert found.tokens[: len(begun)] == begun
    assert written(found) == written(free) == SENTENCES[0]
    for one, other in zip(found.choices, free.choices, strict=True):
        assert one.logp == pytest.approx(other.logp, abs=1e-4)
        assert one.lm_logp == pytest.approx(other.lm_logp, abs=1e-4)


def test_a_clip_of_another_model_is_refused_and_the_others_go_on():
    [expected] = heard(clip(0.5, ALL))
    batch = Batch(babbling(), VOCABULARY)
    [search] = batch.join([clip(0.5, ALL)])
    batch.step()
    with pytest.raises(ValueError, match="weighed by one n-gram model"):
        batch.join([clip(0.5, ONE)])
    assert batch.searches == [search] and batch.rows == 1
    while batch.searches:
        batch.step()
    assert search.best().tokens == expected.tokens


@pytest.mark.parametrize("searched", [False, True])
def test_what_is_recognised_is_weighed_with_the_recognisers_own_model(searched):
    recogniser = SimpleNamespace(
        lm=babbling(),
        vocabulary=VOCABULARY,
        ngram=often(SENTENCES[0]),
        seconds=len,
        longest=lambda seconds, settings: LIMIT + 10,
    )
    units = [Units(np.arange(n, dtype=np.int32), np.ones(n, np.int32)) for n in (3, 5)]
    retrieval = knn(Silent()) if searched else None
    settings = options(20.0).model_copy(update={"agreement": -1.0 if searched else None})
    found = recognise(recogniser, units, settings, retrieval)
    assert [written(one) for one in found] == [SENTENCES[0]] * 2
