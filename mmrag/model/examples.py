"""Utterances as ids: what training reads of them, and which of them no vocabulary can write."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from mmrag.model.vocabulary import Vocabulary
from mmrag.records import Rejection
from mmrag.speech.tokenized import Tokenized


class Example(NamedTuple):
    """An utterance as ids: `text` pieces, and `units` or None; `name` is the utterance's id."""

    text: list[int]
    units: list[int] | None
    name: str = ""
    letters: list[int] | None = None
    """How the text is spelt (`Vocabulary.spelling`); None where nobody has worked it out yet."""


def speakable(tokenized: Iterable[Tokenized], vocabulary: Vocabulary) -> Iterator[Tokenized]:
    """The utterances without text, and those whose text the vocabulary can write."""
    for one in tokenized:
        if not one.utterance.text or not vocabulary.unspeakable(one.utterance.text):
            yield one


def unspeakable(tokenized: Iterable[Tokenized], vocabulary: Vocabulary) -> Iterator[Rejection]:
    """The others, and why."""
    for one in tokenized:
        text = one.utterance.text
        if text and vocabulary.unspeakable(text):
            yield Rejection(one.utterance.id, vocabulary.refusal(text))


def examples(tokenized: Sequence[Tokenized], vocabulary: Vocabulary) -> list[Example]:
    """Utterances as ids; one without text is speech alone (its text is empty)."""
    return [
        Example(
            text=vocabulary.encode(one.utterance.text or ""),
            units=None if one.units is None else vocabulary.encode_units(one.units),
            name=one.utterance.id,
        )
        for one in tokenized
    ]
