"""Ways to transcribe: what each hands the decoder, opened inside the worker that uses it.

A mode is a frozen description that travels to the worker; `open` loads what it needs there and
returns a guide, which says for each batch what `mmrag.transcribe.recognise` is given besides the
speech.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch

from mmrag.artifact import local
from mmrag.config import KNN, RetrievedAttention, Spotting
from mmrag.decoding.boost import Boost
from mmrag.decoding.spotting import Favoured
from mmrag.recogniser import Recogniser
from mmrag.records import Retriever
from mmrag.retrieval import terms
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.index import saved_shards
from mmrag.retrieval.interpolation import Retrieval
from mmrag.retrieval.memory import AttentionSource
from mmrag.retrieval.phrases import Phrases
from mmrag.retrieval.retrievers import LocalRetriever, SubsetRetriever
from mmrag.speech.tokenized import Tokenized
from mmrag.storage import Location
from mmrag.transcribe import letters

Biasing = Callable[[Sequence[Tokenized]], dict[str, Any]]
"""A batch of utterances -> keyword arguments of `recognise`."""
PhraseLists = Mapping[str, Sequence[str]]
"""The phrases that come with each utterance, by its id."""


class Mode(Protocol):
    """How to transcribe."""

    def open(self, recogniser: Recogniser) -> Biasing: ...


@dataclass(frozen=True)
class NoRetrieval:
    """The language model alone."""

    def open(self, recogniser: Recogniser) -> Biasing:
        return lambda batch: {}


@dataclass(frozen=True)
class KNNRetrieval:
    """One datastore for every utterance: a retriever, or a directory opened in the worker."""

    source: Retriever | Location
    knn: KNN

    def open(self, recogniser: Recogniser) -> Biasing:
        retriever = open_locally(self.source) if isinstance(self.source, Location) else self.source
        retrieval = Retrieval(retriever, self.knn)
        return lambda batch: {"retrieval": retrieval}


@dataclass(frozen=True)
class DocumentKNN:
    """One datastore, of which each utterance searches some documents: the phrases that come with
    it, or what a first level of retrieval left over. `documents` names them by utterance."""

    datastore: Location
    knn: KNN
    documents: Mapping[str, Sequence[str]]

    def open(self, recogniser: Recogniser) -> Biasing:
        datastore = Datastore.open(self.datastore)

        def guide(batch: Sequence[Tokenized]) -> dict[str, Any]:
            named = [self.documents[one.utterance.id] for one in batch]
            subsets = [SubsetRetriever(datastore, datastore.entries_of(own)) for own in named]
            return {"retrieval": [Retrieval(subset, self.knn) for subset in subsets]}

        return guide


@dataclass(frozen=True)
class SubsetKNN:
    """The first `entries` of a datastore, of each utterance every `stride`-th."""

    datastore: Location
    knn: KNN
    entries: int
    stride: int = 1

    def open(self, recogniser: Recogniser) -> Biasing:
        datastore = Datastore.open(self.datastore)
        chosen = np.arange(min(self.entries, datastore.entries))
        chosen = chosen[datastore.positions[chosen] % self.stride == 0]
        retrieval = Retrieval(SubsetRetriever(datastore, chosen), self.knn)
        return lambda batch: {"retrieval": retrieval}


@dataclass(frozen=True)
class CrossAttentionRetrieval:
    """One datastore for every utterance, whose nearest windows the adapter reads."""

    source: Retriever | Location
    attention: RetrievedAttention

    def open(self, recogniser: Recogniser) -> Biasing:
        retriever = open_locally(self.source) if isinstance(self.source, Location) else self.source
        source = AttentionSource(recogniser.window_cache(retriever), self.attention, retriever)
        return lambda batch: {"attention_sources": [source] * len(batch)}


@dataclass(frozen=True)
class PhraseCrossAttention:
    """Each utterance's phrases, read from a datastore of entities: all of them, or what a search
    among them brings where they are too many."""

    datastore: Location
    attention: RetrievedAttention
    phrases: PhraseLists
    mentions: int
    """Ways of saying a phrase that are read whole."""

    def open(self, recogniser: Recogniser) -> Biasing:
        datastore = Datastore.open(self.datastore)
        known = Phrases(datastore)
        everything = SubsetRetriever(datastore, np.empty(0, np.int64))
        cache = recogniser.window_cache(everything)

        def attention_source(one: Tokenized) -> AttentionSource:
            listed = self.phrases[one.utterance.id]
            windows = known.first_mentions(listed, self.mentions)
            whole = AttentionSource(cache, self.attention, everything, windows)
            if whole.whole:
                return whole
            own = datastore.entries_of(listed)
            return replace(whole, retriever=SubsetRetriever(datastore, own))

        return lambda batch: {"attention_sources": [attention_source(one) for one in batch]}


@dataclass(frozen=True)
class Both:
    """Several ways at once: neighbours that vote and windows that are read."""

    modes: tuple[Mode, ...]

    def open(self, recogniser: Recogniser) -> Biasing:
        guides = [mode.open(recogniser) for mode in self.modes]
        return lambda batch: {key: v for guide in guides for key, v in guide(batch).items()}


def retrieval_mode(
    source: Retriever | Location, knn: KNN | None, read: RetrievedAttention | None
) -> Mode:
    """The mode that votes with the neighbours, attends to them, or both, by what is given."""
    ways: list[Mode] = []
    if knn is not None:
        ways.append(KNNRetrieval(source, knn))
    if read is not None:
        ways.append(CrossAttentionRetrieval(source, read))
    return ways[0] if len(ways) == 1 else Both(tuple(ways))


def phrase_mode(
    datastore: Location,
    knn: KNN | None,
    read: RetrievedAttention | None,
    phrases: PhraseLists,
    mentions: int = 1,
) -> Mode:
    """Like `retrieval_mode`, among each utterance's own phrases alone, which are documents of a
    datastore of entities."""
    ways: list[Mode] = []
    if knn is not None:
        ways.append(DocumentKNN(datastore, knn, phrases))
    if read is not None:
        ways.append(PhraseCrossAttention(datastore, read, phrases, mentions))
    return ways[0] if len(ways) == 1 else Both(tuple(ways))


@dataclass(frozen=True)
class PhraseBoosting:
    """Each utterance's phrases favoured by `weight` nats a piece."""

    weight: float
    phrases: PhraseLists

    def open(self, recogniser: Recogniser) -> Biasing:
        vocabulary = recogniser.vocabulary
        starts = torch.from_numpy(vocabulary.word_starts())

        def guide(batch: Sequence[Tokenized]) -> dict[str, Any]:
            listed = [self.phrases[one.utterance.id] for one in batch]
            spelt = [chain.from_iterable(map(vocabulary.spellings, own)) for own in listed]
            return {"boosts": [Boost(own, self.weight, starts) for own in spelt]}

        return guide


