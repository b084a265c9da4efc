"""Which models transcribe: mmrag's own over HuBERT units, or a Whisper checkpoint.

Both encode waves, and both have a decoder and a vocabulary behind the contract of
`mmrag.model.contract`: whoever transcribes, retrieves or serves does not know which one it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from mmrag import artifact, shipped
from mmrag.artifact import Artifact
from mmrag.config import ESPEAK, Decode, Speaking
from mmrag.corpora import synthetic
from mmrag.corpora.voices import engines
from mmrag.corpora.voices.engines import Synthesizers
from mmrag.corpora.voices.speech import UnspeakableError
from mmrag.decoding.confidence import Calibration
from mmrag.model import pretrained, whisper
from mmrag.model.contract import SpeechDecoder, TextVocabulary
from mmrag.model.cross_attention import Adapter
from mmrag.model.lm import LM
from mmrag.model.ngram import NGram
from mmrag.model.vocabulary import Vocabulary
from mmrag.model.whisper import EncodedAudio, Whisper, WhisperVocabulary
from mmrag.records import Line, Retriever, Units
from mmrag.retrieval.window_cache import WindowCache
from mmrag.speech.audio import SAMPLE_RATE
from mmrag.speech.hubert import HubertEncoder, spells
from mmrag.speech.units import Codebook
from mmrag.storage import Location

Part = TypeVar("Part")
Say = Callable[[Sequence[str | Line]], Iterator[Any]]
"""Sentences -> what somebody saying each of them is encoded to."""


class Encoder(Protocol):
    """Waves to what a decoder reads."""

    identity: dict[str, str]
    """Role -> fingerprint of the model."""

    @property
    def window_seconds(self) -> float:
        """Longest clip that is encoded at once."""
        ...

    def encode(self, waves: Sequence[Tensor]) -> list[Any]:
        """Waves (T,) at 16 kHz, encoded."""
        ...

    def seconds(self, encoded: Any) -> float:
        """Length of a clip."""
        ...

    def times(self, encoded: Any) -> np.ndarray:
        """Start and end (T, 2), seconds, of each part that a decoder attends to."""
        ...


class Decoder(Protocol):
    """What is encoded to text."""

    lm: SpeechDecoder
    vocabulary: TextVocabulary
    adapter: Adapter | None
    ngram: NGram | None
    identity: dict[str, str]

    def seconds(self, encoded: Any) -> float:
        """Length of a clip."""
        ...

    def times(self, encoded: Any) -> np.ndarray:
        """As an encoder's."""
        ...

    @property
    def keyed_by(self) -> dict[str, str]:
        """What a datastore has to be keyed by: role -> fingerprint."""
        ...

    def window_cache(self, source: Retriever) -> WindowCache:
        """The windows of `source` as the adapter reads them; ValueError without one."""
        ...

    def longest(self, seconds: float, settings: Decode) -> int:
        """The longest transcript of a clip, tokens."""
        ...


CALIBRATION = "calibration"
NGRAM = "ngram"
"""Kinds of artifacts, and directories beside the models that they are of."""
SPOKEN = 32
"""Sentences that a synthesizer says before they are encoded, as one batch: HuBERT encodes short
ones many times faster together, and a phrase's units do not depend on the others."""
LETTERS_PER_SECOND = 11
"""Of short sentences that Kokoro says, spaces and its pauses counted."""


def too_long(seconds: float, window_seconds: float) -> str | None:
    """Why a spoken text cannot be heard; None if it can."""
    if seconds <= window_seconds:
        return None
    return f"takes {seconds:.1f} s to say, and {window_seconds:g} s are heard at once"


