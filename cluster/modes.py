"""Ways to transcribe: what each hands the decoder, opened inside the worker that uses it.

A mode is a frozen description that travels to the worker; `open` loads what it needs there and
returns a guide, which says for each batch what `mmrag.transcribe.recognise` is given besides the
speech.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from mmrag.boost import Boost
from mmrag.config import KNN, Read
from mmrag.datastore import Datastore
from mmrag.decode import Retrieval
from mmrag.index import LocalRetriever, SubsetRetriever, saved_shards
from mmrag.phrases import Phrases
from mmrag.reading import Reading
from mmrag.records import Retriever
from mmrag.tokens import Tokenized
from mmrag.transcribe import Recogniser

Guide = Callable[[Sequence[Tokenized]], dict[str, Any]]
"""A batch of utterances -> keyword arguments of `recognise`."""
Listed = Mapping[str, Sequence[str]]
"""The phrases that come with each utterance, by its id."""


class Mode(Protocol):
    """How to transcribe."""

    def open(self, recogniser: Recogniser) -> Guide: ...


@dataclass(frozen=True)
class Plain:
    """The language model alone."""

    def open(self, recogniser: Recogniser) -> Guide:
        return lambda batch: {}


@dataclass(frozen=True)
class Retrieving:
    """One datastore for every utterance: a retriever, or a directory opened in the worker."""

    source: Retriever | Path
    knn: KNN

    def open(self, recogniser: Recogniser) -> Guide:
        retriever = open_locally(self.source) if isinstance(self.source, Path) else self.source
        retrieval = Retrieval(retriever, self.knn)
        return lambda batch: {"retrieval": retrieval}


@dataclass(frozen=True)
class RetrievingDocuments:
    """One datastore, of which each utterance searches some documents: the phrases that come with
    it, or what a first level of retrieval left over. `documents` names them by utterance."""

    datastore: Path
    knn: KNN
    documents: Mapping[str, Sequence[str]]

    def open(self, recogniser: Recogniser) -> Guide:
        datastore = Datastore.open(self.datastore)

        def guide(batch: Sequence[Tokenized]) -> dict[str, Any]:
            named = [self.documents[one.utterance.id] for one in batch]
            subsets = [SubsetRetriever(datastore, datastore.entries_of(own)) for own in named]
            return {"retrieval": [Retrieval(subset, self.knn) for subset in subsets]}

        return guide


@dataclass(frozen=True)
class RetrievingSome:
    """The first `entries` of a datastore, of each utterance every `stride`-th."""

    datastore: Path
    knn: KNN
    entries: int
    stride: int = 1

    def open(self, recogniser: Recogniser) -> Guide:
        datastore = Datastore.open(self.datastore)
        chosen = np.arange(min(self.entries, datastore.entries))
        chosen = chosen[datastore.positions[chosen] % self.stride == 0]
        retrieval = Retrieval(SubsetRetriever(datastore, chosen), self.knn)
        return lambda batch: {"retrieval": retrieval}


@dataclass(frozen=True)
class Attending:
    """One datastore for every utterance, whose nearest windows the adapter reads."""

    source: Retriever | Path
    read: Read

    def open(self, recogniser: Recogniser) -> Guide:
        retriever = open_locally(self.source) if isinstance(self.source, Path) else self.source
        reading = Reading(recogniser.bank(retriever), self.read, retriever)
        return lambda batch: {"readings": [reading] * len(batch)}


@dataclass(frozen=True)
class AttendingPhrases:
    """Each utterance's phrases, read from a datastore of entities: all of them, or what a search
    among them brings where they are too many."""

    datastore: Path
    read: Read
    phrases: Listed
    mentions: int
    """Ways of saying a phrase that are read whole."""

    def open(self, recogniser: Recogniser) -> Guide:
        datastore = Datastore.open(self.datastore)
        known = Phrases(datastore)
        everything = SubsetRetriever(datastore, np.empty(0, np.int64))
        bank = recogniser.bank(everything)

        def reading(one: Tokenized) -> Reading:
            listed = self.phrases[one.utterance.id]
            windows = known.first_mentions(listed, self.mentions)
            whole = Reading(bank, self.read, everything, windows)
            if whole.whole:
                return whole
            own = datastore.entries_of(listed)
            return replace(whole, retriever=SubsetRetriever(datastore, own))

        return lambda batch: {"readings": [reading(one) for one in batch]}


@dataclass(frozen=True)
class Together:
    """Several ways at once: neighbours that vote and windows that are read."""

    modes: tuple[Mode, ...]

    def open(self, recogniser: Recogniser) -> Guide:
        guides = [mode.open(recogniser) for mode in self.modes]
        return lambda batch: {key: v for guide in guides for key, v in guide(batch).items()}


def retrieving(source: Retriever | Path, knn: KNN | None, read: Read | None) -> Mode:
    """The mode that votes with the neighbours, attends to them, or both, by what is given."""
    ways: list[Mode] = []
    if knn is not None:
        ways.append(Retrieving(source, knn))
    if read is not None:
        ways.append(Attending(source, read))
    return ways[0] if len(ways) == 1 else Together(tuple(ways))


@dataclass(frozen=True)
class BoostingPhrases:
    """Each utterance's phrases favoured by `weight` nats a piece."""

    weight: float
    phrases: Listed

    def open(self, recogniser: Recogniser) -> Guide:
        vocabulary = recogniser.vocabulary
        starts = torch.from_numpy(vocabulary.word_starts())

        def guide(batch: Sequence[Tokenized]) -> dict[str, Any]:
            listed = [self.phrases[one.utterance.id] for one in batch]
            spelt = [chain.from_iterable(map(vocabulary.spellings, own)) for own in listed]
            return {"boosts": [Boost(own, self.weight, starts) for own in spelt]}

        return guide


@dataclass(frozen=True)
class PromptingPhrases:
    """Each utterance's phrases as text before its speech."""

    phrases: Listed

    def open(self, recogniser: Recogniser) -> Guide:
        vocabulary = recogniser.vocabulary

        def guide(batch: Sequence[Tokenized]) -> dict[str, Any]:
            listed = [map(vocabulary.encode, self.phrases[one.utterance.id]) for one in batch]
            return {"contexts": [list(chain.from_iterable(own)) for own in listed]}

        return guide


def open_locally(directory: Path) -> LocalRetriever:
    """A datastore with all of its shards in this process."""
    return LocalRetriever.load(saved_shards(directory), Datastore.open(directory))
