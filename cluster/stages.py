"""Ray Data stages: the same work as in `mmrag`, over a pool of actors, one part at a time.

A stage's input is cut into named parts beforehand. An actor loads its models once, works a part
off and writes its files, whole or not at all, and answers with a small summary; a part whose
files are there is not worked off again. So a killed job redoes at most one part a worker.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from cluster.clips import Clips, hear
from cluster.modes import Biasing, Mode, open_locally
from cluster.parts import Part, Source, Work, cut, parts, work_off
from cluster.recording import write_flac
from cluster.rejections import read_rejections, write_rejections
from cluster.tokenizing import device
from mmrag.config import BatchDecode, Workers
from mmrag.config import Datastore as DatastoreConfig
from mmrag.corpora import synthetic
from mmrag.corpora.voices.engines import Synthesizers
from mmrag.corpora.voices.speech import UnspeakableError
from mmrag.model import pretrained
from mmrag.model.states import read_states
from mmrag.recogniser import SPOKEN, Recogniser, load, load_decoder, too_long
from mmrag.records import Rejection, Units, Utterance
from mmrag.retrieval.contexts import write_neighbours
from mmrag.retrieval.datastore import write_segment
from mmrag.retrieval.entries import read_entries
from mmrag.retrieval.interpolation import Retrieval
from mmrag.retrieval.segment import Segment, join
from mmrag.retrieval.stored import segment_file
from mmrag.score import recall_at_k
from mmrag.speech import audio
from mmrag.speech.hubert import HubertEncoder
from mmrag.speech.tokenized import Tokenized
from mmrag.speech.units import Codebook
from mmrag.storage import Location
from mmrag.transcribe import recognise, words

SPOKEN_AUDIO = ".spoken"
"""Where recordings of synthetic speech lie while a datastore is made of them."""
FRAMES = 50
"""Encoder frames a second of a recording."""


class Embed:
    """Utterances with their audio -> one vector each (N, D), by name: for document retrieval.

    `encoder` `lm` means the language model's keys over the units, `hubert` HuBERT's features; both
    are averaged over the clip.
    """

    def __init__(self, models: Path, encoder: str) -> None:
        self._recogniser = Recogniser.load(models, device())
        self._encoder = encoder

    def __call__(self, part: Part[tuple[Utterance, Units]]) -> dict[str, np.ndarray]:
        return {said.id: self._embed(said, units) for said, units in part.work}

    @torch.inference_mode()
    def _embed(self, said: Utterance, units: Units) -> np.ndarray:
        models = self._recogniser
        if self._encoder == "hubert":
            return (
                models.encoder.features([audio.read(said.audio, audio.span_of(said))])[0]
                .mean(0)
                .cpu()
                .numpy()
            )
        prompt = models.vocabulary.prompt(models.vocabulary.encode_units(units))
        ids = torch.tensor([prompt], device=models.lm.embedding.weight.device)
        keys = models.lm(ids, at=torch.zeros_like(ids, dtype=torch.bool)).keys
        return keys[0, 2:-1].float().mean(0).cpu().numpy()


class Speak:
    """Text utterances -> the same as recordings of synthetic speech, in `.spoken/` in `directory`.

    Those that cannot be spoken, or take longer than `window_seconds`, are left out: they go to
    `.<part>.rejected.jsonl`. `settings` say who speaks.
    """

    def __init__(
        self,
        seed: int,
        directory: Path,
        settings: DatastoreConfig,
        window_seconds: float = math.inf,
    ) -> None:
        self._synthesizers = Synthesizers(settings.kokoro)
        self._voices = settings.voices
        self._seed = seed
        self._directory = directory
        self._window_seconds = window_seconds

    def __call__(self, part: Part[Tokenized]) -> Part[Tokenized]:
        recordings = self._directory / SPOKEN_AUDIO / part.name
        recorded = []
        for number, (said, wave) in enumerate(self._say(part)):
            path = recordings / f"{number}.flac"
            write_flac(path, wave.numpy())
            recorded.append(Tokenized(replace(said, audio=path, offset=None, duration=None), None))
        return Part(part.name, recorded)

    def _say(self, part: Part[Tokenized]) -> Clips:
        texts = [one.utterance.text for one in part.work]
        voiced = synthetic.assign_voices(texts, self._seed, self._voices)
        said: Clips = []
        rejected: list[Rejection] = []
        for one, planned in zip(part.work, voiced, strict=True):
            try:
                wave = synthetic.render(planned, self._synthesizers).wave
            except UnspeakableError as error:
                rejected.append(Rejection(one.utterance.id, str(error)))
                continue
            if reason := too_long(len(wave) / audio.SAMPLE_RATE, self._window_seconds):
                rejected.append(Rejection(one.utterance.id, reason))
            else:
                said.append((one.utterance, torch.from_numpy(wave)))
        write_rejections(self._directory / f".{part.name}.rejected.jsonl", rejected)
        return said


class SpeakUnits(Speak):
    """Text utterances -> the same with units of synthetic speech, which no file keeps."""

    def __init__(
        self,
        hubert: Location,
        codebook: Location,
        seed: int,
        directory: Path,
        settings: DatastoreConfig,
    ) -> None:
        super().__init__(seed, directory, settings)
        self._encoder = HubertEncoder.load(hubert).to(device()).eval()
        self._codebook = Codebook.load(codebook)

    def __call__(self, part: Part[Tokenized]) -> Part[Tokenized]:
        return Part(part.name, list(self._heard(self._say(part))))

    def _heard(self, said: Clips) -> Iterator[Tokenized]:
        for start in range(0, len(said), SPOKEN):
            batch = said[start : start + SPOKEN]
            features = self._encoder.features([wave for _, wave in batch])
            for (utterance, _), one in zip(batch, features, strict=True):
                yield Tokenized(utterance, self._codebook.encode(one.cpu().numpy()))


@dataclass(frozen=True)
class WrittenSegment:
    """A segment that was written, of so many utterances."""

    name: str
    utterances: int


@dataclass(frozen=True)
class FindSegment:
    """A part -> what is known of its segment in `directory` if that is there already, else None."""

    directory: Path

    def __call__(self, part: Part[Tokenized]) -> WrittenSegment | None:
        if not segment_file(self.directory, part.name).exists():
            return None
        unspoken = self.directory / f".{part.name}.rejected.jsonl"
        left_out = len(read_rejections(unspoken)) if unspoken.exists() else 0
        return WrittenSegment(part.name, len(part.work) - left_out)


class WriteEntries:
    """Utterances -> one datastore segment: the state of `models` before each token of each text (or
    of its entities), over the utterance's speech where `audio` is not `none`."""

    def __init__(
        self,
        models: Path | str,
        settings: DatastoreConfig,
        directory: Path,
        language: str | None = None,
    ) -> None:
        self._models = load_decoder(models, device(), language)
        self._settings = settings
        self._directory = directory

    def __call__(self, part: Part[Tokenized]) -> WrittenSegment:
        batches = _batches(part.work, _token_count, self._settings.batch_tokens)
        nothing = Segment.empty(self._models.lm.width, self._settings.window)
        segment = join([nothing, *map(self._read, batches)])
        write_segment(self._directory, part.name, segment)
        return WrittenSegment(part.name, len(part.work))

    def _read(self, batch: list[Tokenized]) -> Segment:
        settings = self._settings
        if settings.audio == "none":
            batch = [Tokenized(one.utterance, None) for one in batch]
        else:
            batch = hear(self._models, batch)
        lm, vocabulary = self._models.lm, self._models.vocabulary
        return read_entries(lm, vocabulary, batch, settings.window, settings.entries)


