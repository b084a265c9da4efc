import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrag.retrieval.knn import (
    best_neighbour,
    gate,
    knn_logp,
    mix,
    mix_votes,
    settled,
    unsure,
    votes_logp,
)

VOCABULARY = 7


@st.composite
def found(draw):
    """Distances (B, K), some of them missing or enormous, and tokens (B, K)."""
    rows, k = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    distance = st.floats(-100, 100, width=32) | st.sampled_from([math.inf, 1e30, 3e38, -3e38])
    distances = draw(st.lists(distance, min_size=rows * k, max_size=rows * k))
    tokens = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=rows * k, max_size=rows * k))
    return torch.tensor(distances).view(rows, k), torch.tensor(tokens).view(rows, k)


def lm_like(distances, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(distances), VOCABULARY, generator=generator).log_softmax(1)


def by_hand(distances, tokens, temperature):
    """Equation 2 one neighbour at a time, in float64."""
    result = torch.zeros(len(distances), VOCABULARY, dtype=torch.float64)
    for row in range(len(distances)):
        weights = (-distances[row].double() / temperature).softmax(0)
        for weight, token in zip(weights, tokens[row], strict=True):
            result[row, token] += weight
    return result.log().float()


def test_neighbours_of_one_token_add_up_as_in_the_paper():
    distances = torch.tensor([[1.0, 2.0, 2.5, 9.0], [0.5, 0.5, 0.5, 0.5]])
    tokens = torch.tensor([[3, 1, 3, 0], [2, 2, 2, 5]])
    got = knn_logp(distances, tokens, 0.7, VOCABULARY)
    torch.testing.assert_close(got, by_hand(distances, tokens, 0.7))
    assert got[1].exp().tolist() == pytest.approx([0, 0, 0.75, 0, 0, 0.25, 0])


def test_a_token_of_tiny_probability_keeps_its_logarithm():
    got = knn_logp(torch.tensor([[0.0, 500.0, 500.0]]), torch.tensor([[1, 2, 2]]), 1.0, VOCABULARY)
    assert got[0, 2].item() == pytest.approx(math.log(2) - 500)


@settings(max_examples=100, deadline=None)
@given(found(), st.floats(1e-3, 1e3))
def test_probabilities_sum_to_one_unless_nothing_was_found(neighbours, temperature):
    distances, tokens = neighbours
    got = knn_logp(distances, tokens, temperature, VOCABULARY)
    assert not got.isnan().any()
    expected = distances.isfinite().any(1).float()
    torch.testing.assert_close(got.exp().sum(1), expected)


@settings(max_examples=50, deadline=None)
@given(found(), st.randoms(use_true_random=False))
def test_the_order_of_neighbours_does_not_matter(neighbours, random):
    distances, tokens = neighbours
    order = list(range(distances.shape[1]))
    random.shuffle(order)
    torch.testing.assert_close(
        knn_logp(distances[:, order], tokens[:, order], 2.0, VOCABULARY),
        knn_logp(distances, tokens, 2.0, VOCABULARY),
    )


@settings(max_examples=50, deadline=None)
@given(found())
def test_weight_zero_is_the_language_model_bit_for_bit(neighbours):
    distances, tokens = neighbours
    lm = lm_like(distances)
    knn = knn_logp(distances, tokens, 1.0, VOCABULARY)
    assert torch.equal(mix(lm, knn, 0.0), lm)
    assert torch.equal(mix(lm, knn, torch.zeros(len(lm))), lm)


@settings(max_examples=50, deadline=None)
@given(found(), st.floats(0, 1))
def test_a_mixture_is_normalised_and_each_row_keeps_its_own_weight(neighbours, weight):
    distances, tokens = neighbours
    lm, knn = lm_like(distances), knn_logp(distances, tokens, 1.0, VOCABULARY)
    mixed = mix(lm, knn, weight)
    torch.testing.assert_close(mixed.exp().sum(1), torch.ones(len(lm)))
    weights = torch.full((len(lm),), weight)
    weights[0] = 0.0
    by_row = mix(lm, knn, weights)
    assert torch.equal(by_row[0], lm[0])
    torch.testing.assert_close(by_row[1:], mixed[1:])


def test_mixing_is_the_weighted_mean_of_probabilities():
    lm = torch.tensor([[0.5, 0.3, 0.2]]).log()
    knn = torch.tensor([[0.0, 1.0, 0.0]]).log()
    assert mix(lm, knn, 0.4).exp()[0].tolist() == pytest.approx([0.3, 0.58, 0.12])


