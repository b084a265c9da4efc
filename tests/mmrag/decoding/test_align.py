import itertools
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import perturb

from mmrag import shipped
from mmrag.config import LanguageModel
from mmrag.corpora.grammar import GRAMMAR, expand
from mmrag.corpora.voices.espeak import VOICES, Synthesizer
from mmrag.decoding.align import PACE, PAUSE_FRAMES, align, attention, audible, divide
from mmrag.model.lm import LM
from mmrag.model.vocabulary import SentencePieces, Vocabulary
from mmrag.recogniser import Recogniser
from mmrag.speech.audio import SAMPLE_RATE

SHAPE = LanguageModel(width=16, layers=2, heads=4, kv_heads=2, feed_forward=24, tied=True)


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary(SentencePieces.train(["turn on the light", "call maria now"], 60), units=12)


@pytest.fixture(scope="module")
def lm(vocabulary):
    """A model whose weights are large enough for every one of them to matter."""
    torch.manual_seed(0)
    return perturb(LM(SHAPE, vocabulary.size)).eval().requires_grad_(False)


def clip(vocabulary, durations, seed=0):
    """Units of these durations (frames of 20 ms): their ids, and start and end in seconds."""
    ids = np.random.default_rng(seed).integers(0, vocabulary.units, len(durations))
    ends = np.cumsum(durations)
    seconds = np.stack([ends - durations, ends], 1).reshape(-1, 2) * 0.02
    return (vocabulary.first_unit + ids).tolist(), seconds


words = st.lists(st.text("acehilmnortu", min_size=1, max_size=6), max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=12), words, st.data())
def test_every_word_has_a_span_in_the_clip_and_none_starts_before_the_last_has_ended(
    lm, vocabulary, durations, said, data
):
    speech, seconds = clip(vocabulary, np.array(durations, int))
    flags = st.lists(st.booleans(), min_size=len(speech), max_size=len(speech))
    heard = data.draw(st.none() | flags)
    tokens = vocabulary.encode(" ".join(said))
    spans = align(lm, vocabulary, speech, seconds, tokens, heard)
    assert spans.shape == (len(vocabulary.word_ends(tokens)), 2) == (len(said), 2)
    assert np.isfinite(spans).all()
    assert (spans[:, 0] <= spans[:, 1]).all()
    assert (spans[1:, 0] >= spans[:-1, 1]).all()
    if len(said) and len(speech):
        assert spans[0, 0] >= 0
        assert spans[-1, 1] <= seconds[-1, 1]
        assert (spans[:, 0] < spans[:, 1]).all()


def test_an_empty_transcript_has_no_spans(lm, vocabulary):
    assert align(lm, vocabulary, *clip(vocabulary, np.ones(5, int)), []).shape == (0, 2)


def test_without_units_no_time_has_passed(lm, vocabulary):
    tokens = vocabulary.encode("call maria")
    assert not align(lm, vocabulary, *clip(vocabulary, np.ones(0, int)), tokens).any()


def test_one_word_lasts_from_the_first_audible_unit_to_the_last(lm, vocabulary):
    speech, seconds = clip(vocabulary, np.array([3, 2, 1, 4, 5, 2]))
    for text in ("a", "maria"):
        tokens = vocabulary.encode(text)
        whole = align(lm, vocabulary, speech, seconds, tokens)
        np.testing.assert_allclose(whole, [[0, 0.34]])
        heard = np.array([0, 1, 0, 1, 1, 0])
        some = align(lm, vocabulary, speech, seconds, tokens, heard)
        np.testing.assert_allclose(some, [[0.06, 0.3]])


def test_where_nothing_is_audible_everything_counts(lm, vocabulary):
    speech, seconds = clip(vocabulary, np.array([3, 2, 1, 4]))
    tokens = vocabulary.encode("call now")
    silent = align(lm, vocabulary, speech, seconds, tokens, np.zeros(4))
    assert np.array_equal(silent, align(lm, vocabulary, speech, seconds, tokens))


