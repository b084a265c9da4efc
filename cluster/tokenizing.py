"""Ray Data stages from audio to units: a worker decodes ahead, encodes in batches, assigns behind.

What travels between processes are the names of recordings: a worker reads them itself. While its
encoder is at one batch, threads decode the recordings that come next, and another thread finds the
units of the batch before, so a fast encoder waits for neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cluster.clips import Clips, open_ahead
from cluster.parts import Part, parts
from cluster.rejections import write_rejections
from mmrag.config import Tokenize
from mmrag.model.precision import has_bf16
from mmrag.records import Rejection, Utterance
from mmrag.speech import audio, cutting
from mmrag.speech.hubert import HubertEncoder
from mmrag.speech.tokenized import Tokenized, write_part
from mmrag.speech.units import Codebook, collapse
from mmrag.storage import Location

GATHERED = 4
"""Batches' worth of clips that are sorted by length before they are encoded."""


def device() -> str:
    """Where this worker computes."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class EncodeFeatures:
    """Utterances -> HuBERT features (N, D) of all of them together, float16: to fit a codebook.

    Clips that cannot be read are passed over; long ones are heard as far as `max_seconds`.
    """

    def __init__(self, hubert: Location, settings: Tokenize) -> None:
        self._encoder = HubertEncoder.load(hubert).to(device()).eval()
        self._settings = settings

    def __call__(self, part: Part[Utterance]) -> np.ndarray:
        waves = []
        for one in part.work:
            with suppress(audio.AudioError):
                waves.append(self._open(one))
        if not waves:
            return np.empty((0, 0), np.float16)
        features = self._encoder.features(waves)
        return np.concatenate([one.cpu().numpy() for one in features]).astype(np.float16)

    def _open(self, one: Utterance) -> torch.Tensor:
        limits = self._settings
        wanted = audio.span_of(one)
        with closing(
            cutting.segments(one.audio, limits.max_seconds, limits.min_seconds, wanted)
        ) as segments:
            return next(segments).wave


class EncodeUnits:
    """Utterances with audio -> one Parquet part with their units, and what was rejected.

    The clips stand by length, those of one length in the order of the part.
    """

    def __init__(
        self, hubert: Location, codebook: Location, settings: Tokenize, directory: Path
    ) -> None:
        self._encoder = HubertEncoder.load(hubert).to(device()).eval()
        self._codebook = Codebook.load(codebook)
        self._settings = settings
        self._directory = directory
        fast = has_bf16(self._encoder.device) if settings.precision == "auto" else False
        self._bf16 = fast or settings.precision == "bf16"

    def __call__(self, part: Part[Utterance]) -> str:
        tokenized = [Tokenized(one, None) for one in part.work if one.audio is None]
        heard, rejected = self._hear([one for one in part.work if one.audio])
        path = self._directory / f"{part.name}.parquet"
        write_rejections(path.with_name(f".{path.stem}.rejected.jsonl"), rejected)
        write_part(path, tokenized + heard)
        return part.name

    def _hear(self, said: list[Utterance]) -> tuple[list[Tokenized], list[Rejection]]:
        """The clips of `said` with their units, and what could not be heard."""
        readers = torch.get_num_threads()
        rejected: list[tuple[int, list[Rejection]]] = []
        behind: list[tuple[list[Place], Future[list[Tokenized]]]] = []
        with ThreadPoolExecutor(1) as assigning:
            opened = open_ahead(said, self._settings, readers)
            with closing(opened):
                for batch in self._batches(opened, rejected):
                    clips = [clip for _, clip in batch]
                    features = self._features(clips)
                    places = [place for place, _ in batch]
                    behind.append((places, assigning.submit(self._assign, clips, features)))
        found = [
            pair for places, units in behind for pair in zip(places, units.result(), strict=True)
        ]
        found.sort(key=itemgetter(0))
        unread = [one for _, some in sorted(rejected, key=itemgetter(0)) for one in some]
        return [one for _, one in found], unread

    def _batches(
        self,
        opened: Iterator[tuple[int, Clips, list[Rejection]]],
        rejected: list[tuple[int, list[Rejection]]],
    ) -> Iterator[list[Placed]]:
        """Clips of about one length, `batch_seconds` together; adds to `rejected` on the way."""
        limit = self._settings.batch_seconds * audio.SAMPLE_RATE
        waiting: list[Placed] = []
        samples = 0
        for number, clips, unread in opened:
            rejected.append((number, unread))
            for index, clip in enumerate(clips):
                waiting.append(((len(clip[1]), number, index), clip))
                samples += len(clip[1])
            if samples >= GATHERED * limit:
                yield from _by_length(waiting, limit)
                waiting, samples = [], 0
        yield from _by_length(waiting, limit)

    def _features(self, clips: Clips) -> list[Tensor]:
        with torch.autocast(self._encoder.device.type, torch.bfloat16, enabled=self._bf16):
            return self._encoder.features([wave for _, wave in clips])

    def _assign(self, clips: Clips, features: list[Tensor]) -> list[Tokenized]:
        """All frames of a batch in one search."""
        ids = self._codebook.assign(torch.cat(features).float().cpu().numpy())
        frames = np.split(ids, np.cumsum([len(one) for one in features])[:-1])
        return [
            Tokenized(replace(said, duration=len(wave) / audio.SAMPLE_RATE), collapse(own))
            for (said, wave), own in zip(clips, frames, strict=True)
        ]


Place = tuple[int, int, int]
"""Where a clip comes in its part: by its samples, its recording's number, its own in that."""
Placed = tuple[Place, tuple[Utterance, Tensor]]


def _by_length(placed: list[Placed], limit: float) -> Iterator[list[Placed]]:
    """Batches of at most `limit` samples, sorted."""
    placed = sorted(placed, key=itemgetter(0))
    for part in parts(placed, lambda one: one[0][0], limit):
        yield part.work
