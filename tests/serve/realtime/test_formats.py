"""Audio of a session: every format to the same samples, however it is cut into events."""

import base64
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchaudio.transforms import Resample

from mmrag.speech.resampling import Resampler
from serve.realtime.formats import ALAW, PCM, RATES, ULAW, AudioDecoder, unpacked


def tone(rate):
    return (0.5 * np.sin(2 * np.pi * 440.0 * np.arange(rate) / rate)).astype("f4")


def samples(kind, data):
    """Bytes as samples at the format's own rate."""
    return AudioDecoder(kind)._samples(data)


def coded(kind, wave):
    """A wave in a format; G.711 by looking for the nearest sample."""
    if kind == PCM:
        return (wave * 32767).round().astype("<i2").tobytes()
    every = samples(kind, bytes(range(256)))
    return bytes(int(np.abs(every - sample).argmin()) for sample in wave)


def heard(kind, data, cuts):
    decoder, edges = AudioDecoder(kind), [0, *sorted(cuts), len(data)]
    parts = [decoder.push(data[a:b]) for a, b in pairwise(edges)]
    return np.concatenate([*parts, decoder.flush()])


@given(st.lists(st.integers(0, 48_000), max_size=12))
@settings(max_examples=25, deadline=None)
def test_a_stream_is_what_the_whole_would_be_however_it_is_cut(cuts):
    data = coded(PCM, tone(24_000))
    whole = Resample(24_000, 16_000)(torch.from_numpy(samples(PCM, data)))
    assert np.allclose(heard(PCM, data, cuts), whole.numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", RATES)
def test_every_format_carries_the_same_tone(kind):
    made = heard(kind, coded(kind, tone(RATES[kind])), [1, 777, 5001])
    assert len(made) == 16_000
    assert np.abs(made - tone(16_000))[200:-200].max() < (0.001 if kind == PCM else 0.03)


@pytest.mark.parametrize(
    ("kind", "byte", "sample"),
    [
        *[(ULAW, 0xFF, 0), (ULAW, 0x00, -32124), (ULAW, 0x80, 32124), (ULAW, 0x7F, 0)],
        *[(ALAW, 0xD5, 8), (ALAW, 0x55, -8), (ALAW, 0x2A, -32256), (ALAW, 0xAA, 32256)],
    ],
)
def test_g711_decodes_as_the_recommendation_says(kind, byte, sample):
    assert samples(kind, bytes([byte])) * 32768 == sample


@pytest.mark.parametrize("kind", RATES)
def test_no_audio_is_no_samples(kind):
    decoder = AudioDecoder(kind)
    assert len(decoder.push(b"")) == len(decoder.flush()) == 0


@pytest.mark.parametrize("audio", ["?", "AAA", "ä", "AA AA", "\ud800"])
def test_what_is_no_base64_is_refused(audio):
    with pytest.raises(ValueError, match="base64"):
        unpacked(audio)


def test_base64_is_unpacked():
    assert unpacked(base64.b64encode(b"\x00\x01").decode()) == b"\x00\x01"


def test_a_rate_that_has_no_hundredth_is_refused():
    with pytest.raises(ValueError, match="11025"):
        Resampler(11_025)