class Speakers:
    """Synthetic voices; those of espeak-ng need the `speech` extra, those of Kokoro its own.

    The voice of a sentence depends on `seed`, the sentence and `speaking` alone. None may last
    longer than `window_seconds`.
    """

    def __init__(self, speaking: Speaking, window_seconds: float, seed: int = 0) -> None:
        self.speaking = speaking
        self._window_seconds = window_seconds
        self._seed = seed
        self._synthesizers = Synthesizers(speaking.kokoro)

    def open(self) -> None:
        """Make the engines that take long to load ready to speak; ImportError or OSError for one
        that is not installed. The others are loaded at their first word."""
        for name in self.speaking.voices:
            if engines.ENGINES[name].slow:
                self._synthesizers.open(name)

    def waves(self, texts: Sequence[str | Line]) -> list[Tensor]:
        """What is heard of each sentence, (T,) float32 at 16 kHz. Raises UnspeakableError for one
        that lasts too long, or of which there is nothing to say."""
        planned = synthetic.assign_voices(texts, self._seed, self.speaking.voices)
        waves = [synthetic.render(one, self._synthesizers).wave for one in planned]
        for one, wave in zip(planned, waves, strict=True):
            if reason := too_long(len(wave) / SAMPLE_RATE, self._window_seconds):
                raise UnspeakableError(f"{one.text!r} {reason}")
        return [torch.from_numpy(wave) for wave in waves]

    def waited_for(self, texts: Iterable[str | Line], most: float) -> bool:
        """Whether what slow engines say of these sentences lasts longer than `most` seconds, by
        their letters; no more of them are looked at than that takes."""
        letters = most * LETTERS_PER_SECOND
        if any(engines.ENGINES[name].slow for name in self.speaking.voices):
            for text in texts:
                [planned] = synthetic.assign_voices([text], self._seed, self.speaking.voices)
                letters -= engines.ENGINES[planned.voice.engine].slow * len(planned.text)
                if letters < 0:
                    return True
        return False


def text_to_speech(encoder: Encoder, seed: int = 0, speaking: Speaking = ESPEAK) -> Say:
    """Says sentences as `Speakers` does, and encodes them.

    SPOKEN sentences are encoded at once, and given when they are. Raises UnspeakableError for one
    that takes longer than the encoder hears.
    """
    speakers = Speakers(speaking, encoder.window_seconds, seed)

    def say(texts: Sequence[str | Line]) -> Iterator[Any]:
        for start in range(0, len(texts), SPOKEN):
            yield from encoder.encode(speakers.waves(texts[start : start + SPOKEN]))

    return say


@dataclass(frozen=True)
class _Timed:
    """What knows how long units last."""

    codebook: Codebook

    def seconds(self, units: Units) -> float:
        """Length of a clip."""
        return float(units.durations.sum()) * self.codebook.frame_seconds

    def times(self, units: Units) -> np.ndarray:
        """When each unit is said (T, 2), seconds from the clip's start."""
        return self.codebook.seconds(units)


@dataclass(frozen=True)
class SpeechTokenizer(_Timed):
    """The models that turn sound into units, and where they came from."""

    encoder: HubertEncoder
    identity: dict[str, str]
    """Role (hubert, codebook, and lm where there is one) -> fingerprint of the artifact."""

    @classmethod
    def load(cls, directory: Location, device: str = "cpu") -> SpeechTokenizer:
        """Read `hubert/` and `codebook/` below `directory`.

        Raises ArtifactError if one is missing or was not made for the other.
        """
        made = {kind: artifact.load(directory / kind, kind) for kind in ("hubert", "codebook")}
        made["codebook"].require("hubert", made["hubert"])
        return cls(
            encoder=HubertEncoder.load(made["hubert"].path).to(device).eval(),
            codebook=Codebook.load(made["codebook"].path),
            identity={role: one.fingerprint for role, one in made.items()},
        )

    def encode(self, waves: Sequence[Tensor]) -> list[Units]:
        """Waves (T,) at 16 kHz to units, with their letters where the encoder has a CTC head."""
        features = self.encoder.features(waves)
        heard = zip(features, self.encoder.letters(features), strict=True)
        return [
            replace(self.codebook.encode(one.cpu().numpy()), letters=letters)
            for one, letters in heard
        ]

    @property
    def spells(self) -> bool:
        """Whether the encoder has a CTC head, in whose letters phrases are spotted."""
        return self.encoder.alphabet is not None

    @property
    def window_seconds(self) -> float:
        """Longest clip that is encoded at once: any."""
        return math.inf

    def synthesizer(self, seed: int = 0, speaking: Speaking = ESPEAK) -> Say:
        """Says a sentence with a synthetic voice and encodes it, as `text_to_speech` does."""
        return text_to_speech(self, seed, speaking)


