"""What the rows of a batch look up from step to step, and what they need not look up again.

Worked out for all rows at once and with one wait for the language model's device. A search is
spared where the model is certain (`KNN.certain`), where no neighbour could change the likeliest
token (`settled`), after searches that found nothing near (`patience`), where the entries behind
those of the step before go on with what is said (`follow`: RetoMaton, arXiv 2201.12431), and where
the same was asked lately (`recent`). A slow search that takes nobody's core here goes on in another
thread until somebody needs what it finds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mmrag.config import KNN
from mmrag.records import NO_ENTRY, Neighbours
from mmrag.retrieval import overlap
from mmrag.retrieval.interpolation import Retrieval
from mmrag.retrieval.knn import mix_votes, settled, votes_logp, weighed
from mmrag.retrieval.lookup import (
    ANSWERED,
    CERTAIN,
    DISTANT,
    RECENT,
    SEARCHED,
    SETTLED,
    Lookup,
    Trail,
    largest,
    look_up,
    place,
)

LONGEST_REST = 8
"""Steps that pass without a search at most before it is tried again whether anything is near."""
SLOWNESS = 0.2
"""Share of a search in the running mean of how long searches take."""
NOTHING = KNN(k=1, weight=0.0, temperature=1.0)
"""The settings of a row without a retrieval."""


@dataclass(frozen=True)
class Searches:
    """How many questions there were, one a row and step, and what became of them."""

    asked: int = 0
    """All of them: of rows that have a retrieval, of a weight above 0."""
    searched: int = 0
    certain: int = 0
    """Not asked: the language model was certain."""
    settled: int = 0
    """Not asked: no neighbour could have changed the likeliest token."""
    distant: int = 0
    """Not asked: nothing had been near for some searches."""
    followed: int = 0
    """Answered by the entries behind those that the step before found."""
    recent: int = 0
    """Answered by what the same query had found."""

    def __add__(self, other: Searches) -> Searches:
        names = [field.name for field in fields(self)]
        return Searches(**{name: getattr(self, name) + getattr(other, name) for name in names})


@dataclass
class Pending:
    """What was begun by `RowSearches.begin`, for `RowSearches.finish`."""

    lm_logp: Tensor
    sayable: Callable[[np.ndarray], np.ndarray]
    """Which tokens (B, K) of a row's own have a probability at all (B, K) bool."""
    fate: np.ndarray
    """SEARCHED to RECENT for each row (B,), as far as it is known; 0 for no question."""
    lookups: list[Callable[[], Lookup]]
    """One for each retrieval that has to be asked; each waits for what it returns."""


