"""Ways to transcribe: what each hands the decoder, opened inside the worker that uses it.

A mode is a frozen description that travels to the worker; `open` loads what it needs there and
returns a guide, which says for each batch what `mmrag.transcribe.recognise` is given besides the
speech.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from mmrag.boost import Boost
from mmrag.config import KNN
from mmrag.datastore import Datastore
from mmrag.decode import Retrieval
from mmrag.index import LocalRetriever, SubsetRetriever, saved_shards
from mmrag.records import Retriever
from mmrag.tokens import Tokenized
from mmrag.vocabulary import Vocabulary

Guide = Callable[[Sequence[Tokenized]], dict[str, Any]]
"""A batch of utterances -> keyword arguments of `recognise`."""
Phrases = Mapping[str, Sequence[str]]
"""The phrases that come with each utterance, by its id."""


class Mode(Protocol):
    """How to transcribe."""

    def open(self, vocabulary: Vocabulary) -> Guide: ...


@dataclass(frozen=True)
class Plain:
    """The language model alone."""

    def open(self, vocabulary: Vocabulary) -> Guide:
        return lambda batch: {}


@dataclass(frozen=True)
class Retrieving:
    """One datastore for every utterance: a retriever, or a directory opened in the worker."""

    source: Retriever | Path
    knn: KNN

    def open(self, vocabulary: Vocabulary) -> Guide:
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

    def open(self, vocabulary: Vocabulary) -> Guide:
        datastore = Datastore.open(self.datastore)
        order = np.argsort(datastore.documents, kind="stable")
        ends = np.cumsum(np.bincount(datastore.documents))
        spans = {
            datastore.document_name(number): slice(*span)
            for number, span in enumerate(pairwise([0, *ends.tolist()]))
        }

        def guide(batch: Sequence[Tokenized]) -> dict[str, Any]:
            named = [self.documents[one.utterance.id] for one in batch]
            entries = [np.concatenate([order[spans[name]] for name in own]) for own in named]
            subsets = [SubsetRetriever(datastore, own) for own in entries]
            return {"retrieval": [Retrieval(subset, self.knn) for subset in subsets]}

        return guide


@dataclass(frozen=True)
class RetrievingSome:
    """The first `entries` of a datastore, of each utterance every `stride`-th."""

    datastore: Path
    knn: KNN
    entries: int
    stride: int = 1

    def open(self, vocabulary: Vocabulary) -> Guide:
        datastore = Datastore.open(self.datastore)
        chosen = np.arange(min(self.entries, datastore.entries))
        chosen = chosen[datastore.positions[chosen] % self.stride == 0]
        retrieval = Retrieval(SubsetRetriever(datastore, chosen), self.knn)
        return lambda batch: {"retrieval": retrieval}


@dataclass(frozen=True)
class BoostingPhrases:
    """Each utterance's phrases favoured by `weight` nats a piece."""

    weight: float
    phrases: Phrases

    def open(self, vocabulary: Vocabulary) -> Guide:
        starts = torch.from_numpy(vocabulary.word_starts())

        def guide(batch: Sequence[Tokenized]) -> dict[str, Any]:
            listed = [self.phrases[one.utterance.id] for one in batch]
            boosts = [Boost(self._spelt(own, vocabulary), self.weight, starts) for own in listed]
            return {"boosts": boosts}

        return guide

    def _spelt(self, phrases: Sequence[str], vocabulary: Vocabulary) -> list[list[int]]:
        """Phrases as ids; some vocabularies spell a word behind a blank in another way."""
        return [vocabulary.encode(blank + phrase) for phrase in phrases for blank in ("", " ")]


@dataclass(frozen=True)
class PromptingPhrases:
    """Each utterance's phrases as text before its speech."""

    phrases: Phrases

    def open(self, vocabulary: Vocabulary) -> Guide:
        def guide(batch: Sequence[Tokenized]) -> dict[str, Any]:
            listed = [map(vocabulary.encode, self.phrases[one.utterance.id]) for one in batch]
            return {"contexts": [list(chain.from_iterable(own)) for own in listed]}

        return guide


def open_locally(directory: Path) -> LocalRetriever:
    """A datastore with all of its shards in this process."""
    return LocalRetriever.load(saved_shards(directory), Datastore.open(directory))
