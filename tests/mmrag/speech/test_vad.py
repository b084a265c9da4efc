"""Speech is heard in speech, and in nothing else."""

import io

import pytest
import soundfile
import torch

from mmrag.corpora.augment import unspoken
from mmrag.corpora.voices.espeak import VOICES, Synthesizer
from mmrag.speech import vad

THRESHOLD = 0.75


def clips(count, seed):
    for clip in unspoken(count, seed):
        yield torch.from_numpy(soundfile.read(io.BytesIO(clip), dtype="float32")[0])


def test_silence_noise_and_tones_are_not_speech():
    heard = [vad.spoken(wave, THRESHOLD) for wave in clips(30, seed=5)]
    assert sum(heard) == 0
    assert len(heard) == 30


@pytest.mark.parametrize("voice", VOICES["test"], ids=lambda voice: voice.id)
def test_a_sentence_is_speech_in_every_voice(voice):
    wave = torch.from_numpy(Synthesizer().speak("please call maria lopez", voice).wave)
    assert vad.spoken(wave, THRESHOLD)
    assert vad.spoken(torch.cat((torch.zeros(32_000), wave[:8000])), THRESHOLD)


def test_how_likely_somebody_speaks_is_between_nothing_and_certainty():
    wave = torch.from_numpy(Synthesizer().speak("please call maria", VOICES["test"][0]).wave)
    likely = vad.probability(wave)
    assert 0.9 < likely <= 1
    assert vad.spoken(wave, likely) and not vad.spoken(wave, min(1.0, likely + 1e-6) + 1e-9)
    assert 0.5 <= vad.probability(wave, enough=0.5) <= likely
    assert all(0 <= vad.probability(wave) < 0.5 for wave in clips(6, seed=5))


@pytest.mark.parametrize("decibels", [-40, -52, -60, -68])
@pytest.mark.parametrize("voice", VOICES["test"][:2], ids=lambda voice: voice.id)
def test_a_sentence_is_speech_however_quiet(voice, decibels):
    wave = torch.from_numpy(Synthesizer().speak("please call maria lopez", voice).wave)
    quiet = wave / wave.abs().max() * 10 ** (decibels / 20)
    digits = (quiet * 2**15).round() / 2**15
    assert vad.spoken(digits, THRESHOLD)
    padded = torch.cat((torch.zeros(16_000), digits, torch.zeros(16_000)))
    kept, start = vad.trim(padded)
    around = vad.MARGIN + vad.HOP
    assert 16_000 - around <= start <= 16_000 + 1_600 and len(kept) <= len(digits) + 2 * around
    assert 0.1 < float(kept.abs().max()) < 2


@pytest.mark.parametrize("decibels", [-96, -90, -80, -70, -60, -50])
def test_noise_is_no_speech_however_quiet(decibels):
    draw = torch.Generator().manual_seed(decibels)
    for _ in range(3):
        noise = torch.randn(48_000, generator=draw) * 10 ** (decibels / 20)
        assert not vad.spoken((noise * 2**15).round() / 2**15, THRESHOLD)


@pytest.mark.parametrize("softer", [0.03, 0.003])
def test_quiet_noise_and_tones_are_not_speech(softer):
    waves = [(wave * softer * 2**15).round() / 2**15 for wave in clips(30, seed=5)]
    assert sum(vad.spoken(wave, THRESHOLD) for wave in waves) == 0


def test_a_clip_of_a_usual_level_is_left_as_it_is():
    wave = torch.from_numpy(Synthesizer().speak("please call maria lopez", VOICES["test"][0]).wave)
    for clip in (wave, 0.1 * wave, torch.zeros(16_000), torch.ones(10) * 1e-3):
        assert vad.levelled(clip) is clip


def test_a_threshold_of_nothing_asks_nothing():
    assert vad.spoken(torch.zeros(100), 0)
    assert not vad.spoken(torch.zeros(100), THRESHOLD)


def test_listening_leaves_the_threads_of_the_process_alone():
    before = torch.get_num_threads()
    vad.spoken(torch.zeros(2000), THRESHOLD)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("hiss", [0.0, 1e-3])
@pytest.mark.parametrize("before", [0.0, 0.5, 2.0])
def test_the_quiet_around_a_sentence_is_cut_off(before, hiss):
    said = torch.from_numpy(Synthesizer().speak("please call maria lopez", VOICES["test"][0]).wave)
    quiet = torch.zeros(round(before * 16_000))
    wave = torch.cat((quiet, said, torch.zeros(8_000)))
    wave += hiss * torch.randn(wave.shape, generator=torch.Generator().manual_seed(0))
    kept, start = vad.trim(wave)
    assert torch.equal(kept, wave[start : start + len(kept)])
    assert len(quiet) - vad.MARGIN - vad.HOP <= start <= len(quiet) + 1_600
    assert len(said) - 4_000 <= len(kept) <= len(said) + 2 * (vad.MARGIN + vad.HOP)


@pytest.mark.parametrize("length", [0, 1, 100, 16_000])
def test_a_wave_without_anything_in_it_is_left_as_it_is(length):
    kept, start = vad.trim(torch.zeros(length))
    assert (len(kept), start) == (length, 0)