class RowSearches:
    """What the rows of a batch look up, from step to step.

    A step is `retrieve`, or `begin` and `finish` with anything in between that does not need what
    is found; rows come and go between two steps.
    """

    def __init__(
        self, retrievals: Sequence[Retrieval | None], greedy: Sequence[bool] | None = None
    ) -> None:
        """One retrieval a row, or none. `greedy` rows choose the likeliest token of what `retrieve`
        returns, and nothing else of it matters to them: what `KNN.settled` may spare."""
        one_each = {id(one): one for one in retrievals if one is not None}
        number = {name: place for place, name in enumerate(one_each)}
        self._retrievals = list(one_each.values())
        self._which = np.array([number.get(id(one), -1) for one in retrievals], np.int64)
        """Each row's among the retrievals; -1 for none."""
        rows = len(self._which)
        self._greedy = np.zeros(rows, bool) if greedy is None else np.array(greedy, bool)
        self._missed = np.zeros(rows, np.int64)
        """Searches in a row that found nothing within the gate."""
        self._resting = np.zeros(rows, np.int64)
        """Steps that pass without a search."""
        self._behind = np.zeros(rows, np.int64)
        """Steps since the last search."""
        self._entries = np.zeros((rows, 0), np.int64)
        self._tokens = np.zeros((rows, 0), np.int32)
        """What was found in the last step, where it may be followed (B, K)."""
        self._documents = np.zeros((rows, 0), np.int32)
        self._seconds: dict[int, float] = {}
        """How long searches of a retrieval take, by its id."""
        self.searches = Searches()
        """What became of all questions so far, of rows that have left, too."""
        self._settle()

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, which may repeat."""
        rows = np.asarray(rows, np.int64)
        if len(rows) == len(self._which) and (rows == np.arange(len(rows))).all():
            return
        for name in _ROW_BY_ROW:
            setattr(self, name, getattr(self, name)[rows])
        self._settle()

    def join(self, other: RowSearches) -> None:
        """Go on with the rows of `other`, too."""
        known = {id(one): place for place, one in enumerate(self._retrievals)}
        for one in other._retrievals:
            if known.setdefault(id(one), len(known)) == len(self._retrievals):
                self._retrievals.append(one)
        places = np.array([*(known[id(one)] for one in other._retrievals), -1])
        k = max(self._entries.shape[1], other._entries.shape[1])
        self._widen(k)
        other._widen(k)
        moved = vars(other) | {"_which": places[other._which]}
        for name in _ROW_BY_ROW:
            setattr(self, name, np.concatenate((getattr(self, name), moved[name])))
        self._seconds = other._seconds | self._seconds
        self.searches += other.searches
        self._settle()

    def retrieve(
        self,
        lm_logp: Tensor,
        keys: Tensor,
        chosen: Sequence[int],
        exclude_documents: Sequence[int] | None,
    ) -> tuple[Tensor, Neighbours, list[int]]:
        """The next-token log-probabilities (B, V) after retrieval with `keys` (B, D), what was
        heard, and how many shards did not answer each row.

        `chosen` (B,) is what each row chose in the step before, -1 in its first. With weight 0,
        where nothing is looked up and behind a shut gate a row is `lm_logp`'s own, and has no
        neighbours; where that is so of all rows, `lm_logp` itself is returned.
        """
        return self.finish(self.begin(lm_logp, keys, chosen, exclude_documents, apart=False))

    def begin(
        self,
        lm_logp: Tensor,
        keys: Tensor,
        chosen: Sequence[int],
        exclude_documents: Sequence[int] | None,
        apart: bool = True,
    ) -> Pending:
        """Ask what `retrieve` asks. Slow searches go on in another thread, if they may be `apart`;
        the others wait for `finish`. Waits for the device of `lm_logp` and `keys`, once."""
        asked, fate = self._asked, np.zeros(len(self._which), np.int8)
        if not len(asked):
            return Pending(lm_logp, _anything, fate, [])
        queries, rules, sayable = self._fetch(lm_logp, keys)
        fate[asked] = SEARCHED
        fate[self._resting > 0] = DISTANT
        for rule, name in ((rules[:, 1], SETTLED), (rules[:, 0], CERTAIN)):
            fate[asked[rule]] = name
        chosen = np.asarray(chosen, np.int64)
        excluded = None if exclude_documents is None else np.asarray(exclude_documents)
        lookups = []
        for retrieval, rows in self._asking:
            if not retrieval.settings.follow and (fate[rows] != SEARCHED).all():
                continue
            lookup = partial(
                look_up,
                retrieval,
                rows,
                queries[np.searchsorted(asked, rows)],
                fate[rows],
                None if excluded is None else excluded[rows],
                self._followable(rows, chosen) if retrieval.settings.follow else None,
            )
            slow = self._seconds.get(id(retrieval), 0.0)
            elsewhere = keys.device.type != "cpu" or getattr(retrieval.retriever, "remote", False)
            searching = (fate[rows] == SEARCHED).any()
            if apart and searching and overlap.worthwhile(slow, elsewhere):
                lookup = overlap.begin(lookup).result
            lookups.append(lookup)
        return Pending(lm_logp, sayable, fate, lookups)

    def finish(self, pending: Pending) -> tuple[Tensor, Neighbours, list[int]]:
        """What `retrieve` returns; once for each `begin`, and before rows come or go. Raises what a
        search raised."""
        rows, lm_logp = len(self._which), pending.lm_logp
        found, fate = Neighbours.none(rows, self._most), pending.fate
        missing = np.zeros(rows, np.int64)
        for lookup in pending.lookups:
            one = lookup()
            place(found, one.rows, one.found)
            fate[one.rows] = one.fate
            missing[one.rows] = one.found.missing_shards
            self._remember_seconds(one)
        heard, near = self._heard(found, fate, pending.sayable)
        self._note(found, heard, fate, near | (missing > 0))
        neighbours = replace(heard, missing_shards=int(missing.max(initial=0)))
        return self._mixed(lm_logp, heard, near), neighbours, missing.tolist()

    def _fetch(
        self, lm_logp: Tensor, keys: Tensor
    ) -> tuple[np.ndarray, np.ndarray, Callable[[np.ndarray], np.ndarray]]:
        """Of the rows that ask, with one wait for the device: queries (A, D) float32, whether the
        model is certain and whether neighbours could not change its choice (A, 2) bool, and
        `Pending.sayable`."""
        here = self._on(keys.device)
        rows = here.asking
        queries = (keys if len(rows) == len(keys) else keys[rows]).float().contiguous()
        at_hand = keys.device.type == "cpu"
        rules = torch.zeros(len(rows), 2, dtype=torch.bool, device=keys.device)
        if self._ever_certain or self._ever_settled or not at_hand:
            logp = lm_logp if len(rows) == len(lm_logp) else lm_logp[rows]
        if self._ever_certain:
            rules[:, 0] = ~(logp.amax(1) < here.certain.to(logp.dtype))
        if self._ever_settled:
            rules[:, 1] = settled(logp, here.settling)
        if at_hand:
            return queries.numpy(), rules.numpy(), partial(_finite, lm_logp)
        queries, rules, bits = unpack(pack(queries, rules, logp), keys.shape[1])
        return queries, rules, partial(_set, bits, self._asked)

    def _followable(self, rows: np.ndarray, chosen: np.ndarray) -> Trail:
        """What the step before found for these rows of one retrieval, and said what was chosen."""
        knn = self._retrievals[self._which[rows[0]]].settings
        entries = self._entries[rows, : knn.k]
        agreeing = (entries != NO_ENTRY) & (self._tokens[rows, : knn.k] == chosen[rows, None])
        near = (self._behind[rows] < knn.follow) & (agreeing.sum(1) >= knn.agreeing)
        documents = self._documents[rows, : knn.k]
        return Trail(np.where(agreeing, entries, NO_ENTRY), documents, near)

    def _heard(
        self, found: Neighbours, fate: np.ndarray, sayable: Callable[[np.ndarray], np.ndarray]
    ) -> tuple[Neighbours, np.ndarray]:
        """What has a vote, as `interpolation.retrieve` returns it, and which rows (B,) hear any."""
        answered = ANSWERED[fate][:, None]
        allowed = answered & sayable(found.tokens)
        distances = np.where(allowed, found.distances, np.float32(np.inf))
        near = (np.isfinite(distances) & (distances <= self._gate[:, None])).any(1)
        allowed &= near[:, None]
        heard = Neighbours(
            distances=np.where(allowed, found.distances, np.float32(np.inf)),
            tokens=np.where(answered, found.tokens, np.int32(0)),
            entries=np.where(allowed, found.entries, NO_ENTRY),
            documents=np.where(answered, found.documents, np.int32(-1)),
        )
        return heard, near

    def _note(
        self, found: Neighbours, heard: Neighbours, fate: np.ndarray, near: np.ndarray
    ) -> None:
        """Remember for the next step what this one found, and count. Nothing is known to be far
        from rows that are `near` (B,), or that a shard did not answer."""
        looked = (fate == SEARCHED) | (fate == RECENT)
        self._resting = np.maximum(self._resting - 1, 0)
        self._missed = np.where(looked, np.where(near, 0, self._missed + 1), self._missed)
        tired = looked & (self._patience > 0) & (self._missed >= self._patience)
        self._resting[tired] = np.minimum(self._missed[tired], LONGEST_REST)
        if k := self._entries.shape[1]:
            answered = ANSWERED[fate][:, None]
            self._behind = np.where(looked, 0, self._behind + 1)
            self._entries = np.where(answered, heard.entries, found.entries)[:, :k]
            self._tokens, self._documents = found.tokens[:, :k], found.documents[:, :k]
        counts = np.bincount(fate, minlength=RECENT + 1).tolist()
        self.searches += Searches(sum(counts[1:]), *counts[1:])

    def _mixed(self, lm_logp: Tensor, heard: Neighbours, near: np.ndarray) -> Tensor:
        """`lm_logp` (B, V) with what the neighbours say."""
        if not near.any():
            return lm_logp
        distances, weight = self._weighed(heard)
        votes = np.full(distances.shape, np.float32(-np.inf))
        votes[near] = votes_logp(distances[near], heard.tokens[near], self._temperature[near])
        tokens, weight = heard.tokens.astype(np.int64), np.where(near, weight, 0)
        device = lm_logp.device
        sent = (_sent(values, device) for values in (votes, tokens, weight.astype(np.float32)))
        return mix_votes(lm_logp, *sent)

    def _weighed(self, heard: Neighbours) -> tuple[np.ndarray, np.ndarray]:
        """Distances (B, K) and the weights (B,) of what is heard, as the entries' own weights bend
        them."""
        uneven = [(one, rows) for one, rows in self._asking if one.weights is not None]
        if not uneven:
            return heard.distances, self._weight
        lean = np.zeros(heard.distances.shape, np.float32)
        for one, rows in uneven:
            lean[rows] = one.weights.of_entries(heard.entries[rows])
        return weighed(heard.distances, self._temperature, lean, self._weight)

    def _remember_seconds(self, one: Lookup) -> None:
        if one.seconds is None:
            return
        name = id(self._retrievals[self._which[one.rows[0]]])
        mean = self._seconds.get(name, one.seconds)
        self._seconds[name] = mean + SLOWNESS * (one.seconds - mean)

    def _settle(self) -> None:
        """Lay out the settings of the rows, and let go of retrievals that none has any more."""
        used, places = np.unique(self._which, return_inverse=True)
        kept = [self._retrievals[number] for number in used.tolist() if number >= 0]
        none = int(len(used) and used[0] < 0)
        self._retrievals, self._which = kept, places.reshape(-1) - none
        settings = [NOTHING] * none + [one.settings for one in kept]

        def column(values: list, dtype: type) -> np.ndarray:
            return np.array(values, dtype)[places.reshape(-1)]

        self._weight = column([one.weight for one in settings], np.float32)
        self._temperature = column([one.temperature for one in settings], np.float32)
        self._gate = column([largest(one.gate) for one in settings], np.float32)
        self._patience = column([one.patience for one in settings], np.int64)
        # Logarithms as `knn.unsure` has them: of python's floats, then rounded.
        certain = [math.inf if one.certain is None else math.log(one.certain) for one in settings]
        self._certain = column(certain, np.float64)
        may_settle = column([one.settled for one in settings], bool) & self._greedy
        heavy = [one.weights.heaviest if one.weights else 1.0 for one in kept]
        odds = self._weight * column([1.0] * none + heavy, np.float32)
        largest_weight = np.maximum(self._weight, odds / (1 - self._weight + odds))
        self._settling = np.where(may_settle, largest_weight, np.float32(1))
        self._asked = np.flatnonzero(self._weight > 0)
        self._asking = [
            (one, np.flatnonzero(self._which == number))
            for number, one in enumerate(kept)
            if one.settings.weight > 0
        ]
        self._ever_certain = bool(np.isfinite(self._certain[self._asked]).any())
        self._ever_settled = bool(may_settle[self._asked].any())
        self._most = max((one.settings.k for one in kept), default=1)
        following = [one.settings.k for one in kept if one.settings.follow]
        self._widen(max(following, default=0))
        known = {id(one) for one in kept}
        self._seconds = {name: took for name, took in self._seconds.items() if name in known}
        self._there: _OnDevice | None = None

    def _widen(self, k: int) -> None:
        """Let as many found entries be followed."""
        more = (0, 0), (0, max(0, k - self._entries.shape[1]))
        self._entries = np.pad(self._entries, more, constant_values=NO_ENTRY)
        self._tokens, self._documents = np.pad(self._tokens, more), np.pad(self._documents, more)

    def _on(self, device: torch.device) -> _OnDevice:
        """The rows' settings, where the language model is."""
        if self._there is None or self._there.device != device:
            columns = (self._asked, self._certain[self._asked], self._settling[self._asked])
            self._there = _OnDevice(device, *(_sent(column, device) for column in columns))
        return self._there


