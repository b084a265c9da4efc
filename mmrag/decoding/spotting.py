"""Which of many phrases a clip says, by what a CTC head hears of it.

A word spotter (Andrusenko et al., "Fast context-biasing for CTC and transducer ASR models with
CTC-based word spotter", Interspeech 2024, arXiv 2406.07096). A phrase's score is how likely the
likeliest way is in which its letters, with a gap before and behind, are heard in some frames of the
clip; nothing is transcribed for it, spoken or searched. (Over what is heard best there, as theirs
is, unclear speech would be like any phrase.) What is spotted is then favoured while the clip is
decoded (`boost`), and a clip in which nothing is spotted is decoded as ever.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import filterfalse

import numpy as np
import torch

from mmrag.config import Spotting
from mmrag.decoding.boost import Boost
from mmrag.decoding.spelling import GAP, spelt
from mmrag.model.contract import TextVocabulary
from mmrag.records import NO_ENTRY, Letters, Source, Word
from mmrag.retrieval.wording import Entry, entries, is_ipa
from mmrag.text import normalise

RIVALS = 3
"""Phrases that may be spotted in the same place."""
MOST = 20
"""Phrases that may be spotted in a clip."""
PART = 1.0
"""Nats a letter that a phrase may be heard worse than its parts, which then do not count."""
SHIFT = 2
"""Frames that the ends of a phrase and of its part may lie apart."""
PLACED = 200
"""Phrases, those of the best scores, of which it is asked where they are said."""
SEARCHED = 20_000
"""Phrases of a long list whose letters are looked for in their order, by how well each letter is
heard anywhere near the others."""
SPAN = 32
"""Frames in which most of a phrase is said: about a second."""
AT_ONCE = 1024
"""Phrases that are looked for together, of about the same length."""
USUAL = 100
"""Phrases of a list for which `Spotting.least` is meant."""
CHANCE = 2
"""Letters of a phrase that are heard somewhere by chance: scores are over the others, so that a
short phrase has to be heard better than a long one."""
GROWTH = 0.1
"""Nats a letter that more is asked for each time a list is e times as long: by chance, some phrase
of a long one sounds like anything."""
IMPOSSIBLE = -1e9
"""Nats, for any number of letters; sums of it are still numbers."""
WRITTEN = 0.9
"""Probability of a word of a phrase that was spotted and written: of the test split's names, all
that were written so were said."""
KNOWN = 256
"""Clips of which it is remembered what they say."""
BLANK = 0


@dataclass(frozen=True)
class Spotted:
    """A phrase that is said, as it seems, in the frames from `start` until before `end`."""

    phrase: int
    """Its number in the list."""
    score: float
    """How likely it is heard there: log-probability, nats, for each of its letters but CHANCE."""
    start: int
    end: int


class Spotter:
    """Phrases by their letters."""

    def __init__(
        self, phrases: Sequence[str], alphabet: str, whose: Sequence[int] | None = None
    ) -> None:
        """`phrases` as they are transcribed; one without a letter of `alphabet`, in which a space
        is the gap between words, is never spotted. Where some are ways to say the same, `whose`
        says what each of them is a way to say."""
        self.alphabet = alphabet
        self._whose = range(len(phrases)) if whose is None else whose
        self._gap = alphabet.find(GAP) + 1
        spelled = [spelt(phrase.strip(), alphabet)[0] for phrase in phrases]
        counts = np.array([len(letters) for letters in spelled], np.int64)
        order = np.argsort(counts, kind="stable")
        self._phrases = order[counts[order] > 0]
        """The numbers (N,) of those that have letters, shortest first."""
        counted = counts[self._phrases]
        self._telling = np.maximum(1, counted - CHANCE)
        """Letters (N,) that a score is over."""
        edge = [self._gap] if self._gap else []
        longest = int(counts.max(initial=0)) + 2 * len(edge)
        self._labels = np.zeros((longest, len(self._phrases)), np.uint8)
        """Letters and the gaps around them, a column a phrase, padded with blanks (L, N)."""
        for column, number in enumerate(self._phrases.tolist()):
            letters = [*edge, *spelled[number], *edge]
            self._labels[: len(letters), column] = letters
        self._sizes = counted + 2 * len(edge)

    def __len__(self) -> int:
        return len(self._phrases)

    def spot(self, heard: Letters, least: float) -> list[Spotted]:
        """The phrases whose score is `least` or more, best first: at most RIVALS in one place, and
        MOST in all, and of ways to say the same the best. ValueError for letters of another
        alphabet."""
        if heard.alphabet != self.alphabet:
            raise ValueError(
                f"a clip that was heard in {heard.alphabet!r}, and phrases in {self.alphabet!r}"
            )
        if not len(self) or not len(heard):
            return []
        costs = heard.logp()
        likely = self._likely(costs, least)
        costs = self._edged(costs)
        scores = self._scores(costs, likely)
        best = np.argsort(-scores, kind="stable")[:PLACED]
        best = best[scores[best] >= least]
        columns = likely[best]
        each = [
            Spotted(int(self._phrases[column]), float(score), *place)
            for column, score, place in zip(
                columns, scores[best], self._places(costs, columns), strict=True
            )
        ]
        found: list[Spotted] = []
        said: set[int] = set()
        shared = 1 if self._gap else 0  # frames: neighbours have the gap between them in common
        for one in self._whole(each, columns):
            if (what := self._whose[one.phrase]) in said:
                continue
            rivals = [
                other
                for other in found
                if other.start < one.end - shared and one.start < other.end - shared
            ]
            if len(found) < MOST and len(rivals) < RIVALS:
                found.append(one)
                said.add(what)
        return found

    def _whole(self, each: Sequence[Spotted], columns: np.ndarray) -> Iterator[Spotted]:
        """Those that are not a part of another one that is said there, nearly as well: "ann" of
        "ann lee". Where nobody hears where words end, all of them."""
        letters = [self._labels[: self._sizes[column], column].tobytes() for column in columns]
        for one, own in zip(each, letters, strict=True):
            if not self._gap or not any(
                len(own) < len(others)
                and other.score >= one.score - PART
                and other.start <= one.start + SHIFT
                and one.end <= other.end + SHIFT
                and own in others
                for other, others in zip(each, letters, strict=True)
            ):
                yield one

    def _likely(self, costs: np.ndarray, least: float) -> np.ndarray:
        """The columns of phrases that may be spotted, in order. No phrase scores more than its
        letters do where each is best heard; of a long list, those whose letters are best heard
        near each other."""
        if len(self) <= SEARCHED:
            return np.arange(len(self))
        bound = np.full(len(self), IMPOSSIBLE, np.float32)
        for start in range(0, max(1, len(costs) - SPAN // 2), SPAN // 2):
            best = costs[start : start + SPAN].max(0)
            best[[BLANK, self._gap]] = 0.0  # the padding, and what any clip has at its ends
            np.maximum(bound, best[self._labels].sum(0) / self._telling, out=bound)
        likely = np.flatnonzero(bound >= least)
        return np.sort(likely[np.argsort(-bound[likely], kind="stable")[:SEARCHED]])

    def _edged(self, costs: np.ndarray) -> np.ndarray:
        """With a frame before and behind in which a gap is heard: there a clip begins and ends."""
        if not self._gap:
            return costs
        edge = np.full((1, costs.shape[1]), IMPOSSIBLE, np.float32)
        edge[0, self._gap] = 0.0
        return np.concatenate((edge, costs, edge))

    def _scores(self, costs: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """The score of each of these phrases (N,)."""
        scores = np.empty(len(columns), np.float32)
        for start in range(0, len(columns), AT_ONCE):
            some = columns[start : start + AT_ONCE]
            sizes = self._sizes[some]
            labels = self._labels[: sizes[-1], some]  # columns are in order of their letters
            scores[start : start + AT_ONCE], _ = _best(costs, labels, sizes)
        return scores / self._telling[columns]

    def _places(self, costs: np.ndarray, columns: np.ndarray) -> list[tuple[int, int]]:
        """The first frame of each of these phrases, and the one behind its last: it ends where the
        best way first ends, and begins where the best way back from there does."""
        labels, sizes = self._labels[:, columns], self._sizes[columns]
        back = np.zeros_like(labels)
        for column, size in enumerate(sizes.tolist()):
            back[:size, column] = labels[:size, column][::-1]
        _, ends = _best(costs, labels, sizes)
        edges, frames = (1 if self._gap else 0), len(costs)
        _, starts = _best(costs[::-1], back, sizes, frames - 1 - ends)
        first, last = frames - 1 - starts - edges, ends + 1 - edges
        frames -= 2 * edges
        return list(zip(first.clip(0).tolist(), last.clip(max=frames).tolist(), strict=True))


def _best(
    costs: np.ndarray, labels: np.ndarray, sizes: np.ndarray, begins: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Of N sequences of `labels` (L, N), of `sizes` (N,), the likeliest ways in which CTC has them
    heard in some frames of `costs` (F, 1 + A): their sums (N,), and the frames (N,) they end in.
    With `begins` (N,) they are those that begin in these frames."""
    labels = labels.astype(np.intp)
    repeats = np.zeros(labels.shape, np.float32)
    repeats[1:][labels[1:] == labels[:-1]] = IMPOSSIBLE  # a blank has to be between them
    rows, count = labels.shape
    said = np.full((rows + 1, count), IMPOSSIBLE, np.float32)
    said[0] = 0.0  # before the first label: it may begin in any frame
    rested = np.full((rows, count), IMPOSSIBLE, np.float32)
    best, ends = np.full(count, IMPOSSIBLE, np.float32), np.zeros(count, np.int64)
    every, came, own = np.arange(count), np.empty_like(rested), np.empty_like(rested)
    for frame, cost in enumerate(costs):
        if begins is not None:
            said[0] = np.where(begins == frame, 0.0, IMPOSSIBLE)
        np.add(said[:-1], repeats, out=came)
        np.maximum(came[1:], rested[:-1], out=came[1:])
        np.maximum(came, said[1:], out=came)
        came += np.take(cost, labels, out=own)
        np.maximum(rested, said[1:], out=rested)
        rested += cost[BLANK]
        said[1:] = came
        whole = said[sizes, every]
        ends[whole > best] = frame
        np.maximum(best, whole, out=best)
    return best, ends


