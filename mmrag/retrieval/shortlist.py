"""Of very many phrases, those that a clip may have said: found by the sound of a first transcript.

Nobody's attention reaches over a hundred thousand names. A transcript that was made without them
spells a name wrong, and mostly as it sounds: `SoundIndex` compares phones, first the short runs
that a phrase and the transcript share, then, for the likeliest phrases, how well the whole of each
fits somewhere into the transcript. The clip is transcribed again with those few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby

import numpy as np
from rapidfuzz import fuzz, process
from rapidfuzz.distance import Levenshtein
from scipy import sparse

from mmrag.records import Line
from mmrag.retrieval.interpolation import Retrieval
from mmrag.retrieval.memory import AttentionSource
from mmrag.retrieval.phrases import Phrases
from mmrag.retrieval.retrievers import SubsetRetriever

SHORTLIST = 10
"""Phrases that a segment is given where nobody says how many."""
ALIGNED = 4800
"""Phrases that are compared as a whole, by what runs they share with the transcript."""
RANK = 60
"""Added to both ranks before they are joined (reciprocal rank fusion, Cormack et al. 2009)."""
REMEMBERED = 500_000
"""Texts whose phones are kept."""
Pronounce = Callable[[Sequence[str | Line]], list[tuple[str, ...]]]
"""Texts -> the phones that each is said in, in IPA."""

_RUNS = (2, 3, 4)
"""Classes of phones that follow each other."""
_ALIKE = (
    *("i ɪ eɪ ɛ æ", "ɑ ʌ ə ɜ aɪ aʊ", "ɔ ʊ u oʊ ɔɪ"),
    *("p b", "t d θ ð", "k ɡ", "f v", "s z ʃ ʒ tʃ dʒ", "m n ŋ", "l", "ɹ", "w", "j"),
)
_CLASS = {phone: alike[0] for alike in _ALIKE for phone in alike.split()}
"""Phones that are heard for one another. Others are none: `h` is often heard for nothing."""


class Remembered:
    """Says each text once: a long list that changed by a phrase is pronounced in no time."""

    def __init__(self, pronounce: Pronounce, most: int = REMEMBERED) -> None:
        """At most about so many are remembered, and then none."""
        self._pronounce = pronounce
        self._most = most
        self._said: dict[str | Line, tuple[str, ...]] = {}

    def __call__(self, texts: Sequence[str | Line]) -> list[tuple[str, ...]]:
        """The phones of each text, as `Pronounce`. From any thread."""
        found = {text: said for text in texts if (said := self._said.get(text)) is not None}
        new = list(dict.fromkeys(text for text in texts if text not in found))
        found |= zip(new, self._pronounce(new), strict=True)
        if len(self._said) + len(new) > self._most:
            self._said = {}
        self._said |= {text: found[text] for text in new}
        return [found[text] for text in texts]


class SoundIndex:
    """Phrases by their sound."""

    def __init__(self, phrases: Sequence[str], pronounce: Pronounce) -> None:
        self._pronounce = pronounce
        said = [_once(phones) for phones in pronounce(phrases)]
        known = sorted(set(chain.from_iterable(said)))
        self._letters = {phone: chr(ord("!") + number) for number, phone in enumerate(known)}
        self._spelled = [self._spell(phones) for phones in said]
        runs = [list(_runs(phones)) for phones in said]
        self._known = {run: n for n, run in enumerate(sorted(set(chain.from_iterable(runs))))}
        counts = [len(own) for own in runs]
        rows = np.fromiter((self._known[run] for run in chain.from_iterable(runs)), np.int64)
        columns = np.repeat(np.arange(len(runs)), counts)
        shape = (len(self._known), len(runs))
        found = sparse.csr_array((np.ones(len(rows), np.float32), (rows, columns)), shape)
        rarity = np.log((len(runs) + 1) / np.maximum(1, found.sum(axis=1)))
        self._weights = sparse.csr_array(found.multiply(rarity[:, None]))
        self._lengths = np.sqrt(np.maximum(self._weights.sum(axis=0), 1e-6))

    def __len__(self) -> int:
        return len(self._spelled)

    def near(self, text: str, most: int) -> np.ndarray:
        """The numbers (N,) int64 of at most so many phrases, those that sound most like something
        in `text` first; none where nothing in it has a sound of theirs."""
        [said] = map(_once, self._pronounce([text]))
        heard = [self._known[run] for run in set(_runs(said)) if run in self._known]
        if not heard:
            return np.empty(0, np.int64)
        shared = self._weights[heard].sum(axis=0) / self._lengths
        kept = min(ALIGNED, int(np.count_nonzero(shared)))
        likely = np.argpartition(-shared, kept - 1)[:kept]
        likely = likely[np.lexsort((likely, -shared[likely]))]
        phrases = [self._spelled[number] for number in likely.tolist()]
        [fits] = process.cdist([self._spell(said)], phrases, scorer=fuzz.partial_ratio)
        # Half of a phrase's phones fit by chance; of two that fit as well, the longer says more.
        fits = (fits / 100 - 0.5) * np.sqrt([len(phrase) for phrase in phrases])
        by_fit = np.empty(kept, np.int64)
        by_fit[np.argsort(-fits, kind="stable")] = np.arange(kept)
        both = 1 / (RANK + np.arange(kept)) + 1 / (RANK + by_fit)
        return likely[np.argsort(-both, kind="stable")[:most]]

    def _spell(self, phones: Sequence[str]) -> str:
        """A letter for each phone, a blank for one that no phrase has: rapidfuzz aligns texts."""
        return "".join(self._letters.get(phone, " ") for phone in phones)


@dataclass(frozen=True)
class Shortlist:
    """A long list of phrases, of which each clip is given those that it may have said."""

    phrases: Phrases
    sounds: SoundIndex
    most: int

    @classmethod
    def of(cls, phrases: Phrases, pronounce: Pronounce, most: int) -> Shortlist:
        """ImportError where there is nothing to pronounce them with."""
        return cls(phrases, SoundIndex(phrases.names, pronounce), most)

    def given(
        self, text: str, retrieval: Retrieval | None, attention: AttentionSource | None
    ) -> tuple[Retrieval | None, AttentionSource | None]:
        """The same ways to look things up, in what a clip may have said alone; None where that is
        nothing. `text` is its transcript without them."""
        names = [self.phrases.names[number] for number in self.sounds.near(text, self.most)]
        if not names:
            return None, None
        retriever = SubsetRetriever(self.phrases.datastore, self.phrases.entries(names))
        windows = self.phrases.first_mentions(names)
        return (
            retrieval and replace(retrieval, retriever=retriever),
            attention and replace(attention, retriever=retriever, entries=windows),
        )


def sound_alike(some: Sequence[Sequence[str]], others: Sequence[Sequence[str]]) -> np.ndarray:
    """How much of their sound phones share, each of `some` with each of `others`: (S, O) float32.

    1: the same phones; 0: none of them. It is what is left after the fewest phones are put in, left
    out and exchanged, over the longer one's length; one that is exchanged for another that it is
    heard for counts half.
    """
    known = sorted(set(chain.from_iterable((*some, *others))))
    kinds = {phone: _CLASS.get(phone, phone) for phone in known}
    letter = {name: chr(ord("A") + n) for n, name in enumerate({*known, *kinds.values()})}
    exact = {phone: letter[phone] for phone in known}
    shares = []
    for letters in (exact, {phone: letter[kind] for phone, kind in kinds.items()}):
        texts = (
            ["".join(letters[phone] for phone in one) for one in each] for each in (some, others)
        )
        shares.append(process.cdist(*texts, scorer=Levenshtein.normalized_similarity))
    return (shares[0] + shares[1]) / 2


def _once(phones: Sequence[str]) -> tuple[str, ...]:
    """A phone that follows itself is heard once."""
    return tuple(phone for phone, _ in groupby(phones))


def _runs(phones: Sequence[str]) -> Iterator[str]:
    """Every run of _RUNS classes of phones, each once."""
    classes = "".join(_CLASS.get(phone, "") for phone in phones)
    for length in _RUNS:
        yield from {classes[at : at + length] for at in range(len(classes) - length + 1)}
