"""Retrieved windows as the language model's memory while it transcribes.

Each row of a batch reads its own windows: those of a short list all along, those of a search for a
few tokens, until the next search. Knows states and entries; neither words nor audio.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from mmrag.config import RetrievedAttention
from mmrag.model.cross_attention import Adapter, Memory
from mmrag.model.lm import LM, LMOutput
from mmrag.model.pages import PagePool
from mmrag.records import NO_ENTRY, Retriever
from mmrag.retrieval.knn import gate
from mmrag.retrieval.weights import Weights
from mmrag.retrieval.window_cache import WindowCache

ATTRIBUTED_WINDOWS = 3
"""Windows that a token's attention is attributed to."""

AttendedWindow = tuple[int, float, float]
"""An entry, the share of attention that its window got, and its distance (+inf: not searched)."""


@dataclass(frozen=True)
class AttentionSource:
    """A datastore's windows to read while transcribing one clip or many.

    `entries` (N,) is a list to read whole where it has at most `settings.whole` of them, whatever
    document they are of; otherwise `retriever` is asked, which then searches that list alone.
    """

    cache: WindowCache
    settings: RetrievedAttention
    retriever: Retriever
    entries: np.ndarray | None = None
    weights: Weights | None = None
    """What entries weigh: a window gets its entry's times the attention."""

    @cached_property
    def whole(self) -> bool:
        """Whether everything is read, without a search."""
        return self.entries is not None and len(self.entries) <= self.settings.whole


@dataclass(frozen=True)
class Attended:
    """What each of B rows attended to most in a step: entries (B, A) int64, their windows' shares
    of attention (B, A), the largest first, and their distances (B, A), +inf where not searched.

    They stay where the model computes until somebody asks for a row. An entry without a share is
    none.
    """

    entries: Tensor
    shares: Tensor
    distances: Tensor

    def row(self, number: int) -> tuple[AttendedWindow, ...]:
        """What one row read."""
        return self.rows(slice(number, number + 1))[0]

    def rows(self, chosen: slice = slice(None)) -> list[tuple[AttendedWindow, ...]]:
        """What several rows read, or all."""
        found = (part[chosen].tolist() for part in (self.entries, self.shares, self.distances))
        return [
            tuple(window for window in zip(*row, strict=True) if window[1] > 0)
            for row in zip(*found, strict=True)
        ]


