"""Whoever runs a stage does not hold what it reads."""

import pytest

from jobs.benchmark import drivers
from jobs.benchmark.driven import STAGES
from jobs.benchmark.drivers import Driver

BOUND = 600
"""Bytes an utterance, of so few; one that is held takes five times that."""


def test_growth_is_by_the_utterance():
    assert Driver("tokenize", (1_000, 3_000), (50_000, 90_000)).bytes_an_utterance == 20


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_whoever_runs_a_stage_holds_no_corpus(stage, tmp_path):
    [found] = drivers.measure(tmp_path, (2_000, 40_000), [stage])
    assert found.bytes_an_utterance < BOUND
