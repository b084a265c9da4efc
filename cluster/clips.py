"""Clips as a corpus's recordings hold them: opened, looked at before anybody hears them, heard."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from cluster.parts import Part
from cluster.rejections import write_rejections
from mmrag.config import Tokenize
from mmrag.corpora import manifest
from mmrag.folders import printable
from mmrag.records import Rejection, Utterance
from mmrag.speech import audio, cutting
from mmrag.speech.tokenized import Tokenized
from mmrag.storage import Location

Clips = list[tuple[Utterance, torch.Tensor]]
"""Utterances, each with its wave (T,) at 16 kHz."""
AHEAD = 32
"""Recordings that a thread decodes before anybody asks for them."""


class Hearing(Protocol):
    """What encodes waves, if anything has to be."""

    def encode(self, waves: Sequence[torch.Tensor]) -> list: ...


def hear(models: Hearing, batch: Sequence[Tokenized]) -> list[Tokenized]:
    """`batch`, in which each recording that is no units yet is what `models` makes of it.

    Raises AudioError for one that cannot be read.
    """
    recorded = [n for n, one in enumerate(batch) if one.units is None and one.utterance.audio]
    told = [batch[n].utterance for n in recorded]
    waves = [audio.read(one.audio, audio.span_of(one)) for one in told]
    heard = list(batch)
    if recorded:
        for n, encoded in zip(recorded, models.encode(waves), strict=True):
            heard[n] = replace(heard[n], units=encoded)
    return heard


def open_clips(said: Sequence[Utterance], limits: Tokenize) -> tuple[Clips, list[Rejection]]:
    """The clips of utterances with audio, each recording opened once, and what has to be left out.

    A long one without a transcript is split at silence.
    """
    clips: Clips = []
    rejected: list[Rejection] = []
    for one in _recordings(said):
        heard, unheard = _opened(one, limits)
        clips += heard
        rejected += unheard
    return clips, rejected


def open_ahead(
    said: Sequence[Utterance], limits: Tokenize, readers: int
) -> Iterator[tuple[int, Clips, list[Rejection]]]:
    """What `open_clips` makes of each recording, with the recording's number, by threads that are
    up to AHEAD recordings a thread in front of who asks.

    The shortest come first, as far as is known: clips of about one length follow each other.
    """
    numbered = sorted(enumerate(_recordings(said)), key=lambda one: _length(*one[1]))
    with ThreadPoolExecutor(readers) as pool:
        coming: deque[tuple[int, Future[tuple[Clips, list[Rejection]]]]] = deque()
        try:
            for number, recording in numbered:
                coming.append((number, pool.submit(_opened, recording, limits)))
                if len(coming) > AHEAD * readers:
                    first, opened = coming.popleft()
                    yield first, *opened.result()
            for first, opened in coming:
                yield first, *opened.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _recordings(said: Sequence[Utterance]) -> list[tuple[Location, list[Utterance]]]:
    """Each recording, and what is said in it."""
    recordings: dict[Location, list[Utterance]] = {}
    for one in said:
        recordings.setdefault(one.audio, []).append(one)
    return list(recordings.items())


def _length(path: Location, said: list[Utterance]) -> tuple[bool, float]:
    """Grows with how long the clips are: by what is stated, else by the file's size."""
    stated = [one.duration for one in said if one.duration is not None]
    if stated:
        return False, max(stated)
    if isinstance(path, Path):  # of an object that would be another request
        with suppress(OSError, ValueError):  # ValueError: a name with a zero byte in it
            return True, path.stat().st_size
    return True, 0.0


def _opened(
    recording: tuple[Location, list[Utterance]], limits: Tokenize
) -> tuple[Clips, list[Rejection]]:
    """One recording's clips, and what of it has to be left out."""
    path, said = recording
    clips: Clips = []
    rejected: list[Rejection] = []
    for opened in _open(path, said, limits):
        if isinstance(opened, audio.AudioError):
            rejected.append(Rejection(printable(path), str(opened)))
        else:
            clips += opened
    return clips, rejected


class CheckClips:
    """Utterances -> a manifest of those that can be heard, and a list of what was rejected.

    The manifest names each clip's own span of its recording, and how long it is.
    """

    def __init__(self, settings: Tokenize, directory: Path) -> None:
        self._settings = settings
        self._directory = directory

    def __call__(self, part: Part[Utterance]) -> str:
        silent = [one for one in part.work if one.audio is None]
        clips, rejected = open_clips([one for one in part.work if one.audio], self._settings)
        heard = [replace(one, duration=len(wave) / audio.SAMPLE_RATE) for one, wave in clips]
        path = self._directory / f"{part.name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        write_rejections(path.with_name(f".{path.stem}.rejected.jsonl"), rejected)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        manifest.write(aside, [*silent, *heard])
        aside.replace(path)
        return part.name


def _open(
    path: Location, said: list[Utterance], limits: Tokenize
) -> list[Clips | audio.AudioError]:
    """The clips of each utterance of a recording, or why there are none.

    Those with a transcript are one clip each, all read in one pass.
    """
    whole = [one for one in said if (one.text or "").strip()]
    try:
        waves = audio.spans(
            path,
            [audio.span_of(one) for one in whole],
            min_seconds=limits.min_seconds,
            max_seconds=limits.max_seconds,
        )
    except audio.AudioError as error:
        return [error] * len(said)
    clips = {
        id(one): wave if isinstance(wave, audio.AudioError) else [(one, wave)]
        for one, wave in zip(whole, waves, strict=True)
    }
    return [clips[id(one)] if id(one) in clips else _untranscribed(one, limits) for one in said]


def _untranscribed(one: Utterance, limits: Tokenize) -> Clips | audio.AudioError:
    """A clip without a transcript, or several: a long one is split."""
    if limits.require_text:
        return audio.AudioError(f"{printable(one.audio)}: no transcript")
    try:
        cut = list(
            cutting.segments(one.audio, limits.max_seconds, limits.min_seconds, audio.span_of(one))
        )
    except audio.AudioError as error:
        return error
    if len(cut) == 1:
        return [(one, cut[0].wave)]
    start, document = one.offset or 0.0, one.document or one.id
    return [
        (
            replace(one, id=f"{one.id}#{number}", document=document, offset=start + each.start),
            each.wave,
        )
        for number, each in enumerate(cut)
    ]
