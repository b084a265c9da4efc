"""Recordings made worse in the way and by the amount that was asked for."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrag.config.decoding import CONDITION
from mmrag.corpora.augment import (
    CODECS,
    coded,
    mild,
    noisy,
    reverberant,
    rough,
    softer,
    telephone,
)
from mmrag.speech.audio import SAMPLE_RATE

WAYS = {
    "softer": lambda wave, draw: softer(wave, 6),
    "white": lambda wave, draw: noisy(wave, 10, draw),
    "brown": lambda wave, draw: noisy(wave, 10, draw, tilt=2),
    "reverberant": lambda wave, draw: reverberant(wave, 0.3, 0.2, draw),
    "telephone": lambda wave, draw: telephone(wave),
    "rough": rough,
    "mild": mild,
    **{name: lambda wave, draw, name=name: coded(wave, name, draw) for name in CODECS},
}
SETTLED = ("softer", "telephone", "mulaw", "gsm")
"""Ways of which nothing is drawn."""


def generator(seed=0):
    return np.random.default_rng(seed)


def speechlike(samples=SAMPLE_RATE, seed=0):
    """Noise that swells and fades four times a second."""
    swell = np.sin(np.linspace(0, 4 * np.pi * samples / SAMPLE_RATE, samples)) ** 2
    return (0.2 * swell * generator(seed).standard_normal(samples)).astype(np.float32)


def decibels(loud, soft):
    return 10 * np.log10(
        np.mean(np.square(loud, dtype=float)) / np.mean(np.square(soft, dtype=float))
    )


def power_between(wave, low, high):
    """Mean power of the frequencies from `low` to `high` Hz."""
    spectrum = np.abs(np.fft.rfft(wave.astype(float))) ** 2
    frequencies = np.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE)
    return spectrum[(frequencies >= low) & (frequencies < high)].mean()


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=15, deadline=None)
@given(samples=st.integers(1, 5000), seed=st.integers(0, 2**32 - 1), silent=st.booleans())
def test_a_worse_recording_is_as_long_and_every_sample_is_a_number(way, samples, seed, silent):
    wave = speechlike(samples, seed) * np.float32(not silent)
    before = wave.copy()
    worse = WAYS[way](wave, generator(seed))
    assert worse.shape == wave.shape and worse.dtype == np.float32
    assert np.isfinite(worse).all()
    np.testing.assert_array_equal(wave, before, err_msg="the clean one is left alone")


@pytest.mark.parametrize("way", WAYS)
def test_the_generator_decides_what_is_random(way):
    wave = speechlike()
    first = WAYS[way](wave, generator(1))
    np.testing.assert_array_equal(WAYS[way](wave, generator(1)), first)
    other = WAYS[way](wave, generator(2))
    assert np.array_equal(other, first) == (way in SETTLED)


@pytest.mark.parametrize("amount", [0, 6, 20])
def test_softer_is_so_many_decibels_quieter(amount):
    wave = speechlike()
    assert decibels(wave, softer(wave, amount)) == pytest.approx(amount, abs=1e-4)


@pytest.mark.parametrize("tilt", [0, 1, 2])
@pytest.mark.parametrize("snr", [-5, 0, 20, 40])
def test_the_noise_is_as_far_down_as_was_asked(snr, tilt):
    wave = speechlike()
    noise = noisy(wave, snr, generator(), tilt) - wave
    assert decibels(wave, noise) == pytest.approx(snr, abs=1e-2)


@pytest.mark.parametrize("tilt", [0, 1, 2])
def test_the_noises_power_falls_as_frequency_to_the_power_of_its_tilt(tilt):
    silence = np.full(20 * SAMPLE_RATE, 0.1, np.float32)
    noise = noisy(silence, 0, generator(), tilt) - silence
    for low in (100, 400, 1600):
        ratio = power_between(noise, low, 1.25 * low) / power_between(noise, 4 * low, 5 * low)
        assert ratio == pytest.approx(4**tilt, rel=0.2)


def test_a_room_answers_a_click_with_a_tail_that_decays_by_60_decibels():
    click = np.zeros(SAMPLE_RATE, np.float32)
    click[100] = 1
    heard = reverberant(click, 0.5, 0.3, generator())
    tail = heard[101 : 100 + SAMPLE_RATE // 2]
    assert np.abs(heard[:100]).max() < 1e-6, "nothing before the click"
    assert heard[100] == pytest.approx(1, abs=1e-5)
    assert np.sum(tail.astype(float) ** 2) == pytest.approx(0.3, rel=1e-3)
    assert np.abs(heard[100 + SAMPLE_RATE // 2 :]).max() < 1e-6, "nothing after its time"
    tenth = len(tail) // 10
    assert decibels(tail[:tenth], tail[-tenth:]) == pytest.approx(0.9 * 60, abs=2)


def test_a_telephone_passes_speech_frequencies_and_no_others():
    wave = generator().standard_normal(4 * SAMPLE_RATE).astype(np.float32)
    heard = telephone(wave)

    def passed(low, high):
        return 10 * np.log10(power_between(heard, low, high) / power_between(wave, low, high))

    assert passed(500, 3000) == pytest.approx(0, abs=0.5)
    assert passed(0, 150) < -30
    assert passed(4000, 4500) < -8
    assert passed(5000, 8001) < -30


def test_a_quiet_room_is_25_to_40_decibels_above_its_noise():
    wave = speechlike()
    for seed in range(20):
        heard = mild(wave, generator(seed))
        gain = float(heard @ wave / (wave @ wave))
        assert -12.1 < 20 * np.log10(gain) < 0.1
        assert 24.5 < decibels(gain * wave, heard - gain * wave) < 40.5


def vowel():
    """A second of a steady voice: 150 Hz and what resonates at 600, 1,100 and 2,400 Hz."""
    at = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    wave = sum(
        np.exp(-(((150 * n - formant) / 150) ** 2)) * np.sin(2 * np.pi * 150 * n * at)
        for formant in (600, 1100, 2400)
        for n in range(1, 20)
    )
    return (0.1 * wave).astype(np.float32)


@pytest.mark.parametrize("codec", CODECS)
def test_a_codec_loses_something_of_a_voice_and_shifts_nothing(codec):
    wave = vowel()
    wave[: SAMPLE_RATE // 4] = wave[-SAMPLE_RATE // 4 :] = 0  # so that a delay would show
    heard = coded(wave, codec, generator())
    assert not np.array_equal(heard, wave)
    inner = slice(1000, -1000)
    likeness = {
        shift: np.roll(heard, -shift)[inner] @ wave[inner]
        for shift in (-160, -20, -8, 0, 8, 20, 160)
    }
    assert max(likeness, key=likeness.get) == 0
    scale = np.linalg.norm(heard[inner]) * np.linalg.norm(wave[inner])
    assert 0.8 < likeness[0] / scale < 0.999999


@pytest.mark.parametrize("codec", ["mulaw", "gsm"])
def test_what_is_sent_at_8_khz_has_no_sound_above_4(codec):
    wave = generator().standard_normal(2 * SAMPLE_RATE).astype(np.float32) / 10
    heard = coded(wave, codec, generator())
    assert power_between(heard, 4500, 8001) < 0.02 * power_between(heard, 500, 3000)


def test_every_codec_is_a_condition_that_an_experiment_may_name():
    assert all(re.fullmatch(CONDITION, codec) for codec in CODECS)
    assert not re.fullmatch(CONDITION, "vinyl")


def test_rough_recordings_are_some_of_them_telephoned_some_echoing_and_all_noisy():
    wave = speechlike()
    heard = [rough(wave, generator(seed)) for seed in range(150)]
    narrow = [power_between(one, 5000, 8001) / power_between(one, 500, 3000) for one in heard]
    telephoned = np.array(narrow) < 1e-2
    assert 0.15 < telephoned.mean() < 0.4, "a sixth, and half of what goes through codecs"

    def likeness(one):
        return one @ wave / np.linalg.norm(one) / np.linalg.norm(wave)

    assert all(likeness(one) < 0.99995 for one in heard), "none is clean"
    loudness = [decibels(wave, one) for one in heard]
    assert min(loudness) > -3.5 and max(loudness) < 16
