"""A caller's phrases as a small datastore: each spoken in a few carrier sentences, its own tokens
alone the entries.

What surrounds a phrase teaches nothing about it, and as entries it would be mistaken for what is
said next.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, product
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from mmrag import durable
from mmrag.config import ESPEAK, KNN, Speaking
from mmrag.config import identity as said_by
from mmrag.model.lm import LM
from mmrag.model.vocabulary import Vocabulary
from mmrag.records import Line, Units, Utterance
from mmrag.retrieval import datastore
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.entries import read_entries
from mmrag.retrieval.segment import Description, Segment
from mmrag.retrieval.wording import Entry, entries
from mmrag.speech.tokenized import Tokenized
from mmrag.text import normalise

WINDOW = 20
SHARE = 0.2
"""Of the typical distance among a datastore's keys: the temperature where nobody tuned one."""
SAMPLED = 1024
LOOKED_AT = 64
"""Entries that tell whether a datastore is one of phrases."""
BATCH = 64
"""Sentences read at once."""
PHRASE_WORDS = 5
"""Words of the longest text that counts as a phrase, and not as a sentence."""
Say = Callable[[Sequence[str | Line]], Iterable[Units]]
"""Sentences -> the units of somebody saying each, in their order; they may come bit by bit."""
Progress = Callable[[int, int], None]
"""Told the sentences that were spoken so far, and all that there are."""

LISTS, SENTENCES = "phrases.jsonl", "phrase_sentences.jsonl"
"""Files of a tokens directory whose corpus has a list for each utterance: the lists, and sentences
about all of their phrases to build a datastore of."""

CARRIERS = ("please call {phrase} today", "about {phrase} next week", "{phrase}")
"""Sentences in which a phrase is spoken; the first is the one that is read."""
BARE = "{phrase}"


def utterances(
    phrases: Sequence[str],
    carriers: Sequence[str] = CARRIERS,
    spoken: Callable[[str], str] = str,
) -> Iterator[Utterance]:
    """Sentences, to be spoken, about each phrase, which is their only entity and their document.

    The phrase stands in them as it is `spoken` (`Vocabulary.spoken`); the entity and the document
    are as it is written.
    """
    for number, phrase in enumerate(dict.fromkeys(phrases)):
        for way, carrier in enumerate(carriers):
            yield Utterance(
                id=f"phrase-{number:06d}-{way}",
                text=carrier.format(phrase=spoken(phrase)),
                document=phrase,
                entities=(phrase,),
            )


def sayings(
    phrases: Sequence[str | Entry],
    carriers: Sequence[str] = CARRIERS,
    spoken: Callable[[str], str] = str,
    takes: int = 1,
) -> Iterator[tuple[Utterance, str | Line]]:
    """As `utterances`, with what is said of each: a carrier sentence in every pronunciation that an
    entry has, written as ever; in a language that is not the carriers' the phrase alone. All of it
    once more for each take."""
    for number, one in enumerate(entries(phrases)):
        own = [BARE] if one.foreign else carriers
        written = spoken(one.text)
        once = [(carrier, line) for carrier in own for line in one.lines(carrier, written)]
        said = [(carrier, again(line, take)) for take in range(takes) for carrier, line in once]
        for way, (carrier, line) in enumerate(said):
            text = carrier.format(phrase=written)
            about = f"phrase-{number:06d}-{way}"
            yield Utterance(id=about, text=text, document=one.text, entities=(one.text,)), line


def again(line: str | Line, take: int) -> str | Line:
    """What is said once more, after so many others have said it."""
    if not take:
        return line
    return replace(line if isinstance(line, Line) else Line(line), take=take)


def phrases_and_sentences(
    texts: Iterable[str | Entry],
) -> tuple[list[Entry], list[Entry]]:
    """What is to be found again: phrases, and the longer ones that are sentences; each once, its
    words a space apart."""
    every = entries(texts)
    short = {one.text: len(one.text.split()) <= PHRASE_WORDS for one in every}
    return [one for one in every if short[one.text]], [one for one in every if not short[one.text]]


def sentences(
    longer: Iterable[Entry], spoken: Callable[[str], str], takes: int = 1
) -> Iterator[tuple[Utterance, str | Line]]:
    """Texts that are said as they stand, in each of their pronunciations and takes, and what is
    said."""
    for one in longer:
        written = spoken(one.text)
        for take, line in product(range(takes), one.lines(BARE, written)):
            about = Utterance(id=uuid4().hex, text=written, document=one.text)
            yield about, again(line, take)


