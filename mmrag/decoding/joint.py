"""The rows of a batch with what a CTC head heard of their clips, which has a say in each token.

Joint decoding (Watanabe et al., "Hybrid CTC/attention architecture for end-to-end speech
recognition", IEEE JSTSP 2017): a token's score is the language model's and that of its letters, by
weight. Only tokens that may be chosen are scored: those that are likeliest if each is taken to be
as likely as its first letter, which it can but fall short of, and of these only as many letters as
show that others of the clip are better. Nothing here waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmrag.decoding.ctc import NO_LETTER, Frames, Prefixes, longer
from mmrag.decoding.spelling import Spelling, spelling
from mmrag.model.contract import TextVocabulary
from mmrag.records import Letters

LEAST_CANDIDATES = 16
"""Tokens of a row that may be scored, at least; else twice as many as it has to offer. Those beyond
them would be worse by their first letter alone."""
LIKELIEST = 512
"""Of a large vocabulary, tokens that are likeliest by the language model, among which candidates
are looked for."""
FEW = 8
"""So many times as many tokens are all looked at."""
LEAST_HEARD = -1000.0
"""Of letters that there is no time for, nats: a transcript goes on with them where nothing else is
possible."""


@dataclass(frozen=True, eq=False)
class _Starts:
    """What the tokens of R rows may go on from.

    `at` (2 R,): the places in `prefixes` of those that go on with a word, then of those that begin
    one. `each` (R, 2 (1 + A)): what is heard of any letter behind the former, and the latter; of
    none in column 0.
    """

    prefixes: Prefixes
    at: Tensor
    each: Tensor


class LetterRows:
    """What was heard of the rows of a batch, from step to step."""

    def __init__(
        self,
        heard: Sequence[Letters | None],
        weights: Sequence[float],
        vocabulary: TextVocabulary,
        device: torch.device,
    ) -> None:
        """One a row; a row without letters, or of weight 0, is left to the language model.

        Raises ValueError where the clips were heard in several alphabets.
        """
        self._end, self._device = vocabulary.eos, device
        has = [one is not None and w > 0 for one, w in zip(heard, weights, strict=True)]
        self.of_rows = np.array(has, bool)
        """Which rows (B,) have letters: R of them."""
        self._weight = np.array(weights, np.float64)[self.of_rows]
        self._clip = np.arange(len(self._weight))
        """The clip of each, in `_frames`."""
        self._last = np.full(len(self._clip), NO_LETTER)
        """The last letter of each (R,)."""
        self._gap = np.zeros(len(self._clip), bool)
        """Whether a gap is to be heard before the next letter of each (R,)."""
        self._spelling: Spelling | None = None
        own = [one for one, there in zip(heard, has, strict=True) if there]
        if own:
            self._spelling = spelling(vocabulary, _the_one({one.alphabet for one in own}))
            self._lengths = np.array([len(one) for one in own])
            """Frames of each clip (C,)."""
            self._frames = Frames.of(own, device)
            empty = Prefixes.empty(self._frames, self._sent(self._clip))
            self._states = empty.states
            """Of a row's prefix (R, 2, F + 1), as in `Prefixes`."""
            self._logp = empty.logp
            """Log-probability (R,) that what is said begins with it."""
        self._place()

    def __len__(self) -> int:
        return len(self._clip)

    def weigh(
        self,
        logp: Tensor,
        bonus: Tensor | None,
        count: int,
        temperatures: np.ndarray | None = None,
        totals: np.ndarray | None = None,
    ) -> Tensor:
        """The joint scores (B, V) of the next tokens: of `logp` (B, V), in which the `bonus` (B, V)
        of phrases and counts is, which stays whole, and of the letters.

        In a row with letters the end has its score, and of the other tokens the best `count`, and
        any other that is a candidate where `temperatures` (B,) are not 0; all else is -inf. With
        the `totals` (B,) of what the rows have written, those are the best of all rows of a clip.
        Rows without letters stay as they are.
        """
        if not len(self):
            return logp
        every = len(self) == len(logp)
        own = logp if every else logp[self._rows]
        gain = bonus if bonus is None or every else bonus[self._rows]
        drawn = None if temperatures is None else temperatures[self.of_rows] > 0
        rivals = None if totals is None else self._sent(totals[self.of_rows])[:, None]
        starts = self._starts()
        tokens = self._candidates(own, gain, starts, max(LEAST_CANDIDATES, 2 * count))
        score = self._scores(own, gain, starts, tokens, count, drawn, rivals)
        joint = torch.full_like(own, -torch.inf).scatter_(1, tokens, score)
        end = slice(self._end, self._end + 1)
        whole = self._conditional(self._prefixes().logp_whole(), self._logp)[:, None]
        joint[:, end] = self._joint(own[:, end], None if gain is None else gain[:, end], whole)
        return joint if every else logp.index_copy(0, self._rows, joint)

    def begin(
        self, rows: np.ndarray, offsets: np.ndarray, tokens: np.ndarray, logp: Tensor
    ) -> Tensor:
        """Go on with tokens that are given: `tokens` (G,), each of a row, of `rows` (G,), and of a
        place in what it begins with, of `offsets` (G,). `logp` (G, V), with the joint score of the
        given token at each place."""
        if not self.of_rows[rows].any():
            return logp
        place = np.cumsum(self.of_rows) - 1
        column = self._sent(tokens)[:, None]
        own = logp.gather(1, column)
        for offset in range(offsets[self.of_rows[rows]].max() + 1):
            at = np.flatnonzero((offsets == offset) & self.of_rows[rows])
            here, places = self._sent(at), place[rows[at]]
            heard = self._go_on(places, tokens[at])[:, None]
            score = self._joint(own[here], None, heard, self._weighing[self._sent(places)])
            own = own.index_copy(0, here, score)
        return logp.scatter(1, column, own)

    def advance(self, tokens: np.ndarray) -> None:
        """Every row goes on with its token, of `tokens` (B,)."""
        if len(self):
            self._go_on(np.arange(len(self)), tokens[self.of_rows])

    def select(self, rows: np.ndarray) -> None:
        """Keep these rows (K,), which may repeat."""
        if not len(self):
            self.of_rows = self.of_rows[rows]
            return
        kept = (np.cumsum(self.of_rows) - 1)[rows[self.of_rows[rows]]]
        self.of_rows = self.of_rows[rows]
        clips, self._clip = np.unique(self._clip[kept], return_inverse=True)
        for name in ("_weight", "_last", "_gap"):
            setattr(self, name, getattr(self, name)[kept])
        index = self._sent(kept)
        self._states, self._logp = self._states[index], self._logp[index]
        if len(clips) < len(self._lengths):
            self._lengths = self._lengths[clips]
            most = int(self._lengths.max(initial=0))
            self._frames = self._frames.select(self._sent(clips), most)
            self._states = self._states[..., : self._frames.size + 1]
        self._place()

    def require(self, other: LetterRows) -> None:
        """ValueError where the rows of `other` were heard in another alphabet."""
        if len(self) and len(other):
            _the_one({self._spelling.alphabet, other._spelling.alphabet})

    def join(self, other: LetterRows) -> None:
        """Go on with the rows of `other`, too, heard in the same alphabet."""
        if len(other) and len(self):
            other._clip = other._clip + len(self._lengths)
            self._lengths = np.concatenate((self._lengths, other._lengths))
            self._frames = self._frames.join(other._frames)
            states = (longer(one._states, self._frames.size) for one in (self, other))
            self._states = torch.cat(tuple(states))
            self._logp = torch.cat((self._logp, other._logp))
        elif len(other):
            for name in ("_spelling", "_lengths", "_frames", "_states", "_logp"):
                setattr(self, name, getattr(other, name))
        for name in ("of_rows", "_weight", "_clip", "_last", "_gap"):
            setattr(self, name, np.concatenate((getattr(self, name), getattr(other, name))))
        self._place()

    def _prefixes(self) -> Prefixes:
        """What the rows have written so far."""
        return Prefixes(self._frames, self._clips, self._sent(self._last), self._logp, self._states)

    def _starts(self) -> _Starts:
        """What tokens may go on from."""
        prefixes, gap, size = self._prefixes(), self._spelling.gap, len(self)
        inside = np.arange(size)
        behind = inside.copy()
        if (parted := np.flatnonzero(self._parts)).size:
            here = self._sent(parted)
            prefixes = prefixes.join(prefixes.then(here, torch.full_like(here, gap)))
            behind[parted] = size + np.arange(parted.size)
            inside = np.where(self._waits, behind, inside)
        at = self._sent(np.concatenate((inside, behind)))
        each = prefixes.logp_of_each(at[self._grid]).flatten(0, 1)[self._cells]
        # A gap alone says nothing where nothing is written, and is what waits behind a comma, say.
        for places, heard in (
            (np.flatnonzero(self._gap & (self._last != NO_LETTER)), at[size:]),
            (np.flatnonzero(~self._gap & (self._last == NO_LETTER)), at[:size]),
        ):
            if places.size:
                here = self._sent(places)
                each[here, gap] = prefixes.logp[heard[here]]
        each = self._conditional(each, self._logp.repeat(2)[:, None])
        each[:, NO_LETTER] = 0.0
        return _Starts(prefixes, at, torch.cat(each.split(size), 1))

    @property
    def _parts(self) -> np.ndarray:
        """Where a gap has to be heard before a token that opens with one (R,) bool."""
        return (self._last != NO_LETTER) & (self._spelling.gap > 0)

    @property
    def _waits(self) -> np.ndarray:
        """Where a gap is to be heard before any letter (R,) bool."""
        return self._gap & self._parts & (self._last != self._spelling.gap)

    def _candidates(self, logp: Tensor, gain: Tensor | None, starts: _Starts, count: int) -> Tensor:
        """The `count` tokens (R, K) other than the end that may have the highest scores: as if of
        their letters only the first were heard."""
        first, each = self._first, starts.each.to(logp.dtype)
        if logp.shape[1] <= FEW * LIKELIEST:
            most = self._joint(logp, gain, each.index_select(1, first))
            most[:, self._end] = -torch.inf
            return most.topk(min(count, most.shape[1])).indices
        logp, likeliest = logp.topk(LIKELIEST)
        gain = None if gain is None else gain.gather(1, likeliest)
        most = self._joint(logp, gain, each.gather(1, first[likeliest]))
        chosen = most.masked_fill(likeliest == self._end, -torch.inf).topk(count).indices
        return likeliest.gather(1, chosen)

    def _scores(
        self,
        logp: Tensor,
        gain: Tensor | None,
        starts: _Starts,
        tokens: Tensor,
        count: int,
        drawn: np.ndarray | None,
        rivals: Tensor | None,
    ) -> Tensor:
        """The joint scores (R, K) of `tokens` (R, K); -inf for the end, and where `count` are
        better of the row, or, with totals of `rivals` (R, 1), of all rows of a clip, but for rows
        that are `drawn` (R,).

        A letter at a time for all: what is heard of a token becomes less with each, and it is given
        up once as many whole ones are better. Tokens of a row that begin alike are one until they
        part.
        """
        logp = logp.gather(1, tokens).masked_fill(tokens == self._end, -torch.inf)
        gain = None if gain is None else gain.gather(1, tokens)
        heard = starts.each.gather(1, self._first[tokens])
        letters, counts, opens, _ = (
            one.index_select(0, tokens.flatten()) for one in self._spelling.on(self._device)
        )
        counts, letters = counts.view(tokens.shape), letters.long()
        at = starts.at.view(2, -1, 1).expand(-1, -1, tokens.shape[1]).flatten(1)
        at, prefixes = torch.where(opens > 0, at[1], at[0]), starts.prefixes
        before = self._logp.repeat_interleave(tokens.shape[1])
        for place in range(1, self._spelling.longest):
            score, goes_on = self._joint(logp, gain, heard), counts > place
            if not (waited_for := _waited_for(score)):
                worst = self._worst_of_best(score.masked_fill(goes_on, -torch.inf), count, rivals)
                if drawn is not None:
                    worst = worst.masked_fill(self._sent(drawn)[:, None], -torch.inf)
                heard.masked_fill_(goes_on & (score <= worst), -torch.inf)
                goes_on &= score > worst
            here = _where(goes_on.flatten())
            if not here.numel():
                break
            spelt = letters[here, place - 1]
            parents, added, same = _distinct(at[here], spelt, self._frames.letters)
            prefixes, letter = prefixes.then(parents, added), letters[here, place]
            at = at.index_copy(0, here, same)
            own = self._conditional(prefixes.logp_then(same, letter), before[here])
            if waited_for:
                own = torch.where(letter > 0, own, heard.flatten())
            heard.view(-1).index_copy_(0, here, own)
        return self._joint(logp, gain, heard)

    def _worst_of_best(self, score: Tensor, count: int, rivals: Tensor | None) -> Tensor:
        """Of scores (R, K) the `count`-th best of each row (R, 1); with totals of `rivals` (R, 1),
        what a score of the row is worth as much as the `count`-th best of all rows of its clip."""
        if rivals is None:
            return score.topk(min(count, score.shape[1])).values[:, -1:]
        shape = self._grid.numel() // 2, score.shape[1]
        own = torch.full(shape, -torch.inf, dtype=rivals.dtype, device=self._device)
        own = own.index_copy_(0, self._cell, score + rivals).view(len(self._grid), -1)
        return own.topk(min(count, own.shape[1])).values[self._clips, -1:] - rivals

    def _go_on(self, places: np.ndarray, tokens: np.ndarray) -> Tensor:
        """The rows at `places` (S,) go on with `tokens` (S,); log-probability (S,) of their letters
        behind what was written."""
        table, gap = self._spelling, self._gap[places]
        spelt, blank = table.letters[tokens], table.blank[tokens]
        counts = np.where(blank & ~gap & (self._last[places] == NO_LETTER), 0, table.counts[tokens])
        parted = self._waits[places] | (table.opens[tokens] & self._parts[places])
        parted &= (counts > 0) & ~blank
        spelt = np.pad(spelt, ((0, 0), (1, 0)), constant_values=table.gap).astype(np.int64)
        spelt[~parted] = np.roll(spelt[~parted], -1, 1)
        counts = counts + parted
        here = self._sent(places)
        prefixes = self._prefixes().take(here)
        before = self._logp[here]
        for place in range(counts.max(initial=0)):
            on = np.flatnonzero(counts > place)
            index = self._sent(on)
            grown = prefixes.then(index, self._sent(spelt[on, place]))
            prefixes = grown if on.size == places.size else prefixes.put(index, grown)
        self._states = self._states.index_copy(0, here, prefixes.states)
        self._logp = self._logp.index_copy(0, here, prefixes.logp)
        said = counts > 0
        self._last[places[said]] = spelt[said, counts[said] - 1]
        self._gap[places] = np.where(blank, ~said, table.closes[tokens] | (gap & ~said))
        return self._conditional(prefixes.logp, before)

    def _joint(
        self, logp: Tensor, gain: Tensor | None, heard: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        """Scores (R, K) of tokens of `logp` (R, K), in which there may be a `gain` (R, K) that
        stays whole, and of what is `heard` of them (R, K)."""
        weight = self._weighing if weight is None else weight
        other = heard if gain is None else heard + gain
        joint = ((1 - weight) * logp + weight * other).to(logp.dtype)
        return joint.masked_fill(logp == -torch.inf, -torch.inf)

    @staticmethod
    def _conditional(logp: Tensor, before: Tensor) -> Tensor:
        """`logp` given what is as likely as `before`, LEAST_HEARD at least; where that cannot have
        been heard, whatever follows is as likely as anything."""
        heard = (logp - before).nan_to_num_(0.0, neginf=-torch.inf)
        return heard.clamp_(LEAST_HEARD, 0.0)

    def _place(self) -> None:
        """Number the rows and their clips on the device."""
        self._rows = self._sent(np.flatnonzero(self.of_rows))
        self._clips = self._sent(self._clip)
        self._weighing = self._sent(self._weight.astype(np.float32))[:, None]
        if not len(self):
            return
        self._first = self._spelling.on(self._device)[3]
        # The rows of each clip beside each other, as many as the most that one has.
        size, counts = len(self), np.bincount(self._clip)
        order = np.argsort(self._clip, kind="stable")
        number = np.empty_like(order)
        number[order] = np.arange(size) - np.repeat(np.cumsum(counts) - counts, counts)
        grid = np.zeros((len(counts), counts.max()), np.int64)
        grid[self._clip, number] = np.arange(size)
        cells = 2 * self._clip * grid.shape[1] + number
        self._cell = self._sent(self._clip * grid.shape[1] + number)
        """The place of each row (R,) among the rows of clips, padded (C M)."""
        self._grid = self._sent(np.concatenate((grid, grid + size), 1))
        """What each clip's rows go on from (C, 2 M), as `_Starts.at` numbers it."""
        self._cells = self._sent(np.concatenate((cells, cells + grid.shape[1])))
        """The place there of each (2 R,)."""

    def _sent(self, values: np.ndarray) -> Tensor:
        """On its way to the device: nobody waits for it here."""
        sent = torch.from_numpy(values)
        return sent if self._device.type == "cpu" else sent.to(self._device, non_blocking=True)


def _the_one(alphabets: set[str]) -> str:
    if len(alphabets) > 1:
        named = " and ".join(map(repr, sorted(alphabets)))
        raise ValueError(f"clips that are decoded together were heard in two alphabets: {named}")
    return alphabets.pop()


def _waited_for(values: Tensor) -> bool:
    """Whether `values` are on a device that the host would have to wait for."""
    return not values.is_cpu


def _where(chosen: Tensor) -> Tensor:
    """The places that are `chosen` (N,) bool; where that would have to be waited for, all."""
    if _waited_for(chosen):
        return torch.arange(chosen.numel(), device=chosen.device)
    return torch.from_numpy(chosen.numpy().nonzero()[0])


def _distinct(places: Tensor, letters: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of `places` (N,) and `letters` (N,) below `size`, each once (M,), and which of them
    each was (N,); where that would have to be waited for, all as they are."""
    if _waited_for(places):
        return places, letters, torch.arange(len(places), device=places.device)
    pairs, same = np.unique((places * size + letters).numpy(), return_inverse=True)
    pairs = torch.from_numpy(pairs)
    return pairs // size, pairs % size, torch.from_numpy(same.reshape(-1))
