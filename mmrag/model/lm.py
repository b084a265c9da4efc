"""The language model: a Llama-family decoder that hands out its retrieval key.

The key of a position is the normalised input of the last feed-forward layer, the representation
that kNN-LM found best (arXiv 1911.00172, section 5). It is returned, never hooked. The model
knows ids and positions; it knows neither text nor units nor datastores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mmrag.config import LanguageModel
from mmrag.model.cross_attention import Memory
from mmrag.model.cross_entropy import summed_cross_entropy
from mmrag.model.layers import (
    INIT_STD,
    Attention,
    Embedding,
    Projection,
    RMSNorm,
    SwiGLU,
    rotary,
)
from mmrag.model.pages import PagedCache, PagePool, ReadPlan, StepPlan


@dataclass(frozen=True)
class LMOutput:
    """`logits` (N, V) float32 of the N positions asked for, row by row; `keys`, `states` and
    `hidden` (B, T, D) of every position: the retrieval key, the last layer's output, and the same
    normalised. Where targets were given there are no logits (0, V), but `loss`, their summed
    cross-entropy.

    With a memory, `attention` (L, B, T, M) says where each of its L blocks looked.
    """

    logits: Tensor
    keys: Tensor
    states: Tensor
    hidden: Tensor
    attention: Tensor | None = None
    loss: Tensor | None = None


class Block(nn.Module):
    """Attention and feed-forward, each normalised first and added to what came in."""

    def __init__(self, config: LanguageModel) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.width, config.norm_eps)
        self.feed_forward = SwiGLU(
            config.width, config.feed_forward, INIT_STD / (2 * config.layers) ** 0.5
        )

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        pages: tuple[Tensor, Tensor] | None,
        plan: ReadPlan | None,
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> the block's output and the normalised input of its feed-forward."""
        return self._fed(x + self.attention(self.attention_norm(x), angles, pages, plan))

    def packed(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        pages: tuple[Tensor, Tensor],
        plan: ReadPlan,
    ) -> tuple[Tensor, Tensor]:
        """`forward` without the padding: x (M, D)."""
        return self._fed(x + self.attention.packed(self.attention_norm(x), angles, pages, plan))

    def step(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        pages: tuple[Tensor, Tensor],
        plan: StepPlan,
    ) -> tuple[Tensor, Tensor]:
        """`forward` for one token a row: x (R, D)."""
        return self._fed(x + self.attention.step(self.attention_norm(x), angles, pages, plan))

    def _fed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        key = self.feed_forward_norm(x)
        return x + self.feed_forward(key), key


