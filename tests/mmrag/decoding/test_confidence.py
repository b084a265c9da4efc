import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrag.decoding.confidence import (
    COST_OF_DOUBT,
    FILE,
    Calibration,
    Judged,
    expected_calibration_error,
    fit,
    marked,
    reliability,
)
from mmrag.records import Word


def of(probabilities, letters=5):
    """Words of so many letters, as likely as that."""
    return [Word("x" * letters, float(each), 0.5) for each in probabilities]


def transcripts(count, mean, spread, error_rate, seed):
    """Transcripts of six words whose log-odds are drawn around `mean`, right as often as a model
    that is too sure of itself by two would have it."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        odds = draw.normal(mean, spread, 6)
        correct = draw.random(6) < 1 / (1 + np.exp(2 - odds))
        words = of(1 / (1 + np.exp(-odds)), draw.integers(1, 10))
        made.append(Judged(words, correct.tolist(), error_rate))
    return made


@pytest.fixture(scope="module")
def calibration():
    sets = {
        "known": transcripts(400, 5, 1, 0.05, seed=0),
        "strange": transcripts(400, 1, 1, 0.9, seed=1),
    }
    return fit(sets)


def pooled(calibration, judged):
    return (
        np.concatenate([calibration.words(one.words) for one in judged]),
        np.concatenate([np.array(one.correct, float) for one in judged]),
    )


def test_it_is_as_often_right_as_it_is_sure(calibration):
    for mean, rate in ((5, 0.05), (1, 0.9)):
        fresh = transcripts(400, mean, 1, rate, seed=mean + 10)
        sure, right = pooled(calibration, fresh)
        raw = np.array([word.probability for one in fresh for word in one.words])
        assert expected_calibration_error(sure, right) < 0.04
        if mean == 1:
            assert expected_calibration_error(raw, right) > 0.2, "what it mends"
    assert calibration.fitted_on == {"known": 400, "strange": 400}


def test_bad_transcripts_are_marked_and_good_ones_are_not(calibration):
    bad, _ = marked(calibration, transcripts(200, 1, 1, 0.9, seed=20))
    _, good = marked(calibration, transcripts(200, 5, 1, 0.0, seed=21))
    assert bad > 0.95 and good < 0.05
    assert all(math.isnan(share) for share in marked(calibration, []))
    wordless = [Judged([], [], 1.0)]
    assert all(math.isnan(share) for share in marked(calibration, wordless))


def test_a_good_one_that_is_marked_costs_as_much_as_two_bad_ones_that_are_not():
    good, bad = transcripts(60, 3, 1.5, 0.05, seed=3), transcripts(60, 2, 1.5, 0.9, seed=4)
    calibration = fit({"good": good, "bad": bad})
    sure, unsure = (
        np.array([calibration.segment(one.words) for one in each]) for each in (good, bad)
    )

    def cost(threshold):
        return (unsure >= threshold).mean() + COST_OF_DOUBT * (sure < threshold).mean()

    found, doubted = marked(calibration, [*good, *bad])
    assert cost(calibration.unclear) == pytest.approx(1 - found + COST_OF_DOUBT * doubted)
    others = np.concatenate([sure, unsure]) + 1e-9
    assert cost(calibration.unclear) == pytest.approx(min(map(cost, others)))
    assert cost(calibration.unclear) > 0.3, "they do overlap"


def test_sets_weigh_the_same_however_large_they_are():
    small, large = transcripts(50, 3, 1, 0.3, seed=2), transcripts(50, 1, 2, 0.9, seed=3)
    once = fit({"a": small, "b": large})
    twice = fit({"a": small, "b": large * 7})
    numbers = [(one.bias, one.own, one.mean, one.letters) for one in (once, twice)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.02, abs=0.02)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_confidences_are_probabilities_and_a_segments_is_their_mean(probabilities):
    calibration = Calibration(-3.0, 0.5, 1.5, 0.5)
    each = calibration.words(of(probabilities))
    assert ((each >= 0) & (each <= 1)).all()
    assert calibration.segment(of(probabilities)) == pytest.approx(each.mean())
    order = np.argsort(probabilities)
    assert (np.diff(each[order]) >= 0).all(), "a likelier word is surer in its segment"


def test_short_words_are_less_sure_where_they_were_wrong_more_often():
    draw = np.random.default_rng(5)
    sets = {
        "some": [
            Judged(of([0.5, 0.9], letters), (draw.random(2) < letters / 10).tolist(), 0.5)
            for letters in draw.integers(1, 10, 800).tolist()
        ]
    }
    calibration = fit(sets)
    short, long = (calibration.words(of([0.7], letters))[0] for letters in (2, 8))
    assert short == pytest.approx(0.2, abs=0.1) and long == pytest.approx(0.8, abs=0.1)


def test_a_calibration_of_before_does_without_lengths(tmp_path, calibration):
    calibration.save(tmp_path)
    values = json.loads((tmp_path / FILE).read_text())
    del values["letters"]
    (tmp_path / FILE).write_text(json.dumps(values))
    before = Calibration.read(tmp_path)
    assert before.words(of([0.7], 2)) == before.words(of([0.7], 9))


def test_a_segment_without_words_has_no_confidence():
    calibration = Calibration(0, 1, 1, 0.5)
    assert calibration.segment([]) == 0 and len(calibration.words([])) == 0


def test_the_reliability_table_counts_every_word_in_its_bin():
    sure, right = np.array([0.0, 0.05, 0.55, 0.95, 1.0]), np.array([0.0, 1.0, 1.0, 1.0, 1.0])
    table = reliability(sure, right)
    assert [count for count, _, _ in table] == [2, 0, 0, 0, 0, 1, 0, 0, 0, 2]
    assert table[0] == (2, 0.025, 0.5) and table[9] == (2, 0.975, 1.0)
    expected = (2 * 0.475 + 0.45 + 2 * 0.025) / 5
    assert expected_calibration_error(sure, right) == pytest.approx(expected)


def test_it_needs_words_that_are_right_and_words_that_are_wrong():
    for sets in ({}, {"a": [Judged(of([0.9]), [True], 0.0)]}, {"a": [Judged([], [], 1.0)]}):
        with pytest.raises(ValueError, match="words that are right and words that are wrong"):
            fit(sets)


def test_it_is_saved_as_it_is(tmp_path, calibration):
    calibration.save(tmp_path)
    assert Calibration.read(tmp_path) == calibration
