"""The encoder: audio to units, many callers' clips at once; text to units by a synthesizer."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from ray import serve
from ray.serve.metrics import Counter, Histogram

from mmrag.config import ESPEAK
from mmrag.decoding.align import audible
from mmrag.model.whisper import EncodedAudio
from mmrag.recogniser import SPOKEN, Speakers, load_encoder
from mmrag.records import Line
from mmrag.speech import vad
from mmrag.speech.audio import SAMPLE_RATE
from serve import logs, probe
from serve.messages import Encoded, EncodedSegment, InvalidRequest
from serve.model import device, language, locate, require_voices
from serve.settings import Settings

CERTAIN = 0.99
"""Probability of speech from which on the detector looks no further."""
SLACK = 0.05
"""How far two encodings of one clip may lie apart, in batches of different size."""
NATS = 0.5
"""How far what a CTC head hears in them may."""


class Encoder:
    """Holds HuBERT and the codebook, or a Whisper. One thread encodes; what comes meanwhile is its
    next batch. Another speaks."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.encoder.threads)
        logs.install(settings.logs)
        self._settings = settings
        self._models = load_encoder(locate(settings), device(settings), language(settings))
        require_voices(settings)
        longest = self._models.window_seconds
        self._speakers = Speakers(settings.speaking, longest)
        self._speakers.open()
        self._hurried = Speakers(ESPEAK, longest)
        self._thread, self._speaking = (
            ThreadPoolExecutor(
                1, initializer=torch.set_num_threads, initargs=(settings.encoder.threads,)
            )
            for _ in range(2)
        )
        self._batch_seconds = Histogram(
            "mmrag_encoder_batch_seconds",
            "Audio encoded at once, seconds.",
            boundaries=[1, 2, 5, 10, 20, 50, 100],
        )
        self._busy = Counter("mmrag_encoder_busy_seconds_total", "Time spent encoding, seconds.")
        self.encode.set_max_batch_size(round(settings.encoder.batch_seconds * SAMPLE_RATE))
        self.encode.set_batch_wait_timeout_s(settings.encoder.wait_seconds)
        self._expected = self._encode([probe.wave()])[0]

    @serve.batch(batch_size_fn=lambda waves: sum(map(len, waves)))
    async def encode(self, waves: list[np.ndarray]) -> list[EncodedSegment | None]:
        """Waves (T,) float32 at 16 kHz to units (or a Whisper's states), None where nobody speaks.

        Callers hand in one wave each and get its units; Serve makes the batches.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._encode, waves)

    async def synthesize(self, texts: list[str | Line], hurried: bool = False) -> list[Encoded]:
        """Sentences, said by the voices that are set, or `hurried` by espeak-ng's, and encoded;
        ImportError without the extra.

        A synthesizer may take as long as it speaks, and keeps nobody's clip waiting.
        """
        loop, encoded = asyncio.get_running_loop(), []
        speakers = self._hurried if hurried else self._speakers
        for start in range(0, len(texts), SPOKEN):
            batch = texts[start : start + SPOKEN]
            waves = await loop.run_in_executor(self._speaking, _said, speakers, batch)
            encoded += await loop.run_in_executor(self._thread, self._models.encode, waves)
        return encoded

    async def alive(self) -> None:
        """Returns: this replica takes calls."""

    async def check_health(self) -> None:
        """Encode the probe; RuntimeError if its units, or the letters heard in them, are not what
        they were at the start."""
        [encoded] = await asyncio.get_running_loop().run_in_executor(
            self._thread, self._encode, [probe.wave()]
        )
        if encoded is None or not _same(encoded.units, self._expected.units):
            raise RuntimeError("the encoder no longer encodes the probe as it did")

    def _encode(self, waves: list[np.ndarray]) -> list[EncodedSegment | None]:
        started = time.perf_counter()
        clips = [torch.from_numpy(np.array(wave)) for wave in waves]
        threshold = self._settings.decode.speech
        enough = max(threshold, CERTAIN)
        speech = [vad.probability(clip, enough) if threshold > 0 else None for clip in clips]
        spoken = [n for n, likely in enumerate(speech) if likely is None or likely >= threshold]
        found: list[EncodedSegment | None] = [None] * len(clips)
        if spoken:
            trimmed = [vad.trim(clips[n]) for n in spoken]
            units = self._models.encode([clip for clip, _ in trimmed])
            for n, (clip, start), one in zip(spoken, trimmed, units, strict=True):
                times = self._models.times(one)
                begins, likely = start / SAMPLE_RATE, speech[n]
                found[n] = EncodedSegment(one, audible(clip, times), begins, likely)
        self._batch_seconds.observe(sum(map(len, waves)) / SAMPLE_RATE)
        self._busy.inc(time.perf_counter() - started)
        return found


def _said(speakers: Speakers, texts: list[str | Line]) -> list[torch.Tensor]:
    try:
        return speakers.waves(texts)
    except ValueError as error:  # nothing that can be spoken, or a language without a voice
        raise InvalidRequest(str(error)) from None


def _same(one: Encoded, other: Encoded) -> bool:
    """Whether a clip was encoded alike twice, as far as arithmetic in another order allows."""
    if isinstance(one, EncodedAudio) and isinstance(other, EncodedAudio):
        return torch.allclose(one.states, other.states, rtol=SLACK, atol=SLACK)
    spelled = one.letters, other.letters
    if None not in spelled and not np.allclose(*(each.logp() for each in spelled), atol=NATS):
        return False
    return np.array_equal(one.ids, other.ids)