class RetrievedMemory:
    """The memory of the rows of a batch, from step to step.

    A step in which no row's windows change neither lays anything out nor waits for the device.
    """

    def __init__(
        self, lm: LM, attention_sources: Sequence[AttentionSource], capacity: int, pool: PagePool
    ) -> None:
        """One reading a row; `capacity` is the longest that a row may get, in tokens."""
        self._lm = lm
        self._readings = list(attention_sources)
        adapters = {id(one.cache.adapter): one.cache.adapter for one in attention_sources}
        if len(adapters) != 1:
            raise ValueError(f"clips decoded together read with {len(adapters)} adapters, not one")
        [self._adapter] = adapters.values()
        nothing = np.empty(0, np.int64)
        self._entries = [one.entries if one.whole else nothing for one in attention_sources]
        self._distances = [np.full(len(own), np.inf, np.float32) for own in self._entries]
        self._age = np.zeros(len(self._entries), np.int64)
        self._tokens = np.zeros(len(self._entries), np.int64)
        """That each row's windows have."""
        self._stale = np.ones(len(self._entries), bool)
        """Rows whose entries have changed since they were laid out."""
        self._version = np.arange(len(self._entries))
        """Rows of one version are laid out alike."""
        self._versions = itertools.count(len(self._entries))
        self._laid: _Layout | None = None
        self._rules()
        # Blocks after the last layer alone change nothing below them: one pass serves both.
        self._cache = None
        if self._adapter.layers != [lm.config.layers - 1]:
            self._cache = lm.cache([None] * len(attention_sources), capacity, pool)

    def read(
        self,
        ids: Tensor,
        lengths: Tensor,
        at: Tensor | None,
        output: LMOutput,
        lm_logp: Tensor,
        exclude_documents: Sequence[int] | None,
        counts: np.ndarray | None = None,
    ) -> tuple[Tensor, Attended]:
        """Logits (B, V) at each row's last token with what is read, and its windows by attention.

        `output` and `lm_logp` (B, V) are the language model's own for `ids`. With `counts` (B,), so
        many last tokens of each row read what the last one finds, and there are logits and windows
        of every one of them, row by row.
        """
        newest = torch.arange(len(lengths), device=lengths.device), lengths - 1
        self._search(output.keys, newest, lm_logp, exclude_documents)
        if self._stale.any():
            self._lay_out()
        if counts is None:
            first, most, rows, offsets = lengths - 1, 1, newest[0], 0
        else:
            first, most, rows, offsets = _last_positions(lengths, counts)
        memory = self._laid.memory(self._adapter, first, self._uneven, most)
        if self._cache is None:
            last = self._lm.config.layers - 1
            states, attention = memory.read(last, output.states, output.keys)
            logits = self._lm.logits(states[rows, first[rows] + offsets])
        else:
            read = self._lm(ids, self._cache, lengths, at, memory)
            logits, attention = read.logits, read.attention.mean(0)
        return logits, self._laid.attended(attention[rows, offsets], rows)

    def read_prompt(self, ids: Tensor) -> None:
        """Read the beginnings (B, T) of the rows' prompts, where nothing is attended to."""
        if self._cache is not None:
            self._lm(ids, self._cache, at=torch.zeros_like(ids, dtype=torch.bool))

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, which may repeat."""
        for name in ("_readings", "_entries", "_distances"):
            values = getattr(self, name)
            setattr(self, name, [values[row] for row in rows])
        before = self._version
        for name in ("_age", "_tokens", "_stale", "_version"):
            setattr(self, name, getattr(self, name)[list(rows)])
        self._rules()
        index = torch.tensor(rows, device=self._lm.embedding.weight.device)
        # Hypotheses of one clip read the same list: which of them goes on is all one.
        if self._laid is not None and not np.array_equal(before, self._version):
            most = max((len(own) for own in self._entries), default=0)
            self._laid = self._laid.select(index, int(self._tokens.max(initial=0)), most)
        if self._cache is not None:
            self._cache = self._cache.select(index)

    def join(self, other: RetrievedMemory) -> None:
        """Go on with the rows of `other`, too."""
        if other._adapter is not self._adapter:
            raise ValueError("clips decoded together read with 2 adapters, not one")
        for name in ("_readings", "_entries", "_distances"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        renamed = {one: next(self._versions) for one in dict.fromkeys(other._version.tolist())}
        theirs = [renamed[one] for one in other._version.tolist()]
        self._version = np.concatenate((self._version, np.array(theirs, np.int64)))
        for name in ("_age", "_tokens", "_stale"):
            setattr(self, name, np.concatenate((getattr(self, name), getattr(other, name))))
        self._rules()
        if self._laid is None or other._laid is None:
            self._laid = None
            self._stale[:] = True
        else:
            self._laid = self._laid.join(other._laid)
        if self._cache is not None:
            self._cache = self._cache.join(other._cache)

    def release(self) -> None:
        """All rows end: what they took is free."""
        if self._cache is not None:
            self._cache.release()

    def _rules(self) -> None:
        """What the rows' settings ask, as arrays."""
        self._uneven = any(one.weights is not None for one in self._readings)
        searching = [not one.whole for one in self._readings]
        self._searching = np.array(searching, bool)
        self._stride = np.array([one.settings.stride for one in self._readings], np.int64)
        certain = [one.settings.certain for one in self._readings]
        self._certain_logp = np.array(
            [np.inf if one is None else math.log(one) for one in certain], np.float32
        )
        self.missing_shards = [0] * len(self._readings)
        """Shards that did not answer each row's search in the last step."""

    def _search(
        self,
        keys: Tensor,
        newest: tuple[Tensor, Tensor],
        lm_logp: Tensor,
        exclude_documents: Sequence[int] | None,
    ) -> None:
        """Look for windows where a row has none left and its model is not certain."""
        if not self._searching.any():
            return
        self.missing_shards = [0] * len(self._readings)
        self._age += self._searching
        held = np.array([len(own) > 0 for own in self._entries])
        due = self._searching & (~held | (self._age >= self._stride))
        if not due.any():
            return
        for row in np.flatnonzero(due & held).tolist():
            self._found(row, np.empty(0, np.int64), np.empty(0, np.float32))
        if np.isfinite(self._certain_logp[due]).any():
            due &= lm_logp.amax(1).float().cpu().numpy() < self._certain_logp
        asking: dict[int, list[int]] = {}
        for row in np.flatnonzero(due).tolist():
            asking.setdefault(id(self._readings[row]), []).append(row)
        if asking:
            queries = keys[newest].float().cpu().numpy()
        for rows in asking.values():
            self._ask(rows, queries[rows], exclude_documents)

    def _ask(
        self, rows: list[int], queries: np.ndarray, exclude_documents: Sequence[int] | None
    ) -> None:
        """Search for rows of one reading."""
        one = self._readings[rows[0]]
        excluded = exclude_documents and [exclude_documents[row] for row in rows]
        found = one.retriever.search(queries, one.settings.k, excluded)
        near = gate(torch.from_numpy(found.distances), one.settings.gate).numpy()
        for number, row in enumerate(rows):
            self.missing_shards[row] = found.missing_shards
            if near[number]:
                kept = found.entries[number] != NO_ENTRY
                self._found(row, found.entries[number][kept], found.distances[number][kept])

    def _found(self, row: int, entries: np.ndarray, distances: np.ndarray) -> None:
        self._entries[row], self._distances[row] = entries, distances
        self._age[row], self._stale[row] = 0, True
        self._version[row] = next(self._versions)

    def _lay_out(self) -> None:
        """Lay out what has changed; rows of several datastores side by side."""
        stale = np.flatnonzero(self._stale).tolist()
        caches = {id(self._readings[row].cache): self._readings[row].cache for row in stale}
        for cache in caches.values():
            rows = [row for row in stale if self._readings[row].cache is cache]
            own = [self._entries[row] for row in rows]
            laid = _Layout(*cache.gather(own), *self._described(rows))
            self._tokens[rows] = [cache.tokens(one) for one in own]
            whole = len(rows) == len(self._readings)
            if self._laid is None and not whole:
                self._laid = laid.empty(len(self._readings))
            index = torch.tensor(rows, device=laid.windows.device)
            self._laid = laid if whole else self._laid.put(index, laid)
        self._stale[:] = False

    def _described(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The entries of rows (B, A), their distances and the logarithms of their weights,
        padded."""
        most = max(1, *(len(self._entries[row]) for row in rows))
        entries = np.full((len(rows), most), NO_ENTRY, np.int64)
        distances = np.full((len(rows), most), np.inf, np.float32)
        lean = np.zeros((len(rows), most), np.float32)
        for number, row in enumerate(rows):
            entries[number, : len(self._entries[row])] = self._entries[row]
            if (weights := self._readings[row].weights) is not None:
                lean[number] = weights.of_entries(entries[number])
            distances[number, : len(self._distances[row])] = self._distances[row]
        device = self._lm.embedding.weight.device
        return tuple(torch.from_numpy(one).to(device) for one in (entries, distances, lean))


def _last_positions(lengths: Tensor, counts: np.ndarray) -> tuple[Tensor, int, Tensor, Tensor]:
    """The last `counts` (B,) positions of rows of `lengths` (B,): the first of each row (B,), the
    most of any, and row and place in the row of every one (N,)."""
    rows = np.repeat(np.arange(len(counts)), counts)
    offsets = np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]
    many, rows, offsets = (
        torch.from_numpy(one).to(lengths.device) for one in (counts, rows, offsets)
    )
    return lengths - many, int(counts.max()), rows, offsets


@dataclass(frozen=True)
class _Layout:
    """What B rows read: `encoded` (L, 2, B, H, M, d), a token's window in its row `windows` (B, M),
    -1 for padding, and the windows' entries, their distances and the logarithms of their weights
    (B, A)."""

    encoded: Tensor
    windows: Tensor
    entries: Tensor
    distances: Tensor
    lean: Tensor

    @cached_property
    def visible(self) -> Tensor:
        """(B, 1, M)"""
        return (self.windows >= 0)[:, None]

    def memory(self, adapter: Adapter, start: Tensor, uneven: bool, positions: int = 1) -> Memory:
        """To be read at so many positions of each row from `start` (B,) on; `uneven` if any window
        may weigh more or less than one."""
        lean = self.lean.gather(1, self.windows.clamp(min=0)) if uneven else None
        visible = self.visible.expand(-1, positions, -1)
        return Memory(adapter, self.encoded.transpose(1, 2), visible, start, lean)

    def attended(self, attention: Tensor, rows: Tensor) -> Attended:
        """Attention (N, M) of a position of each of `rows` (N,), summed by window: the most read
        ones."""
        described = (self.windows, self.entries, self.distances)
        windows, entries, distances = (one[rows] for one in described)
        shares = attention.new_zeros(entries.shape)
        shares.scatter_add_(1, windows.clamp(min=0), attention)
        best = shares.topk(min(ATTRIBUTED_WINDOWS, shares.shape[1]))
        return Attended(
            entries.gather(1, best.indices),
            best.values,
            distances.gather(1, best.indices),
        )

    def select(self, rows: Tensor, tokens: int, windows: int) -> _Layout:
        """Of these rows (B',), none of which has more `tokens` or `windows`."""
        tokens, windows = max(1, tokens), max(1, windows)
        encoded = self.encoded[..., :tokens, :]
        return _Layout(
            self._repeated(encoded, len(rows)) if self.one else encoded.index_select(2, rows),
            self.windows[:, :tokens].index_select(0, rows),
            self.entries[:, :windows].index_select(0, rows),
            self.distances[:, :windows].index_select(0, rows),
            self.lean[:, :windows].index_select(0, rows),
        )

    def join(self, other: _Layout) -> _Layout:
        """These rows, then those of `other`."""
        both = [one._as_wide_as(two) for one, two in ((self, other), (other, self))]
        if self._is(other):
            encoded = self._repeated(self.encoded, len(self.windows) + len(other.windows))
        else:
            encoded = torch.cat([one.encoded for one in both], 2)
        return _Layout(
            encoded,
            *(torch.cat([getattr(one, name) for one in both]) for name in _FLAT),
        )

    def empty(self, rows: int) -> _Layout:
        """As wide, with so many rows that read nothing."""
        layers, both, _, *rest = self.encoded.shape
        return _Layout(
            self.encoded.new_zeros(layers, both, rows, *rest),
            self.windows.new_full((rows, self.windows.shape[1]), -1),
            self.entries.new_full((rows, self.entries.shape[1]), NO_ENTRY),
            self.distances.new_full((rows, self.distances.shape[1]), torch.inf),
            self.lean.new_zeros(rows, self.lean.shape[1]),
        )

    def put(self, rows: Tensor, other: _Layout) -> _Layout:
        """With what `other` has for these rows (B',)."""
        other, made = other._as_wide_as(self), self._as_wide_as(other)
        return _Layout(
            made.encoded.index_copy(2, rows, other.encoded),
            *(getattr(made, name).index_copy(0, rows, getattr(other, name)) for name in _FLAT),
        )

    @property
    def one(self) -> bool:
        """Whether all rows are one in memory, whichever of them."""
        return self.encoded.shape[2] == 1 or self.encoded.stride(2) == 0

    def _is(self, other: _Layout) -> bool:
        """Whether the rows of both are the same one."""
        mine, theirs = (one.encoded[:, :, :1] for one in (self, other))
        same = mine.shape == theirs.shape and mine.data_ptr() == theirs.data_ptr()
        return same and self.one and other.one

    @staticmethod
    def _repeated(encoded: Tensor, rows: int) -> Tensor:
        """Its first row so many times, without a copy."""
        return encoded[:, :, :1].expand(-1, -1, rows, -1, -1, -1)

    def _as_wide_as(self, other: _Layout) -> _Layout:
        """Padded where `other` has room for more."""
        tokens = max(0, other.windows.shape[1] - self.windows.shape[1])
        windows = max(0, other.entries.shape[1] - self.entries.shape[1])
        if not tokens and not windows:
            return self
        return _Layout(
            pad(self.encoded, (0, 0, 0, tokens)),
            pad(self.windows, (0, tokens), value=-1),
            pad(self.entries, (0, windows), value=NO_ENTRY),
            pad(self.distances, (0, windows), value=math.inf),
            pad(self.lean, (0, windows)),
        )


_FLAT = ("windows", "entries", "distances", "lean")
"""What of a layout has its rows first."""
