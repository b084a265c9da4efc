"""Audio that comes in little by little to another rate, as if it were resampled as a whole."""

from __future__ import annotations

import torch
from torchaudio.transforms import Resample

from mmrag.speech.audio import SAMPLE_RATE

HOPS = 100
"""Parts of a second that are resampled between the one before and the one after them: 10 ms, more
than the filter reaches, and a whole number of samples at every rate that is streamed."""


class Resampler:
    """A stream at `rate` to one at `to`; what it returns lags 10 to 20 ms behind what it is
    given."""

    def __init__(self, rate: int, to: int = SAMPLE_RATE) -> None:
        """ValueError for a rate of which a hundredth of a second is no whole number of samples."""
        for one in (rate, to):
            if one <= 0 or one % HOPS:
                raise ValueError(f"{one} Hz cannot be streamed: not a multiple of {HOPS}")
        self._hop, self._made = rate // HOPS, to // HOPS
        self._resample = Resample(rate, to)
        self._clear()

    def push(self, wave: torch.Tensor) -> torch.Tensor:
        """The next samples (T,) float32 at `rate` to those that are complete at `to` (U,)."""
        self._pending = torch.cat([self._pending, wave])
        until = len(self._pending) // self._hop - 1
        if until <= self._before:
            return torch.empty(0)
        made = self._resample(self._pending)[self._before * self._made : until * self._made]
        self._pending, self._before = self._pending[(until - 1) * self._hop :], 1
        return made

    def flush(self) -> torch.Tensor:
        """What is left, as if silence followed; the next stream begins afresh."""
        if not len(self._pending):
            return torch.empty(0)
        made = self._resample(self._pending)[self._before * self._made :]
        self._clear()
        return made

    def _clear(self) -> None:
        self._pending = torch.empty(0)
        self._before = 0
        """Hops of `pending` that have been returned."""
