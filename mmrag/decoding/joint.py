"""The rows of a batch with what a CTC head heard of their clips, which has a say in each token.

Joint decoding (Watanabe et al., "Hybrid CTC/attention architecture for end-to-end speech
recognition", IEEE JSTSP 2017): a token's score is the language model's and that of its letters, by
weight. Only tokens that may be chosen are scored: those that are likeliest if each is taken to be
as likely as its first letter, which it can but fall short of, and of these only as many letters as
show that others are better. Nothing here waits for a device.
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

    `prefixes` (2 R,): those that go on with a word, then those that begin one. `behind` (R,):
    log-probability that what is said begins with the latter. A gap alone is `free` (R,) bool where
    nothing is written, and is what is `waiting` (R,) bool to be heard behind a comma, say.
    """

    prefixes: Prefixes
    behind: Tensor
    free: Tensor
    waiting: Tensor


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
    ) -> Tensor:
        """The joint scores (B, V) of the next tokens: of `logp` (B, V), in which the `bonus` (B, V)
        of phrases is, and of the letters.

        In a row with letters the end has its score, and of the other tokens the best `count`, and
        any other that is a candidate where `temperatures` (B,) are not 0; all else is -inf. Rows
        without letters stay as they are.
        """
        if not len(self):
            return logp
        every = len(self) == len(logp)
        own = logp if every else logp[self._rows]
        gain = bonus if bonus is None or every else bonus[self._rows]
        drawn = None if temperatures is None else temperatures[self.of_rows] > 0
        starts = self._starts()
        tokens, most = self._candidates(own, gain, starts, max(LEAST_CANDIDATES, 2 * count))
        score = self._scores(own, gain, starts, tokens, most, count, drawn)
        joint = torch.full_like(own, -torch.inf).scatter(1, tokens, score)
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
        written, gap = self._prefixes(), self._spelling.gap
        behind = written
        if (places := np.flatnonzero(self._parts)).size:
            here = self._sent(places)
            letters = torch.full_like(here, gap)
            behind = written.put(here, written.then(here, letters))
        inside = written
        if (places := np.flatnonzero(self._waits)).size:
            here = self._sent(places)
            inside = written.put(here, behind.take(here))
        prefixes = Prefixes(
            self._frames,
            self._clips.repeat(2),
            torch.cat((inside.last, behind.last)),
            torch.cat((inside.logp, behind.logp)),
            torch.cat((inside.states, behind.states)),
        )
        free = (self._last == NO_LETTER) & ~self._gap
        waiting = (self._last != NO_LETTER) & self._gap
        return _Starts(prefixes, behind.logp, self._sent(free), self._sent(waiting))

    @property
    def _parts(self) -> np.ndarray:
        """Where a gap has to be heard before a token that opens with one (R,) bool."""
        return (self._last != NO_LETTER) & (self._spelling.gap > 0)

    @property
    def _waits(self) -> np.ndarray:
        """Where a gap is to be heard before any letter (R,) bool."""
        return self._gap & self._parts & (self._last != self._spelling.gap)

    def _candidates(
        self, logp: Tensor, gain: Tensor | None, starts: _Starts, count: int
    ) -> tuple[Tensor, Tensor]:
        """The `count` tokens (R, K) other than the end that may have the highest scores, and what
        these are at most (R, K), highest first: as if of their letters only the first were heard.
        """
        letters, _, opens, _ = self._spelling.on(self._device)
        first = opens * self._frames.letters + letters[:, 0]
        bound = starts.prefixes.logp_of_each()
        gap = bound[: len(self), self._spelling.gap]
        gap.copy_(
            torch.where(starts.free, self._logp, torch.where(starts.waiting, starts.behind, gap))
        )
        bound = self._conditional(bound, self._logp.repeat(2)[:, None])
        bound[:, NO_LETTER] = 0.0
        bound = torch.cat(bound.to(logp.dtype).split(len(self)), 1)
        if logp.shape[1] <= FEW * LIKELIEST:
            most = self._joint(logp, gain, bound[:, first])
            most[:, self._end] = -torch.inf
            most, tokens = most.topk(min(count, most.shape[1]))
            return tokens, most
        logp, likeliest = logp.topk(LIKELIEST)
        gain = None if gain is None else gain.gather(1, likeliest)
        most = self._joint(logp, gain, bound.gather(1, first[likeliest]))
        most, chosen = most.masked_fill(likeliest == self._end, -torch.inf).topk(count)
        return likeliest.gather(1, chosen), most

    def _scores(
        self,
        logp: Tensor,
        gain: Tensor | None,
        starts: _Starts,
        tokens: Tensor,
        most: Tensor,
        count: int,
        drawn: np.ndarray | None,
    ) -> Tensor:
        """The joint scores (R, K) of `tokens` (R, K), each `most` (R, K) at most, the most likely
        first; -inf where the first `count` are all better, but for rows that are `drawn` (R,)."""
        logp = logp.gather(1, tokens)
        gain = None if gain is None else gain.gather(1, tokens)
        heard = torch.full(tokens.shape, -torch.inf, dtype=torch.float64, device=self._device)
        rows = torch.arange(len(self), device=self._device)[:, None]
        heard[:, :count] = self._heard(starts, rows, tokens[:, :count])
        worst = self._joint(logp, gain, heard)[:, :count].amin(1, keepdim=True)
        better = most[:, count:] > worst
        if drawn is not None:
            better |= self._sent(drawn)[:, None]
        places = _where(better.flatten())
        if len(places):
            row, column = places // better.shape[1], count + places % better.shape[1]
            least = self._needed(worst, logp, gain)
            if drawn is not None:
                least = least.masked_fill(self._sent(drawn)[:, None], -torch.inf)
            own = self._heard(starts, row, tokens[row, column], least[row, column])
            heard[row, column] = own
        return self._joint(logp, gain, heard)

    def _needed(self, score: Tensor, logp: Tensor, gain: Tensor | None) -> Tensor:
        """What must be heard (R, K) of tokens of `logp` (R, K) for a joint score above `score`."""
        needed = (score - (1 - self._weighing) * logp) / self._weighing
        return needed if gain is None else needed - gain

    def _heard(
        self, starts: _Starts, rows: Tensor, tokens: Tensor, least: Tensor | None = None
    ) -> Tensor:
        """Log-probability of the letters of `tokens` (...) behind what `rows` (...) have written;
        -inf where that is not above the `least` (...).

        A letter at a time for all; tokens of a row that begin alike are one until they part.
        """
        letters, counts, opens, blank = (
            one[tokens.flatten()] for one in self._spelling.on(self._device)
        )
        row = rows.expand(tokens.shape).flatten()
        # A gap alone is heard as a letter, but for one before all letters or that was to be heard.
        free, waiting = starts.free[row], starts.waiting[row]
        counts = counts - blank * (free | waiting)
        at = row + len(self) * (opens + blank * waiting)
        letters, before = letters.long(), self._logp[row]
        found = torch.cat((self._logp, starts.behind))[row + len(self) * blank * waiting]
        floor = -torch.inf if least is None else before + least.flatten()
        here, prefixes = _where(counts > 0), starts.prefixes
        for place in range(self._spelling.longest):
            if not len(here):
                break
            own = prefixes.logp_then(at[here], letters[here, place])
            on = counts[here] > place
            found = found.index_copy(0, here, torch.where(on, own, found[here]))
            if len(here := _where((counts > place + 1) & (found > floor))):
                pairs = at[here], letters[here, place], self._frames.letters
                parents, added, same = _distinct(*pairs)
                prefixes = prefixes.then(parents, added)
                at = at.index_copy(0, here, same)
        heard = self._conditional(found, before).view(tokens.shape)
        return heard if least is None else heard.masked_fill(~(heard > least), -torch.inf)

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
            prefixes = prefixes.put(index, prefixes.then(index, self._sent(spelt[on, place])))
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
        return torch.where(before == -torch.inf, 0.0, logp - before).clamp(LEAST_HEARD, 0.0)

    def _place(self) -> None:
        """Number the rows and their clips on the device."""
        self._rows = self._sent(np.flatnonzero(self.of_rows))
        self._clips = self._sent(self._clip)
        self._weighing = self._sent(self._weight)[:, None]

    def _sent(self, values: np.ndarray) -> Tensor:
        """On its way to the device: nobody waits for it here."""
        return torch.from_numpy(values).to(self._device, non_blocking=True)


def _the_one(alphabets: set[str]) -> str:
    if len(alphabets) > 1:
        named = " and ".join(map(repr, sorted(alphabets)))
        raise ValueError(f"clips that are decoded together were heard in two alphabets: {named}")
    return alphabets.pop()


def _where(chosen: Tensor) -> Tensor:
    """The places that are `chosen` (N,) bool; on a device that would have to be waited for, all."""
    if chosen.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(chosen.numpy()))
    return torch.arange(len(chosen), device=chosen.device)


def _distinct(places: Tensor, letters: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of `places` (N,) and `letters` (N,) below `size`, each once (M,), and which of them
    each was (N,); on a device that would have to be waited for, all as they are."""
    if places.device.type == "cpu":
        pairs, same = np.unique((places * size + letters).numpy(), return_inverse=True)
        pairs = torch.from_numpy(pairs)
        return pairs // size, pairs % size, torch.from_numpy(same.reshape(-1))
    return places, letters, torch.arange(len(places), device=places.device)