@dataclass(frozen=True)
class SpeechLM(_Timed):
    """The models that turn units into text, and where they came from."""

    lm: LM
    vocabulary: Vocabulary
    adapter: Adapter | None
    """Reads what is retrieved; None where there is none."""
    identity: dict[str, str]
    """Role (codebook, lm) -> fingerprint of the artifact."""
    calibration: Calibration | None
    """Probabilities to confidences; None where nobody calibrated."""
    ngram: NGram | None
    """What the text of its language is like; None where nobody counted."""

    @classmethod
    def load(
        cls, directory: Location, device: str = "cpu", adapted: bool = True, calibrated: bool = True
    ) -> SpeechLM:
        """Read `lm/` below `directory`; `ngram/`, if it is there; and `adapter/` and
        `calibration/`, if they are there and wanted (`adapted`, `calibrated`).

        Raises ArtifactError if `lm` or `codebook` is missing or they were not made for each other.
        """
        made = {kind: artifact.load(directory / kind, kind) for kind in ("codebook", "lm")}
        made["lm"].require("codebook", made["codebook"])
        lm, vocabulary = pretrained.load(made["lm"].path, device)
        found = partial(_beside, directory, made["lm"])
        identity = {role: one.fingerprint for role, one in made.items()}
        return cls(
            codebook=Codebook.load(made["codebook"].path),
            lm=lm,
            vocabulary=vocabulary,
            adapter=found("adapter", lambda p: pretrained.load_adapter(p, lm)) if adapted else None,
            identity=identity,
            calibration=found(CALIBRATION, Calibration.read) if calibrated else None,
            ngram=found(NGRAM, NGram.read),
        )

    @property
    def keyed_by(self) -> dict[str, str]:
        """What a datastore has to be keyed by: role -> fingerprint."""
        return {role: self.identity[role] for role in ("lm", "codebook")}

    def window_cache(self, source: Retriever) -> WindowCache:
        """The windows of `source` as the adapter reads them; ValueError without."""
        if self.adapter is None:
            raise ValueError("these models have no cross-attention adapter")
        return WindowCache(self.adapter, self.lm, source)

    def longest(self, seconds: float, settings: Decode) -> int:
        """The longest transcript of a clip, tokens."""
        return longest(seconds, settings)


@dataclass(frozen=True)
class Recogniser(SpeechTokenizer, SpeechLM):
    """Both: sound to text."""

    languages = ("en",)
    """What is understood (ISO 639-1)."""

    @classmethod
    def load(cls, directory: Location, device: str = "cpu", calibrated: bool = True) -> Recogniser:
        """Read `hubert/`, `codebook/` and `lm/` below `directory`, `adapter/` and `ngram/` if they
        are there, and `calibration/` if it is there and wanted (`calibrated`).

        Raises ArtifactError if one is missing or was not made for the others.
        """
        tokenizer = SpeechTokenizer.load(directory, device)
        lm = SpeechLM.load(directory, device, calibrated=calibrated)
        fields = vars(tokenizer) | vars(lm)
        return cls(**fields | {"identity": tokenizer.identity | lm.identity})


@dataclass(frozen=True)
class WhisperRecogniser:
    """A Whisper checkpoint: encoder, decoder and vocabulary in one."""

    lm: Whisper
    vocabulary: WhisperVocabulary
    identity: dict[str, str]
    """Role `whisper` -> fingerprint of the checkpoint's files."""
    adapter: None = None
    ngram: None = None
    calibration: None = None
    spells: bool = False

    @classmethod
    def load(cls, name: str, device: str = "cpu", language: str | None = None) -> WhisperRecogniser:
        """Read `whisper:DIRECTORY` or `whisper:HUB_ID`.

        Raises WhisperError, which says in a line what is missing or wrong.
        """
        directory = whisper.locate(name)
        model = Whisper.load(directory, language, device)
        return cls(model, model.vocabulary, {"whisper": whisper.fingerprint(directory)})

    @property
    def languages(self) -> tuple[str, ...]:
        """What is understood (ISO 639-1)."""
        return self.vocabulary.spoken_languages

    def encode(self, waves: Sequence[Tensor]) -> list[EncodedAudio]:
        """Waves (T,) at 16 kHz, of a window at most, to encoder states."""
        return self.lm.encode(waves)

    @property
    def window_seconds(self) -> float:
        """Longest clip that is encoded at once."""
        return self.lm.window_seconds

    def seconds(self, encoded: EncodedAudio) -> float:
        """Length of a clip."""
        return encoded.seconds

    def times(self, encoded: EncodedAudio) -> np.ndarray:
        """When each of the clip's frames is (T, 2), seconds from its start."""
        edges = np.arange(encoded.frames + 1) * encoded.frame_seconds
        return np.stack([edges[:-1], edges[1:]], axis=1)

    def synthesizer(self, seed: int = 0, speaking: Speaking = ESPEAK) -> Say:
        """Says a sentence with a synthetic voice and encodes it, as `text_to_speech` does."""
        return text_to_speech(self, seed, speaking)

    @property
    def keyed_by(self) -> dict[str, str]:
        """What a datastore has to be keyed by: role -> fingerprint."""
        return self.identity

    def window_cache(self, source: Retriever) -> WindowCache:
        """ValueError: an adapter reads the states of mmrag's own language model."""
        raise ValueError(
            "cross-attention needs an adapter, and adapters belong to mmrag's own language model: "
            "with a Whisper use retrieval knn, or boosted phrases"
        )

    def longest(self, seconds: float, settings: Decode) -> int:
        """The longest transcript of a clip, tokens; beside its prompt it fits the checkpoint."""
        return min(longest(seconds, settings), self.lm.longest - len(self.vocabulary.prompt(None)))