@dataclass(frozen=True)
class PhraseSpotting:
    """Of each utterance's phrases, those that the CTC head hears in it favoured."""

    settings: Spotting
    phrases: PhraseLists

    def open(self, recogniser: Recogniser) -> Biasing:
        vocabulary = recogniser.vocabulary
        known: dict[tuple[str, ...], Favoured] = {}

        def boost(one: Tokenized) -> Boost | None:
            listed = tuple(self.phrases[one.utterance.id])
            if listed not in known:
                known.clear()  # lists are everybody's, or each utterance's own
                known[listed] = Favoured(listed, vocabulary, self.settings)
            return known[listed].boost(letters(vocabulary, one.units))

        return lambda batch: {"boosts": [boost(one) for one in batch]}


@dataclass(frozen=True)
class DatastoreSpotting:
    """Of one datastore's phrases and terms, those that the CTC head hears in an utterance
    favoured."""

    datastore: Location
    settings: Spotting

    def open(self, recogniser: Recogniser) -> Biasing:
        vocabulary = recogniser.vocabulary
        own = terms.listed(Datastore.open(self.datastore), vocabulary)
        favoured = Favoured([one.entry for one in own], vocabulary, self.settings)
        return lambda batch: {
            "boosts": [favoured.boost(letters(vocabulary, one.units)) for one in batch]
        }


@dataclass(frozen=True)
class PhrasePrompting:
    """Each utterance's phrases as text before its speech."""

    phrases: PhraseLists

    def open(self, recogniser: Recogniser) -> Biasing:
        vocabulary = recogniser.vocabulary

        def guide(batch: Sequence[Tokenized]) -> dict[str, Any]:
            listed = [self.phrases[one.utterance.id] for one in batch]
            first = [[way for p in own for way in vocabulary.spellings(p)[:1]] for own in listed]
            return {"contexts": [list(chain.from_iterable(own)) for own in first]}

        return guide


def open_locally(directory: Location) -> LocalRetriever:
    """A datastore with all of its shards in this process."""
    directory = local(directory)
    return LocalRetriever.load(saved_shards(directory), Datastore.open(directory))
