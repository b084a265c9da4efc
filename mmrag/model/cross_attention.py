"""Cross-attention: an adapter that reads what was retrieved (arXiv 2406.09618, section 3.2).

A value encoder turns each retrieved window of tokens into one vector a token; after every n-th
layer of the frozen language model a gated block attends to all of them. The gates start shut, so
that an untrained adapter leaves the model as it is, bit for bit; a position that sees no window
stays that way for good. Knows tensors alone: neither datastores nor what is a good neighbour.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mmrag.config import CrossAttention, LanguageModel
from mmrag.model.layers import INIT_STD, Embedding, Linear, RMSNorm, SwiGLU

GATE_GAIN = 10.0
"""How much faster than a matrix's numbers a gate moves."""
MATCH_SCALE = 2.0
"""Of query and key each: sharp enough that a likeness stands out among hundreds of others."""


@dataclass(frozen=True)
class Windows:
    """E windows of at most W tokens, and which of them each of B rows may read, and when.

    `tokens` (E, W) ids, `present` (E, W) bool where there is one, `keys` (E, W, D) each token's
    retrieval key (zeros where it has none). `index` (B, N) numbers the windows of a row, -1 for
    none; `since` and `until` (B, N) bound the text positions that see them: position 0 predicts a
    transcript's first token.
    """

    tokens: Tensor
    present: Tensor
    keys: Tensor
    index: Tensor
    since: Tensor
    until: Tensor

    def to(self, device: torch.device) -> Windows:
        return Windows(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


class EncoderLayer(nn.Module):
    """Attention among the tokens of one window, in both directions, and feed-forward."""

    def __init__(self, config: CrossAttention, width: int, eps: float) -> None:
        super().__init__()
        self.heads = config.encoder_heads
        self.attention_norm = RMSNorm(width, eps)
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)
        self.feed_forward_norm = RMSNorm(width, eps)
        self.feed_forward = SwiGLU(width, config.encoder_feed_forward, INIT_STD)

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        """x (E, W, D), present (E, W) -> (E, W, D)."""
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, present[:, None, None])
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.feed_forward_norm(x))


