"""The pieces of a Llama-family decoder: RMSNorm, rotary positions, cached attention, SwiGLU.

Weights are initialised inside the constructor of the layer that owns them, because ZeRO-3
partitions a layer as soon as it is built and later writes are lost.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmrag.config import LanguageModel
from mmrag.model.cross_entropy import summed_cross_entropy
from mmrag.model.pages import ReadPlan, StepPlan, attend_causally, attend_step, write

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


class Projection(Linear):
    """The output matrix: states (N, D) to logits (N, V), or to the loss of what came next.

    The loss is this layer's own, for under ZeRO-3 its matrix is whole while it is called, and not
    a moment longer.
    """

    def forward(
        self, states: Tensor, targets: Tensor | None = None, chunk: int | None = None
    ) -> Tensor:
        """With `targets` (N,), their summed cross-entropy, as in `summed_cross_entropy`."""
        if targets is None:
            return super().forward(states)
        return summed_cross_entropy(states, self.weight, targets, chunk)


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


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads."""

    def __init__(self, config: LanguageModel) -> None:
        super().__init__()
        self.width = config.head_width or config.width // config.heads
        self.heads, self.kv_heads = config.heads, config.kv_heads
        inner, kv_inner = config.heads * self.width, config.kv_heads * self.width
        self.q = Linear(config.width, inner, bias=config.qkv_bias)
        self.k = Linear(config.width, kv_inner, bias=config.qkv_bias)
        self.v = Linear(config.width, kv_inner, bias=config.qkv_bias)
        self.out = Linear(inner, config.width, std=INIT_STD / (2 * config.layers) ** 0.5)
        self.qkv: nn.Module | None = None
        """One map in place of `q`, `k` and `v`, where the weights were prepared for decoding."""

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        pages: tuple[Tensor, Tensor] | None,
        plan: ReadPlan | None,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D); with a plan, beside what its rows have in a layer's `pages`."""
        q, k, v = self._rotated(x, angles)
        mixed = attend_causally(q, k, v, pages, plan)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def packed(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        pages: tuple[Tensor, Tensor],
        plan: ReadPlan,
    ) -> Tensor:
        """`forward` without the padding: x (M, D) -> (M, D); `angles` are of (M, 1, width)."""
        q, k, v = (one.unflatten(-1, (-1, self.width)) for one in self._projected(x))
        q, k = rotate(q, *angles), rotate(k, *angles)
        q, k, v = (plan.padded(one).transpose(1, 2) for one in (q, k, v))
        mixed = attend_causally(q, k, v, pages, plan)
        return self.out(plan.packed(mixed.transpose(1, 2).flatten(2)))

    def step(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        pages: tuple[Tensor, Tensor],
        plan: StepPlan,
    ) -> Tensor:
        """`forward` for one token a row: x (R, D) -> (R, D); `angles` are of (R, 1, width)."""
        q, k, v = (one.unflatten(-1, (-1, self.width)) for one in self._projected(x))
        write(pages, plan.written, rotate(k, *angles), v)
        return self.out(attend_step(pages, rotate(q, *angles), plan).flatten(1))

    def weights(self, x: Tensor, angles: tuple[Tensor, Tensor], last: int) -> Tensor:
        """Where the `last` positions of x (B, T, D) look: (B, H, last, T) float32, rows sum to 1.

        `forward` never holds them, which is why it is fast; these are what it computes without a
        cache.
        """
        q, k, _ = self._rotated(x, angles)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = q[:, :, -last:] @ k.transpose(2, 3) / self.width**0.5
        time = x.shape[1]
        seen = torch.ones(last, time, dtype=torch.bool, device=x.device).tril(time - last)
        return scores.float().masked_fill(~seen, -torch.inf).softmax(-1)

    def _rotated(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, width), keys and values (B, KV, T, width), the first two turned by
        their positions."""
        q, k, v = (
            one.unflatten(-1, (-1, self.width)).transpose(1, 2) for one in self._projected(x)
        )
        return rotate(q, *angles), rotate(k, *angles), v

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of x, heads side by side."""
        if self.qkv is None:
            return self.q(x), self.k(x), self.v(x)
        sizes = [heads * self.width for heads in (self.heads, self.kv_heads, self.kv_heads)]
        return self.qkv(x).split(sizes, -1)


class SwiGLU(nn.Module):
    """The feed-forward layer: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, width: int, inner: int, std: float) -> None:
        """`std` is that of the projection back to `width`."""
        super().__init__()
        self.gate = Linear(width, inner)
        self.up = Linear(width, inner)
        self.down = Linear(inner, width, std=std)
        self.gate_up: nn.Module | None = None
        """One map in place of `gate` and `up`, where the weights were prepared for decoding."""

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_up is None:
            gate, up = self.gate(x), self.up(x)
        else:
            gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(functional.silu(gate) * up)
