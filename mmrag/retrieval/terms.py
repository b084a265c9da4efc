"""What a datastore has to be listened for: its phrases, and the terms of its sentences.

A term is what a text says and the language model would not write by itself: a name, a drug, a
product. A word surprises as much as its tokens do, each after the text before it and without any
speech, on the average over all the times that the datastore has it. Words that surprise and stand
side by side are a term; so is one word that surprises as much.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from mmrag.model.contract import TextVocabulary
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.phrases import PHRASE_WORDS
from mmrag.retrieval.wording import Entry

WORD = 8.0
"""Nats of a word that belongs to a term: one of three thousand that were as likely."""
TERM = 16.0
"""Nats of all words of a term."""
ALONE = 14.0
"""Nats of a word that is a term by itself."""


@dataclass(frozen=True)
class Listed:
    """What is to be listened for, and where a datastore has it."""

    entry: Entry
    document: str
    text: str
    """What is said there, the first time."""


def places(listed: Iterable[Listed]) -> dict[str, tuple[str, str]]:
    """Of each, by its text, the document and what is said there (`Favoured`)."""
    return {one.entry.text: (one.document, one.text) for one in listed}


@dataclass(frozen=True)
class _Said:
    """What a datastore has of one utterance."""

    row: int
    """Its first entry."""
    words: tuple[tuple[str, float], ...]
    """Each with its nats."""

    @property
    def text(self) -> str:
        return " ".join(word for word, _ in self.words)


def listed(datastore: Datastore, vocabulary: TextVocabulary) -> list[Listed]:
    """The phrases of a datastore as they were given, and the terms of its sentences, in order of
    appearance; each once. What was deleted is not among them, nor what weighs nothing."""
    every = list(_said(datastore, vocabulary))
    rows = np.array([one.row for one in every], np.int64)
    documents = datastore.document_names(datastore.documents[rows])
    wordings, found = datastore.wordings(), dict[str, Listed]()
    sentences: list[tuple[_Said, str]] = []
    for one, document in zip(every, documents, strict=True):
        if len(document.split()) > PHRASE_WORDS or one.text not in vocabulary.spoken(document):
            sentences.append((one, document))
        elif document not in found:
            entry = wordings.get(document, Entry(document))
            found[document] = Listed(entry, document, one.text)
    nats = _mean(one for one, _ in sentences)
    for one, document in sentences:
        for term in _terms([word for word, _ in one.words], nats):
            found.setdefault(term, Listed(Entry(term), document, one.text))
    return list(found.values())


def surprising(datastore: Datastore, vocabulary: TextVocabulary) -> bool:
    """Whether the sentences of a datastore have a word that is a term, as it seems: nobody looks
    at what it says."""
    rows = _rows(datastore)
    nats = datastore.surprisals[rows].astype(np.float32)
    if not nats.any():
        return False
    return bool((np.add.reduceat(nats, _begins(datastore, vocabulary, rows)) >= ALONE).any())


def _rows(datastore: Datastore) -> np.ndarray:
    """The entries (N,) int64 that anybody finds."""
    return np.setdiff1d(np.arange(datastore.entries), datastore.hidden)


def _begins(datastore: Datastore, vocabulary: TextVocabulary, rows: np.ndarray) -> np.ndarray:
    """Which of the entries `rows` begin a word: (W,) indices of them."""
    begins = vocabulary.word_starts()[datastore.tokens[rows]]
    begins |= np.diff(datastore.utterances[rows], prepend=-1) != 0
    return np.flatnonzero(begins)


def _said(datastore: Datastore, vocabulary: TextVocabulary) -> Iterator[_Said]:
    rows = _rows(datastore)
    if not len(rows):
        return
    begins = _begins(datastore, vocabulary, rows)
    nats = np.add.reduceat(datastore.surprisals[rows].astype(np.float32), begins).tolist()
    tokens, utterances = datastore.tokens[rows].tolist(), datastore.utterances[rows[begins]]
    spelled: dict[tuple[int, ...], str] = {}
    edges = [*begins.tolist(), len(rows)]
    firsts = np.flatnonzero(np.diff(utterances, prepend=-1)).tolist()
    for first, last in zip(firsts, [*firsts[1:], len(begins)], strict=True):
        words = []
        for at in range(first, last):
            own = tuple(tokens[edges[at] : edges[at + 1]])
            if own not in spelled:
                spelled[own] = vocabulary.decode(own).strip()
            if spelled[own]:  # the end says nothing
                words.append((spelled[own], nats[at]))
        yield _Said(int(rows[edges[first]]), tuple(words))


def _mean(every: Iterator[_Said]) -> dict[str, float]:
    """How much each word surprises."""
    sums: dict[str, tuple[float, int]] = {}
    for one in every:
        for word, nats in one.words:
            total, count = sums.get(word, (0.0, 0))
            sums[word] = total + nats, count + 1
    return {word: total / count for word, (total, count) in sums.items()}


def _terms(words: list[str], nats: dict[str, float]) -> Iterator[str]:
    """The terms of a sentence: runs of words that surprise, and words that do by themselves."""
    run: list[str] = []
    for word in [*words, ""]:
        if word and nats[word] >= WORD:
            run.append(word)
            continue
        if 1 < len(run) <= PHRASE_WORDS and sum(nats[each] for each in run) >= TERM:
            yield " ".join(run)
        yield from (each for each in run if nats[each] >= ALONE)
        run = []
