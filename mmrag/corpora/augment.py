"""Clean recordings made worse: softer, noisy, echoing, by telephone or codec; and no speech at all.

Waveforms are (T,) float32 at SAMPLE_RATE and keep their length; what is random is drawn from the
generator that is handed in. SciPy is imported where it is used: that takes a second and a half, and
most workers never need it.
"""

from __future__ import annotations

import io
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import soundfile

from mmrag.speech.audio import SAMPLE_RATE

TELEPHONE_HZ = (300.0, 3400.0)


@dataclass(frozen=True)
class Codec:
    """A lossy format of libsndfile's."""

    format: str
    subtype: str
    rate: int = SAMPLE_RATE
    """Samples a second that it is given."""
    compression: tuple[float, float] | None = None
    """libsndfile's compression levels between which one is drawn; None where there is no choice."""


CODECS = {
    "mulaw": Codec("WAV", "ULAW", 8_000),
    "gsm": Codec("WAV", "GSM610", 8_000),  # 13 kbit/s
    "mp3": Codec("MP3", "MPEG_LAYER_III", compression=(0.3, 0.99)),  # 36 to 18 kbit/s
    "opus": Codec("OGG", "OPUS", compression=(0.9, 0.98)),  # 30 to 11 kbit/s
}
"""What calls and voice messages are sent through."""


def softer(wave: np.ndarray, decibels: float) -> np.ndarray:
    """`wave`, so many dB quieter."""
    return wave * np.float32(10 ** (-decibels / 20))


def noisy(wave: np.ndarray, snr: float, draw: np.random.Generator, tilt: float = 0) -> np.ndarray:
    """`wave` with noise `snr` dB below it, mean power against mean power.

    The noise's power falls as frequency to the power of `tilt`: 0 is white, 1 pink, 2 brown.
    """
    from scipy.fft import irfft, next_fast_len, rfft, rfftfreq

    noise = draw.standard_normal(next_fast_len(len(wave), real=True), np.float32)
    if tilt:
        frequency = np.maximum(rfftfreq(len(noise), 1 / SAMPLE_RATE), 20).astype(np.float32)
        noise = irfft(rfft(noise) * frequency ** (-tilt / 2), len(noise))
    noise = noise[: len(wave)]
    power, wanted = np.mean(noise**2), np.mean(wave**2) * 10 ** (-snr / 10)
    return wave + noise * np.float32(np.sqrt(wanted / max(power, 1e-20)))


def reverberant(
    wave: np.ndarray, seconds: float, share: float, draw: np.random.Generator
) -> np.ndarray:
    """`wave` with a decaying tail: 60 dB down after `seconds`, `share` of the direct sound's power.

    The room is noise under an exponential; the direct sound stays where it was.
    """
    from scipy.signal import fftconvolve

    length = max(2, round(seconds * SAMPLE_RATE))
    decay = 10 ** (-3 * np.arange(length, dtype=np.float32) / length)
    room = draw.standard_normal(length, np.float32) * decay
    room[0] = 0
    room *= np.sqrt(share / np.sum(room**2))
    room[0] = 1
    return fftconvolve(wave, room)[: len(wave)]


def telephone(wave: np.ndarray) -> np.ndarray:
    """`wave` as a narrow-band telephone line passes it on (300 to 3400 Hz)."""
    from scipy.signal import butter, sosfilt

    band = butter(6, TELEPHONE_HZ, "bandpass", fs=SAMPLE_RATE, output="sos")
    return sosfilt(band, wave).astype(np.float32)


def coded(wave: np.ndarray, codec: str, draw: np.random.Generator) -> np.ndarray:
    """`wave` sent through one of CODECS, in memory, and decoded again; no sample is shifted."""
    from scipy.signal import resample_poly

    about = CODECS[codec]
    how: dict[str, Any] = {}
    if about.compression is not None:
        how["compression_level"] = draw.uniform(*about.compression)
    if about.format == "MP3":
        how["bitrate_mode"] = "VARIABLE"  # at a constant one the encoder's delay is not taken off
    sent = wave if about.rate == SAMPLE_RATE else resample_poly(wave, about.rate, SAMPLE_RATE)
    stream = io.BytesIO()
    soundfile.write(stream, sent, about.rate, format=about.format, subtype=about.subtype, **how)
    stream.seek(0)
    heard, _ = soundfile.read(stream, dtype="float32")
    if about.rate != SAMPLE_RATE:
        heard = resample_poly(heard, SAMPLE_RATE, about.rate)
    made = np.zeros(len(wave), np.float32)
    made[: len(heard)] = heard[: len(wave)]  # frames of a fixed length are filled up with silence
    return made


def rough(wave: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """One of many recording conditions: for the training of models that should stand them all.

    A third of the clips echo, a sixth come by telephone, a sixth through a codec, the noise is 5 to
    40 dB down.
    """
    if draw.random() < 1 / 3:
        wave = reverberant(wave, draw.uniform(0.1, 0.6), draw.uniform(0.05, 0.5), draw)
    wave = noisy(wave, draw.uniform(5, 40), draw, tilt=draw.uniform(0, 2))
    sent = draw.random()
    if sent < 1 / 6:
        wave = telephone(wave)
    elif sent < 1 / 3:
        wave = coded(wave, str(draw.choice(list(CODECS))), draw)
    return softer(wave, draw.uniform(0, 12))


def mild(wave: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """A quiet room: white noise 25 to 40 dB down."""
    return noisy(softer(wave, draw.uniform(0, 12)), draw.uniform(25, 40), draw)


def unspoken(count: int, seed: int) -> Iterator[bytes]:
    """WAV files of 1 to 5 s in which nobody speaks: near silence, white noise, plucked tones."""
    draw = np.random.default_rng(seed)
    for number in range(count):
        size = int(draw.uniform(1, 5) * SAMPLE_RATE)
        match number % 3:
            case 0:
                sound = draw.standard_normal(size) * 10 ** draw.uniform(-5, -3)
            case 1:
                sound = draw.standard_normal(size) * 10 ** draw.uniform(-2, -0.7)
            case _:
                sound = _tones(size, draw)
        stream = io.BytesIO()
        with wave.open(stream, "wb") as file:
            file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
            file.writeframes((np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes())
        yield stream.getvalue()


def _tones(size: int, draw: np.random.Generator) -> np.ndarray:
    """Four tones a second, each with two overtones, dying away."""
    sound, length = np.zeros(size), SAMPLE_RATE // 4
    for start in range(0, size, length):
        at = np.arange(min(length, size - start)) / SAMPLE_RATE
        pitch = 220 * 2 ** (draw.integers(0, 24) / 12)
        tone = sum(np.sin(2 * np.pi * pitch * n * at) / n for n in (1, 2, 3))
        sound[start : start + len(at)] = 0.2 * tone * np.exp(-3 * at)
    return sound
