"""Beam search over all the clips of a batch at once: which candidates go on, stop or are dropped.

Greedy search is beam search with one beam. Rows are hypotheses: those of a search lie together,
best first. Knows numbers alone; what is said of a candidate is kept in a `History`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import NamedTuple

import numpy as np

from mmrag.config import Decode
from mmrag.decoding.boost import Boost
from mmrag.decoding.hypotheses import NOTHING, History, Hypothesis
from mmrag.model.contract import Speech
from mmrag.model.ngram import NGram
from mmrag.records import Letters
from mmrag.retrieval.interpolation import Retrieval
from mmrag.retrieval.memory import AttentionSource

JOINT_BEAMS = 8
"""Of joint decoding, where nobody says how many: what letters favour shows some tokens later."""


@dataclass(frozen=True)
class Clip:
    """What there is to decode, and how; `context` are ids of the vocabulary."""

    speech: Speech
    limit: int
    """Longest transcript, tokens."""
    beams: int = 1
    length_penalty: float = 0.0
    temperature: float = 0.0
    """With one beam: draw each token from the distribution to the power of 1 / temperature; 0 takes
    the likeliest."""
    ctc_weight: float = 0.0
    """Share of a token's score that is of its letters, as they were heard, where the speech comes
    with any; the rest is the language model's, with what was retrieved."""
    ngram: NGram | None = None
    """An n-gram model of its language."""
    ngram_weight: float = 0.0
    """What counts of that model's log-probabilities, beside the rest of a token's score."""
    retrieval: Retrieval | None = None
    attention: AttentionSource | None = None
    """The windows that the model attends to."""
    exclude_document: int = -1
    """A document whose entries must not be used; -1 for none."""
    boost: Boost | None = None
    """Phrases to favour."""
    context: Sequence[int] = ()
    """Text that stands before the speech in the prompt."""
    beginning: Sequence[int] = ()
    """Whole words that the transcript begins with, whatever is heard."""
    fallback: tuple[float, ...] = ()
    """Temperatures at which the engine makes a transcript again, one after the other, until it
    believes what it gets."""

    @property
    def longest(self) -> int:
        """Tokens of the longest transcript: one more than the beginning has, at least."""
        return max(self.limit, len(self.beginning) + 1)

    @property
    def queries_with_text(self) -> bool:
        """Whether its queries are states over the transcript alone, as in `KNN.query`."""
        return self.retrieval is not None and self.retrieval.settings.query == "text"


