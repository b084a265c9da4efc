"""Both ends of an encoder's transformer: the log-mel bands that it hears, and a head to spell."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn

from mmrag.speech.audio import SAMPLE_RATE

MEL_FIELD, MEL_HOP = 400, 160
"""Samples of a window of log-mel bands that are stacked, and from one to the next."""


class Speller(nn.Module):
    """The CTC head: a transformer layer of half the encoder's feed-forward over the features of a
    clip, since how a sound is spelled depends on those around it, and a letter a frame."""

    def __init__(self, width: int, heads: int, letters: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(width)
        self.letters = nn.Linear(width, 1 + letters)

    def forward(self, features: Tensor, beyond: Tensor | None = None) -> Tensor:
        """Features (B, F, D), without those `beyond` (B, F) a clip's end, to logits
        (B, F, 1 + A)."""
        return self.letters(self.norm(self.layer(features, src_key_padding_mask=beyond)))


class LogMel(nn.Module):
    """Log-mel bands, each scaled to zero mean and unit variance over the clip.

    A frame has the bands of `stack` windows that follow each other.
    """

    def __init__(self, bands: int, field: int, hop: int, stack: int = 1) -> None:
        super().__init__()
        self.bands = bands
        self.stack = stack
        self.power = torchaudio.transforms.MelSpectrogram(
            SAMPLE_RATE, n_fft=field, hop_length=hop, center=False, n_mels=bands, f_min=20.0
        )

    def forward(
        self,
        waves: Tensor,
        frames: Tensor,
        hidden: Tensor | None = None,
        warps: Tensor | None = None,
    ) -> Tensor:
        """Waves (B, T), `frames` (B,) of them real, to bands (B, F, stack * M).

        With `warps` (B,), band m holds what was heard at m times the warp, between two bands or in
        the last; those that are `hidden` (B, M) are at their mean.
        """
        with torch.autocast(waves.device.type, enabled=False):
            bands = (self.power(waves) + 1e-4).log().transpose(1, 2)
        bands = bands[:, : bands.shape[1] // self.stack * self.stack]
        windows = frames * self.stack
        inside = torch.arange(bands.shape[1], device=waves.device) < windows[:, None]
        inside, count = inside[..., None], windows[:, None, None]
        centred = bands - (bands * inside).sum(1, keepdim=True) / count
        variance = (centred.square() * inside).sum(1, keepdim=True) / count
        scaled = centred / (variance + 1e-5).sqrt()
        if warps is not None:
            places = torch.arange(self.bands, device=waves.device) * warps[:, None]
            below = places.long().clamp(max=self.bands - 1)
            above = (below + 1).clamp(max=self.bands - 1)
            lower, upper = (
                scaled.gather(2, at[:, None].expand_as(scaled)) for at in (below, above)
            )
            scaled = lower.lerp(upper, (places - below).clamp(max=1)[:, None])
        if hidden is not None:
            scaled = scaled.masked_fill(hidden[:, None], 0.0)
        return scaled.reshape(len(scaled), -1, self.stack * scaled.shape[-1])


class ConvolvedWindows(nn.Module):
    """Frames of `stack` windows of bands to the transformer's inputs: a convolution over five
    windows, and one over a frame's own and one on either side."""

    def __init__(self, bands: int, stack: int, width: int) -> None:
        super().__init__()
        self.stack = stack
        self.windows = nn.Conv1d(bands, width, 5, padding=2)
        self.frames = nn.Conv1d(width, width, stack + 2, stride=stack, padding=1)
        self.norm = nn.LayerNorm(width)

    def forward(self, stacked: Tensor, frames: Tensor) -> Tensor:
        """Bands (B, F, stack * M), `frames` (B,) of them real, to (B, F, D).

        A clip ends in zeros, as it would alone.
        """
        windows = stacked.reshape(len(stacked), stacked.shape[1] * self.stack, -1).transpose(1, 2)
        inside = torch.arange(windows.shape[2], device=frames.device) < frames[:, None] * self.stack
        inside = inside[:, None]
        heard = F.gelu(self.windows(windows * inside)) * inside
        return self.norm(F.gelu(self.frames(heard)).transpose(1, 2))
