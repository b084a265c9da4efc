"""An n-gram language model over word pieces: how likely each is by the few before it.

A neural model that transcribes leans on what it hears, and spells what sounds like it; which words
there are, and which follow which, is counted from text alone. The decoder weighs both (shallow
fusion: Kannan et al., ICASSP 2018). Counts are interpolated with those of shorter contexts (Witten
and Bell, IEEE Trans. Inf. Theory 1991). Knows ids; neither text nor how hypotheses are chosen.

The n-grams are a tree: a node is a context, and its children, in the order of their pieces, are
what followed it. Level by level the nodes are numbered from the root, 0, so that the children of
one lie together.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

FILE = "ngrams.npz"
UNKNOWN = -1
"""The node of a context that was not met."""
PARTS = 20
"""Shares are kept as parts of a nat: one of 0.95 or of 1."""
_ARRAYS = ("pieces", "shares", "rest", "children")
_UNREADABLE = (BadZipFile, EOFError, KeyError, TypeError, ValueError, zlib.error)
"""What reading a file that is damaged, or another, may raise."""


@dataclass(frozen=True, eq=False)
class NGram:
    """N nodes, and N - 1 edges to all but the root.

    `pieces` (N - 1,) is what each edge goes on with, and `shares` (N - 1,) float32 how much of what
    follows its context that is. Node n's edges are those from `first[n]` to `first[n + 1]`, of
    `first` (N + 1,), and edge e leads to node e + 1. The `rest` (N,) float32 of what follows a
    context is what follows it without its oldest piece; behind none, all pieces alike.
    """

    order: int
    """Pieces of the longest n-gram."""
    size: int
    """Ids of the vocabulary, V."""
    spoken: int
    """How many of them may follow anything."""
    begin: int
    """The id that stands before a text."""
    pieces: np.ndarray
    shares: np.ndarray
    rest: np.ndarray
    first: np.ndarray

    @cached_property
    def _edges(self) -> np.ndarray:
        """Each edge's context and piece (N - 1,), as one number that rises from edge to edge."""
        counts = np.diff(self.first)
        return np.repeat(np.arange(len(counts)), counts) * self.size + self.pieces

    @cached_property
    def _alone(self) -> np.ndarray:
        """Probability of each piece behind no context (V,) float32."""
        likely = np.full(self.size, self.rest[0] / self.spoken, np.float32)
        pieces = slice(self.first[1])
        likely[self.pieces[pieces]] += self.shares[pieces]
        return likely

    @classmethod
    def count(
        cls,
        texts: Iterable[Sequence[int]],
        least: Sequence[int],
        size: int,
        spoken: int,
        begin: int,
        end: int,
    ) -> NGram:
        """Of `texts` as ids below `size`, each between `begin` and `end`. `least` is how often an
        n-gram of each length has to occur, so that there are as many lengths; all pieces that occur
        are kept. ValueError without texts."""
        whole = [[begin, *text, end] for text in texts]
        if not whole:
            raise ValueError("an n-gram model needs texts to count")
        lengths = np.array([len(text) for text in whole])
        tokens = np.concatenate([np.array(text, np.int32) for text in whole])
        del whole
        place = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        node = np.zeros(len(tokens), np.int64)  # of the context that ends before each token
        pieces, shares, rest, children = [], [], [], []
        first, width = 0, 1  # the nodes of the level, which are numbered from `first` on
        for number, rare in enumerate(least):
            here = np.flatnonzero((node >= 0) & (place >= number))
            keys = (node[here] - first) * size + tokens[here]
            found, owner, often = np.unique(keys, return_inverse=True, return_counts=True)
            parent, piece = found // size, found % size
            said = np.where(piece == begin, 0, often)
            total = np.bincount(parent, said, width) + np.bincount(parent, said > 0, width)
            kept = (often >= rare) | (number == 0)
            pieces.append(piece[kept])
            shares.append(said[kept] / total[parent[kept]])
            rest.append(1 - np.bincount(parent[kept], shares[-1], width))
            children.append(np.bincount(parent[kept], minlength=width))
            first, width = first + width, int(kept.sum())
            reached = np.where(kept, first + np.cumsum(kept) - 1, UNKNOWN)[owner]
            node[:] = UNKNOWN
            after = here + 1  # the context of the token behind
            inside = after < len(tokens)
            node[after[inside]] = reached[inside]
        rest.append(np.ones(width))
        children.append(np.zeros(width, np.int64))
        return cls(
            order=len(least),
            size=size,
            spoken=spoken,
            begin=begin,
            pieces=np.concatenate(pieces).astype(np.int64),
            shares=_shares(_parts(np.concatenate(shares))),
            rest=_shares(_parts(np.concatenate(rest))),
            first=np.append(0, np.cumsum(np.concatenate(children))),
        )

    def save(self, directory: Path) -> None:
        """Write FILE into a directory."""
        counts = np.diff(self.first)
        np.savez_compressed(
            directory / FILE,
            shape=np.array([self.order, self.size, self.spoken, self.begin]),
            pieces=self.pieces.astype(np.min_scalar_type(self.size)),
            shares=_parts(self.shares),
            rest=_parts(self.rest),
            children=counts.astype(np.min_scalar_type(counts.max())),
        )

    @classmethod
    def read(cls, directory: Path) -> NGram:
        """What `save` wrote; ValueError where a file is none."""
        path = directory / FILE
        try:
            with np.load(path, allow_pickle=False) as found:
                order, size, spoken, begin = found["shape"].tolist()
                pieces, parts, rest, children = (found[name] for name in _ARRAYS)
        except _UNREADABLE as error:
            raise ValueError(f"{path} holds no n-grams: {error}") from None
        first = np.append(0, np.cumsum(children, dtype=np.int64))
        sizes = {len(pieces), len(parts), int(first[-1]), len(rest) - 1, len(children) - 1}
        if len(sizes) > 1 or pieces.max(initial=0) >= size:
            raise ValueError(f"{path} holds no n-grams: its parts are not of one tree")
        pieces = pieces.astype(np.int64)
        return cls(order, size, spoken, begin, pieces, _shares(parts), _shares(rest), first)

    def __len__(self) -> int:
        """N-grams of all lengths."""
        return len(self.pieces)

    def start(self, rows: int) -> np.ndarray:
        """Where `rows` texts stand before their first piece: the nodes (R, order) of the contexts
        of no piece, the last one, the last two, …; UNKNOWN where one was not met."""
        nodes = np.full((rows, self.order), UNKNOWN)
        nodes[:, 0] = 0
        return self.advance(nodes, np.full(rows, self.begin))

    def advance(self, nodes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """The nodes (R, order) of texts at `nodes` (R, order) that go on with `tokens` (R,)."""
        asked = np.where(nodes >= 0, nodes * self.size + tokens[:, None], -1)[:, :-1]
        edge = np.searchsorted(self._edges, asked).clip(max=len(self._edges) - 1)
        grown = np.where(self._edges[edge] == asked, edge + 1, UNKNOWN)
        return np.concatenate((np.zeros_like(nodes[:, :1]), grown), 1)

    def logp(self, nodes: np.ndarray) -> np.ndarray:
        """Log-probability (R, V) float32 of what comes next in texts at `nodes` (R, order)."""
        left, places, shares = np.ones(len(nodes), np.float32), [], []
        for here in nodes.T[:0:-1]:  # the longest contexts first: they leave the rest to shorter
            rows = np.flatnonzero(here >= 0)
            begin = self.first[here[rows]]
            count = self.first[here[rows] + 1] - begin
            edge = np.arange(count.sum()) + np.repeat(begin - (count.cumsum() - count), count)
            places.append(np.repeat(rows * self.size, count) + self.pieces[edge])
            shares.append(np.repeat(left[rows], count) * self.shares[edge])
            left[rows] *= self.rest[here[rows]]
        likely = left[:, None] * self._alone
        for place, share in zip(places, shares, strict=True):
            likely.reshape(-1)[place] += share
        return np.log(np.minimum(likely, 1, out=likely), out=likely)  # rounded, it may be above


def _parts(shares: np.ndarray) -> np.ndarray:
    """Shares as uint8: 0 for none, else one more than how far below 1 they are, in PARTS."""
    with np.errstate(divide="ignore"):
        below = np.rint(-PARTS * np.log(shares)) + 1
    return np.where(shares > 0, below.clip(1, 255), 0).astype(np.uint8)


def _shares(parts: np.ndarray) -> np.ndarray:
    """What `_parts` wrote."""
    shares = np.exp((1 - parts.astype(np.float32)) / PARTS)
    return np.where(parts > 0, shares, np.float32(0))
