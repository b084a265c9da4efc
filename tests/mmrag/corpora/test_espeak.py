import ctypes
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrag.audio import SAMPLE_RATE
from mmrag.corpora.espeak import Synthesizer, Voice, timed_words

pytest.importorskip("espeakng_loader")

WOMAN = Voice("woman", "en-us+f3")
MAN = Voice("man", "en-gb-scotland+m7", pitch=40, rate=190)


@pytest.fixture(scope="module")
def synthesizer() -> Synthesizer:
    return Synthesizer()


@pytest.mark.parametrize("voice", [WOMAN, MAN, Voice("klatt", "en-us+klatt6"), Voice("en", "en")])
def test_the_same_text_and_voice_give_identical_samples_whatever_was_said_before(
    synthesizer, voice
):
    first = synthesizer.speak("call mary at the office", voice)
    synthesizer.speak("something else", MAN)
    synthesizer.speak("and more", WOMAN)
    for again in (synthesizer, Synthesizer()):
        speech = again.speak("call mary at the office", voice)
        np.testing.assert_array_equal(speech.wave, first.wave)
        assert speech.words == first.words


def test_speech_is_mono_float32_within_full_scale(synthesizer):
    speech = synthesizer.speak("hello there", Voice("loud", "en-us+klatt4"))
    assert speech.wave.dtype == np.float32
    assert speech.wave.ndim == 1
    assert 0.1 < np.abs(speech.wave).max() <= 1


@pytest.mark.parametrize(
    "text",
    [
        "of a i the to the of",
        "in the middle of the night there was a 1234 well-known dog's o'clock",
        "dr. smith said hello. and then: 10:30 ok",
        "  two  spaces\nand a line ",
        "café naïve 日本 über",
        "... !!!",
        "a/b c&d e@f.com <b>x</b> [[h@l'oU]]",
    ],
)
def test_every_whitespace_word_has_its_time(synthesizer, text):
    speech = synthesizer.speak(text, WOMAN)
    assert [word.text for word in speech.words] == text.split()
    edges = [edge for word in speech.words for edge in (word.start, word.end)]
    assert edges == sorted(edges)
    assert edges[0] >= 0
    assert edges[-1] == pytest.approx(len(speech.wave) / SAMPLE_RATE, abs=1e-3)


def test_a_word_starts_where_its_sound_starts(synthesizer):
    speech = synthesizer.speak("goodbye, tomorrow", Voice("dry", "en-us"))
    start = round(speech.words[1].start * SAMPLE_RATE)
    before, after = speech.wave[start - 800 : start], speech.wave[start : start + 3200]
    assert np.mean(before**2) < 0.01 * np.mean(after**2)


def test_words_run_together_share_their_time_and_split_words_count_once():
    words = timed_words("in the well-known house", [(1, 0), (8, 500), (13, 900), (19, 1000)], 2.0)
    assert [(word.start, word.end) for word in words] == [
        (0.0, pytest.approx(0.2)),
        (pytest.approx(0.2), 0.5),
        (0.5, 1.0),
        (1.0, 2.0),
    ]


@given(
    st.lists(st.text("ab-'", min_size=1, max_size=6), min_size=1, max_size=8),
    st.lists(st.tuples(st.integers(-2, 60), st.integers(0, 5000)), max_size=12),
    st.floats(0.1, 4),
)
def test_word_times_never_run_backwards_whatever_the_events(words, events, duration):
    timed = timed_words(" ".join(words), events, duration)
    assert [word.text for word in timed] == words
    edges = [0.0, *(edge for word in timed for edge in (word.start, word.end)), duration]
    assert all(later - earlier >= -1e-9 for earlier, later in pairwise(edges))


def test_a_faster_rate_makes_shorter_speech_and_another_pitch_another_sound(synthesizer):
    text = "how far is it to the sea"
    slow, fast, high = (
        synthesizer.speak(text, voice).wave
        for voice in (
            Voice("slow", "en", rate=120),
            Voice("fast", "en", rate=240),
            Voice("high", "en", pitch=90, rate=120),
        )
    )
    assert len(fast) < 0.7 * len(slow)
    assert not np.array_equal(slow, high)


@pytest.mark.parametrize("name", ["xx-nowhere", "en-us+nobody", "xx-nowhere+f3", ""])
def test_an_unknown_voice_is_an_error_that_names_it_and_breaks_nothing(synthesizer, name):
    with pytest.raises(ValueError, match=f"no (voice|variant).*{name[:5]}"):
        synthesizer.speak("hello", Voice("unknown", name))
    assert len(synthesizer.speak("hello", WOMAN).wave)


@pytest.mark.parametrize(("setting", "value"), [("pitch", 100), ("pitch", -1), ("rate", 40)])
def test_a_voice_beyond_the_ranges_is_an_error(setting, value):
    with pytest.raises(ValueError, match=f"x: {setting} {value}"):
        Voice("x", "en", **{setting: value})


@pytest.mark.parametrize("text", ["", " \n", "a\0b"])
def test_text_that_cannot_be_spoken_is_an_error(synthesizer, text):
    with pytest.raises(ValueError, match="nothing that can be spoken"):
        synthesizer.speak(text, WOMAN)


def test_a_failure_while_sound_arrives_reaches_the_caller(synthesizer, monkeypatch):
    def fail(address, size):
        raise MemoryError("no room for samples")

    monkeypatch.setattr(ctypes, "string_at", fail)
    with pytest.raises(MemoryError, match="no room for samples"):
        synthesizer.speak("hello", WOMAN)


def test_without_the_wheel_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ImportError, match=r"pip install mmrag\[speech\]"):
        Synthesizer()
