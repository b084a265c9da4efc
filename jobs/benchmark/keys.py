"""Any number of keys that lie as a model's own do: as near to each other, in as many directions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np

from mmrag.config import Synthesize, Workers
from mmrag.corpora import synthetic
from mmrag.recogniser import load_decoder
from mmrag.records import Utterance
from mmrag.retrieval import datastore
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.entries import read_entries
from mmrag.retrieval.segment import Description, Segment
from mmrag.speech.tokenized import Tokenized

SENTENCES, BATCH = 3000, 100
NEIGHBOURS = 8
"""Real keys that a synthetic one lies among."""
DRAWN = 4
"""Of these, how many it is a mixture of."""
CONCENTRATION = 0.7
"""Of the mixture's weights (Dirichlet)."""
WINDOW, UTTERANCE = 8, 20
"""Tokens in a window, and entries of an utterance, each a document."""
SEGMENT = 100_000
"""Entries written at once."""
TOLD = 10
"""Segments from one word about how far it is to the next."""
ROUNDING = 0.02
"""How far keys may be apart that are the same: the model's states differ with its threads."""
STEPS = 8
"""Of the search for how far a key lies from its mixture."""
PROBED = 2000


@dataclass(frozen=True)
class Likeness:
    """Median distances to the nearest key of another sentence, among as many keys of each kind."""

    real: float
    synthetic: float


