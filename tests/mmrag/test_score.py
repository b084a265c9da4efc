"""Error rates are counts divided once; recalls count what was found."""

import jiwer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrag import score
from mmrag.score import Difference, Edit, ErrorRate, Recall
from mmrag.text import normalise

WORDS = st.lists(st.sampled_from(["a", "b", "cd", "it's", "niño"]), max_size=6).map(" ".join)
PAIRS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=12).filter(
    lambda pairs: any(reference for reference, _ in pairs)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello,  WORLD!\n", "hello world"),
        ("It’s John‘s – isn´t it?", "it's john's isn't it"),
        ("'tis the dogs' \"rock 'n' roll\"", "tis the dogs rock n roll"),
        ("well-known and/or", "well known and or"),
        ("El niño comió; ¿qué?", "el niño comió qué"),
        ("nin\u0303o", "niño"),
        ("ﬁne Ｗｉｄｅ №5", "fine wide no5"),
        ("co\u00adoperate\u200b", "cooperate"),
        ("snake_case 50%", "snake case 50"),
        ("aŉb", "a'nb"),
        ("हिन्दी", "हिन्दी"),
        (" '' … ", ""),
    ],
)
def test_normalised_text(text, expected):
    assert normalise(text) == expected


@given(st.text(max_size=40))
def test_normalising_twice_changes_nothing(text):
    once = normalise(text)
    assert normalise(once) == once


@pytest.mark.parametrize(
    ("reference", "heard"),
    [
        ("2 lamps", "two lamps"),
        ("two lamps", "2 Lamps!"),
        ("$5 & 10%", "five dollars and ten percent"),
    ],
)
def test_numbers_count_as_the_words_they_are_spoken_as(reference, heard):
    assert score.word_error_rate([reference], [heard], resamples=1).rate == 0
    assert score.entity_recall([[reference]], [heard]) == Recall(1, 1)
    assert {edit.kind for edit in score.align(reference, heard)} == {"equal"}


def test_an_accent_is_a_difference():
    assert score.word_error_rate(["el año"], ["el ano"], resamples=1).substitutions == 1


def character_error_rate(references, hypotheses, resamples) -> ErrorRate:
    return score.error_rate(score.character_counts(references, hypotheses), resamples, seed=0)


@given(PAIRS)
@settings(deadline=None)
def test_counts_and_rates_are_those_of_jiwer(pairs):
    references, hypotheses = map(list, zip(*pairs, strict=True))
    for ours, theirs in [
        (score.word_error_rate, jiwer.process_words),
        (character_error_rate, jiwer.process_characters),
    ]:
        rate = ours(references, hypotheses, resamples=10)
        expected = theirs(references, hypotheses)
        counted = (rate.substitutions, rate.deletions, rate.insertions)
        assert counted == (expected.substitutions, expected.deletions, expected.insertions)
        assert rate.reference == expected.hits + expected.substitutions + expected.deletions
        assert rate.rate == (expected.wer if ours is score.word_error_rate else expected.cer)


@given(PAIRS, st.integers(1, 4))
@settings(deadline=None)
def test_wer_pooled_over_shards_equals_the_whole(pairs, shards):
    def scored(part: list[tuple[str, str]]) -> ErrorRate:
        return score.word_error_rate(*zip(*part, strict=True), resamples=5)

    parts = [pairs[shard::shards] for shard in range(shards)]
    rates = [scored(part) for part in parts if any(reference for reference, _ in part)]
    unspoken = [part for part in parts if not any(reference for reference, _ in part)]
    errors = sum(rate.substitutions + rate.deletions + rate.insertions for rate in rates)
    errors += sum(len(hypothesis.split()) for part in unspoken for _, hypothesis in part)
    assert scored(pairs).rate == errors / sum(rate.reference for rate in rates)


@given(PAIRS)
@settings(deadline=None)
def test_a_perfect_hypothesis_scores_zero(pairs):
    references = [reference for reference, _ in pairs]
    for measure in (score.word_error_rate, character_error_rate):
        rate = measure(references, [reference.upper() + "!" for reference in references], 20)
        assert (rate.rate, rate.low, rate.high) == (0.0, 0.0, 0.0)


def test_error_rates_are_not_means_of_means():
    rate = score.word_error_rate(["a", "a b c d e f g h i"], ["x", "a b c d e f g h i"])
    assert rate.rate == 1 / 10


def test_an_empty_reference_counts_insertions():
    rate = score.word_error_rate(["", "yes"], ["oh well", "yes"])
    assert (rate.rate, rate.insertions, rate.reference) == (2.0, 2, 1)
    assert np.isfinite([rate.low, rate.high]).all()


def test_nothing_to_score_is_an_error_that_counts():
    with pytest.raises(ValueError, match="no reference words to score against in 2 utterances"):
        score.word_error_rate(["", "?!"], ["a", "b"])
    with pytest.raises(ValueError, match="no reference words"):
        character_error_rate([], [], 5)
    with pytest.raises(ValueError, match="3 references but 2 hypotheses"):
        score.word_error_rate(["a", "b", "c"], ["a", "b"])
    with pytest.raises(TypeError, match="one element an utterance"):
        score.word_error_rate("abc", "abc")


