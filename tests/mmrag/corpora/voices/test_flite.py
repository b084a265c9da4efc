import numpy as np
import pytest

from mmrag.corpora.voices import flite
from mmrag.speech.audio import SAMPLE_RATE

spoken = pytest.mark.skipif(not flite.installed(), reason="flite is not installed")


@pytest.fixture
def nowhere(monkeypatch):
    """A machine without the program."""
    monkeypatch.setattr(flite, "PROGRAM", "no-such-program")
    flite.voices.cache_clear()
    yield
    flite.voices.cache_clear()


def test_a_program_that_is_missing_is_not_installed_and_cannot_speak(nowhere):
    assert not flite.installed()
    with pytest.raises(OSError, match="no-such-program"):
        flite.speak("hello", "slt")


@spoken
def test_its_voices_are_names():
    assert flite.installed()
    assert {"slt", "rms"} <= set(flite.voices())
    assert all(name.isidentifier() for name in flite.voices())


@spoken
@pytest.mark.parametrize("voice", ["nobody", "", "SLT", "slt rms"])
def test_an_unknown_voice_is_an_error_that_names_it_and_the_known_ones(voice):
    with pytest.raises(ValueError, match=f"no voice '{voice}', only .*slt"):
        flite.speak("hello", voice)


@spoken
@pytest.mark.parametrize("voice", ["slt", "rms"])
def test_speech_is_mono_float32_at_our_rate_and_the_same_every_time(voice):
    wave = flite.speak("call mary at the office", voice)
    assert wave.dtype == np.float32 and wave.ndim == 1
    assert 0.1 < np.abs(wave).max() <= 1
    assert 1 < len(wave) / SAMPLE_RATE < 3, "seconds"
    np.testing.assert_array_equal(flite.speak("call mary at the office", voice), wave)


@spoken
def test_voices_sound_different_and_more_text_takes_longer():
    short, longer = flite.speak("call mary", "slt"), flite.speak("call mary at six", "slt")
    assert len(longer) > 1.2 * len(short)
    other = flite.speak("call mary", "rms")
    assert other.shape != short.shape or not np.allclose(other, short)


@spoken
@pytest.mark.parametrize("text", ["-o nothing.wav", "--help", "$(false); `false`"])
def test_text_that_looks_like_an_option_or_a_command_is_spoken(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert np.abs(flite.speak(text, "slt")).max() > 0.1
    assert list(tmp_path.iterdir()) == []


@spoken
def test_text_that_cannot_be_handed_over_is_an_error():
    with pytest.raises(ValueError, match="null"):
        flite.speak("a\0b", "slt")
