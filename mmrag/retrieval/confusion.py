"""What an entry would be confused with, told before it is put in: by its sound, and by its keys.

A decoder goes by keys: what a model knows just before a token. So each entry that is there is asked
how many of the votes it would take where the new one is said, and how many it would lose to it.
Words that the model writes anyway have no keys; what sounds like them may be written instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mmrag.model.contract import TextVocabulary
from mmrag.records import Line
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.display import Display
from mmrag.retrieval.phrases import BARE, CARRIERS
from mmrag.retrieval.segment import Metric, Segment, distances, prepare
from mmrag.retrieval.shortlist import Pronounce, sound_alike
from mmrag.retrieval.wording import Entry
from mmrag.text import normalise

CANDIDATES = 50
"""Documents whose votes are counted: so many by their sound, and so many by their keys."""
MOST = 20
"""That are told of."""
SOUND, VOTES = 0.6, 0.1
"""What sounds less alike, and takes fewer votes, is not told of: set by hand, so that a short list
comes of it. Nobody decides anything by them."""
WORD_LETTERS = 3
"""Letters of a common word, at least."""
BLOCK = 65_536
"""Keys compared at once."""


@dataclass(frozen=True)
class Heard:
    """A sentence about an entry, said as it would be, and what a model hears without retrieval."""

    pronunciation: str
    sentence: str
    heard: str
    right: bool
    """Whether all of the entry's words are in it."""


@dataclass(frozen=True)
class Preview:
    """What is known of an entry before it is put in."""

    text: str
    writes: str
    """What the model writes for it."""
    shows: str
    """What a transcript has in its place."""
    heard: tuple[Heard, ...]
    confused_with: tuple[Confusable, ...]


@dataclass(frozen=True)
class Confusable:
    """Something that an entry may be confused with."""

    text: str
    kind: Literal["entry", "word"]
    """A document of the datastore, or a word that the model has a piece for."""
    sound: float
    """Share of their phones that is alike, 0 to 1 (`shortlist.sound_alike`)."""
    loses: float | None = None
    """Of the votes where the new entry is said, the share that this would take for other tokens,
    if the two were all there is; None for a word."""
    takes: float | None = None
    """The other way round: the share of this one's votes that the new entry would take."""

    @property
    def risk(self) -> float:
        """The larger of the two; 0 for a word."""
        return max(self.loses or 0.0, self.takes or 0.0)


def common_words(vocabulary: TextVocabulary) -> list[str]:
    """The words that a model has a piece of its own for: those that its text was full of."""
    starts = np.flatnonzero(vocabulary.word_starts())
    words = (vocabulary.decode([int(piece)]).strip() for piece in starts)
    return sorted({word for word in words if word.isalpha() and len(word) >= WORD_LETTERS})


def heard(
    new: Entry, vocabulary: TextVocabulary, transcripts: Iterable[str], sentences: Iterable[str]
) -> tuple[Heard, ...]:
    """What became of `hearing`'s sentences about an entry, in each of its pronunciations."""
    key = tuple(written(new, vocabulary).split())
    said = new.said(vocabulary.spoken(new.text))
    known = Display([(key, "")])
    return tuple(
        Heard(pronunciation, sentence, text, bool(known.among(text.split())))
        for pronunciation, sentence, text in zip(said, sentences, transcripts, strict=True)
    )


def hearing(new: Entry, vocabulary: TextVocabulary) -> list[str | Line]:
    """A sentence about an entry, in each of its pronunciations."""
    carrier = BARE if new.foreign else CARRIERS[0]
    return new.lines(carrier, vocabulary.spoken(new.text))


def written(new: Entry, vocabulary: TextVocabulary) -> str:
    """An entry as the model writes it."""
    return normalise(vocabulary.spoken(new.text))


def confusable(
    new: Entry,
    spoken: Segment,
    there: Datastore,
    documents: Sequence[str],
    words: Sequence[str],
    vocabulary: TextVocabulary,
    pronounce: Pronounce,
    temperature: float,
) -> list[Confusable]:
    """What `new` would be confused with, of the `documents` that are in a datastore and of common
    `words`; what is most alike by sound or by votes first. The datastore stays as it is.

    `spoken` are its entries, as they would be put in; `temperature` is that of the votes.
    """
    wordings = there.wordings(documents)
    names = [name for name in documents if name != new.text]
    known = [wordings.get(name, Entry(name)) for name in names]
    shares = _sounds(new, known, vocabulary, pronounce).tolist()
    sounds = dict(zip(names, shares, strict=True))
    likely = sorted(sounds, key=sounds.__getitem__, reverse=True)[:CANDIDATES]
    likely += [name for name in _near(spoken, there, new.text) if name in sounds]
    told = []
    for name in dict.fromkeys(likely):
        old = wordings.get(name, Entry(name))
        votes = _votes(spoken, new, there, old, temperature)
        told.append(Confusable(name, "entry", sounds[name], *votes))
    own = {*new.text.lower().split(), new.text.lower()}
    other = [word for word in words if word.lower() not in own]
    heard = _sounds(new, [Entry(word) for word in other], vocabulary, pronounce)
    told += map(Confusable, other, ["word"] * len(other), heard.tolist())
    kept = [one for one in told if one.sound >= SOUND or one.risk >= VOTES]
    return sorted(kept, key=lambda one: (-max(one.risk, one.sound), one.text))[:MOST]


