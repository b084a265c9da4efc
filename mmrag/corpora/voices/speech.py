"""What every synthesizer gives for a text and a voice: samples, and when what is said."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Protocol, TypeVar

import numpy as np
import torch
from torchaudio.transforms import Resample

from mmrag.records import Timed
from mmrag.speech.audio import SAMPLE_RATE

SHORTEST_SECONDS = 0.05
"""Of anything that is said: a synthesizer makes a few silent ms of dashes or unknown digits."""

SPEEDS = (0.9, 0.95, 1.0, 1.05, 1.1)
"""At which speech is `played` to make other speakers of it."""


class UnspeakableError(ValueError):
    """A text of which a synthesizer makes no speech; the message names it."""


@dataclass(frozen=True)
class Speech:
    """`wave` (T,) float32 in [-1, 1], mono at SAMPLE_RATE; `words` has one a whitespace word,
    `phones` one a phone of `phones.PHONES`; pauses are none."""

    wave: np.ndarray
    words: tuple[Timed, ...]
    phones: tuple[Timed, ...]


class Voice(Protocol):
    """A speaker: `engine` is the name of the synthesizer that has this voice."""

    @property
    def id(self) -> str: ...

    @property
    def engine(self) -> str: ...


AnyVoice = TypeVar("AnyVoice", bound=Voice, contravariant=True)


class Engine(Protocol[AnyVoice]):
    """A synthesizer."""

    def speak(self, text: str, voice: AnyVoice, **how: bool) -> Speech:
        """Say `text`, `how` an engine may be told to. The same text and voice give identical
        samples.

        Raises ValueError for a voice that the engine does not have, UnspeakableError for text of
        which it makes no speech.
        """
        ...


@cache
def _resampler(rate: int) -> Resample:
    return Resample(rate, SAMPLE_RATE)


def played(samples: np.ndarray, rate: int, speed: float = 1.0) -> tuple[np.ndarray, float]:
    """Samples (T,) float32 of `rate` a second, played at `speed`: (T',) at SAMPLE_RATE, clipped to
    [-1, 1], and how much longer it has become. Tempo, pitch and formants move together.
    """
    # So many samples a second; whole thousands keep the resampler's kernels small.
    fast = round(rate * speed / 1000) * 1000 if speed != 1 else rate
    # Zeros up to whole seconds: torch keeps memory for every length that it has convolved.
    padded = torch.zeros(math.ceil(len(samples) / fast) * fast)
    padded[: len(samples)] = torch.from_numpy(samples)
    length = math.ceil(len(samples) * SAMPLE_RATE / fast)
    return _resampler(fast)(padded)[:length].clamp(-1, 1).numpy(), rate / fast
