"""Whether systems differ: every pair, tested on the same utterances and corrected."""

import itertools

import numpy as np
import pytest

from mmrag.score import Difference, compare, paired_difference
from mmrag.score.significance import PERMUTATIONS, holm, permutation_p

REFERENCES = ["call anna smith now"] * 12
GOOD, BAD = "call anna smith now", "call hannah smith now"


def heard(wrong: int) -> list[str]:
    return [BAD] * wrong + [GOOD] * (len(REFERENCES) - wrong)


def test_every_pair_is_compared_once_in_the_order_of_the_systems():
    systems = {"plain": heard(12), "knn": heard(2), "both": heard(1)}
    found = compare(REFERENCES, systems, resamples=50)
    assert [(one.a, one.b) for one in found] == [
        ("plain", "knn"),
        ("plain", "both"),
        ("knn", "both"),
    ]
    for one in found:
        assert one.difference == paired_difference(
            REFERENCES, systems[one.a], systems[one.b], resamples=50
        )
    assert compare(REFERENCES, {"plain": heard(3)}) == []


def test_a_difference_in_every_utterance_is_no_accident_and_one_in_one_may_be():
    first, _, last = compare(REFERENCES, {"plain": heard(12), "knn": heard(2), "both": heard(1)})
    assert first.p < 0.01 and first.p_holm < 0.01
    assert last.p == pytest.approx(1.0) and last.p_holm == 1.0


def test_a_system_does_not_differ_from_itself():
    [found] = compare(REFERENCES, {"a": heard(5), "b": heard(5)}, resamples=20)
    assert (found.p, found.p_holm, found.difference) == (1.0, 1.0, Difference(0.0, 0.0, 0.0))


def test_p_is_the_share_of_exchanges_that_differ_as_much():
    differences = np.array([2, 1, 1, -1, 3, 0, 0, 2])
    signs = itertools.product((-1, 1), repeat=len(differences))
    exact = np.mean([abs(np.dot(sign, differences)) >= differences.sum() for sign in signs])
    assert permutation_p(differences) == pytest.approx(exact, abs=0.015)
    assert permutation_p(-differences) == permutation_p(differences)
    assert permutation_p(np.ones(60, int)) == pytest.approx(1 / (PERMUTATIONS + 1))


def test_systems_of_equal_quality_are_called_different_one_time_in_twenty():
    rng = np.random.default_rng(0)
    ps = [permutation_p(rng.integers(-2, 3, 40), seed) for seed in range(200)]
    assert 0.01 <= np.mean(np.array(ps) <= 0.05) <= 0.1


def test_holm_corrects_as_in_a_worked_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2] and holm([]) == []
