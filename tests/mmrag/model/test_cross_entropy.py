"""The loss in chunks is the loss of all logits at once, and never holds them."""

import pytest
import torch
from fake_memory import Live
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from mmrag.model.cross_entropy import summed_cross_entropy

WIDTH, VOCABULARY, SCALE = 16, 50, 0.3


def drawn(rows, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    states = torch.randn(rows, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype).requires_grad_()
    return states, weight, torch.randint(VOCABULARY, (rows,), generator=generator)


def plain(states, weight, targets):
    logits = functional.linear(states, weight).float()
    return functional.cross_entropy(logits, targets, reduction="sum")


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 20), st.none() | st.integers(1, 30))
def test_loss_and_gradients_are_those_of_all_logits_at_once(rows, chunk):
    states, weight, targets = drawn(rows)
    expected, got = plain(states, weight, targets), summed_cross_entropy(*drawn(rows), chunk)
    torch.testing.assert_close(got, expected)
    wanted = torch.autograd.grad(expected * SCALE, (states, weight))
    loss = summed_cross_entropy(states, weight, targets, chunk)
    for one, other in zip(torch.autograd.grad(loss * SCALE, (states, weight)), wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("chunk", [None, 7])
def test_bfloat16_differs_by_rounding_alone(autocast, chunk):
    dtype = torch.float32 if autocast else torch.bfloat16
    states, weight, targets = drawn(60, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = plain(states, weight, targets), summed_cross_entropy(*drawn(60, dtype), chunk)
        torch.testing.assert_close(*losses, rtol=1e-3, atol=0)
        loss = summed_cross_entropy(states, weight, targets, chunk)
    exact = [one.detach().float().requires_grad_() for one in (states, weight)]
    wanted = torch.autograd.grad(plain(*exact, targets) * SCALE, exact)
    for one, other in zip(torch.autograd.grad(loss * SCALE, (states, weight)), wanted, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.float(), other, rtol=0.03, atol=0.03)


def test_what_is_frozen_gets_no_gradient():
    states, weight, targets = drawn(9)
    (gradient,) = torch.autograd.grad(
        summed_cross_entropy(states, weight.detach(), targets, 4), states
    )
    expected = torch.autograd.grad(plain(states, weight, targets), states)[0]
    torch.testing.assert_close(gradient, expected)
    with torch.no_grad():
        assert not summed_cross_entropy(states, weight, targets, 4).requires_grad


def test_the_big_models_logits_are_held_for_a_chunk_alone():
    """16,384 positions: 2.2 GB in float32 all at once, and several times in a backward pass."""
    rows, width, vocabulary, chunk = 16_384, 4096, 34_004, 1024
    held = {}
    for name, loss in (("chunks", summed_cross_entropy), ("at once", plain)):
        with FakeTensorMode():
            states = torch.empty(rows, width, dtype=torch.bfloat16, requires_grad=True)
            weight = torch.empty(vocabulary, width, dtype=torch.bfloat16, requires_grad=True)
            targets = torch.zeros(rows, dtype=torch.long)
            arguments = (chunk,) if name == "chunks" else ()
            with Live() as counted:
                loss(states, weight, targets, *arguments).backward()
            held[name] = counted
    assert held["chunks"].largest == 4 * vocabulary * width, "of the matrix's own gradient"
    assert held["at once"].largest == 4 * rows * vocabulary
    assert held["chunks"].most < 0.3 * held["at once"].most
