"""Audio to transcript, from end to end. Start reading here.

audio -> units (or Whisper's states) -> decode (with retrieval) -> words with their evidence
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import starmap
from typing import Any

import numpy as np
from torch import Tensor

from mmrag.config import Decode
from mmrag.decoding.align import align, audible
from mmrag.decoding.boost import Boost
from mmrag.decoding.confidence import Calibration
from mmrag.decoding.decode import Choice, Hypothesis, decode
from mmrag.decoding.guard import credible, loops
from mmrag.decoding.spotting import Favoured
from mmrag.decoding.stitch import Stitcher
from mmrag.model.contract import TextVocabulary
from mmrag.recogniser import AnyRecogniser
from mmrag.records import NO_ENTRY, Letters, Retriever, Source, Timed, Transcript, Word
from mmrag.retrieval.display import Display
from mmrag.retrieval.interpolation import Retrieval
from mmrag.retrieval.memory import AttentionSource
from mmrag.retrieval.shortlist import Shortlist
from mmrag.speech import cutting, vad
from mmrag.speech.audio import SAMPLE_RATE, AudioError
from mmrag.speech.cutting import Segment
from mmrag.storage import Location

BATCH_SECONDS = 60.0
"""Audio that is transcribed at once, where nobody says how much."""
AS_HEARD = Display()
"""As the model writes."""


def transcribe(
    path: Location | bytes,
    recogniser: AnyRecogniser,
    settings: Decode,
    retrieval: Retrieval | None = None,
    source: Retriever | None = None,
    attention: AttentionSource | None = None,
    shortlist: Shortlist | None = None,
    favoured: Favoured | None = None,
    batch_seconds: float = BATCH_SECONDS,
    display: Display = AS_HEARD,
) -> Iterator[Transcript]:
    """Transcribe a file of any length in segments of at most `settings.max_seconds`, in order.

    `batch_seconds` of it are read, encoded and decoded at a time (one segment at least), and so
    much of it is in memory. It is cut in pauses; where nobody pauses for so long, neighbouring
    segments hear the same words, which are given once.

    `source` names where retrieved words come from; it is what `retrieval` and `attention` search,
    all of it, or the phrases of a `shortlist` that a segment may have said. Phrases that are
    `favoured` are spotted in each segment. Entries are written as `display` has them.
    Raises AudioError if the file cannot be read or is too short to hold a word; where it breaks
    off, what was said before has been given.
    """
    longest = min(settings.max_seconds, recogniser.window_seconds)
    found = cutting.segments(path, longest, overlap=cutting.overlap(longest))
    stitcher: Stitcher[Transcript] = Stitcher()
    try:
        for batch in _batches(found, batch_seconds):
            ways = retrieval, source, attention, shortlist, favoured
            heard = _heard(batch, recogniser, settings, *ways)
            for segment, made, timed in heard:
                where = segment.start, segment.before, segment.after
                complete = starmap(_kept, stitcher.add(made, timed, *where))
                yield from map(display.of_transcript, complete)
    except AudioError:
        yield from map(display.of_transcript, starmap(_kept, stitcher.rest()))
        raise


def _batches(segments: Iterator[Segment], batch_seconds: float) -> Iterator[list[Segment]]:
    """Segments of `batch_seconds` together, or a longer one; also of a file that breaks off."""
    batch: list[Segment] = []
    seconds = 0.0
    try:
        for segment in segments:
            own = len(segment.wave) / SAMPLE_RATE
            if batch and seconds + own > batch_seconds:
                yield batch
                batch, seconds = [], 0.0
            batch.append(segment)
            seconds += own
    except AudioError:
        if batch:
            yield batch
        raise
    yield batch


def _heard(
    segments: Sequence[Segment],
    recogniser: AnyRecogniser,
    settings: Decode,
    retrieval: Retrieval | None,
    source: Retriever | None,
    attention: AttentionSource | None,
    shortlist: Shortlist | None,
    favoured: Favoured | None,
) -> Iterator[tuple[Segment, Transcript, list[Timed]]]:
    """Each segment with all that is heard in it; its words' times where it shares some audio."""
    spoken = [n for n, one in enumerate(segments) if vad.spoken(one.wave, settings.speech)]
    clips = {n: vad.trim(segments[n].wave) for n in spoken}
    units = recogniser.encode([wave for wave, _ in clips.values()]) if clips else []
    reads = [attention] * len(units)
    ways = retrieval, shortlist, favoured
    decoded = (
        recognise(recogniser, units, settings, *ways, attention_sources=reads) if units else []
    )
    each = dict(zip(spoken, zip(units, decoded, strict=True), strict=True))
    for n, segment in enumerate(segments):
        if n not in each:
            yield segment, Transcript("", start=segment.start, end=segment.end), []
            continue
        encoded, heard = each[n]
        text = recogniser.vocabulary.decode(heard.tokens)
        found = words(heard, recogniser.vocabulary, source)
        if favoured is not None:
            found = favoured.evidence(found, letters(recogniser.vocabulary, encoded))
        made = Transcript(text, found, segment.start, segment.end, heard.stopped)
        made = judged(made, recogniser.calibration, settings)
        timed: list[Timed] = []
        if made.words and (segment.before or segment.after):
            wave, skipped = clips[n]
            begins = segment.start - segment.before + skipped / SAMPLE_RATE
            timed = _timed(recogniser, encoded, heard, wave, made.words, begins)
        yield segment, made, timed


