"""Audio to transcript, from end to end. Start reading here.

audio -> units -> ids -> decode (with retrieval) -> words with their evidence
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrag import artifact
from mmrag.config import Decode
from mmrag.corpora import synthetic
from mmrag.corpora.voices.espeak import Synthesizer
from mmrag.decoding.decode import Choice, Hypothesis, decode
from mmrag.decoding.guard import credible
from mmrag.model import pretrained
from mmrag.model.cross_attention import Adapter
from mmrag.model.lm import LM
from mmrag.model.vocabulary import Vocabulary
from mmrag.records import NO_ENTRY, Retriever, Source, Transcript, Units, Word
from mmrag.retrieval.interpolation import Retrieval
from mmrag.retrieval.memory import AttentionSource, WindowCache
from mmrag.speech import audio, vad
from mmrag.speech.hubert import HubertEncoder
from mmrag.speech.units import Codebook

SPOKEN = 32
"""Sentences that a synthesizer says before they are heard, as one batch: HuBERT hears short ones
many times faster together, and a phrase's units do not depend on the others."""


@dataclass(frozen=True)
class SpeechTokenizer:
    """The models that turn sound into units, and where they came from."""

    encoder: HubertEncoder
    codebook: Codebook
    identity: dict[str, str]
    """Role (hubert, codebook, and lm where there is one) -> fingerprint of the artifact."""

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> SpeechTokenizer:
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
        """Waves (T,) at 16 kHz to units."""
        features = self.encoder.features(waves)
        return [self.codebook.encode(one.cpu().numpy()) for one in features]

    def synthesizer(self, seed: int = 0) -> Callable[[Sequence[str]], Iterator[Units]]:
        """Says sentences with synthetic voices and listens to them; needs the `speech` extra.

        The voice depends on `seed` and the sentence alone. SPOKEN sentences are heard at once, and
        given when they are.
        """
        synthesizer = Synthesizer()

        def say(texts: Sequence[str]) -> Iterator[Units]:
            planned = synthetic.assign_voices(texts, seed)
            for start in range(0, len(planned), SPOKEN):
                batch = planned[start : start + SPOKEN]
                spoken = [synthetic.render(one, synthesizer).wave for one in batch]
                yield from self.encode([torch.from_numpy(wave) for wave in spoken])

        return say


@dataclass(frozen=True)
class SpeechLM:
    """The models that turn units into text, and where they came from."""

    lm: LM
    vocabulary: Vocabulary
    adapter: Adapter | None
    """Reads what is retrieved; None where there is none."""
    identity: dict[str, str]
    """Role (codebook, lm) -> fingerprint of the artifact."""

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> SpeechLM:
        """Read `lm/` below `directory`, and `adapter/` if it is there.

        Raises ArtifactError if `lm` or `codebook` is missing or they were not made for each other.
        """
        made = {kind: artifact.load(directory / kind, kind) for kind in ("codebook", "lm")}
        made["lm"].require("codebook", made["codebook"])
        lm, vocabulary = pretrained.load(made["lm"].path, device)
        adapter = None
        if (directory / "adapter").exists():
            trained = artifact.load(directory / "adapter", "adapter")
            trained.require("lm", made["lm"])
            adapter = pretrained.load_adapter(trained.path, lm)
        identity = {role: one.fingerprint for role, one in made.items()}
        return cls(lm, vocabulary, adapter, identity)

    def window_cache(self, source: Retriever) -> WindowCache:
        """The windows of `source` as the adapter reads them; ValueError without."""
        if self.adapter is None:
            raise ValueError("these models have no cross-attention adapter")
        return WindowCache(self.adapter, self.lm, source)


@dataclass(frozen=True)
class Recogniser(SpeechTokenizer, SpeechLM):
    """Both: sound to text."""

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> Recogniser:
        """Read `hubert/`, `codebook/` and `lm/` below `directory`, and `adapter/` if it is there.

        Raises ArtifactError if one is missing or was not made for the others.
        """
        tokenizer, lm = SpeechTokenizer.load(directory, device), SpeechLM.load(directory, device)
        fields = vars(tokenizer) | vars(lm)
        return cls(**fields | {"identity": tokenizer.identity | lm.identity})


def transcribe(
    path: Path | bytes,
    recogniser: Recogniser,
    settings: Decode,
    retrieval: Retrieval | None = None,
    source: Retriever | None = None,
    attention: AttentionSource | None = None,
) -> Iterator[Transcript]:
    """Transcribe a file of any length, one segment of at most `settings.max_seconds` at a time.

    `source` names where retrieved words come from; it is what `retrieval` and `attention` search.
    Raises AudioError if the file cannot be read or is too short to hold a word.
    """
    for segment in audio.segments(path, settings.max_seconds):
        if not vad.spoken(segment.wave, settings.speech):
            yield Transcript("", start=segment.start, end=segment.end)
            continue
        units = recogniser.encode([vad.trim(segment.wave)[0]])
        [heard] = recognise(recogniser, units, settings, retrieval, attention_sources=[attention])
        text = recogniser.vocabulary.decode(heard.tokens)
        spoken = words(heard, recogniser.vocabulary, source)
        yield Transcript(text, spoken, segment.start, segment.end, heard.stopped)


