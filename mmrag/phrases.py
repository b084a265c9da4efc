"""A caller's phrases as a small datastore: each spoken in a few carrier sentences, its own tokens
alone the entries.

What surrounds a phrase teaches nothing about it, and as entries it would be mistaken for what is
said next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from mmrag.datastore import Datastore
from mmrag.records import Utterance

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


class Phrases:
    """A datastore of entities, phrase by phrase: each time one was spoken is a window."""

    def __init__(self, datastore: Datastore) -> None:
        self.datastore = datastore
        starts = np.flatnonzero(np.diff(datastore.utterances, prepend=-1))
        stops = np.append(starts[1:], datastore.entries)
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