@settings(max_examples=200, deadline=None)
@given(found(), st.sampled_from([0.0, 0.3, 1.0]), st.floats(1e-2, 1e2), st.booleans())
def test_mixing_at_the_neighbours_tokens_is_mixing_everywhere(found, weight, temperature, masked):
    distances, tokens = found
    lm = lm_like(distances)
    lm[:, 2] = -math.inf if masked else lm[:, 2]
    weights = torch.full((len(lm),), weight)
    weights[0] = 0.5
    expected = mix(lm, knn_logp(distances, tokens, temperature, VOCABULARY), weights)
    weights = torch.where(distances.isfinite().any(1), weights, 0.0)
    temperatures = np.full(len(lm), temperature, np.float32)
    votes = torch.from_numpy(votes_logp(distances.numpy(), tokens.numpy(), temperatures))
    got = mix_votes(lm, votes, tokens, weights)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-5)
    alone = weights == 0
    assert torch.equal(got[alone], lm[alone])


@settings(max_examples=100, deadline=None)
@given(found(), st.floats(0, 1), st.integers(0, 99), st.floats(0.1, 10))
def test_no_neighbour_changes_a_settled_choice(found, weight, seed, sharpness):
    distances, tokens = found
    lm = (sharpness * lm_like(distances, seed)).log_softmax(1)
    weights = torch.full((len(lm),), weight)
    sure = settled(lm, weights)
    said = knn_logp(distances, tokens, 1.0, VOCABULARY)
    assert torch.equal(mix(lm, said, weight).argmax(1)[sure], lm.argmax(1)[sure])


def test_a_choice_is_settled_where_its_lead_outweighs_the_neighbours():
    lm = torch.tensor([[0.8, 0.15, 0.05], [0.6, 0.35, 0.05]]).log()
    assert settled(lm, torch.full((2,), 0.3)).tolist() == [True, False]
    assert not settled(lm, torch.full((2,), 0.5)).any()


def test_weight_one_is_the_neighbours_alone():
    distances, tokens = torch.tensor([[1.0, 2.0]]), torch.tensor([[1, 2]])
    knn = knn_logp(distances, tokens, 1.0, VOCABULARY)
    torch.testing.assert_close(mix(lm_like(distances), knn, 1.0), knn)


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_without_neighbours_the_language_model_speaks_alone(k, weight):
    distances, tokens = torch.full((2, k), math.inf), torch.zeros(2, k, dtype=torch.int32)
    lm = lm_like(distances)
    knn = knn_logp(distances, tokens, 1.0, VOCABULARY)
    assert (knn == -math.inf).all()
    assert torch.equal(mix(lm, knn, weight), lm)
    assert not gate(distances, None).any()
    assert best_neighbour(distances, tokens, torch.zeros(2, dtype=torch.long)).tolist() == [-1, -1]


def test_the_gate_hears_only_near_neighbours():
    distances = torch.tensor([[1.0, 5.0], [3.0, 4.0], [math.inf, math.inf]])
    assert gate(distances, 2.0).tolist() == [True, False, False]
    assert gate(distances, 3.0).tolist() == [True, True, False]
    assert gate(distances, None).tolist() == [True, True, False]


def test_a_certain_model_has_nothing_to_ask():
    logp = torch.tensor([[0.6, 0.4], [0.1, 0.9], [0.01, 0.99]]).log()
    assert unsure(logp, 0.8).tolist() == [True, False, False]
    assert unsure(logp, 0.95).tolist() == [True, True, False]
    assert unsure(logp, None).tolist() == [True, True, True]


def test_the_best_neighbour_is_the_nearest_with_the_chosen_token():
    distances = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, math.inf], [3.0, 1.0, 2.0]])
    tokens = torch.tensor([[4, 6, 6], [4, 4, 0], [5, 5, 5]])
    assert best_neighbour(distances, tokens, torch.tensor([6, 0, 5])).tolist() == [1, -1, 1]


def test_a_temperature_or_weight_out_of_range_is_refused():
    lm = torch.zeros(1, VOCABULARY)
    with pytest.raises(ValueError, match="temperature 0"):
        knn_logp(torch.zeros(1, 1), torch.zeros(1, 1), 0.0, VOCABULARY)
    with pytest.raises(ValueError, match=r"weight 1\.5"):
        mix(lm, lm, 1.5)
