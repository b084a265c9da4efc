"""Sines, as waves and as files."""

from __future__ import annotations

import io

import numpy as np
import soundfile

from mmrag.speech.audio import SAMPLE_RATE


def tone(seconds: float, rate: int = SAMPLE_RATE, channels: int = 1) -> np.ndarray:
    """(T, channels) float32: a sine an octave higher, and softer, in each further channel."""
    times = np.arange(round(seconds * rate)) / rate
    waves = [0.4 / (c + 1) * np.sin(2 * np.pi * 220 * 2**c * times) for c in range(channels)]
    return np.stack(waves, axis=1).astype(np.float32)


def encoded(samples: np.ndarray, rate: int = SAMPLE_RATE, **how: str) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, **{"format": "WAV", **how})
    return stream.getvalue()
