"""Texts and recordings as entries: spoken by the encoder, read by the decoder, a part at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, groupby
from uuid import uuid4

import numpy as np
from ray.serve.handle import DeploymentHandle

from mmrag.model.vocabulary import Vocabulary
from mmrag.recogniser import Speakers
from mmrag.records import Line, Utterance
from mmrag.retrieval.confusion import Heard, heard, hearing
from mmrag.retrieval.phrases import phrases_and_sentences, sayings, sentences
from mmrag.retrieval.segment import Segment
from mmrag.retrieval.wording import Entry
from mmrag.speech.tokenized import Tokenized
from serve.messages import DecodeRequest, Encoded, InvalidRequest
from serve.parts import PART_SENTENCES, in_order, parts
from serve.settings import Speaking

Said = tuple[Utterance, str | Line]
"""An utterance as it is written, and what is said of it."""


class Additions:
    """What is to become entries of a datastore, or of one request."""

    def __init__(
        self,
        encoder: DeploymentHandle,
        decoder: DeploymentHandle,
        vocabulary: Vocabulary,
        speaking: Speaking,
    ) -> None:
        """Both are called by reference (`handles`)."""
        self._encoder = encoder
        self._decoder = decoder
        self._vocabulary = vocabulary
        self._speaking = speaking
        self._speakers = Speakers(speaking, math.inf)

    def hurried(self, given: Sequence[Entry]) -> bool:
        """Whether these texts are so much that they are said in a hurry: once each, by espeak-ng
        alone, since others would speak for longer than `speaking.seconds`."""
        phrases, longer = phrases_and_sentences(given)
        said = chain(self._sayings(phrases, False), self._sentences(longer, False))
        return self._speakers.waited_for((line for _, line in said), self._speaking.seconds)

    async def spoken(self, given: Sequence[Entry], hurried: bool) -> list[Segment]:
        """Texts as entries: a phrase is said in carrier sentences, a sentence as it stands."""
        phrases, longer = phrases_and_sentences(given)
        said = [[one] for one in self._sentences(longer, hurried)]
        carried = self._carried(phrases, hurried)
        made = [
            *await self._read_spoken(carried, "entities", hurried),
            *await self._read_spoken(said, "all", hurried),
        ]
        worded = {one.text: one for one in (*phrases, *(one for one in longer if not one.plain))}
        return [
            replace(one, wordings={n: worded[n] for _, n in one.names if n in worded})
            for one in made
        ]

    async def paired(
        self, texts: Sequence[str], waves: Sequence[Sequence[np.ndarray]]
    ) -> list[Segment]:
        """Recordings as entries, an entry a token of what is said in them."""
        said = [[Utterance(id=uuid4().hex, text=text, document=text)] for text in texts]
        encoding = (self._encoder.encode.remote(wave) for [wave] in waves)
        encoded = await in_order(encoding, PART_SENTENCES)
        for text, one in zip(texts, encoded, strict=True):
            if one is None:
                raise InvalidRequest(f"nobody speaks in the recording of {text!r}")
        units = iter([one.units for one in encoded])
        paired = [[(one, next(units)) for one in part] for part in parts(said)]
        return await in_order(self._read(*zip(*p, strict=True), "all") for p in paired)

    async def phrases(
        self,
        phrases: Sequence[Entry],
        keep: Callable[[dict[str, Segment]], None],
        hurried: bool,
    ) -> None:
        """Phrases as entries, of which `keep` is told as soon as some are there: each phrase's."""

        def cut(segment: Segment) -> Segment:
            keep(_by_document(segment))
            return segment

        await self._read_spoken(self._carried(phrases, hurried), "entities", hurried, cut)

    async def heard(self, one: Entry, hurried: bool) -> tuple[Heard, ...]:
        """What the model hears of an entry without retrieval, however it is pronounced."""
        lines = hearing(one, self._vocabulary)
        units = await self._encoder.synthesize.remote(lines, hurried)
        asked = (self._decoder.transcribe.remote(DecodeRequest(own)) for own in units)
        texts = [result.text for result in await in_order(asked)]
        sentences = [line if isinstance(line, str) else line.text for line in lines]
        return heard(one, self._vocabulary, texts, sentences)

    async def _read_spoken(
        self,
        groups: Sequence[Sequence[Said]],
        kind: str,
        hurried: bool,
        keep: Callable[[Segment], Segment] = lambda segment: segment,
    ) -> list[Segment]:
        """Groups of sentences, spoken by the encoder and read by the decoder, as entries.

        A group stays together. `keep` is called with each segment as soon as it is there. Raises
        InvalidRequest for a text that cannot be spoken, before anything is spoken.
        """
        lines = {one.id: line for group in groups for one, line in group}
        for one in (one for group in groups for one, _ in group):
            if refusal := self._vocabulary.refusal(one.document):
                raise InvalidRequest(refusal)

        async def read(part: Sequence[Utterance]) -> Segment:
            said = [lines[one.id] for one in part]
            units = await self._encoder.synthesize.remote(said, hurried)
            return keep(await self._read(part, units, kind))

        told = [[one for one, _ in group] for group in groups]
        return await in_order(read(part) for part in parts(told))

    async def _read(
        self, said: Sequence[Utterance], units: Sequence[Encoded], kind: str
    ) -> Segment:
        """The entries of utterances, given their units."""
        spoken = [Tokenized(one, own) for one, own in zip(said, units, strict=True)]
        return await self._decoder.entries.remote(spoken, kind)

    def _carried(self, phrases: Sequence[Entry], hurried: bool) -> list[list[Said]]:
        """Each phrase's carrier sentences."""
        said = self._sayings(phrases, hurried)
        return [list(group) for _, group in groupby(said, lambda one: one[0].document)]

    def _sayings(self, phrases: Sequence[Entry], hurried: bool) -> Iterator[Said]:
        return sayings(phrases, spoken=self._vocabulary.spoken, takes=self._takes(hurried))

    def _sentences(self, longer: Sequence[Entry], hurried: bool) -> Iterator[Said]:
        return sentences(longer, self._vocabulary.spoken, self._takes(hurried))

    def _takes(self, hurried: bool) -> int:
        return 1 if hurried else self._speaking.takes


def _by_document(segment: Segment) -> dict[str, Segment]:
    """A segment cut into one a document."""
    found = {}
    for document in dict.fromkeys(document for _, document in segment.names):
        own = [n for n, (_, of) in enumerate(segment.names) if of == document]
        rows = np.isin(segment.utterances, own)
        found[document] = Segment(
            keys=segment.keys[rows],
            tokens=segment.tokens[rows],
            windows=segment.windows[rows],
            positions=segment.positions[rows],
            utterances=np.searchsorted(own, segment.utterances[rows]),
            names=[segment.names[n] for n in own],
            surprisals=segment.expected()[rows],
        )
    return found