def fresh(datastore: Datastore, given: Sequence[Entry]) -> list[Entry]:
    """Those entries that a datastore has not, or with another wording."""
    wordings = datastore.wordings(one.text for one in given)
    return [
        one
        for one in given
        if one != wordings.get(one.text, Entry(one.text))
        or not len(datastore.entries_of([one.text]))
    ]


def read_lists(path: Path) -> dict[str, list[str]]:
    """Utterance id -> its phrases, from a file LISTS.

    Raises ValueError where there is none, or a line that is no list.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}: its corpus has no list of phrases")
    lists = {}
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                fields = json.loads(line)
                lists[fields["utterance"]] = [str(phrase) for phrase in fields["phrases"]]
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{path}:{number}: not a JSON object of utterance and phrases"
                ) from None
    return lists


def description(lm: LM, identity: Mapping[str, str], say: Say | None) -> Description:
    """What a datastore of phrases is: `identity` names the models; without `say`, text alone."""
    audio = "none" if say is None else "spoken"
    return Description(lm.width, WINDOW, "l2", audio, dict(identity))


def speak(
    phrases: Sequence[str | Entry],
    lm: LM,
    vocabulary: Vocabulary,
    say: Say | None,
    progress: Progress | None = None,
    takes: int = 1,
) -> Iterator[Segment]:
    """The phrases' entries, BATCH sentences a segment, each spoken when its segment is asked for,
    so many `takes` of each.

    Without `say` the phrases are read as text alone. Raises ValueError, at the call, for a phrase
    that the vocabulary refuses, or none at all.
    """
    given = {one.text: one for one in entries(phrases)}
    refused = next(filter(None, map(vocabulary.refusal, given)), None)
    if refused or not given:
        raise ValueError(refused or "nothing to listen for: no phrases")
    takes = 1 if say is None else takes
    told = list(sayings(list(given.values()), spoken=vocabulary.spoken, takes=takes))

    def read(start: int) -> Segment:
        batch = told[start : start + BATCH]
        heard = [None] * len(batch) if say is None else say([line for _, line in batch])
        spoken = []
        for (one, _), units in zip(batch, heard, strict=True):
            spoken.append(Tokenized(one, units))
            if progress is not None:
                progress(start + len(spoken), len(told))
        made = read_entries(lm, vocabulary, spoken, WINDOW, "entities")
        return replace(made, wordings={name: given[name] for _, name in made.names})

    return map(read, range(0, len(told), BATCH))


def remember(
    cache: Path,
    phrases: Sequence[str | Entry],
    lm: LM,
    vocabulary: Vocabulary,
    identity: Mapping[str, str],
    say: Say | None,
    progress: Progress | None = None,
    speaking: Speaking = ESPEAK,
) -> Datastore:
    """The phrases' datastore below `cache`, made at the first call with just these, said so.

    Takes what `description` and `speak` take, and raises what `speak` raises; `speaking` is how
    `say` does it. `progress` is told while it is made; one that is remembered is there at once.
    """
    described = description(lm, identity, say)
    segments = speak(phrases, lm, vocabulary, say, progress, speaking.takes)
    said = {one.text: one.said(vocabulary.spoken(one.text)) for one in entries(phrases)}
    content: list[Any] = [
        {one.text: [" / ".join(said[one.text]), one.fields()] for one in entries(phrases)},
        CARRIERS,
        described.audio,
        dict(sorted(identity.items())),
    ]
    if said_by(speaking) != said_by(ESPEAK):
        content.append(said_by(speaking))
    directory = cache / hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    if not directory.exists():
        aside = cache / f".{directory.name}.{uuid4().hex}"
        datastore.create(aside, described)
        names = []
        for number, segment in enumerate(segments):
            names.append(f"part-{number:05d}")
            datastore.write_segment(aside, names[-1], segment)
        datastore.publish(aside, names)
        try:
            durable.rename(aside, directory)
        except OSError:  # another process was first
            if not directory.exists():
                raise
    return Datastore.open(directory)


def typical_distance(datastore: Datastore) -> float:
    """The median distance from a key to the nearest of another utterance (squared, for l2).

    A scale for temperatures where there is no dev split to tune on; SAMPLED keys of what was not
    deleted are looked at. 1.0 where there are no two of them.
    """
    chosen = _spread(datastore, SAMPLED)
    keys, utterances = datastore.keys_of(chosen), datastore.utterances[chosen]
    squares = (keys**2).sum(axis=1)
    apart = squares[:, None] + squares - 2 * keys @ keys.T
    apart[utterances[:, None] == utterances] = np.inf
    nearest = apart.min(axis=1, initial=np.inf)
    found = nearest[np.isfinite(nearest)]
    return max(float(np.median(found)), 1e-6) if len(found) else 1.0


def _spread(datastore: Datastore, most: int) -> np.ndarray:
    """At most so many entries that were not deleted, from the first to the last of them, (N,)
    int64."""
    gone = np.sort(datastore.deleted)
    living = datastore.entries - len(gone)
    places = np.linspace(0, living - 1, min(most, living)).astype(np.int64)
    return places + np.searchsorted(gone - np.arange(len(gone)), places, side="right")


def untuned(settings: KNN, datastore: Datastore) -> KNN:
    """`settings` for a model whose distances nobody knows: a temperature in the datastore's own,
    and no gate."""
    share = SHARE * typical_distance(datastore)
    return settings.model_copy(update={"temperature": share, "gate": None})


def are_phrases(datastore: Datastore, vocabulary: Vocabulary, documents: Sequence[str]) -> bool:
    """Whether documents, which are all that a datastore has, are phrases: called what is said in
    them, which is short. Of their entries a few are looked at; of none they are not."""
    if not documents or any(len(name.split()) > PHRASE_WORDS for name in documents):
        return False
    entries = _spread(datastore, LOOKED_AT)
    if not len(entries):
        return False
    windows = datastore.windows(entries).tolist()
    said = (vocabulary.decode([token for token in window if token]) for window in windows)
    names = (vocabulary.spoken(name) for name, _ in datastore.origins(entries))
    return all(normalise(each) in normalise(name) for each, name in zip(said, names, strict=True))


class Phrases:
    """A datastore of entities, phrase by phrase: each time one was spoken is a window.

    What is deleted from the datastore was not spoken, and what weighs nothing is never retrieved.
    """

    def __init__(self, datastore: Datastore) -> None:
        self.datastore = datastore
        starts = np.flatnonzero(np.diff(datastore.utterances, prepend=-1))
        stops = np.append(starts, datastore.entries)[1:]
        # The window around the middle reaches as far to both sides as it can.
        middles = np.setdiff1d((starts + stops) // 2, datastore.hidden)
        self._mentions: dict[str, list[int]] = {}
        self._spans: dict[str, list[range]] = {}
        names = datastore.document_names(datastore.documents[middles])
        last = np.searchsorted(starts, middles, side="right") - 1
        spans = zip(starts[last].tolist(), stops[last].tolist(), strict=True)
        for middle, span, name in zip(middles.tolist(), spans, names, strict=True):
            self._mentions.setdefault(name, []).append(middle)
            self._spans.setdefault(name, []).append(range(*span))
        self.names = list(self._mentions)
        self._ways = {
            name: max(1, len(own)) for name, own in datastore.wordings.pronunciations().items()
        }

    def mentions(self, phrase: str, most: int | None = None) -> list[int]:
        """An entry for each time the phrase was spoken, at most so many; none for an unknown one.

        The entry stands in the middle of the phrase, so that its window holds all of it.
        """
        return self._mentions.get(phrase, [])[:most]

    def entries(self, phrases: Iterable[str]) -> np.ndarray:
        """Every entry (N,) int64 of each phrase, one phrase after the other."""
        spans = chain.from_iterable(self._spans.get(name, ()) for name in phrases)
        return np.fromiter(chain.from_iterable(spans), np.int64)

    def alike(self, most: int) -> dict[str, list[str]]:
        """The other phrases that sound most like each, at most so many, the likest first.

        They are those whose keys are on the average nearest, where each is first mentioned: what a
        model hears, whatever is written.
        """
        first = np.array([own[0] for own in self._mentions.values()], np.int64)
        said = self.datastore.passages(first)
        present = said.present[..., None]
        means = (said.keys.astype(np.float32) * present).sum(1) / present.sum(1)
        squares = (means**2).sum(1)
        found = {}
        for number, name in enumerate(self.names):
            apart = squares - 2 * means @ means[number]
            apart[number] = np.inf
            nearest = np.argsort(apart)[: min(most, len(means) - 1)]
            found[name] = [self.names[other] for other in nearest]
        return found

    def first_mentions(self, phrases: Iterable[str] | None = None, most: int = 1) -> np.ndarray:
        """At most so many `mentions` of each phrase, in each of its pronunciations, one phrase
        after the other: (N,) int64.

        Of all phrases without `phrases`.
        """
        named = self.names if phrases is None else phrases
        found = (self.mentions(name, most * self._ways.get(name, 1)) for name in named)
        return np.array([mention for own in found for mention in own], np.int64)