def _timed(
    recogniser: AnyRecogniser,
    encoded: Any,
    heard: Hypothesis,
    wave: Tensor,
    spoken: Sequence[Word],
    begins: float,
) -> list[Timed]:
    """When words were said in a recording, of which `wave` begins at second `begins`."""
    times = recogniser.times(encoded)
    speech = recogniser.vocabulary.speech_input(encoded)
    models = recogniser.lm, recogniser.vocabulary
    spans = align(*models, speech, times, heard.tokens, audible(wave, times)) + begins
    return [
        Timed(word.text, float(start), float(end))
        for word, (start, end) in zip(spoken, spans, strict=True)
    ]


def _kept(made: Transcript, counted: slice) -> Transcript:
    """A transcript with those of its words that count."""
    kept = made.words[counted]
    if len(kept) == len(made.words):
        return made
    return replace(made, text=" ".join(word.text for word in kept), words=kept)


def recognise(
    recogniser: AnyRecogniser,
    units: Sequence[Any],
    settings: Decode,
    retrieval: Retrieval | Sequence[Retrieval | None] | None = None,
    shortlist: Shortlist | None = None,
    favoured: Favoured | None = None,
    **biasing: Any,
) -> list[Hypothesis]:
    """Encoded clips to hypotheses, decoded together; `biasing` is handed to `decode`.

    With a `shortlist` they are decoded twice: without what they are given, then with as much of it
    as sounds like the first transcript. One in which nothing does stays as it was. Of phrases that
    are `favoured`, those are that are spotted in a clip.
    With `settings.agreement`, a transcript made with retrieval that the language model finds too
    unlikely, or that goes round in circles, is made again without, and one that does with phrases
    alone without them.
    """
    vocabulary = recogniser.vocabulary
    ids = [vocabulary.speech_input(one) for one in units]
    limits = [recogniser.longest(recogniser.seconds(one), settings) for one in units]
    if favoured is not None:
        biasing["boosts"] = [favoured.boost(vocabulary.letters(one)) for one in ids]

    def alone(
        clips: Sequence[int], boosts: Sequence[Boost | None] | None = None
    ) -> list[Hypothesis]:
        few = [ids[n] for n in clips], [limits[n] for n in clips]
        kept = None if boosts is None else [boosts[n] for n in clips]
        return decode(
            recogniser.lm, vocabulary, *few, settings, ngram=recogniser.ngram, boosts=kept
        )

    each = retrieval if isinstance(retrieval, Sequence) else [retrieval] * len(units)
    read = biasing.pop("attention_sources", None) or [None] * len(units)
    first: list[Hypothesis] = []
    if shortlist is not None and any((*each, *read)):
        first = alone(range(len(units)))
        texts = [vocabulary.decode(one.tokens) for one in first]
        given = [shortlist.given(*one) for one in zip(texts, each, read, strict=True)]
        each, read = zip(*given, strict=True)
    heard = decode(
        *(recogniser.lm, vocabulary, ids, limits, settings, each),
        attention_sources=read,
        ngram=recogniser.ngram,
        **biasing,
    )
    if settings.agreement is None:
        return heard
    boosts = biasing.get("boosts")
    helped = [n for n in range(len(units)) if each[n] or read[n]]
    doubtful = [n for n in helped if not credible(heard[n], settings.agreement)]
    again = [first[n] for n in doubtful] if first and not boosts else alone(doubtful, boosts)
    for n, one in zip(doubtful, again, strict=True):
        heard[n] = one
    favouring = [n for n, one in enumerate(boosts or ()) if one is not None]
    looping = [n for n in favouring if loops(heard[n].tokens)]
    for n, one in zip(looping, alone(looping), strict=True):
        heard[n] = one
    return heard


def letters(vocabulary: TextVocabulary, encoded: Any) -> Letters | None:
    """What a CTC head hears in an encoded clip; None where there is none."""
    return vocabulary.letters(vocabulary.speech_input(encoded))


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
    confidence = calibration.segment(transcript.words)
    unclear = confidence < calibration.unclear
    marked = replace(transcript, confidence=confidence, unclear=unclear)
    if unclear and settings.unclear == "empty":
        return replace(marked, text="", words=())
    each = zip(transcript.words, calibration.words(transcript.words).tolist(), strict=True)
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