class FindNeighbours:
    """Tokenized utterances -> a part with the entries near each of their tokens, and how many
    they are.

    The utterance's own document is left out.
    """

    def __init__(self, lm: Location, datastore: Location, k: int, directory: Path) -> None:
        self._lm, self._vocabulary = pretrained.load(lm, device())
        self._retriever = open_locally(datastore)
        self._k = k
        self._directory = directory

    def __call__(self, part: Part[Tokenized]) -> int:
        vocabulary, datastore = self._vocabulary, self._retriever.datastore
        texts = [vocabulary.encode(one.utterance.text) for one in part.work]
        speech = [vocabulary.encode_units(one.units) for one in part.work]
        keys, _, slices, _ = read_states(self._lm, vocabulary, texts, speech, logits=False)
        queries, found = keys.cpu().numpy(), {}
        for one, span in zip(part.work, slices, strict=True):
            own = datastore.document_id(one.utterance.document)
            excluded = None if own is None else [own] * (span.stop - span.start)
            near = self._retriever.search(queries[span], self._k, excluded)
            found[one.utterance.id] = near.entries
        write_neighbours(self._directory / f"{part.name}.npz", found)
        return len(part.work)


@dataclass(frozen=True)
class FindNeighboursOf:
    """A part -> how many utterances it has if its neighbours are in `directory`, else None."""

    directory: Path

    def __call__(self, part: Part[Tokenized]) -> int | None:
        there = (self.directory / f"{part.name}.npz").exists()
        return len(part.work) if there else None


