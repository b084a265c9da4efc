"""Audio to transcript, from end to end. Start reading here.

audio -> units (or Whisper's states) -> decode (with retrieval) -> words with their evidence
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmrag.config import Decode
from mmrag.decoding.confidence import Calibration
from mmrag.decoding.decode import Choice, Hypothesis, decode
from mmrag.decoding.guard import credible
from mmrag.model.contract import TextVocabulary
from mmrag.recogniser import AnyRecogniser
from mmrag.records import NO_ENTRY, Retriever, Source, Transcript, Word
from mmrag.retrieval.interpolation import Retrieval
from mmrag.retrieval.memory import AttentionSource
from mmrag.retrieval.shortlist import Shortlist
from mmrag.speech import audio, vad


def transcribe(
    path: Path | bytes,
    recogniser: AnyRecogniser,
    settings: Decode,
    retrieval: Retrieval | None = None,
    source: Retriever | None = None,
    attention: AttentionSource | None = None,
    shortlist: Shortlist | None = None,
) -> Iterator[Transcript]:
    """Transcribe a file of any length, one segment of at most `settings.max_seconds` at a time.

    `source` names where retrieved words come from; it is what `retrieval` and `attention` search,
    all of it, or the phrases of a `shortlist` that a segment may have said.
    Raises AudioError if the file cannot be read or is too short to hold a word.
    """
    for segment in audio.segments(path, min(settings.max_seconds, recogniser.window_seconds)):
        if not vad.spoken(segment.wave, settings.speech):
            yield Transcript("", start=segment.start, end=segment.end)
            continue
        units = recogniser.encode([vad.trim(segment.wave)[0]])
        [heard] = recognise(
            recogniser, units, settings, retrieval, shortlist, attention_sources=[attention]
        )
        text = recogniser.vocabulary.decode(heard.tokens)
        spoken = words(heard, recogniser.vocabulary, source)
        made = Transcript(text, spoken, segment.start, segment.end, heard.stopped)
        yield judged(made, recogniser.calibration, settings)


def recognise(
    recogniser: AnyRecogniser,
    units: Sequence[Any],
    settings: Decode,
    retrieval: Retrieval | Sequence[Retrieval | None] | None = None,
    shortlist: Shortlist | None = None,
    **biasing: Any,
) -> list[Hypothesis]:
    """Encoded clips to hypotheses, decoded together; `biasing` is handed to `decode`.

    With a `shortlist` they are decoded twice: without what they are given, then with as much of it
    as sounds like the first transcript. One in which nothing does stays as it was.
    With `settings.agreement`, a transcript made with retrieval that the language model finds too
    unlikely, or that goes round in circles, is made again without.
    """
    vocabulary = recogniser.vocabulary
    ids = [vocabulary.speech_input(one) for one in units]
    limits = [recogniser.longest(recogniser.seconds(one), settings) for one in units]

    def alone(clips: Sequence[int]) -> list[Hypothesis]:
        few = [ids[n] for n in clips], [limits[n] for n in clips]
        return decode(recogniser.lm, vocabulary, *few, settings)

    each = retrieval if isinstance(retrieval, Sequence) else [retrieval] * len(units)
    read = biasing.pop("attention_sources", None) or [None] * len(units)
    first: list[Hypothesis] = []
    if shortlist is not None and any((*each, *read)):
        first = alone(range(len(units)))
        texts = [vocabulary.decode(one.tokens) for one in first]
        given = [shortlist.given(*one) for one in zip(texts, each, read, strict=True)]
        each, read = zip(*given, strict=True)
    heard = decode(
        *(recogniser.lm, vocabulary, ids, limits, settings, each), attention_sources=read, **biasing
    )
    if not any((*each, *read)) or settings.agreement is None:
        return heard
    doubtful = [n for n, one in enumerate(heard) if not credible(one, settings.agreement)]
    again = [first[n] for n in doubtful] if first else alone(doubtful)
    for n, one in zip(doubtful, again, strict=True):
        heard[n] = one
    return heard


def words(
    heard: Hypothesis, vocabulary: TextVocabulary, source: Retriever | None = None
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


def judged(transcript: Transcript, calibration: Calibration | None, settings: Decode) -> Transcript:
    """The transcript with its confidence and that of its words, marked if it is unclear; without
    its words then, if `settings` want it so. Where nobody calibrated, it stays as it is."""
    if calibration is None or not transcript.words:
        return transcript
    probabilities = [word.probability for word in transcript.words]
    confidence = calibration.segment(probabilities)
    unclear = confidence < calibration.unclear
    marked = replace(transcript, confidence=confidence, unclear=unclear)
    if unclear and settings.unclear == "empty":
        return replace(marked, text="", words=())
    each = zip(transcript.words, calibration.words(probabilities).tolist(), strict=True)
    sure = tuple(replace(word, confidence=one, unclear=unclear) for word, one in each)
    return replace(marked, words=sure)


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
    evidence: Sequence[_Evidence], vocabulary: TextVocabulary, source: Retriever | None
) -> Iterator[Source]:
    """All of them looked up together: `source` may be on another machine."""
    if source is None or not evidence:
        return
    entries = np.array([one.entry for one in evidence])
    found = zip(evidence, source.origins(entries), source.windows(entries), strict=True)
    for one, (document, utterance), window in found:
        text = vocabulary.decode(window.tolist())
        yield Source(one.entry, one.distance, one.attention, document, utterance, text)