AnyRecogniser = Recogniser | WhisperRecogniser


def _beside(
    directory: Location, lm: Artifact, kind: str, read: Callable[[Path], Part]
) -> Part | None:
    """What was made for a language model, as `read` has it; None if nobody made it, ArtifactError
    if it is for another."""
    if not (directory / kind).exists():
        return None
    made = artifact.load(directory / kind, kind)
    made.require("lm", lm)
    return read(made.path)


def longest(seconds: float, settings: Decode) -> int:
    """The longest transcript of a clip that long, tokens."""
    return max(16, round(seconds * settings.tokens_per_second))


def is_whisper(models: str | Location) -> bool:
    """Whether a model's name means a Whisper checkpoint."""
    return str(models).startswith(whisper.PREFIX)


def load(models: str | Location, device: str = "cpu", language: str | None = None) -> AnyRecogniser:
    """A directory or a URL, a model of this package (`mmrag:tiny`), or a Whisper
    (`whisper:DIRECTORY`).

    `language` is for a multilingual Whisper; ValueError for it with other models. Raises what the
    families' own `load` raises.
    """
    if is_whisper(models):
        return WhisperRecogniser.load(str(models), device, language)
    if language:
        raise ValueError(f"language {language!r}: only a multilingual Whisper is told its language")
    return Recogniser.load(shipped.find(str(models)), device)


def load_encoder(
    models: str | Location, device: str = "cpu", language: str | None = None
) -> SpeechTokenizer | WhisperRecogniser:
    """What encodes waves; `models` as for `load`."""
    if is_whisper(models):
        return WhisperRecogniser.load(str(models), device, language)
    return SpeechTokenizer.load(shipped.find(str(models)), device)


def load_decoder(
    models: str | Location,
    device: str = "cpu",
    language: str | None = None,
    adapted: bool = False,
) -> SpeechLM | WhisperRecogniser:
    """What turns speech that is encoded into text, with its adapter or without (`adapted`);
    `models` as for `load`."""
    if is_whisper(models):
        return WhisperRecogniser.load(str(models), device, language)
    return SpeechLM.load(shipped.find(str(models)), device, adapted)


@dataclass(frozen=True)
class Outline:
    """What is known of models without their weights."""

    fingerprints: dict[str, str]
    """Of each part, by role."""
    keyed_by: dict[str, str]
    """What a datastore has to be keyed by: role -> fingerprint."""
    vocabulary: TextVocabulary
    width: int
    """D of a key."""
    window_seconds: float
    """Longest clip that is encoded at once."""
    spells: bool = False
    """Whether the encoder has a CTC head, in whose letters phrases are spotted."""

    @property
    def adapted(self) -> bool:
        """Whether there is an adapter, which reads what is retrieved."""
        return "adapter" in self.fingerprints


def outline(models: str | Location, language: str | None = None) -> Outline:
    """Read what models are; raises what `load` raises, for parts that do not belong together too.

    `models` are as for `load`.
    """
    if is_whisper(models):
        directory = whisper.locate(str(models))
        width, seconds = whisper.description(directory)
        known = {"whisper": whisper.fingerprint(directory)}
        vocabulary = WhisperVocabulary.load(directory, language)
        return Outline(known, known, vocabulary, width, seconds)
    directory = shipped.find(str(models))
    made = {kind: artifact.load(directory / kind, kind) for kind in ("hubert", "codebook", "lm")}
    made["codebook"].require("hubert", made["hubert"])
    made["lm"].require("codebook", made["codebook"])
    if (directory / "adapter").exists():
        made["adapter"] = artifact.load(directory / "adapter", "adapter")
        made["adapter"].require("lm", made["lm"])
    lm = made["lm"].path
    known = {kind: one.fingerprint for kind, one in made.items()}
    return Outline(
        fingerprints=known,
        keyed_by={role: known[role] for role in ("lm", "codebook")},
        vocabulary=Vocabulary.load(lm),
        width=pretrained.base_config(str(lm)).width,
        window_seconds=math.inf,
        spells=spells(made["hubert"].path),
    )