def test_no_word_starts_or_ends_in_a_pause(lm, vocabulary):
    speech, seconds = clip(vocabulary, np.full(30, 2))
    heard = np.ones(30, bool)
    heard[:5] = heard[12:20] = heard[26:] = False
    spans = align(lm, vocabulary, speech, seconds, vocabulary.encode("call maria now"), heard)
    assert set(spans[:, 0]) <= set(seconds[heard, 0])
    assert set(spans[:, 1]) <= set(seconds[heard, 1])
    assert spans[0, 0] == seconds[5, 0]
    assert spans[-1, 1] == seconds[25, 1]


def test_more_words_than_units_share_a_unit_in_order(lm, vocabulary):
    speech, seconds = clip(vocabulary, np.array([4, 6]))
    spans = align(lm, vocabulary, speech, seconds, vocabulary.encode("a a a a a a a"))
    assert len(spans) == 7
    assert (spans[:, 1] > spans[:, 0]).all()
    np.testing.assert_allclose(spans[1:, 0], spans[:-1, 1])
    np.testing.assert_allclose(spans[[0, -1], [0, 1]], [0, 0.2])


class Phrases:
    unknown = None

    """Pieces that are whole phrases, as some base models have them."""

    size = 2

    def encode(self, text):
        return [0]

    def decode(self, pieces):
        return " ".join(["of the", "sea"][piece] for piece in pieces)


def test_a_word_without_a_token_of_its_own_takes_no_time_where_its_token_starts():
    vocabulary = Vocabulary(Phrases(), units=12)
    torch.manual_seed(0)
    lm = LM(SHAPE, vocabulary.size).eval()
    first = vocabulary.first_piece
    tokens = [first + 1, first, first + 1]
    spans = align(lm, vocabulary, *clip(vocabulary, np.full(12, 2)), tokens)
    assert len(spans) == 4
    assert spans[1, 0] == spans[1, 1] == spans[2, 0] == spans[0, 1]
    assert spans[2, 1] > spans[2, 0]
    again = align(lm, vocabulary, *clip(vocabulary, np.full(12, 2)), tokens[1:])
    assert again[0].tolist() == [0, 0]


def test_units_and_their_times_must_be_as_many(lm, vocabulary):
    speech, seconds = clip(vocabulary, np.full(4, 2))
    with pytest.raises(ValueError, match=r"4 units, times \(3, 2\)"):
        align(lm, vocabulary, speech, seconds[:3], vocabulary.encode("a"))
    with pytest.raises(ValueError, match=r"audible \(5,\)"):
        align(lm, vocabulary, speech, seconds, vocabulary.encode("a"), np.ones(5))


def test_a_head_that_always_looks_at_the_same_place_has_no_say(vocabulary, monkeypatch):
    looks = np.full((1, 1, 2, 3, 7), 0.01, np.float32)
    looks[0, 0, 0, :, 3] = 0.9  # the second unit, whatever the token
    looks[0, 0, 1, [0, 1, 2], [2, 3, 4]] = 0.5
    lm = LM(SHAPE, vocabulary.size)
    monkeypatch.setattr(lm, "attention", lambda ids, last: torch.from_numpy(looks))
    speech, _ = clip(vocabulary, np.full(3, 2))
    shares = attention(lm, vocabulary, speech, [5, 6, 7], np.ones(3, bool))
    useful = looks[0, 0, 1, :, 2:5]
    np.testing.assert_allclose(shares, useful / useful.sum(1, keepdims=True), atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(0, 4), st.integers(0, 1000))
