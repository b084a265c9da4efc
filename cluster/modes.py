"""Ways to transcribe: what each hands the decoder, opened inside the worker that uses it.

A mode is a frozen description that travels to the worker; `open` loads what it needs there and
returns a guide, which says for each batch what `mmrag.transcribe.recognise` is given besides the
speech.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
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
class RetrievingPhrases:
    """One datastore, of which each utterance searches the documents named after its phrases."""

    datastore: Path
    knn: KNN
    phrases: Phrases

    def open(self, vocabulary: Vocabulary) -> Guide:
        datastore = Datastore.open(self.datastore)
        order = np.argsort(datastore.documents, kind="stable")
        ends = np.cumsum(np.bincount(datastore.documents))
        entries = {
            datastore.document_name(document): order[start:end]
            for document, (start, end) in enumerate(
                zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)
            )
        }

        def guide(batch: Sequence[Tokenized]) -> dict[str, Any]:
            chosen = [[entries[p] for p in self.phrases[one.utterance.id]] for one in batch]
            return {
                "retrieval": [
                    Retrieval(SubsetRetriever(datastore, np.concatenate(own)), self.knn)
                    for own in chosen
                ]
            }

        return guide


@dataclass(frozen=True)
class BoostingPhrases:
    """Each utterance's phrases favoured by `weight` nats a piece."""

    weight: float
    phrases: Phrases

    def open(self, vocabulary: Vocabulary) -> Guide:
        starts = torch.from_numpy(vocabulary.word_starts())

        def guide(batch: Sequence[Tokenized]) -> dict[str, Any]:
            spelt = [map(vocabulary.encode, self.phrases[one.utterance.id]) for one in batch]
            return {"boosts": [Boost(own, self.weight, starts) for own in spelt]}

        return guide


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