def recognise(
    recogniser: Recogniser,
    units: Sequence[Units],
    settings: Decode,
    retrieval: Retrieval | Sequence[Retrieval | None] | None = None,
    **biasing: Any,
) -> list[Hypothesis]:
    """Units of several clips to hypotheses, decoded together; `biasing` is handed to `decode`.

    With `settings.agreement`, a transcript made with retrieval that the language model finds too
    unlikely, or that goes round in circles, is made again without.
    """
    vocabulary = recogniser.vocabulary
    ids = [vocabulary.encode_units(one) for one in units]
    frame = recogniser.codebook.frame_seconds
    limits = [longest(one, frame, settings) for one in units]
    heard = decode(recogniser.lm, vocabulary, ids, limits, settings, retrieval, **biasing)
    given = retrieval if isinstance(retrieval, Sequence) else [retrieval]
    helped = any((*given, *(biasing.get("attention_sources") or ())))
    if not helped or settings.agreement is None:
        return heard
    doubtful = [n for n, one in enumerate(heard) if not credible(one, settings.agreement)]
    alone = decode(
        recogniser.lm,
        vocabulary,
        [ids[n] for n in doubtful],
        [limits[n] for n in doubtful],
        settings,
    )
    for n, one in zip(doubtful, alone, strict=True):
        heard[n] = one
    return heard


def longest(units: Units, frame_seconds: float, settings: Decode) -> int:
    """The longest transcript that units may have, tokens."""
    seconds = float(units.durations.sum()) * frame_seconds
    return max(16, round(seconds * settings.tokens_per_second))


def words(
    heard: Hypothesis, vocabulary: Vocabulary, source: Retriever | None = None
) -> tuple[Word, ...]:
    """The hypothesis's words with probabilities, and the entry of `source` that spoke for each."""
    ends = vocabulary.word_ends(heard.tokens)
    starts = [0, *(end for _, end in ends)]
    tokens = [heard.choices[start:end] for start, (_, end) in zip(starts, ends, strict=False)]
    evidence = [None if source is None else _evidence(choices) for choices in tokens]
    sources = _sources([one for one in evidence if one is not None], vocabulary, source)
    return tuple(
        Word(
            text=text,
            probability=_probability(choice.logp for choice in choices),
            lm_probability=_probability(choice.lm_logp for choice in choices),
            changed=any(choice.token != choice.lm_token for choice in choices),
            source=None if one is None else next(sources),
        )
        for (text, _), choices, one in zip(ends, tokens, evidence, strict=True)
    )


def _probability(logps: Iterator[float]) -> float:
    return math.exp(sum(logps))


@dataclass(frozen=True)
class _Evidence:
    """An entry with its distance and its attention, as in `Source`."""

    entry: int
    distance: float | None
    attention: float | None


def _evidence(choices: Sequence[Choice]) -> _Evidence | None:
    """The entry that mattered most to a word; of its tokens, those that retrieval changed count.

    That is the one whose window was attended to most, or the nearest of those that voted.
    """
    changed = [choice for choice in choices if choice.token != choice.lm_token] or choices
    attention: dict[int, float] = {}
    distances: dict[int, float] = {}
    for choice in changed:
        for entry, share, distance in choice.attended:
            attention[entry] = attention.get(entry, 0.0) + share / len(changed)
            distances[entry] = min(distance, distances.get(entry, math.inf))
    voted = [choice for choice in changed if choice.entry != NO_ENTRY]
    if not attention and not voted:
        return None
    if attention:
        entry = max(attention, key=attention.__getitem__)
    else:
        nearest = min(voted, key=lambda choice: choice.distance)
        entry, distances = nearest.entry, {nearest.entry: nearest.distance}
    distance = distances[entry] if math.isfinite(distances[entry]) else None
    return _Evidence(entry, distance, attention.get(entry))


def _sources(
    evidence: Sequence[_Evidence], vocabulary: Vocabulary, source: Retriever | None
) -> Iterator[Source]:
    """All of them looked up together: `source` may be on another machine."""
    if source is None or not evidence:
        return
    entries = np.array([one.entry for one in evidence])
    found = zip(evidence, source.origins(entries), source.windows(entries), strict=True)
    for one, (document, utterance), window in found:
        text = vocabulary.decode(window.tolist())
        yield Source(one.entry, one.distance, one.attention, document, utterance, text)
