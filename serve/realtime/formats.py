"""The audio of a session: base64 of 16-bit PCM at 24 kHz, or of G.711 at 8 kHz, to float32 at 16
kHz, as a stream without seams."""

from __future__ import annotations

import base64
import binascii
from functools import cache

import numpy as np
import torch

from mmrag.speech.resampling import Resampler

PCM, ULAW, ALAW = "audio/pcm", "audio/pcmu", "audio/pcma"
RATES = {PCM: 24_000, ULAW: 8_000, ALAW: 8_000}
"""Samples a second, by the name of the format."""
FULL = 32_768.0


class AudioDecoder:
    """One format's stream. A sample that is cut by the end of an event is put together again."""

    def __init__(self, kind: str) -> None:
        """`kind` is one of RATES."""
        self.kind = kind
        self._resampler = Resampler(RATES[kind])
        self._half = b""

    @property
    def bytes_per_second(self) -> int:
        """Bytes of a second of audio."""
        return RATES[self.kind] * (2 if self.kind == PCM else 1)

    def push(self, data: bytes) -> np.ndarray:
        """The next bytes to samples (T,) float32 at 16 kHz; the last 10 to 20 ms are kept back."""
        return self._resampler.push(torch.from_numpy(self._samples(data))).numpy()

    def flush(self) -> np.ndarray:
        """What was kept back (T,): nothing follows."""
        self._half = b""
        return self._resampler.flush().numpy()

    def _samples(self, data: bytes) -> np.ndarray:
        if self.kind != PCM:
            return _table(self.kind)[np.frombuffer(data, np.uint8)]
        data = self._half + data
        whole = len(data) // 2 * 2
        self._half = data[whole:]
        return np.frombuffer(data[:whole], "<i2").astype(np.float32) / FULL


def unpacked(audio: str) -> bytes:
    """The bytes of an event's audio; ValueError if that is no base64."""
    try:
        return base64.b64decode(audio, validate=True)
    except (binascii.Error, ValueError):  # the second for letters beyond ASCII
        raise ValueError("base64 of audio was expected") from None


@cache
def _table(kind: str) -> np.ndarray:
    """The sample (256,) of each byte of G.711."""
    code = np.arange(256)
    if kind == ULAW:
        code = ~code & 0xFF
        size = (((code & 0x0F) << 3) + 0x84 << ((code & 0x70) >> 4)) - 0x84
        signed = np.where(code & 0x80, -size, size)
    else:
        code = code ^ 0x55
        step, segment = (code & 0x0F) << 4, (code & 0x70) >> 4
        size = np.where(segment == 0, step + 8, step + 0x108 << np.maximum(segment - 1, 0))
        signed = np.where(code & 0x80, size, -size)
    return (signed / FULL).astype(np.float32)