class LM(nn.Module):
    """The decoder over `vocabulary` ids. Position is counted from the start of each row."""

    def __init__(self, config: LanguageModel, vocabulary: int) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = vocabulary
        self.embedding = Embedding(vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head: nn.Module | None = None if config.tied else Projection(config.width, vocabulary)
        self.kept_in: torch.dtype | None = None
        """What keys and values are kept in where that is not the weights' format."""
        self.block_step: Callable[..., tuple[Tensor, Tensor]] | None = None
        """`Block.step`, compiled, where this model was prepared for decoding."""
        self.checkpointed: int | None = None
        """Blocks of which a training pass keeps what goes into the first of them alone, and
        computes the rest again on its way back; None keeps everything."""
        self.loss_chunk: int | None = None
        """Positions whose logits are held at once while a loss is computed; None for all."""

    @property
    def width(self) -> int:
        """D of a key."""
        return self.config.width

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    def pool(self, tokens: int, growing: bool = False) -> PagePool:
        """Pages for `tokens` of this model, all rows together."""
        config = self.config
        width = config.head_width or config.width // config.heads
        like = self.embedding.weight[:0].to(self.kept_in)
        return PagePool(config.layers, config.kv_heads, width, tokens, like, growing)

    def cache(
        self, speech: Sequence[Any], capacity: int, pool: PagePool | None = None
    ) -> PagedCache:
        """An empty cache of a row a clip; this model reads the speech in its prompt. Without a
        pool it gets its own, which grows."""
        rows = len(speech)
        return PagedCache(pool or self.pool(rows * capacity, growing=True), rows, capacity)

    def read(self, ids: Tensor, speech: Sequence[Any], at: Tensor) -> LMOutput:
        """Whole sequences, the speech in them, as in `forward`."""
        return self(ids, at=at)

    def forward(
        self,
        ids: Tensor,
        cache: PagedCache | None = None,
        lengths: Tensor | None = None,
        at: Tensor | None = None,
        memory: Memory | None = None,
        targets: Tensor | None = None,
    ) -> LMOutput:
        """Read `ids` (B, T), padded on the right where `lengths` (B,) says so.

        With a cache, the tokens continue each row where it stands, and the cache moves on by
        `lengths` (T by default). `at` (B, T) bool chooses the positions whose logits are
        computed; None for all. With `targets` (N,), what came next at each of them, there is
        their loss instead. `memory` is read after the layers that its blocks follow.
        """
        one = cache is not None and ids.shape[1] == 1 and lengths is None and memory is None
        if one and self.block_step is not None:
            return self._step(ids, cache)
        rows, time = ids.shape
        plan = None if cache is None else cache.plan(time, lengths)
        if plan is not None and memory is None:
            return self._packed(ids, cache, plan, at)
        if plan is None:
            positions = torch.arange(time, device=ids.device).expand(rows, time)
        else:
            positions = plan.positions

        angles = self._angles(positions)
        x = self.embedding(ids)
        looked: list[Tensor] = []
        again = self.checkpointed if cache is None and torch.is_grad_enabled() else None
        layers = range(len(self.blocks))
        for first in range(0, len(layers), again or len(layers)):
            reading = (layers[first:][:again], x, angles, cache, plan, memory)
            if again is None:
                x, key, seen = self._through(*reading)
            else:
                x, key, seen = checkpoint(
                    self._through, *reading, use_reentrant=False, preserve_rng_state=False
                )
            looked += seen
        hidden = self.norm(x)

        wanted = hidden.flatten(0, 1) if at is None else hidden[at]
        looked_at = torch.stack(looked) if looked else None
        if targets is not None:
            loss = self._loss(wanted, targets)
            return LMOutput(loss.new_empty(0, self.vocabulary), key, x, hidden, looked_at, loss)
        return LMOutput(self._project(wanted), key, x, hidden, looked_at)

    def _through(
        self,
        layers: range,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        cache: PagedCache | None,
        plan: ReadPlan | None,
        memory: Memory | None,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """x (B, T, D) through some layers -> their output, the last one's key, and where each
        block of a memory looked."""
        looked = []
        for layer in layers:
            pages = None if cache is None else cache.pool.layers[layer]
            x, key = self.blocks[layer](x, angles, pages, plan)
            if memory is not None and layer in memory.layers:
                x, attention = memory.read(layer, x, key)
                looked.append(attention)
        return x, key, looked

    def _packed(
        self, ids: Tensor, cache: PagedCache, plan: ReadPlan, at: Tensor | None
    ) -> LMOutput:
        """What a cache has room made for, with nothing computed for padding but its attention."""
        cos, sin = self._angles(plan.packed(plan.positions)[:, None])
        angles = cos[:, 0], sin[:, 0]
        x = self.embedding(plan.packed(ids))
        for pages, block in zip(cache.pool.layers, self.blocks, strict=True):
            x, key = block.packed(x, angles, pages, plan)
        hidden = plan.padded(self.norm(x))
        wanted = hidden.flatten(0, 1) if at is None else hidden[at]
        return LMOutput(self._project(wanted), plan.padded(key), plan.padded(x), hidden)

    def _step(self, ids: Tensor, cache: PagedCache) -> LMOutput:
        """One token a row (R, 1), each block compiled."""
        plan = cache.step()
        cos, sin = self._angles(plan.positions[:, None])
        angles = cos[:, 0], sin[:, 0]
        x = self.embedding(ids[:, 0])
        for layer, block in enumerate(self.blocks):
            x, key = self.block_step(block, x, angles, cache.pool.layers[layer], plan)
        hidden = self.norm(x)
        return LMOutput(self._project(hidden), key[:, None], x[:, None], hidden[:, None])

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
                x, _ = block(x, angles, None, None)
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
        if self.head is None:
            return functional.linear(hidden, self.embedding.weight).float()
        return self.head(hidden).float()

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        if self.head is None:
            return summed_cross_entropy(hidden, self.embedding.weight, targets, self.loss_chunk)
        return self.head(hidden, targets, self.loss_chunk)


def parameter_count(config: LanguageModel, vocabulary: int) -> int:
    """Parameters of an LM of this shape, without building it in memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in LM(config, vocabulary).parameters())
