"""Utterances into datastore entries: the language model's state before each of their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from mmrag.model.lm import LM
from mmrag.model.states import read_states, surprisals
from mmrag.model.vocabulary import Vocabulary
from mmrag.retrieval.segment import Segment, windows_of
from mmrag.speech.tokenized import Tokenized


def read_entries(
    lm: LM,
    vocabulary: Vocabulary,
    batch: Sequence[Tokenized],
    window: int,
    entries: Literal["all", "entities"],
) -> Segment:
    """One entry for each token of the batch's texts and their ends, or of their entities alone.

    An utterance without units is read as text that nobody spoke. With `entities`, each is a
    sequence of its own, and its document is the entity itself. How little each token is expected
    as text is asked of our own models, whose encoders may spell (`retrieval.terms`).
    """
    texts = [vocabulary.encode(one.utterance.text) for one in batch]
    speech = [None if one.units is None else vocabulary.speech_input(one.units) for one in batch]
    keys, tokens, slices, _ = read_states(lm, vocabulary, texts, speech, logits=False)
    expected = None
    if isinstance(lm, LM):  # no Whisper's clips are spelled
        expected = np.concatenate(surprisals(lm, vocabulary, texts))
    sequences = [
        (one.utterance.id, document, whole, part)
        for one, whole in zip(batch, slices, strict=True)
        for document, part in _parts(one, tokens[whole].tolist(), vocabulary, entries)
    ]
    spans = [slice(whole.start + p.start, whole.start + p.stop) for *_, whole, p in sequences]
    counts = [span.stop - span.start for span in spans]
    rows = np.concatenate([np.empty(0, int), *(np.arange(s.start, s.stop) for s in spans)])
    positions = [np.arange(part.start, part.stop) for *_, part in sequences]
    windows = [windows_of(tokens[span], window) for span in spans]
    return Segment(
        keys=keys.cpu().numpy()[rows],
        tokens=tokens[rows],
        windows=np.concatenate([np.empty((0, window), np.int32), *windows]),
        positions=np.concatenate([np.empty(0, int), *positions]),
        utterances=np.repeat(np.arange(len(sequences)), counts),
        names=[(utterance, document) for utterance, document, *_ in sequences],
        surprisals=None if expected is None else expected[rows],
    )


def _parts(
    one: Tokenized, text: list[int], vocabulary: Vocabulary, entries: str
) -> Iterator[tuple[str, slice]]:
    """The spans of a text that become entries, each with its document."""
    said = one.utterance
    if entries == "all":
        yield said.document or said.id, slice(0, len(text))
        return
    for entity in dict.fromkeys(said.entities):
        place = vocabulary.find(entity, text)
        if place is not None:
            yield entity, place