@dataclass(frozen=True)
class TranscribedUtterance:
    """One utterance transcribed in one mode, with what an evaluation needs of it."""

    utterance: str
    speaker: str
    seconds: float
    reference: str
    """As the vocabulary can write it, the entities too."""
    text: str
    entities: list[str]
    changed: list[str]
    """Words that the language model alone would not have written."""
    decode_seconds: float
    """This utterance's share of its batch's time."""
    recalled: int
    """Reference tokens that stood among the neighbours of the state before them."""
    queries: int


@dataclass(frozen=True)
class TranscriptionTask:
    """An utterance to transcribe in the mode of that name."""

    mode: str
    tokenized: Tokenized


class Transcribe:
    """Utterances asked for in one mode -> the mode's name and their transcripts, as one batch."""

    def __init__(
        self,
        models: Path | str,
        settings: BatchDecode,
        modes: Mapping[str, Mode],
        language: str | None = None,
    ) -> None:
        self._recogniser = load(models, device(), language)
        self._settings = settings
        self._modes = modes
        self._guide: tuple[str, Biasing] | None = None
        """Of the mode that was asked for last: they are asked for one after the other, and each
        keeps what it has read."""

    def __call__(self, part: Part[TranscriptionTask]) -> tuple[str, list[TranscribedUtterance]]:
        name = part.work[0].mode
        if self._guide is None or self._guide[0] != name:
            self._guide = None  # what it has read goes before as much is read again
            self._guide = name, self._modes[name].open(self._recogniser)
        return name, self._transcribe([one.tokenized for one in part.work], self._guide[1])

    def _transcribe(self, batch: list[Tokenized], guide: Biasing) -> list[TranscribedUtterance]:
        vocabulary = self._recogniser.vocabulary
        batch = hear(self._recogniser, batch)
        started = time.perf_counter()
        guidance = guide(batch)
        units = [one.units for one in batch]
        hypotheses = recognise(self._recogniser, units, self._settings, **guidance)
        elapsed = time.perf_counter() - started
        audio_seconds = sum(map(seconds, batch))
        recalled = self._recall(batch, guidance.get("retrieval"))
        return [
            TranscribedUtterance(
                utterance=one.utterance.id,
                speaker=one.utterance.speaker,
                seconds=seconds(one),
                reference=vocabulary.spoken(one.utterance.text),
                text=vocabulary.decode(hypothesis.tokens),
                entities=list(map(vocabulary.spoken, one.utterance.entities)),
                changed=[w.text for w in words(hypothesis, vocabulary) if w.changed],
                decode_seconds=elapsed * seconds(one) / audio_seconds,
                recalled=found,
                queries=total,
            )
            for one, hypothesis, (found, total) in zip(batch, hypotheses, recalled, strict=True)
        ]

    def _recall(
        self, batch: list[Tokenized], retrieval: Retrieval | Sequence[Retrieval] | None
    ) -> list[tuple[int, int]]:
        if retrieval is None:
            return [(0, 0)] * len(batch)
        own = retrieval if isinstance(retrieval, Sequence) else [retrieval] * len(batch)
        vocabulary, heard = self._recogniser.vocabulary, own[0].settings.query == "speech"
        told = [one.utterance.text for one in batch]
        texts = [[] if vocabulary.unspeakable(text) else vocabulary.encode(text) for text in told]
        speech = [vocabulary.speech_input(one.units) if heard else None for one in batch]
        keys, tokens, slices, _ = read_states(
            self._recogniser.lm, vocabulary, texts, speech, logits=False
        )
        queries, scores = keys.cpu().numpy(), []
        for one, span in zip(own, slices, strict=True):
            found = one.retriever.search(queries[span], one.settings.k)
            scores.append(recall_at_k(found.tokens, tokens[span], found.entries))
        return [(score.found, score.total) for score in scores]