def _sounds(
    new: Entry, others: Sequence[Entry], vocabulary: TextVocabulary, pronounce: Pronounce
) -> np.ndarray:
    """How alike each of the others sounds (O,), by the pronunciations that are most alike."""
    if not others:
        return np.zeros(0, np.float32)
    said = pronounce(new.lines(BARE, vocabulary.spoken(new.text)))
    lines = [one.lines(BARE, vocabulary.spoken(one.text)) for one in others]
    every = pronounce([line for own in lines for line in own])
    best = sound_alike(said, every).max(axis=0)
    edges = np.cumsum([0, *(len(own) for own in lines[:-1])])
    return np.maximum.reduceat(best, edges)


def _near(spoken: Segment, there: Datastore, but: str) -> list[str]:
    """The documents that have the keys nearest to any of those spoken."""
    if not there.entries or not len(spoken.tokens):
        return []
    metric = there.description.metric
    keys = prepare(spoken.keys, metric)
    nearest = np.full(there.entries, np.inf, np.float32)
    for start in range(0, there.entries, BLOCK):
        some = there.keys(start, min(start + BLOCK, there.entries))
        ranks = -some @ keys.T + (0 if metric == "ip" else (some**2).sum(1, keepdims=True) / 2)
        if metric != "ip":
            ranks += (keys**2).sum(1) / 2
        nearest[start : start + len(some)] = ranks.min(1)
    nearest[there.hidden] = np.inf
    found: dict[str, None] = {}
    order = np.argsort(nearest, kind="stable")
    for first in range(0, len(order), CANDIDATES):
        some = order[first : first + CANDIDATES]
        some = some[np.isfinite(nearest[some])]
        found |= dict.fromkeys(there.document_names(there.documents[some]))
        found.pop(but, None)
        if len(found) >= CANDIDATES or len(some) < CANDIDATES:
            break
    return list(found)[:CANDIDATES]


@dataclass(frozen=True)
class _Said:
    """The entries of something that was said several times."""

    keys: np.ndarray
    tokens: np.ndarray
    utterances: np.ndarray
    carriers: np.ndarray
    """The number of the carrier sentence that each stands in; negative where nobody knows."""
    weight: float


def _votes(
    spoken: Segment, new: Entry, there: Datastore, old: Entry, temperature: float
) -> tuple[float, float]:
    """`Confusable.loses` and `Confusable.takes`."""
    metric = there.description.metric
    entries = np.setdiff1d(there.entries_of([old.text]), there.hidden)
    told = [utterance for _, utterance in there.origins(entries)]
    other = _Said(
        there.keys_of(entries),
        there.tokens[entries],
        there.utterances[entries],
        _carriers(told, old),
        old.weight,
    )
    own = _Said(
        prepare(spoken.keys, metric).astype(np.float16).astype(np.float32),  # as they are stored
        spoken.tokens,
        spoken.utterances,
        _carriers([spoken.names[one][0] for one in spoken.utterances], new),
        new.weight,
    )
    return _taken(own, other, metric, temperature), _taken(other, own, metric, temperature)


def _carriers(utterances: Sequence[str], of: Entry) -> np.ndarray:
    """In which carrier sentence each of the utterances (`phrases.sayings`) is."""
    ways = max(1, len(of.pronunciations))
    own = [CARRIERS.index(BARE)] if of.foreign else range(len(CARRIERS))
    found = [re.fullmatch(r"phrase-\d+-(\d+)", name) for name in utterances]
    return np.array([own[int(one[1]) // ways % len(own)] if one else -1 for one in found], np.int64)


def _taken(one: _Said, by: _Said, metric: Metric, temperature: float) -> float:
    """Of the votes of what is said, heard from its other mentions and from another's, the share
    that the other takes for tokens that do not come next; the mean over its tokens. What was said
    once is heard from itself."""
    if not len(one.tokens) or not len(by.tokens) or by.weight == 0:
        return 0.0
    keys = np.concatenate([one.keys, by.keys])
    tokens = np.concatenate([one.tokens, by.tokens])
    weights = np.repeat([max(one.weight, 1e-6), by.weight], [len(one.tokens), len(by.tokens)])
    foreign = np.arange(len(tokens)) >= len(one.tokens)
    often = len(np.unique(one.utterances)) > 1
    shares = []
    carriers = np.concatenate([one.carriers, by.carriers])
    for key, token, utterance, carrier in zip(
        one.keys, one.tokens, one.utterances, one.carriers, strict=True
    ):
        apart = distances(np.broadcast_to(key, keys.shape), keys, metric)
        if often:  # itself, and what another says in the same sentence, which would be as near
            apart[: len(one.tokens)][one.utterances == utterance] = np.inf
            apart[foreign & (carriers == carrier) & (carriers >= 0)] = np.inf
        votes = weights * np.exp(-(apart - apart.min()) / temperature)
        shares.append(float(votes[foreign & (tokens != token)].sum() / votes.sum()))
    return float(np.mean(shares))
