"""A caller's phrases as a small datastore: each spoken in a few carrier sentences, its own tokens
alone the entries.

What surrounds a phrase teaches nothing about it, and as entries it would be mistaken for what is
said next.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from uuid import uuid4

import numpy as np

from mmrag import datastore
from mmrag.datastore import Datastore, Description
from mmrag.entries import read_entries
from mmrag.lm import LM
from mmrag.records import Units, Utterance
from mmrag.tokens import Tokenized
from mmrag.vocabulary import Vocabulary

WINDOW = 20
BATCH = 64
"""Sentences read at once."""
Say = Callable[[str], Units]
"""A sentence -> the units of somebody saying it."""

CARRIERS = ("please call {phrase} today", "about {phrase} next week", "{phrase}")
"""Sentences in which a phrase is spoken; the first is the one that is read."""


def utterances(phrases: Sequence[str], carriers: Sequence[str] = CARRIERS) -> Iterator[Utterance]:
    """Sentences, to be spoken, about each phrase, which is their only entity and their document."""
    for number, phrase in enumerate(dict.fromkeys(phrases)):
        for way, carrier in enumerate(carriers):
            yield Utterance(
                id=f"phrase-{number:06d}-{way}",
                text=carrier.format(phrase=phrase),
                document=phrase,
                entities=(phrase,),
            )


def remember(
    cache: Path,
    phrases: Sequence[str],
    lm: LM,
    vocabulary: Vocabulary,
    identity: Mapping[str, str],
    say: Say | None,
) -> Datastore:
    """The phrases' datastore below `cache`, made at the first call with just these.

    `identity` names the models, as in `Description`; without `say` the phrases are read as text
    alone. Raises ValueError for a phrase without a letter or digit, or none at all.
    """
    phrases = list(dict.fromkeys(phrases))
    empty = [phrase for phrase in phrases if not vocabulary.encode(phrase)]
    if empty or not phrases:
        raise ValueError(f"nothing to listen for: {empty or 'no phrases'}")
    audio = "none" if say is None else "spoken"
    content = json.dumps([phrases, CARRIERS, audio, dict(sorted(identity.items()))])
    directory = cache / hashlib.sha256(content.encode()).hexdigest()[:16]
    if not directory.exists():
        aside = cache / f".{directory.name}.{uuid4().hex}"
        datastore.create(aside, Description(lm.config.width, WINDOW, "l2", audio, dict(identity)))
        told = list(utterances(phrases))
        for start in range(0, len(told), BATCH):
            batch = [Tokenized(one, say and say(one.text)) for one in told[start : start + BATCH]]
            segment = read_entries(lm, vocabulary, batch, WINDOW, "entities")
            datastore.write_segment(aside, f"part-{start:06d}", segment)
        names = [f"part-{start:06d}" for start in range(0, len(told), BATCH)]
        datastore.publish(aside, names)
        try:
            aside.rename(directory)
        except OSError:  # another process was first
            if not directory.exists():
                raise
    return Datastore.open(directory)


class Phrases:
    """A datastore of entities, phrase by phrase: each time one was spoken is a window."""

    def __init__(self, datastore: Datastore) -> None:
        self.datastore = datastore
        starts = np.flatnonzero(np.diff(datastore.utterances, prepend=-1))
        stops = np.append(starts, datastore.entries)[1:]
        self._mentions: dict[str, list[int]] = {}
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            # The window around the middle reaches as far to both sides as it can.
            name = datastore.document_name(datastore.documents[start])
            self._mentions.setdefault(name, []).append((start + stop) // 2)
        self.names = list(self._mentions)

    def mentions(self, phrase: str, most: int | None = None) -> list[int]:
        """An entry for each time the phrase was spoken, at most so many; none for an unknown one.

        The entry stands in the middle of the phrase, so that its window holds all of it.
        """
        return self._mentions.get(phrase, [])[:most]