class ValueEncoder(nn.Module):
    """Retrieved windows to what is attended to: each token by its key, and what it has to say.

    Tokens come in as the language model's own embeddings. A key is the language model's state
    just before the token, over the speech that it was read with: where a token was heard, the
    memory knows its sound beside its spelling. Layers of attention within the window add context
    to both.
    """

    def __init__(self, config: CrossAttention, lm: LanguageModel) -> None:
        super().__init__()
        self.token_norm = RMSNorm(lm.width, lm.norm_eps)
        self.key_norm = RMSNorm(lm.width, lm.norm_eps)
        self.place = Embedding(config.window, lm.width)
        self.layers = nn.ModuleList(
            EncoderLayer(config, lm.width, lm.norm_eps) for _ in range(config.encoder_layers)
        )
        self.norm = RMSNorm(lm.width, lm.norm_eps)
        self.context = Linear(lm.width, 2 * lm.width)

    def forward(self, embedded: Tensor, keys: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """`embedded`, `keys` (E, W, D), `present` (E, W) -> keys and values (E, W, D) each."""
        places = torch.arange(embedded.shape[1], device=embedded.device)
        keys, values = self.key_norm(keys), self.token_norm(embedded)
        x = keys + values + self.place(places)
        # An empty window attends to its padding, and is masked wherever it is read.
        seen = present | ~present.any(1, keepdim=True)
        for layer in self.layers:
            x = layer(x, seen)
        key_context, value_context = self.context(self.norm(x)).chunk(2, -1)
        return keys + key_context, values + value_context


class Block(nn.Module):
    """Gated cross-attention; one learned vector that says nothing is always there to attend to.

    Query and key pass through one projection, and all three start as identities: a state attends
    to the tokens that were said in a state like it, as kNN-LM would, and writes their embeddings.
    """

    def __init__(self, config: CrossAttention, lm: LanguageModel) -> None:
        super().__init__()
        self.heads = config.heads
        inner = config.heads * config.head_width
        self.match = IdentityLinear(lm.width, inner, MATCH_SCALE)
        self.value = IdentityLinear(lm.width, inner)
        self.null = Embedding(1, inner)
        self.out = IdentityLinear(inner, lm.width)
        self.gate = Gate()

    def project(self, keys: Tensor, values: Tensor) -> Tensor:
        """Encoded windows (E, W, D) -> what is attended to (E, 2, H, W, d)."""
        both = torch.stack((self.match(keys), self.value(values)), 1)
        return both.unflatten(-1, (self.heads, -1)).transpose(2, 3)

    def forward(
        self, x: Tensor, key: Tensor, memory: Tensor, visible: Tensor, lean: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Read `memory` (B, 2, H, M, d) where `visible` (B, T, M) says so, `lean` (B, M) added to
        the scores. Rows that read the same may be one in memory (`Tensor.expand`).

        x (B, T, D) and its `key`, the normalised input of the layer's feed-forward -> x with what
        was read, and the share of attention on each of the M (B, T, M), averaged over the heads;
        what is missing to 1 went to the vector that says nothing.
        """
        q = self.match(key).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = _once(memory).to(q.dtype).unbind(1)
        null = self.null.weight.unflatten(-1, (self.heads, -1)).transpose(0, 1).to(q.dtype)
        scores = torch.cat((q @ null.transpose(-1, -2), _product(q, k.transpose(-1, -2))), -1)
        seen = torch.cat((visible.new_ones(*visible.shape[:2], 1), visible), 2)
        scores = scores.float() / math.sqrt(q.shape[-1])
        if lean is not None:
            scores[..., 1:] += lean[:, None, None]
        attention = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)[..., 1:]
        mixed = _product(attention.to(v.dtype), v).transpose(1, 2).flatten(2)
        return x + self.gate(self.out(mixed)), attention.mean(1)


def _once(memory: Tensor) -> Tensor:
    """Memory (B, ...), or the first row of it (1, ...) where all rows are that one in memory."""
    return memory[:1] if len(memory) > 1 and memory.stride(0) == 0 else memory


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows (B, H, T, X) by each one's matrix (B, H, X, Y), or by one of all (1, H, X, Y), which is
    then read once."""
    if len(rows) == len(matrix):
        return rows @ matrix
    together = rows.transpose(0, 1).flatten(1, 2) @ matrix[0]
    return together.unflatten(1, (len(rows), -1)).transpose(0, 1)


class IdentityLinear(nn.Linear):
    """A linear map without bias that starts as `scale` times the identity."""

    def __init__(self, inputs: int, outputs: int, scale: float = 1.0) -> None:
        super().__init__(inputs, outputs, bias=False)
        with torch.no_grad():
            nn.init.eye_(self.weight).mul_(scale)


class Gate(nn.Module):
    """tanh(gate) * x, with a gate that starts at 0 (arXiv 2204.14198).

    The one number moves GATE_GAIN times as fast as a matrix's, or nothing would be read for long.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return (GATE_GAIN * self.weight.float()).tanh().to(x.dtype) * x


class Adapter(nn.Module):
    """The value encoder and the blocks, for a language model of shape `lm`."""

    def __init__(self, config: CrossAttention, lm: LanguageModel) -> None:
        super().__init__()
        self.config = config
        self.layers = list(range(config.every - 1, lm.layers, config.every))
        if not self.layers:
            raise ValueError(f"a block after every {config.every} of {lm.layers} layers is none")
        self.encoder = ValueEncoder(config, lm)
        self.blocks = nn.ModuleList(Block(config, lm) for _ in self.layers)

    @property
    def encoded_shape(self) -> tuple[int, int, int, int]:
        """What is attended to of one token: (L, 2, H, d)."""
        return len(self.layers), 2, self.config.heads, self.config.head_width

    def memory(self, windows: Windows, embedding: nn.Embedding, start: Tensor, time: int) -> Memory:
        """The memory of a training batch, whose texts take `time` positions from `start` (B,)."""
        encoded = self.encode(embedding(windows.tokens), windows.keys, windows.present)
        chosen = windows.index.clamp(min=0)
        rows = encoded[chosen].permute(2, 0, 3, 4, 1, 5, 6).flatten(4, 5)
        at = torch.arange(time, device=start.device)[None, :, None]
        seen = (windows.since[:, None] <= at) & (at < windows.until[:, None])
        seen &= (windows.index >= 0)[:, None]
        visible = seen[..., None] & windows.present[chosen][:, None]
        return Memory(self, rows, visible.flatten(2), start)

    def encode(self, embedded: Tensor, keys: Tensor, present: Tensor) -> Tensor:
        """Windows to what the blocks attend to: (E, L, 2, H, W, d) for L blocks."""
        encoded = self.encoder(embedded, keys.to(embedded.dtype), present)
        return torch.stack([block.project(*encoded) for block in self.blocks], 1)


@dataclass(frozen=True)
class Memory:
    """What B rows may read, ready for each block.

    `encoded` (L, B, 2, H, M, d); `visible` (B, T, M) for T positions, the first of which is
    `start` (B,) in what the language model is given to read.
    """

    adapter: Adapter
    encoded: Tensor
    visible: Tensor
    start: Tensor
    lean: Tensor | None = None
    """(B, M), the logarithms of what tokens weigh; None where all weigh one."""

    @property
    def layers(self) -> list[int]:
        """The language model's layers that a block follows, from 0."""
        return self.adapter.layers

    def read(self, layer: int, x: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, time, D) after the language model's `layer` -> the same with what was read, and
        where the attention went (B, T, M)."""
        number = self.adapter.layers.index(layer)
        places = self.start[:, None] + torch.arange(self.visible.shape[1], device=x.device)
        inside = places < x.shape[1]
        at = places.clamp(max=x.shape[1] - 1)[..., None].expand(-1, -1, x.shape[2])
        here = x.gather(1, at)
        key = key.gather(1, at)
        visible = self.visible & inside[..., None]
        block, memory = self.adapter.blocks[number], self.encoded[number]
        read, attention = block(here, key, memory, visible, self.lean)
        return x.scatter_add(1, at, read - here), attention

    def at(self, start: Tensor) -> Memory:
        """The same memory for one position a row."""
        return replace(self, start=start, visible=self.visible[:, :1])

    def select(self, rows: Tensor) -> Memory:
        """The memory of these rows, which may repeat."""
        return replace(
            self,
            encoded=self.encoded[:, rows],
            visible=self.visible[rows],
            start=self.start[rows],
            lean=None if self.lean is None else self.lean[rows],
        )
