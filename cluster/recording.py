"""Ray Data stages that make recordings: sentences spoken, recordings degraded."""

from __future__ import annotations

import io
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile

from cluster.parts import Part
from cluster.rejections import write_rejections
from mmrag.corpora import augment, manifest, recordings, synthetic
from mmrag.corpora.recordings import Rerecorded
from mmrag.corpora.synthetic import Planned
from mmrag.corpora.voices import flite
from mmrag.corpora.voices.engines import Synthesizers
from mmrag.corpora.voices.speech import UnspeakableError
from mmrag.records import Rejection, Utterance
from mmrag.speech import audio
from mmrag.speech.audio import AudioError


def write_flac(path: Path, wave: np.ndarray) -> None:
    """Write a wave (T,) at 16 kHz, and the directories above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = io.BytesIO()  # written by Python, which says what is wrong with a full disk
    soundfile.write(encoded, wave, audio.SAMPLE_RATE, format="FLAC")
    path.write_bytes(encoded.getvalue())


class RenderSpeech:
    """Planned sentences and recordings of one split -> FLAC files, and their manifest's rows.

    `directory` holds `audio/`; the rows go to `.<part>.jsonl` in it, and what could not be spoken
    or read to `.<part>.rejected`. `kokoro` is the directory of that synthesizer's files.
    """

    def __init__(self, directory: Path, kokoro: str | None) -> None:
        self._synthesizers = Synthesizers(kokoro)
        self._directory = directory

    def __call__(self, part: Part[Planned | Rerecorded]) -> str:
        said: list[Utterance] = []
        rejected: list[Rejection] = []
        for one in part.work:
            try:
                said.append(self._said(one, part.name))
            except UnspeakableError as error:
                rejected.append(Rejection(one.id, str(error)))
            except AudioError as error:
                rejected.append(Rejection(one.said.id, str(error)))
        write_rejections(self._directory / f".{part.name}.rejected", rejected)
        manifest.write(self._directory / f".{part.name}.jsonl", said)
        return part.name

    def _said(self, one: Planned | Rerecorded, part: str) -> Utterance:
        if isinstance(one, Rerecorded):
            said, wave = recordings.record(one)
        else:
            said = Utterance(
                id=one.id,
                text=one.text,
                document=one.document,
                domain=one.domain,
                entities=one.entities,
            )
            if one.voice is None:
                return said
            speech = synthetic.render(one, self._synthesizers)
            wave = speech.wave
            said = replace(said, speaker=one.voice.id, words=speech.words, phones=speech.phones)
        path = self._directory / "audio" / part / f"{said.id}.flac"
        write_flac(path, wave)
        return replace(said, audio=path, duration=len(wave) / audio.SAMPLE_RATE)


class DegradeRecordings:
    """Utterances of a corpus -> the same under another condition (`Reproduce.conditions`).

    FLAC files and manifest rows as `RenderSpeech` writes them.
    """

    def __init__(self, condition: str, directory: Path, seed: int) -> None:
        self._kind, _, self._argument = condition.partition("-")
        self._directory = directory
        self._seed = seed

    def __call__(self, part: Part[Utterance]) -> str:
        said = []
        for one in part.work:
            wave = self._record(one)
            path = self._directory / "audio" / f"{one.id}.flac"
            write_flac(path, np.clip(wave, -1, 1))
            said.append(replace(one, audio=path, duration=len(wave) / audio.SAMPLE_RATE, phones=()))
        manifest.write(self._directory / f".{part.name}.jsonl", said)
        return part.name

    def _record(self, one: Utterance) -> np.ndarray:
        if self._kind == "flite":
            return flite.speak(one.text, self._argument)
        wave = audio.read(one.audio, audio.span_of(one)).numpy()
        if self._kind == "telephone":
            return augment.telephone(wave)
        draw = np.random.default_rng([self._seed, zlib.crc32(one.id.encode())])
        if self._kind in augment.CODECS:
            return augment.coded(wave, self._kind, draw)
        return augment.noisy(wave, float(self._argument), draw)