_ROW_BY_ROW = (
    *("_which", "_greedy", "_missed", "_resting", "_behind"),
    *("_entries", "_tokens", "_documents"),
)


@dataclass(frozen=True)
class _OnDevice:
    """The rows that ask (A,) and their settings."""

    device: torch.device
    asking: Tensor
    certain: Tensor
    settling: Tensor


def pack(queries: Tensor, rules: Tensor, logp: Tensor) -> Tensor:
    """Queries (A, D) float32, rules (A, 2) bool and which of `logp` (A, V) are finite, as bytes:
    one copy from a device costs less than three."""
    finite = torch.nn.functional.pad(logp.isfinite(), (0, -logp.shape[1] % 8))
    values = 1 << torch.arange(8, dtype=torch.uint8, device=logp.device)
    bits = (finite.view(len(logp), -1, 8) * values).sum(2, dtype=torch.uint8)
    return torch.cat((queries.view(torch.uint8), rules.to(torch.uint8), bits), 1)


def unpack(packed: Tensor, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `pack` was given, in this machine's memory: queries, rules, and eight of the third a
    byte."""
    rows = packed.cpu().numpy()
    queries = np.ascontiguousarray(rows[:, : 4 * width]).view(np.float32)
    return queries, rows[:, 4 * width : 4 * width + 2].astype(bool), rows[:, 4 * width + 2 :]


def _finite(logp: Tensor, tokens: np.ndarray) -> np.ndarray:
    """Which tokens (B, K) have a probability by `logp` (B, V)."""
    return logp.gather(1, torch.from_numpy(tokens).long()).isfinite().numpy()


def _set(bits: np.ndarray, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Which tokens (B, K) of some rows (A,) have a bit that is set (A, V / 8)."""
    own = tokens[rows]
    found = np.zeros(tokens.shape, bool)
    found[rows] = (np.take_along_axis(bits, own >> 3, 1) >> (own & 7)) & 1
    return found


def _anything(tokens: np.ndarray) -> np.ndarray:
    return np.ones(tokens.shape, bool)


def _sent(values: np.ndarray, device: torch.device) -> Tensor:
    """On its way to a device: nobody waits for it here."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)
