"""Kokoro's protocol over a stand-in graph of the same inputs and outputs, whose phonemes last three
frames each; what the real model says where its files lie in `runs/kokoro`."""

from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest

from mmrag.corpora.voices import espeak, kokoro
from mmrag.corpora.voices.kokoro import ACCENTED, PACKS, Synthesizer, Voice, cast, timed_ipa
from mmrag.corpora.voices.phones import PHONES
from mmrag.corpora.voices.speech import UnspeakableError
from mmrag.records import Timed
from mmrag.speech.audio import SAMPLE_RATE

for library in ("onnx", "kokoro_onnx", "espeakng_loader"):
    pytest.importorskip(library)

from tests.support.kokoro_stand_in import FRAMES, SAMPLES, stand_in, write_kokoro  # noqa: E402

REAL = Path(__file__).parents[4] / "runs" / "kokoro"
NOVA = Voice((("af_nova", 1.0),))


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return write_kokoro(tmp_path_factory.mktemp("kokoro"), {"af_nova": 0.1, "bm_lewis": 0.3})


@pytest.fixture(scope="module")
def synthesizer(directory) -> Synthesizer:
    return Synthesizer(directory)


def test_the_lengths_of_phonemes_sum_to_the_audio(synthesizer):
    speech = synthesizer.speak("call mary at nine", NOVA)
    tokens = len(synthesizer._letters("call mary at nine", "en-us")) + 2
    assert len(speech.wave) / SAMPLE_RATE == pytest.approx(tokens * FRAMES * SAMPLES / 24_000)
    first, last = speech.phones[0], speech.phones[-1]
    assert first.start == pytest.approx(FRAMES * SAMPLES / 24_000)
    assert last.end == pytest.approx(len(speech.wave) / SAMPLE_RATE - first.start)
    for one, other in pairwise(speech.phones):
        assert one.end == pytest.approx(other.start), "stress and gaps belong to a phone"
    assert {phone.text for phone in speech.phones} <= set(PHONES)


def test_every_word_has_its_time_whatever_is_run_together_or_taken_apart(synthesizer):
    for text in ("put it in the box of a friend", "pay 1234567 pounds", "-- well-known o'clock"):
        words = synthesizer.speak(text, NOVA).words
        assert [word.text for word in words] == text.split()
        edges = [edge for word in words for edge in (word.start, word.end)]
        assert edges == sorted(edges)
    plain = synthesizer.speak("put it in the box", NOVA)
    starts = {word.text: word.start for word in plain.words}
    [box] = [p.start for p in plain.phones if p.text == "b"]
    assert starts["box"] == pytest.approx(box, abs=0.08)


def test_a_blend_is_between_its_packs_and_a_speed_makes_all_of_it_shorter(synthesizer):
    lewis = Voice((("bm_lewis", 1.0),))
    both = Voice((("af_nova", 0.5), ("bm_lewis", 0.5)))
    levels = [synthesizer.speak("hello", one).wave.mean() for one in (NOVA, both, lewis)]
    assert levels == pytest.approx([0.1, 0.2, 0.3], abs=0.01)
    quick = Voice(NOVA.blend, speed=1.1)
    slow, fast = (synthesizer.speak("hello there", one) for one in (NOVA, quick))
    rate = len(slow.wave) / len(fast.wave)
    assert rate == pytest.approx(1.1, abs=0.03)
    assert slow.phones[-1].end / fast.phones[-1].end == pytest.approx(rate, abs=0.001)


def test_what_cannot_be_said_and_who_is_not_there_are_named(synthesizer):
    with pytest.raises(UnspeakableError, match="nothing that can be spoken in '--'"):
        synthesizer.speak("--", NOVA)
    with pytest.raises(ValueError, match=r"voices-test\.npz has no voice pack 'am_puck'"):
        synthesizer.speak("hello", Voice((("am_puck", 1.0),)))
    with pytest.raises(ValueError, match="rate 3 is not in"):
        Voice(NOVA.blend, rate=3)


def test_absent_files_are_an_error_that_says_how_to_get_them(tmp_path, directory):
    with pytest.raises(FileNotFoundError, match=r"no kokoro\*\.onnx; .*jobs\.fetch_voices"):
        Synthesizer(tmp_path)
    (tmp_path / "kokoro.onnx").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"no voices\*\.bin or voices\*\.npz; "):
        Synthesizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"synthesize\.kokoro names no directory"):
        Synthesizer(None)


