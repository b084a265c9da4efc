import ctypes
import sys
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrag.corpora.voices.espeak import (
    VOICES,
    Synthesizer,
    Voice,
    speaking,
    timed_phones,
    timed_words,
)
from mmrag.records import Line, Timed
from mmrag.speech.audio import SAMPLE_RATE

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
        assert speech.phones == first.phones


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


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cat", ["k", "æ", "t"]),
        ("tomorrow", ["t", "ə", "m", "ɑ", "ɹ", "oʊ"]),
        ("we see. we see", ["w", "i", "s", "i"] * 2),
    ],
)
def test_phones_are_those_of_english_and_pauses_are_none(synthesizer, text, names):
    assert [phone.text for phone in synthesizer.speak(text, Voice("us", "en-us")).phones] == names


def test_phones_follow_each_other_within_their_words_and_the_clip(synthesizer):
    speech = synthesizer.speak("goodbye, mary, tomorrow", Voice("us", "en-us"))
    edges = [edge for phone in speech.phones for edge in (phone.start, phone.end)]
    assert edges == sorted(edges)
    assert edges[0] >= 0 and edges[-1] <= len(speech.wave) / SAMPLE_RATE
    starts = [word.start for word in speech.words[1:]]
    first = [next(p.text for p in speech.phones if p.start >= start - 0.03) for start in starts]
    assert first == ["m", "t"]
    assert len(speech.phones) > 12


def test_a_phone_is_heard_when_it_is_said_and_between_phones_is_silence(synthesizer):
    speech = synthesizer.speak("goodbye, tomorrow", Voice("dry", "en-us"))
    [(gap, pause)] = [
        (one.end, other.start)
        for one, other in pairwise(speech.phones)
        if other.start - one.end > 0.1
    ]
    power = np.square(speech.wave)

    def mean(start, end):
        return power[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)].mean()

    vowels = [phone for phone in speech.phones if phone.text in ("ʊ", "aɪ", "ɑ", "oʊ")]
    assert len(vowels) == 4
    assert mean(gap + 0.05, pause - 0.01) < 0.01 * min(mean(v.start, v.end) for v in vowels)


def test_stress_marks_pauses_and_what_lies_behind_the_end_are_left_out_of_phones():
    events = [
        ("", 0),
        ("ˈæ", 100),
        ("_:", 200),
        ("ˌiː", 300),
        ("k", 300),
        ("t", 450),
        ("_", 600),
    ]
    assert timed_phones(events, 0.5) == (
        Timed("æ", 0.1, 0.2),
        Timed("k", 0.3, 0.45),
        Timed("t", 0.45, 0.5),
    )
    assert timed_phones([("æ", 0)], 2.0) == (Timed("æ", 0.0, 2.0),)
    assert timed_phones([("æ", 0), ("b", 3000)], 2.0) == (Timed("æ", 0.0, 2.0),)


def test_without_events_there_are_no_phones():
    assert timed_phones([], 2.0) == ()


@given(
    st.lists(
        st.tuples(st.sampled_from(["æ", "ˈæ", "_", "_:", "", "t"]), st.floats(0, 3000)), min_size=1
    ),
    st.floats(0.1, 2),
)
def test_phone_times_never_run_backwards(events, duration):
    events.sort(key=lambda event: event[1])
    timed = timed_phones(events, duration)
    assert {phone.text for phone in timed} <= {"æ", "t"}
    edges = [0.0, *(edge for phone in timed for edge in (phone.start, phone.end)), duration]
    assert edges == sorted(edges)
    assert all(phone.end > phone.start for phone in timed)


