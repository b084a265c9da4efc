"""Speech that a fake understands: each word is a quarter of a second of one level.

`Levels` hears it in the place of encoder and decoder, and `LevelDetector` in that of the detector.
"""

import asyncio
import base64
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch

from mmrag.records import Word
from mmrag.retrieval.display import Display
from mmrag.speech.audio import SAMPLE_RATE
from mmrag.speech.turns import Started, Stopped
from serve.messages import DecodeRequest, DecodeResult, EncodedSegment, UnknownDatastore

WORD = SAMPLE_RATE // 4
LEVEL = 1 / 200
FRAME = 512


def said(*levels: int, rate: int = 24_000) -> np.ndarray:
    """The words of these levels, one after the other, as float32 at `rate`; 0 is silence."""
    return np.repeat(np.array(levels, np.float32) * LEVEL, rate // 4)


def base64_of(wave: np.ndarray) -> str:
    """A wave at 24 kHz as `input_audio_buffer.append` has it."""
    return base64.b64encode((wave * 32768).round().astype("<i2").tobytes()).decode()


@dataclass
class Levels:
    """Encoder, decoder and retriever. A word that has only begun is misheard."""

    seconds: float = 0.0
    """How long decoding takes."""
    failing: Exception | None = None
    datastores: tuple[str, ...] = ("names",)
    display: Callable[[tuple[Word, ...]], Any] = lambda shown: Display()
    """How entries are written, by the words that are shown of a transcript."""
    decoded: list[DecodeRequest] = field(default_factory=list)
    spans: list[int] = field(default_factory=list)
    under_way: int = 0
    most: int = 0

    async def request_builder(self, options):
        await asyncio.sleep(self.seconds)
        if options.datastore is not None and options.datastore not in self.datastores:
            raise UnknownDatastore(f"no datastore {options.datastore!r}")
        spelt = tuple(options.phrases)
        return lambda encoded: DecodeRequest(units=(encoded.units, spelt))

    async def encode(self, wave):
        await asyncio.sleep(self.seconds / 4)
        loud = np.abs(wave) > LEVEL / 2
        self.spans.append(len(wave))
        return EncodedSegment(wave, loud, 0.0, 0.9) if loud.any() else None

    async def decode(self, request):
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.under_way -= 1
        if self.failing is not None:
            raise self.failing
        self.decoded.append(request)
        wave, spelt = request.units
        words = list(heard(wave, spelt))
        begun = request.begins.split()
        texts = [*begun, *(word.text for word in words[len(begun) :])]
        words = [replace(word, text=text) for word, text in zip(words, texts, strict=False)]
        shown = tuple(words) if request.output.timed else ()
        text, display = " ".join(texts), self.display(shown)
        tokens, ends = range(len(shown)), range(1, len(shown) + 1)  # one a word
        made = text, shown, tuple(tokens), tuple(ends)
        return DecodeResult(*made, 0.0, True, None, False, display=display)


def heard(wave, spelt):
    """The words in a wave; a phrase of the list says how the word of its number is spelt."""
    position = 0
    for level, run in groupby(np.round(np.abs(wave) / LEVEL).astype(int)):
        length = len(list(run))
        start, position = position, position + length
        if level and length > WORD // 8:
            text = f"word{level}" if length > WORD * 3 // 4 else f"wo{level}"
            names = [name for name in spelt if name.endswith(f"-{level}")]
            spelling = names[0] if names else text
            times = start / SAMPLE_RATE, position / SAMPLE_RATE
            yield Word(spelling, 1.0, 1.0, start=times[0], end=times[1])


class LevelDetector:
    """Turns by loudness, as `mmrag.speech.turns.TurnDetector` tells of them."""

    def __init__(self, threshold=0.5, prefix_padding_ms=300, silence_duration_ms=500):
        self._padding = prefix_padding_ms * SAMPLE_RATE // 1000
        self._silence = silence_duration_ms * SAMPLE_RATE // 1000
        self._rest, self._judged, self._stopped = torch.zeros(0), 0, 0
        self.speaking, self.quiet_since = False, None

    def push(self, wave):
        wave, found = torch.cat([self._rest, wave]), []
        whole = len(wave) // FRAME * FRAME
        for frame in wave[:whole].split(FRAME) if whole else ():
            found += self._judge(float(frame.abs().max()) > LEVEL / 2)
        self._rest = wave[whole:]
        return found

    def _judge(self, loud):
        start, self._judged = self._judged, self._judged + FRAME
        if loud:
            self.quiet_since = None
            if not self.speaking:
                self.speaking = True
                yield Started(max(self._stopped, start - self._padding))
        elif self.speaking:
            self.quiet_since = start if self.quiet_since is None else self.quiet_since
            if self._judged - self.quiet_since >= self._silence:
                quiet, self.quiet_since, self.speaking = self.quiet_since, None, False
                self._stopped = quiet + self._silence
                yield Stopped(self._stopped, quiet)
