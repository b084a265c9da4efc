"""The windows around a datastore's entries as an adapter reads them: each encoded once, however
often it is found, and laid out for the rows of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmrag.model.cross_attention import Adapter
from mmrag.model.lm import LM
from mmrag.records import Retriever

MAX_CACHED_WINDOWS = 4096
"""Encoded windows that a cache keeps; beyond, it starts afresh."""


class WindowCache:
    """The windows of one datastore as an adapter reads them, each encoded once."""

    def __init__(self, adapter: Adapter, lm: LM, source: Retriever) -> None:
        self.adapter = adapter
        self.source = source
        self._lm = lm
        self._places: dict[int, int] = {}
        self._lengths = np.empty(0, np.int64)
        self._encoded: Tensor | None = None
        """Encoded windows (E, W, L, 2, H, d), more of them than there are places taken."""
        self._list: tuple[np.ndarray, Tensor, Tensor] | None = None
        """The entries that all rows had, when they last had the same, and what `gather` made of
        them for one row."""

    def gather(self, rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """The windows around each row's entries: what the blocks attend to (L, 2, B, H, M, d),
        one for each token, and which of the row's windows it belongs to (B, M), -1 for padding.

        Rows of the very same entries are one in memory, and that of the last time where it can be.
        """
        own = rows[0]
        if len(own) and all(one is own for one in rows):
            encoded, windows = self._gathered(own)
            return encoded.expand(-1, -1, len(rows), -1, -1, -1), windows.expand(len(rows), -1)
        return self._gather(rows)

    def _gathered(self, entries: np.ndarray) -> tuple[Tensor, Tensor]:
        """`gather` for one row, which is kept unless a window is missing."""
        if self._list is not None and self._list[0] is entries:
            return self._list[1:]
        found = self._gather([entries])
        if all(self._has(entry) for entry in entries.tolist()):
            self._list = entries, *found
        return found

    def _gather(self, rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        entries = np.concatenate(rows)
        self._encode(np.unique(entries))
        device = self._lm.embedding.weight.device
        if self._encoded is None:
            layers, both, heads, width = self.adapter.encoded_shape
            nothing = self._lm.embedding.weight.new_zeros(layers, both, len(rows), heads, 1, width)
            return nothing, torch.full((len(rows), 1), -1, device=device)
        counts = [len(own) for own in rows]
        places = np.fromiter(map(self._places.__getitem__, entries.tolist()), np.int64, sum(counts))
        at, windows = _side_by_side(places, self._lengths[places], counts, self._encoded.shape[1])
        tokens = self._encoded.flatten(0, 1)[torch.from_numpy(at).to(device)]
        # A block's matrices lie in order, so that no step has to copy them.
        return tokens.permute(2, 3, 0, 4, 1, 5).contiguous(), torch.from_numpy(windows).to(device)

    def tokens(self, entries: np.ndarray) -> int:
        """How many tokens the windows have that were last gathered around entries."""
        if self._list is not None and self._list[0] is entries:
            return self._list[2].shape[1]
        return int(sum(self._lengths[self._places[entry]] for entry in entries.tolist()))

    def _encode(self, entries: np.ndarray) -> None:
        """Take in the windows that are not there yet, or that no shard had when it was asked."""
        new = [entry for entry in entries.tolist() if not self._has(entry)]
        if not new:
            return
        if self._places and len(self._lengths) + len(new) > MAX_CACHED_WINDOWS:
            self._places, self._lengths, self._encoded = {}, np.empty(0, np.int64), None
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
        self._keep(encoded.permute(0, 4, 1, 2, 3, 5))  # a token's own together
        first = len(self._lengths)
        self._lengths = np.concatenate((self._lengths, found.present.sum(1)))
        self._places |= {entry: first + n for n, entry in enumerate(new)}

    def _has(self, entry: int) -> bool:
        place = self._places.get(entry)
        return place is not None and bool(self._lengths[place])

    def _keep(self, encoded: Tensor) -> None:
        """Put windows behind those that are there, in twice the room where there is too little."""
        first, last = len(self._lengths), len(self._lengths) + len(encoded)
        if self._encoded is None or last > len(self._encoded):
            room = encoded.new_zeros(max(last, 2 * first), *encoded.shape[1:])
            if self._encoded is not None:
                room[:first] = self._encoded[:first]
            self._encoded = room
        self._encoded[first:last] = encoded


def _side_by_side(
    places: np.ndarray, lengths: np.ndarray, counts: Sequence[int], width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of windows that lie `width` apart, laid out a row after the other.

    `places` and `lengths` (N,) are those of the windows of all rows, `counts` how many of them each
    row has -> where each token of a row is (B, M), and its window's number in the row, -1 behind.
    """
    row = np.repeat(np.arange(len(counts)), counts)
    firsts = np.cumsum(counts) - counts
    taken = np.bincount(row, lengths, len(counts)).astype(np.int64)
    window = np.repeat(np.arange(len(places)), lengths)
    inside = np.arange(len(window)) - (np.cumsum(lengths) - lengths)[window]
    present = np.arange(max(1, taken.max(initial=0))) < taken[:, None]
    at, numbers = np.zeros(present.shape, np.int64), np.full(present.shape, -1)
    at[present] = places[window] * width + inside
    numbers[present] = window - firsts[row[window]]
    return at, numbers
