"""Ray Data stages that make recordings: sentences spoken, recordings degraded."""

from __future__ import annotations

import io
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile

from cluster.parts import Part
from mmrag.corpora import augment, manifest, synthetic
from mmrag.corpora.synthetic import Planned
from mmrag.corpora.voices import flite
from mmrag.records import Utterance
from mmrag.speech import audio


def write_flac(path: Path, wave: np.ndarray) -> None:
    """Write a wave (T,) at 16 kHz, and the directories above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = io.BytesIO()  # written by Python, which says what is wrong with a full disk
    soundfile.write(encoded, wave, audio.SAMPLE_RATE, format="FLAC")
    path.write_bytes(encoded.getvalue())


class RenderSpeech:
    """Planned sentences of one split -> FLAC files, and their rows of the split's manifest.

    `directory` holds `audio/`; the rows go to `.<part>.jsonl` in it.
    """

    def __init__(self, directory: Path) -> None:
        from mmrag.corpora.voices.espeak import Synthesizer

        self._synthesizer = Synthesizer()
        self._directory = directory

    def __call__(self, part: Part[Planned]) -> str:
        said = [self._speak(planned, part.name) for planned in part.work]
        manifest.write(self._directory / f".{part.name}.jsonl", said)
        return part.name

    def _speak(self, planned: Planned, part: str) -> Utterance:
        said = Utterance(
            id=planned.id,
            text=planned.text,
            document=planned.document,
            domain=planned.domain,
            entities=planned.entities,
        )
        if planned.voice is None:
            return said
        speech = synthetic.render(planned, self._synthesizer)
        path = self._directory / "audio" / part / f"{planned.id}.flac"
        write_flac(path, speech.wave)
        return replace(
            said,
            audio=path,
            duration=len(speech.wave) / audio.SAMPLE_RATE,
            speaker=planned.voice.id,
            words=speech.words,
            phones=speech.phones,
        )


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
        return augment.noisy(wave, float(self._argument), draw)