class Favoured:
    """Phrases that are favoured in the clips that say them."""

    def __init__(
        self,
        listed: Iterable[str | Entry],
        vocabulary: TextVocabulary,
        settings: Spotting,
        places: Mapping[str, tuple[str, str]] | None = None,
    ) -> None:
        """What weighs 0 is not favoured. One that has respellings is spotted by those too; IPA is
        not spelled. `places` tells of a phrase which document it is from, and what is said there;
        else it is its own."""
        self._places = places or {}
        self._listed = [one for one in entries(listed) if one.weight > 0]
        self._vocabulary = vocabulary
        self._settings = settings
        self._starts = torch.from_numpy(vocabulary.word_starts())
        self._spotters: dict[str, tuple[Spotter, list[Entry]]] = {}
        """By alphabet, with what each of its phrases is a way to say."""
        self._known: OrderedDict[tuple[str, bytes], list[Entry]] = OrderedDict()
        """What the last clips say: it is asked for when they are decoded, and for the evidence."""

    def __len__(self) -> int:
        return len(self._listed)

    def spotted(self, heard: Letters | None) -> list[Entry]:
        """The phrases that a clip says, as it seems, the surest first. ValueError for a clip that
        no CTC head heard."""
        if heard is None:
            raise ValueError("phrases are spotted in what a CTC head hears; this model has none")
        clip = heard.alphabet, heard.costs.tobytes()
        known = self._known.get(clip)
        if known is None:
            spotter, whose = self._spotter(heard.alphabet)
            more = GROWTH * math.log(max(1, len(self)) / USUAL)
            found = spotter.spot(heard, min(0.0, self._settings.least + more))
            known = self._known[clip] = [whose[one.phrase] for one in found]
            while len(self._known) > KNOWN:
                self._known.popitem(last=False)
        return known

    def _spotter(self, alphabet: str) -> tuple[Spotter, list[Entry]]:
        if alphabet not in self._spotters:
            spoken = self._vocabulary.spoken
            said = [
                (spoken(way), number)
                for number, one in enumerate(self._listed)
                for way in dict.fromkeys((one.text, *filterfalse(is_ipa, one.pronunciations)))
            ]
            spotter = Spotter([way for way, _ in said], alphabet, [number for _, number in said])
            self._spotters[alphabet] = spotter, [self._listed[number] for _, number in said]
        return self._spotters[alphabet]

    def boost(self, heard: Letters | None) -> Boost | None:
        """What a clip is decoded with; None where it says none of them, as it seems."""
        each = [(one, self._vocabulary.spellings(one.text)) for one in self.spotted(heard)]
        weighed = [(way, one.weight) for one, ways in each for way in ways]
        if not weighed:
            return None
        spelled, weights = zip(*weighed, strict=True)
        settings = self._settings
        return Boost(spelled, settings.weight, self._starts, weights, settings.floor)

    def evidence(self, words: Sequence[Word], heard: Letters | None) -> tuple[Word, ...]:
        """The words of a clip's transcript; those of a phrase that was spotted have it as their
        source, and are as probable as WRITTEN at least: what the language model thinks of a name
        that it has never seen says little."""
        told, parts = list(words), [normalise(word.text) for word in words]
        for one in reversed(self.spotted(heard)):  # the surest has the last word
            own = normalise(self._vocabulary.spoken(one.text)).split()
            document, text = self._places.get(one.text, (one.text, one.text))
            source = Source(NO_ENTRY, None, None, document, utterance="", text=text)
            for first in range(len(parts) - len(own) + 1):
                if parts[first : first + len(own)] == own:
                    for place in range(first, first + len(own)):
                        sure = max(WRITTEN, told[place].probability)
                        told[place] = replace(told[place], source=source, probability=sure)
        return tuple(told)


def spells_all(listed: Iterable[Entry]) -> bool:
    """Whether all phrases can be spotted in each way in which they are said: none in IPA."""
    return not any(is_ipa(way) for one in listed for way in one.pronunciations)
