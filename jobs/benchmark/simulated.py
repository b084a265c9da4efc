"""Corpora of any size that nobody spoke, packed as training reads them: written in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mmrag.model.packed import Segment, fingerprint, made, write
from mmrag.model.vocabulary import SentencePieces, Vocabulary
from mmrag.names import Names, digest

SEED = 1
UNITS, PIECES = 2000, 400
UNITS_EACH, PIECES_EACH, LETTERS_EACH = 100, 12, 50
"""Of an utterance, on the average."""
SPOKEN, SHORTEST = "a lamp on the table near the door", 20
AT_A_TIME = 100_000
BYTES_EACH = 2 * (UNITS_EACH + PIECES_EACH) + LETTERS_EACH + 8 * 6 + 9 + 20
"""On the disk, an utterance."""


def vocabulary(directory: Path) -> Vocabulary:
    """One of a few pieces and many units, saved in `directory`."""
    directory.mkdir(exist_ok=True)
    known = Vocabulary(SentencePieces.train([SPOKEN], PIECES), UNITS)
    known.save(directory)
    return known


def corpus(directory: Path, known: Vocabulary, utterances: int) -> Path:
    """So many utterances of random units and pieces, packed in `directory`."""
    identity = {"vocabulary": fingerprint(known), "utterances": utterances}
    parts = _segments(known, utterances)
    return made(directory, identity, lambda aside: write(aside, parts, known))


def _segments(known: Vocabulary, utterances: int) -> Iterator[Segment]:
    random = np.random.default_rng(SEED)
    most = 2 * AT_A_TIME * (UNITS_EACH + PIECES_EACH)
    ids = random.integers(known.first_piece, known.size, most).astype(np.uint16)
    letters = random.integers(0, len(known.alphabet), 2 * AT_A_TIME * LETTERS_EACH).astype(np.uint8)
    for first in range(0, utterances, AT_A_TIME):
        count = min(AT_A_TIME, utterances - first)
        units = random.integers(SHORTEST, 2 * UNITS_EACH - SHORTEST + 1, count)
        texts = units * PIECES_EACH // UNITS_EACH
        spelt = units * LETTERS_EACH // UNITS_EACH
        names = [f"{number:08d}" for number in range(first, first + count)]
        yield Segment(
            ids=ids[: int((units + texts).sum())],
            texts=texts,
            units=units,
            letters=letters[: int(spelt.sum())],
            letter_counts=spelt,
            names=Names.of(names),
            entities=Names(np.zeros(0, np.uint8), np.zeros(count + 1, np.int64)),
            digests=np.array([digest(name) for name in names], np.uint64),
        )