@pytest.mark.parametrize("speed", [0.9, 1.1])
def test_speed_moves_tempo_pitch_and_every_time_together(synthesizer, speed):
    text, plain = "how far is it to the sea", synthesizer.speak
    speech, other = (plain(text, Voice("v", "en-us", speed=s)) for s in (1.0, speed))
    ratio = len(speech.wave) / len(other.wave)
    assert ratio == pytest.approx(speed, rel=0.015), "whole thousands of samples a second"
    for one, faster in zip(
        (*speech.words, *speech.phones), (*other.words, *other.phones), strict=True
    ):
        assert faster.text == one.text
        assert (faster.start, faster.end) == pytest.approx(
            (one.start / ratio, one.end / ratio), abs=2e-3
        )

    def centre(wave):
        """The mean frequency, Hz."""
        power = np.abs(np.fft.rfft(wave)) ** 2
        return (power @ np.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE)) / power.sum()

    assert centre(other.wave) / centre(speech.wave) == pytest.approx(ratio, rel=0.02)


def test_a_speed_of_one_is_what_a_voice_says_by_itself(synthesizer):
    own, one = (synthesizer.speak("hello", v) for v in (WOMAN, Voice("w", "en-us+f3", speed=1)))
    np.testing.assert_array_equal(own.wave, one.wave)
    assert own.phones == one.phones


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


@pytest.mark.parametrize(
    ("setting", "value"),
    [("pitch", 100), ("pitch", -1), ("rate", 40), ("speed", 0.4), ("speed", 2.5)],
)
def test_a_voice_beyond_the_ranges_is_an_error(setting, value):
    with pytest.raises(ValueError, match=f"x: {setting} {value}"):
        Voice("x", "en", **{setting: value})


@pytest.mark.parametrize("text", ["", " \n", "a\0b", "----", "...", "١٢"])
def test_text_that_cannot_be_spoken_is_an_error(synthesizer, text):
    with pytest.raises(ValueError, match="nothing that can be spoken"):
        synthesizer.speak(text, WOMAN)


def test_texts_are_pronounced_as_they_are_spoken(synthesizer):
    texts = ["siobhan o'connor", "", "…", "dr smith is 42. thanks!", "siobhan o'connor"]
    siobhan, *silent, smith, again = synthesizer.pronounce(texts)
    assert siobhan == again and silent == [(), ()]
    spoken = synthesizer.speak(texts[0], Voice("any", "en-us")).phones
    assert siobhan == tuple(phone.text for phone in spoken)
    assert smith[:3] == ("d", "ɑ", "k") and smith[-1] == "s"
    with pytest.raises(ValueError, match="no voice 'nowhere'"):
        synthesizer.pronounce(["a"], "nowhere")


def test_ipa_is_pronounced_as_it_is_written_and_respellings_as_they_are_read(synthesizer):
    ipa, plain, respelled = (
        Line("/ˈzɒlpɪdɛm/", phonetic=True),
        "zole pie dem",
        Line("zole pie dem", language="en-GB"),
    )
    first, second, third = synthesizer.pronounce([ipa, plain, respelled])
    assert first == ("z", "ɑ", "l", "p", "ɪ", "d", "ɛ", "m")
    assert second == third and second[:3] == ("z", "oʊ", "l")


@pytest.mark.parametrize(
    ("language", "name"),
    [("es", "es+"), ("es_MX", "es+"), ("es-419", "es-419+"), ("de-AT", "de+"), ("pt-BR", "pt-br+")],
)
def test_another_language_has_a_voice_that_speaks_it(synthesizer, language, name):
    voice = speaking(language, "train", Random(0))
    assert voice.name.startswith(name)
    assert len(synthesizer.speak("hola", voice).wave)
    assert voice == speaking(language, "train", Random(0))


def test_english_of_a_region_is_said_by_its_voices_and_other_english_by_anybody():
    for seed in range(20):
        assert speaking("en-GB", "train", Random(seed)).name.startswith("en-gb")
        assert speaking("en_us", "train", Random(seed)).name.startswith("en-us")
    names = {speaking("en-AU", "train", Random(seed)).id for seed in range(200)}
    assert names == {voice.id for voice in VOICES["train"]}


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