@dataclass(frozen=True)
class AskedFor:
    """Reads `spoken` once for each mode, and cuts it into batches of about so many seconds."""

    modes: tuple[str, ...]
    spoken: Callable[[], Iterable[Tokenized]]
    batch_seconds: float

    def __call__(self) -> Iterator[Part[TranscriptionTask]]:
        for mode in self.modes:
            tasks = (TranscriptionTask(mode, one) for one in self.spoken())
            yield from cut(tasks, lambda one: seconds(one.tokenized), self.batch_seconds)


def transcribe(
    models: Path | str,
    settings: BatchDecode,
    modes: Mapping[str, Mode],
    asked: Source | Sequence[Part[TranscriptionTask]],
    workers: Workers,
    key: str = "evaluate.workers",
    language: str | None = None,
) -> Iterator[tuple[str, list[TranscribedUtterance]]]:
    """A mode and a batch's transcripts in it, as they are ready; `asked` is an `AskedFor`."""
    loads = {"models": models, "settings": settings, "modes": modes, "language": language}
    yield from work_off([(Transcribe, loads)], asked, workers, "transcribing", key)


def transcribe_modes(
    models: Path | str,
    settings: BatchDecode,
    modes: Mapping[str, Mode],
    spoken: Sequence[Tokenized],
    workers: Workers,
    key: str = "evaluate.workers",
    language: str | None = None,
) -> dict[str, list[TranscribedUtterance]]:
    """Every utterance transcribed in every mode, in the order of the utterances' names."""
    asked = list(AskedFor(tuple(modes), lambda: spoken, settings.batch_seconds)())
    heard: dict[str, list[TranscribedUtterance]] = {mode: [] for mode in modes}
    for mode, transcripts in transcribe(models, settings, modes, asked, workers, key, language):
        heard[mode] += transcripts
    return {mode: sorted(all, key=lambda one: one.utterance) for mode, all in heard.items()}


def seconds(one: Tokenized) -> float:
    """How long an utterance lasts."""
    return one.utterance.duration


def _token_count(one: Tokenized) -> int:
    """About as many positions as an utterance takes; a recording counts a second's frames."""
    said, heard = one.utterance, 0
    if one.units is not None:
        heard = len(one.units)
    elif said.audio is not None:
        heard = round(FRAMES * (said.duration or 0.0))
    return 4 + len(said.text or "") + heard


def _batches(
    work: Sequence[Work], size: Callable[[Work], float], limit: float
) -> Iterator[list[Work]]:
    for part in parts(work, size, limit):
        yield part.work