def test_whoever_may_be_cast_has_to_be_there_and_the_setting_is_named(tmp_path, directory):
    with pytest.raises(ValueError, match=r"voices-test\.npz has no voice pack 'af_alloy'"):
        kokoro.require(directory, "speaking.kokoro")
    with pytest.raises(FileNotFoundError, match=r"speaking\.kokoro names no directory"):
        kokoro.require(None, "speaking.kokoro")
    kokoro.require(
        write_kokoro(tmp_path, dict.fromkeys((*PACKS["train"], *ACCENTED), 0.1)), "--kokoro"
    )


def test_a_graph_without_lengths_is_refused_by_name(tmp_path):
    stand_in(tmp_path / "kokoro-other.onnx", tensor="/somewhere/else")
    with pytest.raises(ValueError, match=r"kokoro-other\.onnx: this graph does not compute"):
        kokoro.timed(tmp_path / "kokoro-other.onnx")


def test_the_graph_is_made_ready_once_and_left_alone_then(directory):
    ready = directory / "timed-kokoro-test.onnx"
    made = kokoro.timed(directory / "kokoro-test.onnx")
    assert made == ready and kokoro.timed(ready) == ready
    before = ready.stat().st_mtime_ns
    assert kokoro.timed(directory / "kokoro-test.onnx") == ready
    assert ready.stat().st_mtime_ns == before


def test_without_the_library_the_error_says_what_to_install(monkeypatch, directory):
    monkeypatch.setattr(kokoro, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install mmrag\[kokoro\]"):
        Synthesizer(directory)


def test_espeak_forgets_as_well_while_others_keep_its_library_loaded(synthesizer):
    """It keeps noise and flutter in static memory, which only unloading it clears."""
    synthesizer.speak("hello", NOVA)
    ours = espeak.Synthesizer()
    for voice in espeak.VOICES["train"][::5]:
        once = ours.speak("about port darnby next week", voice)
        ours.speak("please call zanab kuri", espeak.VOICES["train"][1])
        again = ours.speak("about port darnby next week", voice)
        np.testing.assert_array_equal(again.wave, once.wave)


def test_gaps_between_words_are_speech_unless_they_are_long():
    said = [
        Timed("ˈ", 0.0, 0.1),
        Timed("I", 0.1, 0.2),
        Timed(" ", 0.2, 0.25),
        Timed("t", 0.25, 0.3),
        Timed(" ", 0.3, 0.6),
        Timed(",", 0.6, 0.7),
        Timed("s", 0.7, 0.8),
    ]
    assert list(timed_ipa(said)) == [
        Timed("aɪ", 0.0, 0.25),
        Timed("t", 0.25, 0.3),
        Timed("s", 0.7, 0.8),
    ]


def test_packs_of_dev_and_test_are_neither_trained_on_nor_blended():
    draw = Random(0)
    for split in ("dev", "test"):
        voices = {cast(split, draw).id for _ in range(200)}
        assert voices == set(PACKS[split])
    trained = [cast(split, draw) for split in ("lm", "adapter", "datastore") for _ in range(500)]
    heard = {pack for voice in trained for pack, _ in voice.blend}
    assert heard == {*PACKS["train"], *ACCENTED}
    assert not heard & {*PACKS["dev"], *PACKS["test"]} and not {*PACKS["dev"]} & {*PACKS["test"]}
    assert len({voice.blend for voice in trained}) > 1400
    assert [cast("lm", Random(7)) for _ in range(2)] == [cast("lm", Random(7))] * 2


@pytest.mark.skipif(not REAL.is_dir(), reason="python -m jobs.fetch_voices fetches Kokoro")
def test_the_real_model_speaks_and_its_vowels_are_louder_than_its_pauses():
    synthesizer = Synthesizer(REAL)
    speech = synthesizer.speak("please call mary, tomorrow", NOVA)
    again = synthesizer.speak("please call mary, tomorrow", NOVA)
    np.testing.assert_array_equal(speech.wave, again.wave)
    said = [phone.text for phone in speech.phones]
    assert said[:6] == ["p", "l", "i", "z", "k", "ɔ"] and said[-1] == "oʊ"
    power = np.square(speech.wave)

    def mean(start, end):
        return power[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)].mean()

    silent = mean(0, speech.phones[0].start - 0.05)
    for phone in speech.phones:
        if phone.text in ("i", "ɔ", "ɛ", "ɑ", "oʊ"):
            assert mean(phone.start, phone.end) > 30 * silent
