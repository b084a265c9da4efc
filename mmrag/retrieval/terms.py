"""What a datastore has to be listened for: its phrases, and the terms of its sentences.

A term is what a text says and the language model would not write by itself: a name, a drug, a
product. A word surprises as much as its tokens do, each after the text before it and without any
speech, on the average over all the times that the datastore has it. Words that surprise and stand
side by side are a term; so is one word that surprises more, and what it is one word apart from
("bore and hodge"); and so is each of them with what always follows it ("bore and sons").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mmrag.model.contract import TextVocabulary
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.phrases import PHRASE_WORDS, are_phrases
from mmrag.retrieval.wording import Entry
from mmrag.text import normalise

WORD = 8.0
"""Nats of a word that belongs to a term: one of three thousand that were as likely."""
TERM = 20.0
"""Nats of the words together that stand side by side in a term."""
ALONE = 14.0
"""Nats of a word that is a term by itself."""
MOST = 300_000
"""Entries up to which a datastore that is served is looked through for terms, which is done anew,
in Python, whenever it changes."""
Span = tuple[int, int, int]
"""A sentence's number, and the words in it from the first to before the last."""


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
    ended: bool
    """Whether its end is an entry: it is whole, and not a phrase from a sentence."""
    words: tuple[tuple[str, float], ...]
    """Each with its nats."""

    @property
    def text(self) -> str:
        return " ".join(word for word, _ in self.words)


def listed(datastore: Datastore, vocabulary: TextVocabulary) -> list[Listed]:
    """The phrases of a datastore as they were given, and the terms of its sentences, in order of
    appearance; each once. What was deleted is not among them, nor what weighs nothing."""
    names = datastore.document_names(datastore.document_counts()[0])
    if are_phrases(datastore, vocabulary, names):  # of which there may be very many
        known = datastore.wordings()
        given = [known.get(name, Entry(name)) for name in names]
        return [Listed(one, one.text, one.text) for one in given if one.weight > 0]
    every = list(_said(datastore, vocabulary))
    rows = np.array([one.row for one in every], np.int64)
    documents = datastore.document_names(datastore.documents[rows])
    wordings, found = datastore.wordings(), dict[str, Listed]()
    sentences: list[tuple[_Said, str]] = []
    for one, document in zip(every, documents, strict=True):
        if one.ended and not _named(one, document, vocabulary):
            sentences.append((one, document))
        elif one.words and document not in found:
            entry = wordings.get(document, Entry(document))
            found[document] = Listed(entry, document, one.text)
    known = [*found, *(name for name, one in wordings.items() if not one.weight)]
    phrases = {normalise(vocabulary.spoken(name)) for name in known}
    nats = _mean(one for one, _ in sentences)
    texts = [[word for word, _ in one.words] for one, _ in sentences]
    spans = [(n, *span) for n, text in enumerate(texts) for span in _spans(text, nats)]
    for number, start, stop in (*spans, *_longer(texts, spans)):
        term = " ".join(texts[number][start:stop])
        one, document = sentences[number]
        if term not in phrases:
            found.setdefault(term, Listed(Entry(term), document, one.text))
    return list(found.values())


def anything(datastore: Datastore, vocabulary: TextVocabulary) -> bool:
    """Whether a datastore has anything to be listened for, as it seems at a glance: each word by
    itself, whatever it says and however else it is said. One of more than MOST entries has not."""
    rows = _rows(datastore) if datastore.entries <= MOST else np.zeros(0, np.int64)
    if not len(rows):
        return False
    begins, utterances = _begins(datastore, vocabulary, rows), datastore.utterances[rows]
    ends = datastore.tokens[rows] == vocabulary.eos
    if len(np.unique(utterances[ends])) < len(np.unique(utterances)):
        return True
    nats = np.where(ends, 0, datastore.surprisals[rows]).astype(np.float32)
    words, whose = np.add.reduceat(nats, begins), utterances[begins]
    beside = (np.minimum(words[1:], words[:-1]) >= WORD) & (whose[1:] == whose[:-1])
    pairs = beside & (words[1:] + words[:-1] >= TERM)
    three = beside[1:] & beside[:-1]  # which have as much
    return bool((words >= ALONE).any() or pairs.any() or three.any())


def _named(one: _Said, document: str, vocabulary: TextVocabulary) -> bool:
    """Whether a document is a phrase: called what is said in it, which is short."""
    short = bool(one.words) and len(document.split()) <= PHRASE_WORDS
    return short and normalise(one.text) == normalise(vocabulary.spoken(document))


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
            if spelled[own]:
                words.append((spelled[own], nats[at]))
        ended = tokens[edges[last] - 1] == vocabulary.eos
        yield _Said(int(rows[edges[first]]), ended, tuple(words))


def _mean(every: Iterator[_Said]) -> dict[str, float]:
    """How much each word surprises."""
    sums: dict[str, tuple[float, int]] = {}
    for one in every:
        for word, nats in one.words:
            total, count = sums.get(word, (0.0, 0))
            sums[word] = total + nats, count + 1
    return {word: total / count for word, (total, count) in sums.items()}


def _spans(words: Sequence[str], nats: Mapping[str, float]) -> Iterator[tuple[int, int]]:
    """Where a sentence has terms: words that surprise by themselves, runs of words that do, and
    two of these with one word between them."""
    edges = np.flatnonzero(np.diff([0, *(nats[word] >= WORD for word in words), 0])).tolist()
    runs = list(zip(edges[::2], edges[1::2], strict=True))
    for start, stop in runs:
        together = sum(nats[word] for word in words[start:stop])
        if 1 < stop - start <= PHRASE_WORDS and together >= TERM:
            yield start, stop
        yield from ((at, at + 1) for at in range(start, stop) if nats[words[at]] >= ALONE)
    for (start, stop), (after, end) in pairwise(runs):
        near = after == stop + 1 and end - start <= PHRASE_WORDS
        if near and max(nats[word] for word in words[start:end]) >= ALONE:
            yield start, end


def _longer(texts: Sequence[Sequence[str]], spans: Iterable[Span]) -> Iterator[Span]:
    """Terms with the words that follow each of them wherever it stands, in two sentences or
    more."""
    places: dict[tuple[str, ...], set[Span]] = {}
    for number, start, stop in spans:
        term = tuple(texts[number][start:stop])
        places.setdefault(term, set()).add((number, start, stop))
    for own in places.values():
        if len({tuple(texts[number]) for number, *_ in own}) < 2:
            continue
        number, start, stop = first = min(own)
        for after in range(PHRASE_WORDS - (stop - start)):
            following = {tuple(texts[n][end + after : end + after + 1]) for n, _, end in own}
            if len(following) > 1 or () in following:
                break
            first = number, start, stop + after + 1
        if first[2] > stop:
            yield first
