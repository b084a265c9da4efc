"""The loss of the next token from states and the output matrix, a chunk of positions at a time.

Logits of a large vocabulary are the largest tensor of a training step: 16,384 positions of 34,004
tokens take 2.2 GB in float32, several times over. Here they live for one chunk: its loss and its
gradients are computed together and the logits are forgotten (as in arXiv 2410.10989, section 3.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def summed_cross_entropy(
    states: Tensor, weight: Tensor, targets: Tensor, chunk: int | None
) -> Tensor:
    """The summed cross-entropy, in nats and float32, of `targets` (N,) under the logits that
    states (N, D) and the output matrix `weight` (V, D) make.

    At most `chunk` rows of logits are held at once; None for all N. Products are made in autocast's
    format where that is on, else in that of the weights; softmax and sums in float32.
    """
    device = states.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        states, weight = states.to(dtype), weight.to(dtype)
    with torch.autocast(device, enabled=False):
        learns = torch.is_grad_enabled()
        return _Chunked.apply(states, weight, targets, chunk or max(len(states), 1), learns)


class _Chunked(torch.autograd.Function):
    """Loss and gradients in one pass: what a chunk's gradients need is gone after it."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, chunk: int, learns: bool
    ) -> Tensor:
        to_states, to_weight = (learns and needed for needed in ctx.needs_input_grad[:2])
        loss = torch.zeros((), device=states.device)
        state_gradient = torch.empty_like(states) if to_states else None
        weight_gradient = None
        for start in range(0, len(states), chunk):
            rows = slice(start, start + chunk)
            here = states[rows]
            lost, gradient = _loss_of(here, weight, targets[rows, None], to_states or to_weight)
            loss += lost
            if to_states:
                torch.mm(gradient, weight, out=state_gradient[rows])
            if to_weight:
                weight_gradient = _added(weight_gradient, gradient.t() @ here, chunk < len(states))
            del gradient  # before the next chunk's logits
        if to_weight and weight_gradient is None:
            weight_gradient = torch.zeros_like(weight)
        ctx.save_for_backward(
            state_gradient, None if weight_gradient is None else weight_gradient.to(weight.dtype)
        )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (one if one is None else _scaled(one, scale) for one in ctx.saved_tensors)
        return *scaled, None, None, None


def _loss_of(
    states: Tensor, weight: Tensor, targets: Tensor, learns: bool
) -> tuple[Tensor, Tensor | None]:
    """The summed loss of `targets` (N, 1), and the gradient of their logits (N, V)."""
    logits = (states @ weight.t()).float()
    normaliser = logits.logsumexp(-1, keepdim=True)
    loss = (normaliser - logits.gather(1, targets)).sum()
    if not learns:
        return loss, None
    gradient = logits.sub_(normaliser).exp_()
    gradient.scatter_add_(1, targets, -torch.ones_like(normaliser))
    return loss, gradient.to(states.dtype)


def _added(total: Tensor | None, part: Tensor, more: bool) -> Tensor:
    """A running sum, in float32 where `more` than one part is added: many small parts would be
    rounded away in bfloat16."""
    if total is None:
        return part.float() if more else part
    return total.add_(part)


def _scaled(gradient: Tensor, scale: Tensor) -> Tensor:
    """Multiplied in float32: a scale that is rounded to bfloat16 first is another learning rate."""
    return gradient.to(torch.float32, copy=True).mul_(scale).to(gradient.dtype)
