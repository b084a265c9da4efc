"""A short clip of speech that health checks transcribe: `probe.flac`, said by a synthesizer."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from mmrag.speech import audio

FILE = Path(__file__).parent / "probe.flac"


@cache
def wave() -> np.ndarray:
    """The clip (T,) float32 at 16 kHz."""
    return audio.read(FILE).numpy()
