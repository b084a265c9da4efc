"""The pieces of a Llama-family decoder: RMSNorm, rotary positions, cached attention, SwiGLU.

Weights are initialised inside the constructor of the layer that owns them, because ZeRO-3
partitions a layer as soon as it is built and later writes are lost.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmrag.config import LanguageModel

INIT_STD = 0.02


class Linear(nn.Linear):
    """A linear map without bias, initialised from N(0, std²)."""

    def __init__(
        self, inputs: int, outputs: int, std: float = INIT_STD, bias: bool = False
    ) -> None:
        super().__init__(inputs, outputs, bias=bias)
        nn.init.normal_(self.weight, std=std)
        if bias:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """An embedding initialised from N(0, std²)."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__(size, width)
        nn.init.normal_(self.weight, std=INIT_STD)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.float()).to(x.dtype)


def rotary(positions: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, 1, T, width) float32 of `positions` (B, T) (arXiv 2104.09864)."""
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    angles = positions.float()[..., None] / theta**exponents
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each half-split pair of `x` (B, H, T, width) by its position's angles."""
    first, second = x.float().chunk(2, dim=-1)
    turned = x.float() * cos + torch.cat((-second, first), dim=-1) * sin
    return turned.to(x.dtype)


class Cache:
    """Keys and values of the tokens seen so far, for B independent rows.

    Each row has its own length, so rows of different length share a batch without padding masks:
    a row writes at its own next position, and a query attends to positions up to its own. What a
    shorter row's padding wrote is overwritten before any query can reach it.
    """

    def __init__(self, config: LanguageModel, rows: int, capacity: int, like: Tensor) -> None:
        width = config.head_width or config.width // config.heads
        shape = (config.layers, rows, config.kv_heads, capacity, width)
        self.keys = like.new_zeros(shape)
        self.values = like.new_zeros(shape)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=like.device)

    @property
    def capacity(self) -> int:
        """Tokens a row has room for."""
        return self.keys.shape[3]

    def write(
        self, layer: int, positions: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store (B, H, T, width) at `positions` (B, T); return all of the layer's, so far."""
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        self.keys[layer][rows, :, positions] = keys.transpose(1, 2)
        self.values[layer][rows, :, positions] = values.transpose(1, 2)
        end = int(positions.max()) + 1
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def select(self, rows: Tensor) -> Cache:
        """The cache of `rows` (R,), which may repeat: for beams, and to drop finished rows."""
        chosen = object.__new__(Cache)
        chosen.keys = self.keys[:, rows]
        chosen.values = self.values[:, rows]
        chosen.lengths = self.lengths[rows]
        return chosen

    def join(self, other: Cache) -> Cache:
        """The rows of both, with room for what either had room for."""
        both = object.__new__(Cache)
        room = max(self.capacity, other.capacity)
        for name in ("keys", "values"):
            parts = [getattr(cache, name) for cache in (self, other)]
            padded = [functional.pad(part, (0, 0, 0, room - part.shape[3])) for part in parts]
            setattr(both, name, torch.cat(padded, 1))
        both.lengths = torch.cat((self.lengths, other.lengths))
        return both


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads."""

    def __init__(self, config: LanguageModel, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.width = config.head_width or config.width // config.heads
        self.grouped = config.kv_heads != config.heads
        inner, kv_inner = config.heads * self.width, config.kv_heads * self.width
        self.q = Linear(config.width, inner, bias=config.qkv_bias)
        self.k = Linear(config.width, kv_inner, bias=config.qkv_bias)
        self.v = Linear(config.width, kv_inner, bias=config.qkv_bias)
        self.out = Linear(inner, config.width, std=INIT_STD / (2 * config.layers) ** 0.5)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        positions: Tensor,
        cache: Cache | None,
        mask: Tensor | None,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D). `mask` (B, 1, T, seen) is None for plain causal attention."""
        q, k = self._rotated(x, angles)
        v = self.v(x).unflatten(-1, (-1, self.width)).transpose(1, 2)
        if cache is not None:
            seen_k, seen_v = cache.write(self.layer, positions, k, v)
            if mask is not None:
                k, v = seen_k, seen_v
        mixed = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped
        )
        return self.out(mixed.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor, angles: tuple[Tensor, Tensor], last: int) -> Tensor:
        """Where the `last` positions of x (B, T, D) look: (B, H, last, T) float32, rows sum to 1.

        `forward` never holds them, which is why it is fast; these are what it computes without a
        cache.
        """
        q, k = self._rotated(x, angles)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = q[:, :, -last:] @ k.transpose(2, 3) / self.width**0.5
        time = x.shape[1]
        seen = torch.ones(last, time, dtype=torch.bool, device=x.device).tril(time - last)
        return scores.float().masked_fill(~seen, -torch.inf).softmax(-1)

    def _rotated(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries (B, H, T, width) and keys (B, KV, T, width), turned by their positions."""
        q, k = (
            project(x).unflatten(-1, (-1, self.width)).transpose(1, 2)
            for project in (self.q, self.k)
        )
        return rotate(q, *angles), rotate(k, *angles)


class SwiGLU(nn.Module):
    """The feed-forward layer: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, width: int, inner: int, std: float) -> None:
        """`std` is that of the projection back to `width`."""
        super().__init__()
        self.gate = Linear(width, inner)
        self.up = Linear(width, inner)
        self.down = Linear(inner, width, std=std)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))
