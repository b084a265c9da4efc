"""Retrieved windows as the language model's memory while it transcribes.

A window is encoded once, however often it is found. Each row of a batch reads its own windows:
those of a short list all along, those of a search for a few tokens, until the next search. Knows
states and entries; neither words nor audio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mmrag.config import RetrievedAttention
from mmrag.model.cross_attention import Adapter, Memory
from mmrag.model.layers import Cache
from mmrag.model.lm import LM, LMOutput
from mmrag.records import NO_ENTRY, Retriever
from mmrag.retrieval.knn import gate, unsure

MAX_CACHED_WINDOWS = 4096
"""Encoded windows that a bank keeps; beyond, it starts afresh."""
ATTRIBUTED_WINDOWS = 3
"""Windows that a token's attention is attributed to."""

AttendedWindow = tuple[int, float, float]
"""An entry, the share of attention that its window got, and its distance (+inf: not searched)."""


class WindowCache:
    """The windows of one datastore as an adapter reads them, each encoded once."""

    def __init__(self, adapter: Adapter, lm: LM, source: Retriever) -> None:
        self.adapter = adapter
        self.source = source
        self._lm = lm
        self._places: dict[int, int] = {}
        self._encoded = torch.empty(0)
        self._lengths = torch.empty(0, dtype=torch.long)

    def gather(self, rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """The windows around each row's entries: what the blocks attend to (B, M, L, 2, H, d),
        one for each token, and which of the row's windows it belongs to (B, M), -1 for padding.
        """
        self._encode(np.unique(np.concatenate(rows)))
        if not self._places:
            shape = self.adapter.encoded_shape
            nothing = self._lm.embedding.weight.new_zeros(len(rows), 1, *shape)
            return nothing, torch.full((len(rows), 1), -1, device=nothing.device)
        places = [torch.tensor([self._places[e] for e in row.tolist()]).long() for row in rows]
        lengths = [self._lengths[own] for own in places]
        most = max(1, *(int(own.sum()) for own in lengths))
        at = torch.zeros((len(rows), most), dtype=torch.long)
        windows = torch.full((len(rows), most), -1)
        width = self._encoded.shape[1]
        for row, (own, counts) in enumerate(zip(places, lengths, strict=True)):
            number = torch.arange(len(own)).repeat_interleave(counts)
            first = counts.cumsum(0) - counts
            inside = torch.arange(len(number)) - first[number]
            at[row, : len(number)] = own[number] * width + inside
            windows[row, : len(number)] = number
        device = self._encoded.device
        return self._encoded.flatten(0, 1)[at.to(device)], windows.to(device)

    def _encode(self, entries: np.ndarray) -> None:
        """Take in the windows that are not there yet, or that no shard had when it was asked."""
        known = {entry for entry, place in self._places.items() if self._lengths[place]}
        new = [entry for entry in entries.tolist() if entry not in known]
        if not new:
            return
        if self._places and len(self._places) + len(new) > MAX_CACHED_WINDOWS:
            self._places, self._encoded = {}, torch.empty(0)
            new = entries.tolist()
        found = self.source.passages(np.array(new))
        if found.tokens.shape[1] > self.adapter.config.window:
            raise ValueError(
                f"a datastore with windows of {found.tokens.shape[1]} tokens for an adapter that "
                f"reads {self.adapter.config.window}"
            )
        device = self._lm.embedding.weight.device
        encoded = self.adapter.encode(
            self._lm.embedding(torch.from_numpy(found.tokens).long().to(device)),
            torch.from_numpy(found.keys).to(device),
            torch.from_numpy(found.present).to(device),
        )
        encoded = encoded.permute(0, 4, 1, 2, 3, 5)  # (E, W, L, 2, H, d): a token's own together
        lengths = torch.from_numpy(found.present.sum(1))
        if self._places:
            encoded = torch.cat((self._encoded, encoded))
            lengths = torch.cat((self._lengths, lengths))
        self._encoded, self._lengths = encoded, lengths
        self._places |= {entry: len(self._places) + n for n, entry in enumerate(new)}


@dataclass(frozen=True)
class AttentionSource:
    """A datastore's windows to read while transcribing one clip or many.

    `entries` (N,) is a list to read whole where it has at most `settings.whole` of them, whatever
    document they are of; otherwise `retriever` is asked, which then searches that list alone.
    """

    bank: WindowCache
    settings: RetrievedAttention
    retriever: Retriever
    entries: np.ndarray | None = None

    @cached_property
    def whole(self) -> bool:
        """Whether everything is read, without a search."""
        return self.entries is not None and len(self.entries) <= self.settings.whole


class RetrievedMemory:
    """The memory of the rows of a batch, from step to step."""

    def __init__(self, lm: LM, attention_sources: Sequence[AttentionSource], capacity: int) -> None:
        """One reading a row; `capacity` is the longest that a row may get, in tokens."""
        self._lm = lm
        self._readings = list(attention_sources)
        adapters = {id(one.bank.adapter): one.bank.adapter for one in attention_sources}
        if len(adapters) != 1:
            raise ValueError(f"clips decoded together read with {len(adapters)} adapters, not one")
        [self._adapter] = adapters.values()
        nothing = np.empty(0, np.int64)
        self._entries = [one.entries if one.whole else nothing for one in attention_sources]
        self._distances = [np.full(len(own), np.inf, np.float32) for own in self._entries]
        self._age = [0] * len(self._entries)
        self.missing_shards = [0] * len(self._entries)
        """Shards that did not answer each row's search in the last step."""
        self._memory: Memory | None = None
        self._windows = torch.empty(0)
        self._changed = True
        # Blocks after the last layer alone change nothing below them: one pass serves both.
        self._cache = None
        if self._adapter.layers != [lm.config.layers - 1]:
            self._cache = Cache(
                lm.config, len(attention_sources), capacity, like=lm.embedding.weight
            )

    def read(
        self,
        ids: Tensor,
        lengths: Tensor,
        at: Tensor,
        output: LMOutput,
        lm_logp: Tensor,
        exclude_documents: Sequence[int] | None,
    ) -> tuple[Tensor, list[list[AttendedWindow]]]:
        """Logits (B, V) at `at` with what is read, and each row's windows by attention.

        `output` and `lm_logp` (B, V) are the language model's own for `ids`.
        """
        self._search(output.keys[at], lm_logp, exclude_documents)
        if self._changed:
            self._gather()
        memory = self._memory.at(lengths - 1)
        if self._cache is None:
            last = self._lm.config.layers - 1
            states, attention = memory.read(last, output.states, output.keys)
            return self._lm.logits(states[at]), self._shares(attention[:, 0])
        read = self._lm(ids, self._cache, lengths, at, memory)
        return read.logits, self._shares(read.attention.mean(0)[:, 0])

    def read_prompt(self, ids: Tensor) -> None:
        """Read the beginnings (B, T) of the rows' prompts, where nothing is attended to."""
        if self._cache is not None:
            self._lm(ids, self._cache, at=torch.zeros_like(ids, dtype=torch.bool))

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, which may repeat."""
        for name in ("_readings", "_entries", "_distances", "_age"):
            values = getattr(self, name)
            setattr(self, name, [values[row] for row in rows])
        index = torch.tensor(rows, device=self._lm.embedding.weight.device)
        if not self._changed:
            self._memory = self._memory.select(index)
            self._windows = self._windows[index]
        if self._cache is not None:
            self._cache = self._cache.select(index)

    def join(self, other: RetrievedMemory) -> None:
        """Go on with the rows of `other`, too."""
        if other._adapter is not self._adapter:
            raise ValueError("clips decoded together read with 2 adapters, not one")
        for name in ("_readings", "_entries", "_distances", "_age"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        if self._cache is not None:
            self._cache = self._cache.join(other._cache)
        self._changed = True

    def _search(
        self, keys: Tensor, lm_logp: Tensor, exclude_documents: Sequence[int] | None
    ) -> None:
        """Look for windows where a row has none left and its model is not certain."""
        asking: dict[int, list[int]] = {}
        self.missing_shards = [0] * len(self._readings)
        for row, one in enumerate(self._readings):
            if one.whole:
                continue
            self._age[row] += 1
            if len(self._entries[row]) and self._age[row] < one.settings.stride:
                continue
            if len(self._entries[row]):
                self._found(row, np.empty(0, np.int64), np.empty(0, np.float32))
            if unsure(lm_logp[row : row + 1], one.settings.certain):
                asking.setdefault(id(one), []).append(row)
        for rows in asking.values():
            one = self._readings[rows[0]]
            excluded = exclude_documents and [exclude_documents[row] for row in rows]
            queries = keys[rows].float().cpu().numpy()
            found = one.retriever.search(queries, one.settings.k, excluded)
            for row in rows:
                self.missing_shards[row] = found.missing_shards
            near = gate(torch.from_numpy(found.distances), one.settings.gate).tolist()
            for row, own, distances, open in zip(
                rows, found.entries, found.distances, near, strict=True
            ):
                if open:
                    kept = own != NO_ENTRY
                    self._found(row, own[kept], distances[kept])

    def _found(self, row: int, entries: np.ndarray, distances: np.ndarray) -> None:
        self._entries[row], self._distances[row] = entries, distances
        self._age[row], self._changed = 0, True

    def _gather(self) -> None:
        """Lay out what every row reads; rows of several datastores side by side."""
        banks = {id(one.bank): one.bank for one in self._readings}
        parts = []
        for bank in banks.values():
            rows = [row for row, one in enumerate(self._readings) if one.bank is bank]
            parts.append((rows, *bank.gather([self._entries[row] for row in rows])))
        if len(parts) == 1 and len(parts[0][0]) == len(self._readings):
            [(_, encoded, windows)] = parts
        else:
            most = max(windows.shape[1] for _, _, windows in parts)
            like = parts[0][1]
            encoded = like.new_zeros(len(self._readings), most, *like.shape[2:])
            windows = parts[0][2].new_full((len(self._readings), most), -1)
            for rows, own, numbers in parts:
                encoded[rows, : own.shape[1]] = own
                windows[rows, : own.shape[1]] = numbers
        self._windows, self._changed = windows, False
        self._memory = Memory(
            self._adapter,
            encoded.permute(2, 0, 3, 4, 1, 5),  # (L, B, 2, H, M, d)
            (windows >= 0)[:, None],
            torch.zeros(len(windows), dtype=torch.long, device=windows.device),
        )

    def _shares(self, attention: Tensor) -> list[list[AttendedWindow]]:
        """Attention (B, M) summed by window: each row's most read ones."""
        counts = [len(own) for own in self._entries]
        shares = attention.new_zeros(len(counts), max(1, *counts))
        shares.scatter_add_(1, self._windows.clamp(min=0), attention)
        best = shares.topk(min(ATTRIBUTED_WINDOWS, shares.shape[1]))
        return [
            [
                (int(own[window]), share, float(distances[window]))
                for share, window in zip(values, windows, strict=True)
                if share > 0
            ]
            for own, distances, values, windows in zip(
                self._entries,
                self._distances,
                best.values.tolist(),
                best.indices.tolist(),
                strict=True,
            )
        ]
