"""The operations of training, against those that torch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmrag.config import LanguageModel
from mmrag.model.flops import PEAK_FLOPS, matrix_parameters, training_flops
from mmrag.model.lm import LM

SHAPES = {
    "plain": LanguageModel(width=64, layers=2, heads=4, kv_heads=4, feed_forward=96, tied=True),
    "grouped": LanguageModel(
        width=64, layers=3, heads=4, kv_heads=2, feed_forward=160, tied=False, head_width=32
    ),
}
VOCABULARY, ROWS, CONTEXT = 200, 3, 8


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_training_pass_costs_what_torch_counts_but_half_of_the_attention(shape):
    """Torch counts every pair of positions, of which a causal model needs half, and a backward
    pass of attention at 5/2, because the scores are computed again there."""
    torch.manual_seed(0)
    lm = LM(shape, VOCABULARY)
    ids = torch.randint(VOCABULARY, (ROWS, CONTEXT))
    with FlopCounterMode(display=False) as counter:
        lm(ids).logits.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    matrices = sum(count for op, count in counts.items() if "attention" not in str(op))
    tokens = ROWS * CONTEXT
    expected = 6 * tokens * (matrix_parameters(shape) + shape.width * VOCABULARY)
    assert matrices == expected
    head = shape.head_width or shape.width // shape.heads
    pairs = ROWS * CONTEXT * (CONTEXT + 1) / 2
    assert training_flops(shape, VOCABULARY, tokens, CONTEXT) == pytest.approx(
        expected + 12 * shape.layers * shape.heads * head * pairs
    )


def test_logits_that_nobody_asks_for_cost_nothing():
    shape = SHAPES["plain"]
    whole = training_flops(shape, VOCABULARY, 100, CONTEXT)
    assert training_flops(shape, VOCABULARY, 100, CONTEXT, targets=100) == whole
    saved = whole - training_flops(shape, VOCABULARY, 100, CONTEXT, targets=40)
    assert saved == pytest.approx(6 * 60 * shape.width * VOCABULARY)


def test_the_big_model_costs_about_six_operations_a_parameter_and_token():
    shape = LanguageModel(
        width=4096, layers=32, heads=32, kv_heads=32, feed_forward=11008, tied=False
    )
    assert training_flops(shape, 34_004, 1, 512) / 6 == pytest.approx(6.66e9, rel=0.01)


def test_peaks_are_dense_figures_of_tensor_cores():
    assert all(1e13 < peak < 3e15 for peak in PEAK_FLOPS.values())
    assert PEAK_FLOPS["NVIDIA H100 80GB HBM3"] / PEAK_FLOPS["NVIDIA A100-SXM4-80GB"] == (
        pytest.approx(3.17, rel=0.01)
    )