def test_the_units_are_divided_in_the_best_of_all_ways(tokens, more, seed):
    draw = np.random.default_rng(seed)
    units = tokens + more
    scores = 4 * draw.standard_normal((tokens, units))
    lengths, letters = draw.uniform(0.02, 0.2, units), draw.integers(1, 7, tokens).astype(float)
    expected = letters / letters.sum() * lengths.sum()

    def value(bounds):
        parts = [slice(*ends) for ends in itertools.pairwise(bounds)]
        looked = sum(scores[n, part].sum() for n, part in enumerate(parts))
        took = np.array([lengths[part].sum() for part in parts])
        return looked - PACE * (np.log(took / expected) ** 2).sum()

    every = [(0, *cut, units) for cut in itertools.combinations(range(1, units), tokens - 1)]
    assert tuple(divide(scores, lengths, letters)) == max(every, key=value)


def frames(levels, seed=0):
    """Noise of these amplitudes, one a frame of 20 ms."""
    noise = np.random.default_rng(seed).standard_normal((len(levels), SAMPLE_RATE // 50))
    return torch.from_numpy((noise * np.array(levels)[:, None]).ravel().astype(np.float32))


def test_long_silence_is_a_pause_and_a_stop_is_none():
    loud, stop, pause = [0.1] * 10, [1e-4] * (PAUSE_FRAMES - 1), [1e-4] * PAUSE_FRAMES
    levels = pause + loud + stop + loud + pause
    seconds = np.arange(len(levels))[:, None] * 0.02 + [0, 0.02]
    inner = len(loud + stop + loud)
    expected = [False] * PAUSE_FRAMES + [True] * inner + [False] * PAUSE_FRAMES
    assert audible(frames(levels), seconds).tolist() == expected
    # Whoever hears mostly a pause is in one, whatever the encoder's frames.
    wide = np.array([[0, 0.26], [0, 0.34], [0.34, 0.7]])
    assert audible(frames(levels), wide).tolist() == [False, True, True]


def test_noise_and_digital_silence_have_no_pauses():
    seconds = np.arange(50)[:, None] * 0.02 + [0, 0.02]
    assert audible(frames([0.1] * 20 + [0.02] * 30), seconds).all()
    assert audible(torch.zeros(SAMPLE_RATE), seconds).all()
    assert audible(torch.zeros(0), seconds[:0]).shape == (0,)


def spread_by_letters(text, start, end):
    """Spans of words that take as long as their letters are many."""
    ends = np.cumsum([0, *(len(word) for word in text.split())])
    times = start + ends / ends[-1] * (end - start)
    return np.stack([times[:-1], times[1:]], 1)


def test_the_shipped_model_places_words_better_than_their_letters_do():
    recogniser, synthesizer = Recogniser.load(shipped.find(shipped.TINY)), Synthesizer()
    draw, quiet = Random(0), np.zeros(SAMPLE_RATE // 2, np.float32)
    ours, letters = [], []
    for number in range(8):
        text, voice = expand("{everyday}", GRAMMAR, draw), VOICES["test"][number % 4]
        speech = synthesizer.speak(text, voice)
        spoken = np.array([(word.start, word.end) for word in speech.words]) + 0.5
        wave = torch.from_numpy(np.concatenate([quiet, speech.wave, quiet]))
        [units] = recogniser.encode([wave])
        seconds = recogniser.codebook.seconds(units)
        ids = recogniser.vocabulary.encode_units(units)
        tokens = recogniser.vocabulary.encode(text)
        heard = audible(wave, seconds)
        spans = align(recogniser.lm, recogniser.vocabulary, ids, seconds, tokens, heard)
        assert spans[0, 0] == pytest.approx(0.5, abs=0.1)
        assert spans[-1, 1] == pytest.approx(spoken[-1, 1], abs=0.1)
        baseline = spread_by_letters(text, seconds[heard][0, 0], seconds[heard][-1, 1])
        ours.append(np.abs(spans - spoken))
        letters.append(np.abs(baseline - spoken))
    ours, letters = np.concatenate(ours).mean(), np.concatenate(letters).mean()
    assert ours < 0.05
    assert ours < 0.7 * letters
