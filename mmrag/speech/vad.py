"""Whether anybody speaks: Silero's voice activity detector, which comes with its weights.

A language model that is handed silence, noise or music writes a sentence all the same, and a
plausible one. So audio without speech never reaches it.
"""

from __future__ import annotations

import warnings
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mmrag.speech.audio import SAMPLE_RATE

FRAME = 512
"""Samples that the detector looks at a time, at 16 kHz."""
SPOKEN_FRAMES = 5
"""Frames with speech that make a clip speech: 160 ms, a short syllable."""
HOP = 160
"""Samples of which one loudness is measured: 10 ms."""
QUIET_DECIBELS = 30.0
"""So far below the loud parts of a clip (95th percentile) nobody speaks yet, or any more."""
MARGIN = 3 * HOP
"""Samples kept on either side of what is loud: a consonant starts softly."""
_LOCK = Lock()


@torch.inference_mode()
def spoken(wave: Tensor, threshold: float) -> bool:
    """Whether a wave (T,) at 16 kHz holds speech: SPOKEN_FRAMES frames (or all of a shorter clip)
    that are speech with a probability of at least `threshold`. A threshold of 0 asks nothing."""
    if threshold <= 0:
        return True
    heard = 0
    frames = functional.pad(wave.float().cpu(), (0, -len(wave) % FRAME)).split(FRAME)
    with _LOCK:  # the detector remembers the frames before
        detector = _detector()
        detector.reset_states()
        for frame in frames:
            heard += float(detector(frame, SAMPLE_RATE)) >= threshold
            if heard >= min(SPOKEN_FRAMES, len(frames)):
                return True
    return False


def trim(wave: Tensor) -> tuple[Tensor, int]:
    """A wave (T,) at 16 kHz without the quiet at its ends, and how many samples came before it.

    Models that were trained on clips that begin with speech lose themselves in a quiet beginning.
    """
    frames = functional.pad(wave.float(), (0, -len(wave) % HOP)).view(-1, HOP)
    if len(frames) < 2:
        return wave, 0
    decibels = 10 * torch.log10(frames.square().mean(1) + 1e-10)
    loud = (decibels >= decibels.quantile(0.95) - QUIET_DECIBELS).nonzero()
    start = max(0, int(loud[0]) * HOP - MARGIN)
    return wave[start : (int(loud[-1]) + 1) * HOP + MARGIN], start


@cache
def _detector() -> Any:
    from silero_vad import load_silero_vad

    with warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning):  # of how Silero's weights are read
            warnings.simplefilter("ignore", kind)
        threads = torch.get_num_threads()
        detector = load_silero_vad()
        torch.set_num_threads(threads)  # loading sets one thread for the whole process
    return detector