class SyntheticKeys:
    """Mixtures of neighbouring keys that a model's own reading of sentences left, and some noise.

    The noise is chosen so that as many synthetic keys lie as near to each other as the real ones.
    The token of an entry is that of one of the keys it is a mixture of.
    """

    def __init__(self, model: str, seed: int) -> None:
        """Reads SENTENCES of the template grammar with the language model of `model`."""
        self._real, self._tokens, sentences = _real(model, seed)
        self.width = self._real.shape[1]
        self._near = _others(self._real, sentences)
        self._noise = 0.0
        real = _typical(self._real, sentences)
        low, high = 0.0, 2 * np.sqrt(real / self.width)
        for _ in range(STEPS):
            self._noise = (low + high) / 2
            found = self._spread(seed)
            low, high = (self._noise, high) if found < real else (low, self._noise)
        self.likeness = Likeness(real, found)

    def draw(self, count: int, seed: int) -> np.ndarray:
        """Keys (count, D) float32."""
        return self._drawn(count, seed)[0]

    def _drawn(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys, and the real one (count,) that each is first of all a mixture of."""
        generator = np.random.default_rng(seed)
        first = generator.integers(len(self._real), size=count)
        others = generator.integers(NEIGHBOURS, size=(count, DRAWN - 1))
        mixed = np.column_stack([first, self._near[first[:, None], others]])
        shares = generator.dirichlet(np.full(DRAWN, CONCENTRATION), count).astype(np.float32)
        keys = np.einsum("nm,nmd->nd", shares, self._real[mixed])
        noise = generator.standard_normal(keys.shape, dtype=np.float32)
        noise *= self._noise
        keys += noise
        return keys.astype(np.float16).astype(np.float32), first

    def _spread(self, seed: int) -> float:
        count = len(self._real)
        return _typical(self.draw(count, seed), np.arange(count))

    def segment(self, name: str, count: int, seed: int) -> Segment:
        """Entries with such keys; a document an utterance."""
        utterances = -(-count // UTTERANCE)
        keys, mixed = self._drawn(count, seed)
        tokens = self._tokens[mixed]
        return Segment(
            keys=keys,
            tokens=tokens,
            windows=np.repeat(tokens[:, None], WINDOW, axis=1),
            positions=np.arange(count) % UTTERANCE,
            utterances=np.arange(count) // UTTERANCE,
            names=[(f"{name}-{number}", f"{name}-{number}") for number in range(utterances)],
        )

    def write(
        self,
        directory: Path,
        entries: int,
        seed: int,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        """A datastore of so many, which `tell` hears about; one that is there already stays.

        Raises ValueError if it is there and is another.
        """
        description = Description(self.width, WINDOW, "l2", "none", {"lm": "synthetic"})
        datastore.create(directory, description)
        there = Datastore.open(directory)
        if there.entries:
            self._require(there, entries, seed)
            return
        names = []
        for number, start in enumerate(range(0, entries, SEGMENT)):
            if tell and number and number % TOLD == 0:
                tell(f"{start:,} of {entries:,} entries written")
            names.append(f"part-{number:05d}")
            segment = self.segment(names[-1], min(SEGMENT, entries - start), seed + number)
            datastore.write_segment(directory, names[-1], segment)
        datastore.publish(directory, names)

    def _require(self, there: Datastore, entries: int, seed: int) -> None:
        """ValueError for a datastore that `write` would not have written, as its first segment
        tells."""
        count = min(SEGMENT, entries)
        wanted, mixed = self._drawn(count, seed)
        if (
            there.entries != entries
            or len(there.deleted)
            or not np.array_equal(there.tokens[np.arange(count)], self._tokens[mixed])
            or not np.allclose(there.keys(0, count), wanted, atol=ROUNDING, rtol=ROUNDING)
        ):
            raise ValueError(
                f"{there} holds {there.entries:,} entries, and not the {entries:,} that are "
                "measured: remove it, or name another directory"
            )


def _real(model: str, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The model's keys of sentences that nobody spoke (R, D), the token that follows each, and
    which sentence it is of."""
    lm = load_decoder(model)
    keys, tokens, sentences = [], [], []
    for number, batch in enumerate(_sentences(seed)):
        read = read_entries(lm.lm, lm.vocabulary, batch, WINDOW, "all")
        keys.append(read.keys)
        tokens.append(read.tokens)
        sentences.append(read.utterances + number * BATCH)
    every = np.concatenate(keys).astype(np.float32)
    return every, np.concatenate(tokens), np.concatenate(sentences)


def _sentences(seed: int) -> Iterator[list[Tokenized]]:
    counts = {"lm": SENTENCES, "adapter": 1, "mentions": 1, "dev": 1, "test": 1, "text": 0}
    workers = Workers(count=1, num_cpus=1)
    config = Synthesize(everyday_share=0.4, workers=workers, **counts)
    planned = synthetic.plan(config, seed)["lm"]
    for start in range(0, len(planned), BATCH):
        yield [
            Tokenized(Utterance(id=one.id, text=one.text, document=one.id), None)
            for one in planned[start : start + BATCH]
        ]


def _others(keys: np.ndarray, sentences: np.ndarray) -> np.ndarray:
    """The NEIGHBOURS keys of other sentences next to each (R, NEIGHBOURS); itself where there are
    fewer among the nearest."""
    index = faiss.IndexFlatL2(keys.shape[1])
    index.add(keys)
    _, found = index.search(keys, 4 * NEIGHBOURS)
    own = sentences[found] == sentences[:, None]
    order = np.argsort(own, axis=1, kind="stable")[:, :NEIGHBOURS]
    others = np.take_along_axis(found, order, axis=1)
    return np.where(np.take_along_axis(own, order, axis=1), np.arange(len(keys))[:, None], others)


def _typical(keys: np.ndarray, sentences: np.ndarray) -> float:
    """The median distance of PROBED keys to the nearest of another sentence."""
    index = faiss.IndexFlatL2(keys.shape[1])
    index.add(keys)
    at = np.linspace(0, len(keys) - 1, min(PROBED, len(keys))).astype(np.int64)
    distances, found = index.search(keys[at], 4 * NEIGHBOURS)
    distances[sentences[found] == sentences[at][:, None]] = np.inf
    nearest = distances.min(1)
    return float(np.median(nearest[np.isfinite(nearest)]))
