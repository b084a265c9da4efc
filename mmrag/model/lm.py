"""The language model: a Llama-family decoder that hands out its retrieval key.

The key of a position is the normalised input of the last feed-forward layer, the representation
that kNN-LM found best (arXiv 1911.00172, section 5). It is returned, never hooked. The model
knows ids and positions; it knows neither text nor units nor datastores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmrag.config import LanguageModel
from mmrag.model.cross_attention import Memory
from mmrag.model.layers import (
    INIT_STD,
    Attention,
    Cache,
    Embedding,
    Linear,
    RMSNorm,
    SwiGLU,
    rotary,
)


@dataclass(frozen=True)
class LMOutput:
    """`logits` (N, V) float32 of the N positions asked for, row by row; `keys`, `states` and
    `hidden` (B, T, D) of every position: the retrieval key, the last layer's output, and the same
    normalised.

    With a memory, `attention` (L, B, T, M) says where each of its L blocks looked.
    """

    logits: Tensor
    keys: Tensor
    states: Tensor
    hidden: Tensor
    attention: Tensor | None = None


class Block(nn.Module):
    """Attention and feed-forward, each normalised first and added to what came in."""

    def __init__(self, config: LanguageModel, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = RMSNorm(config.width, config.norm_eps)
        self.feed_forward = SwiGLU(
            config.width, config.feed_forward, INIT_STD / (2 * config.layers) ** 0.5
        )

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        positions: Tensor,
        cache: Cache | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> the block's output and the normalised input of its feed-forward."""
        x = x + self.attention(self.attention_norm(x), angles, positions, cache, mask)
        key = self.feed_forward_norm(x)
        return x + self.feed_forward(key), key


class LM(nn.Module):
    """The decoder over `vocabulary` ids. Position is counted from the start of each row."""

    def __init__(self, config: LanguageModel, vocabulary: int) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = vocabulary
        self.embedding = Embedding(vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = None if config.tied else Linear(config.width, vocabulary)

    @property
    def width(self) -> int:
        """D of a key."""
        return self.config.width

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    def cache(self, speech: Sequence[Any], capacity: int) -> Cache:
        """An empty cache of a row a clip; this model reads the speech in its prompt."""
        return Cache(self.config, len(speech), capacity, like=self.embedding.weight)

    def read(self, ids: Tensor, speech: Sequence[Any], at: Tensor) -> LMOutput:
        """Whole sequences, the speech in them, as in `forward`."""
        return self(ids, at=at)

    def forward(
        self,
        ids: Tensor,
        cache: Cache | None = None,
        lengths: Tensor | None = None,
        at: Tensor | None = None,
        memory: Memory | None = None,
    ) -> LMOutput:
        """Read `ids` (B, T), padded on the right where `lengths` (B,) says so.

        With a cache, the tokens continue each row where it stands, and the cache moves on by
        `lengths` (T by default). `at` (B, T) bool chooses the positions whose logits are
        computed; None for all. `memory` is read after the layers that its blocks follow.
        """
        rows, time = ids.shape
        start = cache.lengths if cache is not None else ids.new_zeros(rows)
        positions = start[:, None] + torch.arange(time, device=ids.device)
        if cache is not None and int(start.max()) + time > cache.capacity:
            raise ValueError(f"{int(start.max()) + time} tokens in a cache of {cache.capacity}")
        mask = None
        if cache is not None and start.any():
            seen = torch.arange(int(positions.max()) + 1, device=ids.device)
            mask = seen[None, None, None, :] <= positions[:, None, :, None]

        angles = self._angles(positions)
        x = self.embedding(ids)
        looked = []
        for layer, block in enumerate(self.blocks):
            x, key = block(x, angles, positions, cache, mask)
            if memory is not None and layer in memory.layers:
                x, attention = memory.read(layer, x, key)
                looked.append(attention)
        hidden = self.norm(x)

        if cache is not None:
            cache.lengths = start + (time if lengths is None else lengths)
        wanted = hidden.flatten(0, 1) if at is None else hidden[at]
        looked_at = torch.stack(looked) if looked else None
        return LMOutput(self._project(wanted), key, x, hidden, looked_at)

    def attention(self, ids: Tensor, last: int) -> Tensor:
        """Where the `last` positions of `ids` (B, T) look: (L, B, H, last, T) float32.

        The weights that `forward` mixes values by, of every layer and head; each row sums to 1.
        Raises ValueError unless 1 <= last <= T.
        """
        rows, time = ids.shape
        if not 1 <= last <= time:
            raise ValueError(f"the last {last} of {time} positions")
        positions = torch.arange(time, device=ids.device).expand(rows, time)
        angles = self._angles(positions)
        x = self.embedding(ids)
        weights = []
        for layer, block in enumerate(self.blocks, start=1):
            weights.append(block.attention.weights(block.attention_norm(x), angles, last))
            if layer < len(self.blocks):
                x, _ = block(x, angles, positions, None, None)
        return torch.stack(weights)

    def speech_attention(
        self, speech: Sequence[int], prompt: Sequence[int], tokens: Sequence[int]
    ) -> Tensor:
        """Where each choice of `tokens` (N) looks among the units `speech` (T): (L H, N, T)."""
        first = len(prompt) - 1 - len(speech)
        ids = torch.tensor([[*prompt, *tokens[:-1]]], device=self.device)
        weights = self.attention(ids, last=len(tokens))
        return weights[:, 0, :, :, first : first + len(speech)].flatten(0, 1)

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        width = self.config.head_width or self.config.width // self.config.heads
        return rotary(positions, width, self.config.rope_theta)

    def logits(self, states: Tensor) -> Tensor:
        """What the last layer's output (N, D) says of the next token: (N, V) float32."""
        return self._project(self.norm(states))

    def _project(self, hidden: Tensor) -> Tensor:
        head = self.embedding if self.head is None else self.head
        return functional.linear(hidden, head.weight).float()


def parameter_count(config: LanguageModel, vocabulary: int) -> int:
    """Parameters of an LM of this shape, without building it in memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in LM(config, vocabulary).parameters())
