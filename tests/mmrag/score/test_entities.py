"""Entities found, made up, and what their words cost."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrag.score import (
    Detection,
    ErrorRate,
    detect_entities,
    entity_recall,
    score_entities,
    word_error_rate,
)

WORDS = st.lists(st.sampled_from(["call", "anna", "smith", "now"]), max_size=7).map(" ".join)
NAMES = st.lists(st.sampled_from(["anna", "anna smith", "smith now"]), max_size=3)
UTTERANCES = st.lists(st.tuples(WORDS, WORDS, NAMES), min_size=1, max_size=5).filter(
    lambda utterances: any(reference for reference, _, _ in utterances)
)


def counts(rate: ErrorRate) -> tuple[int, int, int, int]:
    return rate.substitutions, rate.deletions, rate.insertions, rate.reference


@pytest.mark.parametrize(
    ("own", "listed", "reference", "hypothesis", "found", "false_alarms"),
    [
        (["Anna Smith"], [], "call anna smith", "call anna smith", 1, 0),
        (["Anna Smith"], ["Hannah Smith"], "call anna smith", "call hannah smith", 0, 1),
        (["Anna Smith"], ["Hannah Smith"], "call anna smith", "call hannah jane smith", 0, 0),
        (["Anna Smith"], ["Bob"], "call anna smith", "call anna smith and bob!", 1, 1),
        (["Anna Smith"], ["Bob"], "call anna smith", "call anna smith bob bob", 1, 2),
        (["Anna Smith"], ["Bob"], "call anna smith", "call anna smith bobby", 1, 0),
        # Its own entity once more than it was said.
        (["anna"], [], "call anna", "call anna anna", 1, 1),
        (["anna", "anna"], [], "call anna or anna", "call anna anna", 2, 0),
        # Said, though not marked as an entity, or part of one: no false alarm.
        (["Anna Smith"], ["Anna"], "call anna smith", "call anna smith", 1, 0),
        ([], ["May"], "it may rain", "it may rain", 0, 0),
        ([], ["May"], "it might rain", "it may rain", 0, 1),
        (["Anna Smith"], ["Bob"], "call anna smith", "", 0, 0),
        (["O’Brien"], ["O'Brien"], "ask O'Brien", "ask o'brien", 1, 0),
    ],
)
def test_false_alarms_are_candidates_that_nobody_said(
    own, listed, reference, hypothesis, found, false_alarms
):
    detected = detect_entities([reference], [hypothesis], [own], [listed])
    assert detected == Detection(found, len(own), false_alarms)


def test_without_lists_the_entities_of_all_utterances_are_candidates():
    references, texts = ["call anna", "call bob", "call me"], ["call bob", "call bob", "call anna"]
    own = [["anna"], ["bob"], []]
    assert detect_entities(references, texts, own) == Detection(1, 2, 2)
    assert detect_entities(references, texts, own, [[], [], []]) == Detection(1, 2, 0)


def test_precision_and_f1_are_made_of_the_counts():
    detected = Detection(found=6, total=8, false_alarms=2)
    assert (detected.recall, detected.precision) == (6 / 8, 6 / 8)
    assert Detection(3, 4, 0).f1 == pytest.approx(2 * (1.0 * 0.75) / (1.0 + 0.75))
    assert Detection(0, 4, 0).precision is None and Detection(0, 4, 0).f1 == 0.0
    assert Detection(0, 0, 1).recall is None and Detection(0, 0, 1).precision == 0.0
    assert Detection(0, 0, 0).f1 is None


@given(UTTERANCES)
@settings(deadline=None)
def test_a_perfect_transcript_has_no_false_alarm(utterances):
    references, _, own = map(list, zip(*utterances, strict=True))
    said = [[name for name in names if f" {name} " in f" {text} "] for text, _, names in utterances]
    assert detect_entities(references, references, said, own).false_alarms == 0
    assert detect_entities(references, references, said).false_alarms == 0


@given(UTTERANCES)
@settings(deadline=None)
def test_what_is_found_is_what_entity_recall_finds(utterances):
    references, hypotheses, own = map(list, zip(*utterances, strict=True))
    recalled = entity_recall(own, hypotheses)
    detected = detect_entities(references, hypotheses, own)
    assert (detected.found, detected.total) == (recalled.found, recalled.total)


@pytest.mark.parametrize(
    ("own", "reference", "hypothesis", "entity", "other"),
    [
        (["Anna Smith"], "Call Anna Smith now.", "call anna smith now", (0, 0, 0, 2), (0, 0, 0, 2)),
        (["Anna Smith"], "call anna smith now", "call hannah now", (1, 1, 0, 2), (0, 0, 0, 2)),
        (["Anna Smith"], "call anna smith now", "hall anna smith", (0, 0, 0, 2), (1, 1, 0, 2)),
        # A word of an entity elsewhere in the sentence is no entity's.
        (["Anna Smith"], "a smith and anna smith", "a and anna smith", (0, 0, 0, 2), (0, 1, 0, 3)),
        # An inserted one is.
        (["Anna Smith"], "call anna smith", "smith call anna smith", (0, 0, 1, 2), (0, 0, 0, 1)),
        (["Anna Smith"], "call anna smith", "call anna jane smith", (0, 0, 0, 2), (0, 0, 1, 1)),
        (["anna", "anna smith"], "anna smith", "", (0, 2, 0, 2), (0, 0, 0, 0)),
        (["anna"], "anna or anna", "anna or", (0, 1, 0, 2), (0, 0, 0, 1)),
        (["Bob"], "call anna smith", "call anna", (0, 0, 0, 0), (0, 1, 0, 3)),
        ([], "call anna smith", "call anna", (0, 0, 0, 0), (0, 1, 0, 3)),
    ],
)
def test_errors_belong_to_the_words_of_entities_or_to_the_others(
    own, reference, hypothesis, entity, other
):
    scored = score_entities([reference], [hypothesis], [own], resamples=5)
    assert counts(scored.entity_words) == entity
    assert counts(scored.other_words) == other
    assert (scored.entity_words.rate is None) == (entity[3] == 0)


@given(UTTERANCES)
@settings(deadline=None)
def test_entity_words_and_other_words_add_up_to_the_word_error_rate(utterances):
    references, hypotheses, own = map(list, zip(*utterances, strict=True))
    scored = score_entities(references, hypotheses, own, resamples=5)
    parts = map(counts, (scored.entity_words, scored.other_words))
    assert tuple(map(sum, zip(*parts, strict=True))) == counts(
        word_error_rate(references, hypotheses, 5)
    )


def test_a_row_says_everything_or_where_there_is_no_entity_nothing():
    full = score_entities(["call anna"], ["call hannah"], [["anna"]], [["hannah"]], 5).row
    assert full["entities"] == 1 and full["entity_recall"] == full["entity_precision"] == 0.0
    assert (full["entity_wer"], full["other_wer"]) == (1.0, 0.0)
    assert (full["entity_substitutions"], full["entity_words"], full["other_words"]) == (1, 1, 1)
    none = score_entities(["call anna"], ["call anna"], [[]], None, 5).row
    assert none.keys() == full.keys() and set(none.values()) == {None}


def test_lists_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 lists of candidates but 1 hypotheses"):
        detect_entities(["a"], ["a"], [["a"]], [[], []])
    with pytest.raises(ValueError, match="2 references but 1 hypotheses"):
        detect_entities(["a", "b"], ["a"], [["a"]])
    with pytest.raises(ValueError, match="without a letter or digit"):
        detect_entities(["a"], ["a"], [["a"]], [["?"]])
    with pytest.raises(ValueError, match="without a letter or digit"):
        score_entities(["a"], ["a"], [["?"]])
