import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrag.config import LanguageModel
from mmrag.model.layers import INIT_STD, Attention, Linear, RMSNorm, SwiGLU, rotary, rotate
from mmrag.model.lm import Block


def shape(**changes):
    fields = {
        "width": 16,
        "layers": 2,
        "heads": 4,
        "kv_heads": 4,
        "feed_forward": 24,
        "tied": False,
    }
    return LanguageModel(**{**fields, **changes})


def draw(*sizes, seed=0):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def attention_of(config, seed=0):
    """Attention with weights large enough for every one of them to matter."""
    torch.manual_seed(seed)
    layer = Attention(config)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2)
    return layer


def places(rows, time):
    return torch.arange(time).expand(rows, time)


def attend(layer, x):
    positions = places(len(x), x.shape[1])
    return layer(x, rotary(positions, layer.width, 100.0), None, None)


def test_rms_norm_divides_by_the_root_mean_square():
    x, norm = draw(2, 3, 4), RMSNorm(4, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, -1.0, 0.5]))
    for row in x.flatten(0, 1):
        expected = row / math.sqrt(sum(v * v for v in row.tolist()) / 4 + 1e-5) * norm.weight
        torch.testing.assert_close(norm(row), expected)


def test_rms_norm_computes_in_float32_and_answers_in_the_dtype_it_was_asked():
    x, norm = draw(2, 64).bfloat16(), RMSNorm(64, eps=1e-5)
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), norm(x.float()).bfloat16())
    huge = torch.full((1, 64), 60000.0, dtype=torch.float16)
    torch.testing.assert_close(norm(huge), torch.ones(1, 64, dtype=torch.float16))


def test_rotation_turns_each_half_split_pair_as_a_complex_number():
    x, positions = draw(2, 3, 5, 8), torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
    turned = rotate(x, *rotary(positions, 8, theta=50.0))
    frequencies = torch.tensor([50.0 ** (-2 * pair / 8) for pair in range(4)])
    angles = positions[:, None, :, None] * frequencies
    expected = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(turned, torch.cat((expected.real, expected.imag), -1))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3000), st.integers(0, 3000), st.integers(0, 1000))
def test_after_rotation_a_product_depends_on_the_distance_alone(first, second, moved):
    query, key = draw(1, 1, 1, 16, seed=1), draw(1, 1, 1, 16, seed=2)

    def product(here, there):
        here, there = torch.tensor([[here]]), torch.tensor([[there]])
        return (rotate(query, *rotary(here, 16, 1e4)) * rotate(key, *rotary(there, 16, 1e4))).sum()

    near, far = product(first, second), product(first + moved, second + moved)
    torch.testing.assert_close(near, far, atol=5e-3, rtol=0)


def test_attention_is_the_weighted_mean_of_earlier_values():
    layer, x = attention_of(shape(kv_heads=2, qkv_bias=True)), draw(1, 5, 16)
    cos, sin = rotary(places(1, 5), 4, 100.0)
    q, k, v = (project(x).view(5, -1, 4).transpose(0, 1) for project in (layer.q, layer.k, layer.v))
    q, k = rotate(q[None], cos, sin)[0], rotate(k[None], cos, sin)[0]
    mixed = torch.zeros(5, 4, 4)
    for head in range(4):
        group = head // 2  # two query heads share a key/value head
        for time in range(5):
            scores = k[group, : time + 1] @ q[head, time] / 2
            mixed[time, head] = scores.softmax(0) @ v[group, : time + 1]
    torch.testing.assert_close(attend(layer, x)[0], layer.out(mixed.flatten(1)))


def test_grouped_heads_are_full_heads_whose_keys_and_values_repeat():
    grouped, full = attention_of(shape(kv_heads=2)), attention_of(shape())
    with torch.no_grad():
        for name in ("k", "v"):
            repeated = getattr(grouped, name).weight.view(2, 4, 16).repeat_interleave(2, 0)
            getattr(full, name).weight.copy_(repeated.view(16, 16))
        full.q.weight.copy_(grouped.q.weight)
        full.out.weight.copy_(grouped.out.weight)
    x = draw(2, 6, 16)
    torch.testing.assert_close(attend(grouped, x), attend(full, x))


def test_no_position_sees_a_later_one():
    layer, x = attention_of(shape()), draw(1, 6, 16)
    changed = x.clone()
    changed[0, 4:] += 1
    before, after = attend(layer, x), attend(layer, changed)
    assert torch.equal(before[0, :4], after[0, :4])
    assert (before[0, 4:] != after[0, 4:]).any(-1).all()


def test_a_head_may_be_wider_than_its_share():
    layer = attention_of(shape(head_width=6))
    assert layer.q.weight.shape == (24, 16)
    assert attend(layer, draw(2, 3, 16)).shape == (2, 3, 16)


def test_swiglu_gates_one_projection_with_another():
    torch.manual_seed(0)
    layer, x = SwiGLU(16, 24, std=0.1), draw(2, 3, 16)
    gate, up, down = (linear.weight for linear in (layer.gate, layer.up, layer.down))
    gated = x @ gate.T
    expected = (gated * gated.sigmoid() * (x @ up.T)) @ down.T
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("layers", [1, 8])
def test_what_is_added_to_the_stream_starts_smaller_in_a_deeper_model(layers):
    torch.manual_seed(0)
    config = shape(width=128, feed_forward=256, layers=layers, qkv_bias=True)
    attention, feed_forward = Attention(config), Block(config).feed_forward
    residual = INIT_STD / math.sqrt(2 * layers)
    for linear, std in (
        (attention.q, INIT_STD),
        (feed_forward.up, INIT_STD),
        (attention.out, residual),
        (feed_forward.down, residual),
    ):
        assert linear.weight.std().item() == pytest.approx(std, rel=0.05)
    assert not attention.q.bias.any()
    assert Linear(2, 2).bias is None