def beams_for(settings: Decode, letters: Letters | None, rows: int | None = None) -> int:
    """The beams of a clip of which a CTC head heard these `letters`, or that none heard; where
    nobody says how many, so few that two clips fit into `rows`."""
    if settings.beams is not None:
        return settings.beams
    if letters is None or not settings.ctc_weight:
        return 1
    return JOINT_BEAMS if rows is None else max(1, min(JOINT_BEAMS, rows // 2))


@dataclass(eq=False)
class BeamSearch:
    """One clip's beam."""

    clip: Clip
    finished: list[Hypothesis] = field(default_factory=list)
    """Those that stopped; at the limit, where none did, those that were cut off."""
    missing_shards: int = 0
    """Shards that did not answer, at most in one step."""
    over: bool = False
    """Whether there is nothing left to extend."""
    _beams: Beams | None = None
    """Where it is extended."""
    _last: list[Hypothesis] = field(default_factory=list)
    _tokens: list[int] = field(default_factory=list)

    @property
    def live(self) -> list[Hypothesis]:
        """Those that the next step extends, best first; as they were, once it was given up."""
        return self._beams.live(self) if self._beams else self._last

    @property
    def tokens(self) -> list[int]:
        """Its tokens that are certain by now, without the end: those that all hypotheses begin
        with, which are all so far where there is one beam."""
        if self._beams:
            self._tokens = self._beams.certain_tokens(self, self._tokens)
            return list(self._tokens)
        return self.best().tokens

    def best(self) -> Hypothesis:
        """The hypothesis of the highest score among those that stopped, or all if none did."""
        return self.nbest(1)[0]

    def nbest(self, count: int) -> list[Hypothesis]:
        """As `best`: the first `count`, highest score first; fewer where there are no more."""
        penalty = self.clip.length_penalty
        found = self.finished or self.live
        return sorted(found, key=lambda one: one.score(penalty), reverse=True)[:count]


class Ranked(NamedTuple):
    """Which of a step's candidates are taken (R,), by row and column, search by search.

    The first `going` of them go on, those of a search best first; the others have stopped. `over`
    (S,) are the searches that have enough, or nothing to extend.
    """

    rows: np.ndarray
    columns: np.ndarray
    going: int
    over: np.ndarray


_OF_ROWS = ("owner", "newest", "tokens", "logp")
_OF_SEARCHES = ("width", "temperature", "_left", "_stopped")


class Beams:
    """The hypotheses of S searches, one a row."""

    def __init__(self, clips: Sequence[Clip], history: History) -> None:
        rows = len(clips)
        self.searches = [BeamSearch(clip, _beams=self) for clip in clips]
        self.owner = np.arange(rows)
        """The search of each row (B,), rising from 0."""
        self.newest = np.full(rows, NOTHING)
        """The newest choice of each row (B,), as the history counts."""
        self.tokens = np.full(rows, -1)
        """Its token (B,); -1 before the first."""
        self.likeliest = True
        """Whether each took the likeliest token of its row in the last step."""
        self.logp = np.zeros(rows)
        """Log-probability of each hypothesis (B,)."""
        self.width = np.array([clip.beams for clip in clips])
        """Beams of each search (S,)."""
        self.temperature = np.array([clip.temperature for clip in clips])
        self._left = np.array([clip.longest - len(clip.beginning) for clip in clips])
        self._stopped = np.zeros(rows, np.int64)
        self._history = history

    def __len__(self) -> int:
        return len(self.owner)

    @property
    def candidates(self) -> int:
        """Candidates that a row has to offer: as one of them may be the end, a beam's and one."""
        widest = int(self.width.max())
        return widest + 1 if widest > 1 else 1

    @property
    def temperatures(self) -> np.ndarray | None:
        """Those of the rows (B,); None where all are 0."""
        return self.temperature[self.owner] if self.temperature.any() else None

    def begin(self, rows: np.ndarray, newest: np.ndarray, logp: np.ndarray) -> None:
        """These rows (R,) go on with a token that was given, in the history as `newest` (R,), of
        log-probability `logp` (R,)."""
        self.newest[rows] = newest
        self.logp[rows] += logp

    def rank(self, tokens: np.ndarray, logp: np.ndarray, end: int) -> Ranked:
        """The best of `tokens` (B, K), of log-probabilities `logp` (B, K), a beam's worth for each
        search; -inf for what is no candidate.

        An `end` among the best of a search, as many as its beams, is a hypothesis that has stopped.
        A search is over once as many have stopped, and at its limit.
        """
        scores = self.logp[:, None] + logp
        row, column = (scores != -np.inf).nonzero()
        order = np.lexsort((-scores[row, column], self.owner[row]))  # of equals, the first
        row, column = row[order], column[order]
        owner, ends = self.owner[row], tokens[row, column] == end
        searches = len(self.searches)
        first = np.searchsorted(owner, np.arange(searches))
        going = np.append(0, np.cumsum(~ends))
        stops = ends & (np.arange(len(owner)) - first[owner] < self.width[owner])
        goes_on = ~ends & (going[1:] - going[first][owner] <= self.width[owner])
        self._stopped += np.bincount(owner[stops], minlength=searches)
        self._left -= 1
        alive = np.bincount(owner[goes_on], minlength=searches) > 0
        over = ~alive | (self._stopped >= self.width) | (self._left <= 0)
        taken = np.append(goes_on.nonzero(), stops.nonzero())
        return Ranked(row[taken], column[taken], int(goes_on.sum()), over)

    def advance(
        self, ranked: Ranked, tokens: np.ndarray, logp: np.ndarray, newest: np.ndarray
    ) -> np.ndarray:
        """Go on with what `rank` found: `tokens` (R,) of log-probabilities `logp` (R,), in the
        history as `newest` (R,); the rows that are extended next, by their place until now.

        Searches that are over get their hypotheses, and leave.
        """
        going, rows = ranked.going, ranked.rows
        owner, total = self.owner[rows], self.logp[rows] + logp
        for place in range(going, len(rows)):
            stopped = self._history.hypothesis(newest[place], float(total[place]), True)
            self.searches[owner[place]].finished.append(stopped)
        owner, total, newest = owner[:going], total[:going], newest[:going]
        for index in ranked.over.nonzero()[0].tolist():
            search = self.searches[index]
            if not search.finished:
                search.finished = [
                    self._history.hypothesis(newest[place], float(total[place]), False)
                    for place in (owner == index).nonzero()[0]
                ]
            search.over, search._beams, search._last = True, None, []
        kept = ~ranked.over[owner]
        self.owner, self.newest, self.logp = owner[kept], newest[kept], total[kept]
        self.tokens = tokens[:going][kept]
        self.likeliest = not ranked.columns[:going].any()
        self._forget(ranked.over)
        return rows[:going][kept]

    def leave(self, search: BeamSearch) -> np.ndarray:
        """Give up a search; the rows (B,) of the others, by their place until now."""
        search._last, search._beams = self.live(search), None
        gone = np.array([one is search for one in self.searches])
        rows = (~gone[self.owner]).nonzero()[0]
        for name in _OF_ROWS:
            setattr(self, name, getattr(self, name)[rows])
        self._forget(gone)
        return rows

    def join(self, other: Beams) -> None:
        """Go on with the searches of `other`, too, which shares the history."""
        other.owner = other.owner + len(self.searches)
        for name in (*_OF_ROWS, *_OF_SEARCHES):
            setattr(self, name, np.concatenate((getattr(self, name), getattr(other, name))))
        for search in other.searches:
            search._beams = self
        self.searches = self.searches + other.searches

    def tidy(self) -> None:
        """Let the history forget what no row follows."""
        self.newest = self._history.tidy(self.newest)

    def live(self, search: BeamSearch) -> list[Hypothesis]:
        """The hypotheses of a search, best first."""
        return [
            self._history.hypothesis(self.newest[row], float(self.logp[row]), False)
            for row in self._rows(search)
        ]

    def certain_tokens(self, search: BeamSearch, known: Sequence[int]) -> list[int]:
        """The tokens that all hypotheses of a search begin with, of which the first are `known`."""
        rows = self._rows(search)
        each = [self._history.tokens(self.newest[row], known) for row in rows]
        each += [one.tokens for one in search.finished]
        columns = zip(*each, strict=False)
        return [column[0] for column in takewhile(_alike, columns)]

    def _rows(self, search: BeamSearch) -> np.ndarray:
        return (self.owner == self.searches.index(search)).nonzero()[0]

    def _forget(self, gone: np.ndarray) -> None:
        """Drop the searches (S,) that are `gone`; no row belongs to them."""
        if not gone.any():
            return
        self.owner = (np.cumsum(~gone) - 1)[self.owner]
        for name in _OF_SEARCHES:
            setattr(self, name, getattr(self, name)[~gone])
        kept = (~gone).nonzero()[0].tolist()
        self.searches = [self.searches[index] for index in kept]


def _alike(column: Sequence[int]) -> bool:
    return len(set(column)) == 1
