"""Phrase boosting: the decoder favours word pieces that spell one of a list of phrases.

Shallow fusion with a prefix tree (Zhao et al., Interspeech 2019): each piece that goes on along a
phrase earns `weight` nats, and a hypothesis that leaves a phrase before its end gives back what the
unfinished part had earned. The baseline that retrieval is measured against. Phrases may weigh more
or less than others: a piece earns as many times `weight` as the heaviest phrase that it may become.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

MOST_LIFT = 20.0
"""Nats by which a piece is made likelier at most for a phrase's sake."""
START = 0
"""The state of a hypothesis without a token."""


class Boost:
    """Phrases to favour. A phrase is met only from a word's start to a word's end.

    A state is the phrase prefix that a hypothesis ends with: the tree's nodes in order of their
    depth, START its root, and a last state for no prefix. A step costs the same whatever the number
    of phrases, but for the first token.
    """

    def __init__(
        self,
        phrases: Iterable[Sequence[int]],
        weight: float,
        word_starts: Tensor,
        weights: Sequence[float] | None = None,
        floor: float | None = None,
    ) -> None:
        """`phrases` as ids; `word_starts` (V,) bool, the ids that end the word before them;
        `weights` are the phrases' own, 1 each without: one of 0 is not favoured. With a `floor`,
        a piece that goes on along a phrase earns no less than makes it that likely (nats), or its
        part of that where the phrase weighs less than 1; what that is above `weight` is not given
        back."""
        self.weight = weight
        self.floor = floor
        self._word_starts = word_starts
        starts = word_starts.numpy()
        self._vocabulary = len(starts)
        listed = list(phrases)
        each = zip(listed, weights or [1.0] * len(listed), strict=True)
        self._build([(phrase, own) for phrase, own in each if len(phrase) and own > 0], starts)
        opening, opened = np.zeros(len(starts), np.float32), np.full(len(starts), self._outside)
        pieces = self._edges[: np.searchsorted(self._edges, len(starts))]
        met = pieces[starts[pieces]]
        opening[met] = self._gains[: len(pieces)][starts[pieces]]
        opened[pieces] = np.where(starts[pieces], np.arange(len(pieces)) + 1, self._outside)
        self._opened = opened
        self._opening = torch.from_numpy(opening)

    def _build(self, weighed: Sequence[tuple[Sequence[int], float]], starts: np.ndarray) -> None:
        """The tree of phrases and their weights, a level at a time.

        An edge is its node's number times V plus its piece, and gains the largest weight of the
        phrases behind it; in order, they lead to the nodes from 1 on. `_whole` is the length, times
        its weight, of the longest phrase that a node starts with if a new word follows (0 for
        none), `_inner` that of the longest one if its last word goes on, both less what the node
        has earned: the gains on the way to it.
        """
        phrases = [phrase for phrase, _ in weighed]
        weights = np.array([own for _, own in weighed], np.float64)
        lengths = np.array([len(phrase) for phrase in phrases], np.int64)
        node = np.zeros(len(phrases), np.int64)
        edges, whole, inner, earned = [], [np.zeros(1)], [np.zeros(1)], [np.zeros(1)]
        gains = [np.zeros(0)]
        count = 1
        for depth in range(1, int(lengths.max(initial=0)) + 1):
            longer = lengths >= depth
            phrases = [phrase for phrase, kept in zip(phrases, longer, strict=True) if kept]
            lengths, node, weights = lengths[longer], node[longer], weights[longer]
            pieces = np.array([phrase[depth - 1] for phrase in phrases], np.int64)
            new, place = np.unique(node * self._vocabulary + pieces, return_inverse=True)
            parent = new // self._vocabulary - (count - len(whole[-1]))
            own = np.where(starts[new % self._vocabulary], whole[-1][parent], inner[-1][parent])
            heaviest, ended = np.zeros(len(new)), np.zeros(len(new))
            np.maximum.at(heaviest, place, weights)
            np.maximum.at(ended, place[lengths == depth], weights[lengths == depth])
            edges.append(new)
            gains.append(heaviest)
            earned.append(earned[-1][parent] + heaviest)
            inner.append(own)
            whole.append(np.where(ended > 0, depth * ended, own))
            node, count = count + place, count + len(new)
        self._outside = count
        self._edges = np.concatenate(edges) if edges else np.empty(0, np.int64)
        self._gains = np.concatenate(gains).astype(np.float32)
        total = np.append(np.concatenate(earned), 0.0)
        self._whole = (np.append(np.concatenate(whole), 0.0) - total).astype(np.float32)
        self._inner = (np.append(np.concatenate(inner), 0.0) - total).astype(np.float32)

    def advance(self, states: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """The states (R,) of hypotheses in `states` (R,) that go on with `tokens` (R,)."""
        asked = states * self._vocabulary + tokens
        edge = np.searchsorted(self._edges, asked)
        found = np.append(self._edges, -1)[edge] == asked
        return np.where(found, edge + 1, self._opened[tokens])

    def lifted(self, states: np.ndarray, logp: Tensor) -> Tensor:
        """What each next token of `logp` (R, V) would earn in `states` (R,): (R, V), nats."""
        bonus = self.bonus(states, logp.device).to(logp)
        if self.floor is None:
            return bonus
        lift = (self.floor - logp).clamp(max=MOST_LIFT) * (bonus / self.weight).clamp(max=1)
        return torch.where(bonus > 0, torch.maximum(bonus, lift), bonus)

    def bonus(self, states: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
        """What each next token would earn in `states` (R,): (R, V) float32 on `device`, nats."""
        if self._opening.device != torch.device(device):
            self._opening = self._opening.to(device)
            self._word_starts = self._word_starts.to(device)
        whole, inner = (
            torch.from_numpy(one[states]).to(device)[:, None] for one in (self._whole, self._inner)
        )
        kept = torch.where(self._word_starts, whole, inner) + self._opening
        bounds = np.array([states, states + 1]) * self._vocabulary
        begin, end = np.searchsorted(self._edges, bounds)
        if (count := end - begin).any():
            rows = np.repeat(np.arange(len(states)), count)
            places = np.arange(count.sum()) + np.repeat(begin - (count.cumsum() - count), count)
            pieces = self._edges[places] % self._vocabulary
            where = torch.from_numpy(rows).to(device), torch.from_numpy(pieces).to(device)
            kept[where] = torch.from_numpy(self._gains[places]).to(device)
        return self.weight * kept


class BoostedRows:
    """What the rows of a batch earn, each by its own phrases, from step to step."""

    def __init__(self, boosts: Sequence[Boost | None]) -> None:
        """One a row; None for a row without phrases."""
        self._boosts = {id(boost): boost for boost in boosts if boost is not None}
        self._boost = np.array([0 if boost is None else id(boost) for boost in boosts], np.int64)
        self._states = np.full(len(boosts), START)

    def bonus(self, logp: Tensor) -> Tensor | None:
        """What the rows' phrases earn each next token (B, V) of `logp` (B, V); None where no row
        has any."""
        earned = None
        for number, boost in self._boosts.items():
            own = (self._boost == number).nonzero()[0]
            every, rows = len(own) == len(logp), torch.from_numpy(own).to(logp.device)
            one = boost.lifted(self._states[own], logp if every else logp[rows])
            if every:
                return one
            earned = torch.zeros_like(logp) if earned is None else earned
            earned = earned.index_copy(0, rows, one)
        return earned

    def begin(self, row: int, tokens: Sequence[int]) -> np.ndarray:
        """A row goes on with `tokens` (T,); what each of them earns (T,), nats."""
        boost, earned = self._boosts.get(int(self._boost[row])), np.zeros(len(tokens), np.float32)
        for place, token in enumerate(tokens if boost else ()):
            state = self._states[row : row + 1]
            earned[place] = boost.bonus(state)[0, token]
            self._states[row] = boost.advance(state, np.array([token]))[0]
        return earned

    def advance(self, tokens: np.ndarray) -> None:
        """Every row goes on with its token, of `tokens` (B,)."""
        for number, boost in self._boosts.items():
            own = self._boost == number
            self._states[own] = boost.advance(self._states[own], tokens[own])

    def select(self, rows: np.ndarray) -> None:
        """Keep these rows (R,), which may repeat."""
        self._boost, self._states = self._boost[rows], self._states[rows]
        kept = set(self._boost.tolist())
        self._boosts = {number: one for number, one in self._boosts.items() if number in kept}

    def join(self, other: BoostedRows) -> None:
        """Go on with the rows of `other`, too."""
        self._boosts |= other._boosts
        self._boost = np.concatenate((self._boost, other._boost))
        self._states = np.concatenate((self._states, other._states))