def noisy(seed: int, utterances: int, error: float) -> tuple[list[str], list[str]]:
    """Utterances of ten words, each word wrong with probability `error`."""
    wrong = np.random.default_rng(seed).random((utterances, 10)) < error
    return ["a " * 10] * utterances, [" ".join(np.where(row, "b", "a")) for row in wrong]


def test_the_interval_is_as_wide_as_statistics_says():
    rate = score.word_error_rate(*noisy(seed=0, utterances=400, error=0.2))
    deviation = np.sqrt(rate.rate * (1 - rate.rate) / 4000)
    assert rate.low == pytest.approx(rate.rate - 1.96 * deviation, abs=0.003)
    assert rate.high == pytest.approx(rate.rate + 1.96 * deviation, abs=0.003)


def test_the_interval_covers_the_truth_about_95_times_in_100():
    covered = 0
    for seed in range(200):
        rate = score.word_error_rate(*noisy(seed, utterances=40, error=0.3), 200, seed)
        covered += rate.low <= 0.3 <= rate.high
    assert 0.90 <= covered / 200 <= 0.98


def test_the_same_seed_gives_the_same_interval():
    texts = noisy(seed=0, utterances=30, error=0.2)
    assert score.word_error_rate(*texts, seed=1) == score.word_error_rate(*texts, seed=1)
    assert score.word_error_rate(*texts, seed=1) != score.word_error_rate(*texts, seed=2)


def test_a_paired_difference_sees_what_separate_intervals_hide():
    """b is a with one more word right in every fourth utterance: the pairing shows it."""
    references, a = noisy(seed=0, utterances=200, error=0.5)
    b = [text if i % 4 else text.replace("b", "a", 1) for i, text in enumerate(a)]
    difference = score.paired_difference(references, a, b)
    rate_a, rate_b = (score.word_error_rate(references, texts) for texts in (a, b))
    assert difference.delta == pytest.approx(rate_a.rate - rate_b.rate)
    assert 0 < difference.low < difference.delta < difference.high
    assert rate_b.high > rate_a.low


def test_a_system_does_not_differ_from_itself():
    references, texts = noisy(seed=0, utterances=20, error=0.5)
    assert score.paired_difference(references, texts, texts) == Difference(0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("entities", "hypothesis", "found"),
    [
        (["Anna Smith"], "call anna smith now", 1),
        (["Anna Smith"], "call anna jane smith now", 0),
        (["Anna"], "call hannah or annabel", 0),
        (["O’Brien"], "ask o'brien.", 1),
        (["anna", "Anna"], "anna rang", 1),
        (["anna", "Anna"], "anna rang anna", 2),
        (["anna", "Anna"], "anna anna", 2),
        (["anna", "anna smith"], "anna smith", 2),
        (["anna"], "anna anna anna", 1),
        (["anna"], "", 0),
    ],
)
def test_entities_are_found_as_whole_words_in_order(entities, hypothesis, found):
    assert score.entity_recall([entities], [hypothesis]) == Recall(found, len(entities))


def test_entity_recall_sums_over_utterances():
    recall = score.entity_recall([["a"], [], ["b", "c"]], ["a", "x", "c"])
    assert recall == Recall(2, 3) and recall.rate == 2 / 3
    assert score.entity_recall([[]], ["x"]).rate is None


def test_bad_entities_are_refused():
    with pytest.raises(ValueError, match="1 lists of entities but 2 hypotheses"):
        score.entity_recall([["a"]], ["a", "b"])
    with pytest.raises(ValueError, match="without a letter or digit"):
        score.entity_recall([["a", "?"]], ["a"])


def test_recall_at_k_ignores_neighbours_that_were_not_found():
    tokens = np.array([[5, 7, 0], [0, 0, 0], [1, 2, 3], [9, 9, 0]])
    entries = np.array([[11, 12, -1], [-1, -1, -1], [4, 5, 6], [1, 2, 3]])
    targets = np.array([7, 0, 8, 0])
    assert score.recall_at_k(tokens, targets, entries) == Recall(2, 4)
    assert score.recall_at_k(tokens[:, :1], targets, entries[:, :1]) == Recall(0, 4)
    assert score.recall_at_k(tokens[:0], targets[:0], entries[:0]).rate is None


def test_recall_at_k_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        score.recall_at_k(np.zeros((2, 3)), np.zeros(3), np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        score.recall_at_k(np.zeros((2, 3)), np.zeros(2), np.zeros((2, 2)))


def test_alignment_shows_every_kind_of_edit():
    assert score.align("call Anna Smith, please now", "please call Hannah Smith now") == [
        Edit("insert", (), ("please",)),
        Edit("equal", ("call",), ("call",)),
        Edit("substitute", ("anna",), ("hannah",)),
        Edit("equal", ("smith",), ("smith",)),
        Edit("delete", ("please",), ()),
        Edit("equal", ("now",), ("now",)),
    ]
    assert score.align("", "") == []


@given(WORDS, WORDS)
def test_an_alignment_spells_out_both_texts(reference, hypothesis):
    edits = score.align(reference, hypothesis)
    assert [word for edit in edits for word in edit.reference_words] == reference.split()
    assert [word for edit in edits for word in edit.hypothesis_words] == hypothesis.split()
    for edit in edits:
        assert (edit.kind == "equal") == (edit.reference_words == edit.hypothesis_words)
