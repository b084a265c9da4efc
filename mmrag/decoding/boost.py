"""Phrase boosting: the decoder favours word pieces that spell one of a list of phrases.

Shallow fusion with a prefix tree (Zhao et al., Interspeech 2019): each piece that goes on along a
phrase earns `weight` nats, and a hypothesis that leaves a phrase before its end gives back what the
unfinished part had earned. The baseline that retrieval is measured against.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Node:
    """A prefix of some phrases, `depth` pieces long; `ends` where it is one of them.

    `whole` is the length of the longest phrase that it starts with if a new word follows (0 for
    none), `inner` that of the longest one if its last word goes on.
    """

    depth: int = 0
    ends: bool = False
    whole: int = 0
    inner: int = 0
    children: dict[int, Node] = field(default_factory=dict)


class Boost:
    """Phrases to favour. A phrase is met only from a word's start to a word's end."""

    def __init__(
        self, phrases: Iterable[Sequence[int]], weight: float, word_starts: Tensor
    ) -> None:
        """`phrases` as ids; `word_starts` (V,) bool, the ids that end the word before them."""
        self.root = Node()
        self.weight = weight
        self.word_starts = word_starts
        for phrase in phrases:
            self._add(phrase)
        self._settle(self.root, 0)

    def _add(self, phrase: Sequence[int]) -> None:
        node = self.root
        for piece in phrase:
            node = node.children.setdefault(piece, Node(node.depth + 1))
        node.ends = True

    def _settle(self, node: Node, inner: int) -> None:
        node.inner = inner
        node.whole = node.depth if node.ends else inner
        for piece, child in node.children.items():
            self._settle(child, node.whole if self.word_starts[piece] else node.inner)

    def follow(self, tokens: Sequence[int]) -> Node:
        """The phrase prefix that a hypothesis ends with; the root for none."""
        node = self.root
        for place, token in enumerate(tokens):
            opens = place == 0 or bool(self.word_starts[token])
            going_on = None if node is self.root else node.children.get(token)
            opening = self.root.children.get(token) if opens else None
            node = going_on or opening or self.root
        return node

    def bonus(self, tokens: Sequence[int]) -> Tensor:
        """What each next token (V,) float32 would earn after `tokens`, in nats."""
        node = self.follow(tokens)
        kept = torch.where(self.word_starts, float(node.whole), float(node.inner)) - node.depth
        if self.root.children:
            opening = torch.tensor(list(self.root.children))
            kept[opening] += self.word_starts[opening].float() if tokens else 1.0
        if node.depth and node.children:
            kept[torch.tensor(list(node.children))] = 1.0
        return self.weight * kept
