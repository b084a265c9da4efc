"""Letters that were heard have their say, whatever the language model would rather write."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_ctc import next_logp, random_letters, spelling_of
from random_models import perturb

from mmrag.config import Decode, LanguageModel
from mmrag.decoding import joint
from mmrag.decoding.beams import beams_for
from mmrag.decoding.decode import Batch, Clip, decode
from mmrag.decoding.joint import LetterRows
from mmrag.decoding.spelling import Spelling
from mmrag.model.lm import LM
from mmrag.model.vocabulary import Heard, SentencePieces, Vocabulary
from mmrag.records import Letters, Units

CPU = torch.device("cpu")
ENGLISH = " 'abcdefghijklmnopqrstuvwxyz"
SENTENCES = ["turn on the light", "don't turn it off", "play the song again", "lights in the hall"]
VOCABULARY = Vocabulary(SentencePieces.train(SENTENCES, 60), units=6)
SHAPE = LanguageModel(width=16, layers=1, heads=2, kv_heads=1, feed_forward=24, tied=False)


@cache
def babbling():
    """A language model that knows nothing."""
    torch.manual_seed(0)
    return perturb(LM(SHAPE, VOCABULARY.size), 0.3).eval().requires_grad_(False)


def clip(text, weight=0.97, **changes):
    """A clip in which `text` is heard."""
    heard = None if text is None else spelling_of(text, ENGLISH)
    speech = Heard([VOCABULARY.first_unit + n for n in range(3)], heard)
    return replace(Clip(speech, 40, ctc_weight=weight), **changes)


def transcribed(*clips):
    """What clips that are decoded together are."""
    batch = Batch(babbling(), VOCABULARY)
    searches = batch.join(clips)
    while batch.searches:
        batch.step()
    return [search.best() for search in searches]


def said(*clips):
    return [VOCABULARY.decode(one.tokens) for one in transcribed(*clips)]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("text", [*SENTENCES, "a tall turtle", "it"])
def test_what_the_letters_say_is_transcribed(text, beams):
    assert said(clip(text, 0.0)) != [text]
    [heard] = transcribed(clip(text, beams=beams))
    assert VOCABULARY.decode(heard.tokens) == text
    assert heard.stopped


def test_several_clips_are_transcribed_together_each_as_it_would_be_alone():
    """With and without letters, of any length, coming and going."""
    clips = [clip(SENTENCES[0]), clip(None), clip("it", beams=3), clip(SENTENCES[2]), clip("a", 0)]
    alone = [transcribed(one)[0] for one in clips]
    batch = Batch(babbling(), VOCABULARY)
    searches = batch.join(clips[:2])
    for one in clips[2:]:
        batch.step()
        searches += batch.join([one])
    while batch.searches:
        batch.step()
    for search, other in zip(searches, alone, strict=True):
        assert search.best().tokens == other.tokens
        assert search.best().logp == pytest.approx(other.logp, abs=1e-3)


def test_without_a_weight_nothing_changes():
    settings = Decode(beams=2, length_penalty=0.6, tokens_per_second=10, max_seconds=10)
    assert settings.ctc_weight == 0.3
    given = babbling(), VOCABULARY
    heard, plain = clip("turn it off").speech, clip(None).speech
    without = settings.model_copy(update={"ctc_weight": 0.0})
    [expected] = decode(*given, [plain], [12], settings)
    assert decode(*given, [heard], [12], without) == [expected]
    assert decode(*given, [plain.ids], [12], settings) == [expected]
    assert decode(*given, [heard], [12], settings) != [expected]


def test_a_beginning_is_heard_before_what_follows_it():
    free = transcribed(clip("turn on the light"))[0]
    starts = VOCABULARY.word_starts()
    begun = free.tokens[: next(n for n in range(3, 40) if starts[free.tokens[n]])]
    [heard] = transcribed(clip("turn on the light", beginning=begun))
    assert VOCABULARY.decode(heard.tokens) == "turn on the light"
    assert [one.logp for one in heard.choices] == pytest.approx(
        [one.logp for one in free.choices], abs=1e-4
    )
    assert heard.tokens == free.tokens


def test_a_beginning_that_cannot_have_been_heard_is_kept_and_what_follows_is_finite():
    begun = VOCABULARY.encode("turn on the light")
    [heard] = transcribed(clip("it", beginning=begun))
    assert heard.tokens[: len(begun)] == begun
    assert np.isfinite(heard.logp) and len(heard.choices) > len(begun)


def test_drawn_tokens_are_drawn_from_what_was_heard():
    torch.manual_seed(0)
    drawn = said(*[clip("turn it off", 0.97, temperature=0.2)] * 5)
    assert drawn == ["turn it off"] * 5


def test_nothing_is_heard_in_no_time():
    nothing = Letters(ENGLISH, np.zeros((0, 29), np.uint8))
    speech = Heard([VOCABULARY.first_unit], nothing)
    [heard] = transcribed(Clip(speech, 5, ctc_weight=0.3))
    assert heard.tokens == [] and heard.stopped


def test_clips_of_two_encoders_are_not_decoded_together():
    one, other = (
        clip("it"),
        Clip(Heard([VOCABULARY.first_unit], random_letters(9)), 5, ctc_weight=1),
    )
    with pytest.raises(ValueError, match=r"in two alphabets: .* and ' ab'"):
        transcribed(one, other)
    batch = Batch(babbling(), VOCABULARY)
    [search] = batch.join([one])
    with pytest.raises(ValueError, match="two alphabets"):
        batch.join([other])
    while batch.searches:
        batch.step()
    assert VOCABULARY.decode(search.best().tokens) == "it"


def test_a_clip_takes_its_letters_along():
    letters = random_letters(4)
    heard = VOCABULARY.speech_input(Units(np.array([1, 0], np.int32), np.array([2, 2]), letters))
    assert list(heard) == VOCABULARY.encode_units(Units(np.array([1, 0]), np.array([2, 2])))
    assert VOCABULARY.letters(heard) is letters
    assert VOCABULARY.letters(list(heard)) is None
    assert VOCABULARY.prompt(heard) == VOCABULARY.prompt(list(heard))


TEXTS = ["", " a", "ab", " Bá", "a b", " b a", "b, ", "-", " ", "aab", "ba ", "c", " cab", "\ufffd"]


class Texts:
    """As much of a vocabulary as letters ask for."""

    written = TEXTS
    eos = 0


@pytest.mark.parametrize(
    ("text", "letters", "opens", "closes"),
    [
        (" the", "the", True, False),
        ("The", "the", False, False),
        (" of the", "of the", True, False),
        ("n't, ", "n't", False, True),
        ("naïve", "naive", False, False),
        ("’s", "'s", False, False),
        ("well-known", "well known", False, False),
        ("7b", "b", False, False),
        (" ", " ", False, False),
        (".", "", False, True),
        ("\ufffd", "", False, False),
        ("", "", False, False),
    ],
)
def test_a_token_is_spelt_as_texts_are_compared(text, letters, opens, closes):
    made = Spelling.of([text, "a longer one"], ENGLISH)
    spelt = "".join(ENGLISH[number - 1] for number in made.letters[0] if number)
    assert (spelt, made.opens[0], made.closes[0]) == (letters, opens, closes)
    assert made.counts[0] == len(letters)


def letter_rows(clips, weight=0.5):
    heard = [None if one is None else random_letters(one, seed=one, sharp=3.0) for one in clips]
    return LetterRows(heard, [weight] * len(clips), Texts(), CPU), heard


def uniform(rows):
    return torch.full((rows, len(TEXTS)), -2.0)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("go"), st.lists(st.integers(1, len(TEXTS) - 1), min_size=1, max_size=5)),
        st.tuples(st.just("keep"), st.lists(st.integers(0, 7), min_size=1, max_size=5)),
        st.tuples(
            st.just("join"), st.lists(st.none() | st.integers(0, 30), min_size=1, max_size=3)
        ),
    ),
    max_size=6,
)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.none() | st.integers(0, 30), min_size=1, max_size=4), steps)
def test_rows_that_go_on_come_and_go_score_every_token_as_one_by_one(clips, plan):
    rows, heard = letter_rows(clips)
    written = [[] for _ in clips]
    for what, numbers in plan:
        if what == "go":
            tokens = np.array([numbers[n % len(numbers)] for n in range(len(written))])
            rows.advance(tokens)
            written = [[*own, token] for own, token in zip(written, tokens, strict=True)]
        elif what == "keep":
            kept = np.array([number % len(written) for number in numbers])
            rows.select(kept)
            written, heard = [written[n] for n in kept], [heard[n] for n in kept]
        else:
            others, theirs = letter_rows(numbers)
            rows.join(others)
            written, heard = written + [[] for _ in theirs], heard + theirs
    found = rows.weigh(uniform(len(written)), None, len(TEXTS))
    for row, (tokens, letters) in enumerate(zip(written, heard, strict=True)):
        if letters is None:
            assert found[row].tolist() == uniform(1)[0].tolist()
        else:
            expected = -1.0 + 0.5 * next_logp(letters, TEXTS, tokens, 0)
            assert found[row].tolist() == pytest.approx(expected.tolist(), abs=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4), st.booleans(), st.booleans(), st.booleans())
def test_the_best_tokens_have_their_own_scores_and_the_others_none(
    seed, count, boosted, large, elsewhere
):
    """Whether the host can look at them, or would have to wait for a device."""
    torch.manual_seed(seed)
    rows, heard = letter_rows([20, 30])
    rows.advance(np.array([1, 2]))
    logp = (3 * torch.randn(2, len(TEXTS))).log_softmax(-1)
    bonus = torch.rand(2, len(TEXTS)) if boosted else None
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(joint, "LEAST_CANDIDATES", 12)
        if large:
            patched.setattr(joint, "LIKELIEST", 13)
            patched.setattr(joint, "FEW", 0)
        patched.setattr(joint, "_waited_for", lambda _: elsewhere)
        found = rows.weigh(logp if bonus is None else logp + bonus, bonus, count)
    for row, tokens in enumerate(([1], [2])):
        said = torch.from_numpy(next_logp(heard[row], TEXTS, tokens, Texts.eos))
        expected = 0.5 * logp[row] + 0.5 * said
        expected = expected + (bonus[row] if boosted else 0)
        scored = found[row] > -torch.inf
        assert found[row][scored].tolist() == pytest.approx(expected[scored].tolist(), abs=1e-4)
        others = expected[1:].topk(count)
        assert found[row][1:].topk(count).values.tolist() == pytest.approx(
            others.values.tolist(), abs=1e-4
        )
        assert found[row, Texts.eos] == pytest.approx(expected[0].item(), abs=1e-4)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 1000),
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, len(TEXTS) - 1)), min_size=1, max_size=8),
)
def test_the_best_of_all_rows_of_a_clip_have_their_own_scores(seed, count, hypotheses):
    random = torch.Generator().manual_seed(seed)
    clips, tokens = (np.array(column) for column in zip(*hypotheses, strict=True))
    rows, heard = letter_rows([20, 30, 9])
    rows.select(clips)
    rows.advance(tokens)
    logp = (3 * torch.randn(len(clips), len(TEXTS), generator=random)).log_softmax(-1)
    totals = 4 * torch.randn(len(clips), generator=random).double()
    found = rows.weigh(logp, None, count, totals=totals.numpy())
    said = [next_logp(heard[clip], TEXTS, [token], Texts.eos) for clip, token in hypotheses]
    expected = 0.5 * logp + 0.5 * torch.tensor(np.array(said))
    scored = found > -torch.inf
    assert scored[:, Texts.eos].all()
    assert found[scored].tolist() == pytest.approx(expected[scored].tolist(), abs=1e-4)
    for clip in set(clips.tolist()):
        own = torch.from_numpy(clips == clip)
        mine, best = (
            (each + totals[:, None])[own, 1:].flatten().topk(count).values.tolist()
            for each in (found, expected)
        )
        assert mine == pytest.approx(best, abs=1e-4)


def test_where_there_is_time_for_no_letter_and_no_end_allowed_something_is_written():
    rows, _ = letter_rows([2])
    rows.advance(np.array([TEXTS.index("ab")]))
    logp = uniform(1)
    logp[0, Texts.eos] = -torch.inf
    found = rows.weigh(logp, None, len(TEXTS))[0]
    assert found[Texts.eos] == -torch.inf
    silent = [n for n, text in enumerate(TEXTS) if text in ("-", "c", "\ufffd")]
    assert (found[silent] == -1).all()
    assert found[TEXTS.index("b, ")] == -501
    logp[0, silent] = -torch.inf
    assert rows.weigh(logp, None, 1)[0].max() == -501


@pytest.mark.parametrize(
    ("told", "weight", "rows", "beams"),
    [(None, 0.3, None, 8), (None, 0.3, 8, 4), (None, 0.3, 1, 1), (None, 0, 8, 1), (3, 0.3, 2, 3)],
)
def test_beams_that_nobody_chose_leave_room_for_a_second_clip(told, weight, rows, beams):
    nothing = Letters(ENGLISH, np.zeros((0, 29), np.uint8))
    settings = Decode(
        beams=told, length_penalty=0.6, tokens_per_second=16, max_seconds=8, ctc_weight=weight
    )
    assert beams_for(settings, nothing, rows) == beams
    assert beams_for(settings, None, rows) == (told or 1)
