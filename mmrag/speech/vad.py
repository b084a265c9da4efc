"""Whether anybody speaks: Silero's voice activity detector, which comes with its weights.

A language model that is handed silence, noise or music writes a sentence all the same, and a
plausible one. So audio without speech never reaches it.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor
from torch.nn import functional

from mmrag.speech.silero import FRAME, network

SPOKEN_FRAMES = 5
"""Frames with speech that make a clip speech: 160 ms, a short syllable."""
HOP = 160
"""Samples of which one loudness is measured: 10 ms."""
QUIET_DECIBELS = 40.0
"""So far below the loud parts of a clip (95th percentile) nobody speaks yet, or any more."""
QUIET_LEVEL, USUAL_LEVEL = 10 ** (-45 / 20), 10 ** (-20 / 20)
"""Root mean square of the loud parts of a clip: what lies below the first is brought to the second,
where the detector, which is deaf below some -50 dBFS, and the encoder hear as they were trained."""
NOISE_LEVEL = 10 ** (-85 / 20)
"""Below it there is nothing to hear but the last digits of 16-bit samples."""
MARGIN = 10 * HOP
"""Samples kept on either side of what is loud: a consonant starts softly."""


def spoken(wave: Tensor, threshold: float) -> bool:
    """Whether a wave (T,) at 16 kHz holds speech with a `probability` of at least `threshold`. A
    threshold of 0 asks nothing."""
    return threshold <= 0 or probability(wave, enough=threshold) >= threshold


@torch.inference_mode()
def probability(wave: Tensor, enough: float = 1.0) -> float:
    """How likely a wave (T,) at 16 kHz holds speech: as likely as SPOKEN_FRAMES of its frames (or
    all of a shorter clip) are each at least. Once that is `enough`, no further frame is looked at.

    How loud the speech is makes no difference, down to NOISE_LEVEL."""
    wave = levelled(wave.float().cpu())
    frames = functional.pad(wave, (0, -len(wave) % FRAME)).view(-1, FRAME).numpy()
    likeliest = [0.0] * min(SPOKEN_FRAMES, len(frames))
    detector = network()
    state = detector.start()
    for frame in frames:
        likely, state = detector(frame, state)
        heapq.heappushpop(likeliest, likely)
        if likeliest[0] >= enough:
            break
    return likeliest[0]


def trim(wave: Tensor) -> tuple[Tensor, int]:
    """A wave (T,) at 16 kHz without the quiet at its ends, and how many samples came before it.

    Models that were trained on clips that begin with speech lose themselves in a quiet beginning.
    A clip that is very quiet throughout is brought to a usual level (`levelled`).
    """
    wave = levelled(wave)
    frames = functional.pad(wave.float(), (0, -len(wave) % HOP)).view(-1, HOP)
    if len(frames) < 2:
        return wave, 0
    decibels = 10 * torch.log10(frames.square().mean(1) + 1e-10)
    loud = (decibels >= decibels.quantile(0.95) - QUIET_DECIBELS).nonzero()
    start = max(0, int(loud[0]) * HOP - MARGIN)
    return wave[start : (int(loud[-1]) + 1) * HOP + MARGIN], start


def levelled(wave: Tensor) -> Tensor:
    """A wave (T,) at 16 kHz at a usual level if it is very quiet; any other as it is.

    The loud parts are the 99th percentile of 10 ms frames: longer than a click, shorter than a
    word. What is nothing but noise of the last digits stays as it is.
    """
    if len(wave) < HOP:
        return wave
    frames = wave.float()[: len(wave) // HOP * HOP].view(-1, HOP)
    loud = float(frames.square().mean(1).sqrt().quantile(0.99))
    return wave * (USUAL_LEVEL / loud) if NOISE_LEVEL < loud < QUIET_LEVEL else wave
