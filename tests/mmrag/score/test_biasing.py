"""U-WER and B-WER count what the LibriSpeech biasing benchmark counts."""

import jiwer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrag.score import ErrorRate, biasing_error_rates, weighted_alignment

WORDS = st.lists(st.sampled_from(["a", "b", "c", "k", "l"]), max_size=9).map(" ".join)
RARE = st.frozensets(st.sampled_from(["a", "k", "zz"]))
UTTERANCES = st.lists(st.tuples(WORDS, WORDS, RARE), min_size=1, max_size=6).filter(
    lambda utterances: any(reference for reference, _, _ in utterances)
)


def counts(rate: ErrorRate) -> tuple[int, int, int, int]:
    return rate.substitutions, rate.deletions, rate.insertions, rate.reference


def total(rate: ErrorRate) -> int:
    return rate.substitutions + rate.deletions + rate.insertions


@pytest.mark.parametrize(
    ("reference", "hypothesis", "rare", "unbiased", "biased"),
    [
        ("they met jondrette here", "they met jondrette here", "jondrette", (0, 0, 0, 3), (0,) * 3),
        ("they met jondrette here", "they met john here", "jondrette", (0, 0, 0, 3), (1, 0, 0)),
        ("they met jondrette here", "they met here", "jondrette", (0, 0, 0, 3), (0, 1, 0)),
        ("they met jondrette here", "he met jondrette", "jondrette", (1, 1, 0, 3), (0, 0, 0)),
        # What is inserted counts where the inserted word belongs.
        ("kaor john carter", "kaor kaor john carter", "kaor", (0, 0, 0, 2), (0, 0, 1)),
        ("kaor john carter", "kaor oh john carter", "kaor", (0, 0, 1, 2), (0, 0, 0)),
        ("well john carter", "well kaor john carter", "kaor", (0, 0, 0, 3), (0, 0, 1)),
        # A rare word in the place of another is that other word's substitution.
        ("well john carter", "well kaor carter", "kaor", (1, 0, 0, 3), (0, 0, 0)),
        ("the mogs saw the mogs", "the mogs saw the", "mogs", (0, 0, 0, 3), (0, 1, 0)),
        ("the mogs saw the mogs", "the mugs saw the mogs", "mogs", (0, 0, 0, 3), (1, 0, 0)),
        ("the mogs saw the mogs", "", "mogs", (0, 3, 0, 3), (0, 2, 0)),
        ("", "the mogs", "mogs", (0, 0, 1, 0), (0, 0, 1)),
        ("", "", "mogs", (0, 0, 0, 0), (0, 0, 0)),
        # One word too few or too many: the last are paired, the first is gone or added.
        ("the glacier", "lasher", "glacier", (0, 1, 0, 1), (1, 0, 0)),
        ("the glacier", "lasher", "the", (1, 0, 0, 1), (0, 1, 0)),
        ("glacier", "the lasher", "glacier", (0, 0, 1, 0), (1, 0, 0)),
        ("glacier", "the lasher", "lasher", (1, 0, 1, 1), (0, 0, 0)),
        # A deletion and an insertion are cheaper than two substitutions …
        ("kaor john", "john said", "kaor", (0, 0, 1, 1), (0, 1, 0)),
        # … and three of each than five substitutions, though they are one error more.
        ("a b c k l", "k l x y z", "k", (0, 3, 3, 4), (0, 0, 0)),
        # Exchanged words: the last one heard is inserted, not the last one said deleted.
        ("kaor john", "john kaor", "kaor", (0, 0, 0, 1), (0, 1, 1)),
        ("kaor john", "john kaor", "john", (0, 1, 1, 1), (0, 0, 0)),
        # Words are as they are written.
        ("kaor john", "Kaor john.", "kaor", (1, 0, 0, 1), (1, 0, 0)),
    ],
)
def test_errors_are_counted_where_the_benchmark_counts_them(
    reference, hypothesis, rare, unbiased, biased
):
    found = biasing_error_rates(["yes", reference], ["yes", hypothesis], [set(), {rare}], 5)
    said = reference.split().count(rare)
    substitutions, deletions, insertions, words = unbiased
    assert counts(found.unbiased) == (substitutions, deletions, insertions, words + 1)
    assert counts(found.biased) == (*biased, said)


def test_a_list_is_of_its_own_utterance_alone():
    found = biasing_error_rates(["mogs ran", "mogs ran"], ["ran", "ran"], [{"mogs"}, set()], 5)
    assert counts(found.biased) == (0, 1, 0, 1)
    assert counts(found.unbiased) == (0, 1, 0, 3)


def test_rates_are_sums_divided_once_and_have_an_interval():
    found = biasing_error_rates(
        ["mogs ran", "a mogs b c"], ["mugs ran", "a mogs b c"], [{"mogs"}] * 2
    )
    assert (found.words.rate, found.unbiased.rate, found.biased.rate) == (1 / 6, 0.0, 1 / 2)
    assert (found.biased.low, found.biased.high) == (0.0, 1.0)
    assert (found.unbiased.low, found.unbiased.high) == (0.0, 0.0)


def test_a_rate_of_no_words_is_none_and_its_insertions_are_kept():
    found = biasing_error_rates(["he ran"], ["he mogs ran"], [{"mogs"}], 5)
    assert found.biased == ErrorRate(None, None, None, 0, 0, 1, 0)
    assert found.words.rate == 1 / 2


def test_lists_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 lists of rare words but 1 hypotheses"):
        biasing_error_rates(["a"], ["a"], [set(), set()])
    with pytest.raises(ValueError, match="no reference words"):
        biasing_error_rates([""], ["a"], [set()])


def slow_alignment(said: list[str], heard: list[str]) -> list[tuple[int | None, int | None]]:
    """The rule cell by cell: where a cell comes from is decided while its cost is."""
    costs, origins = {(0, 0): 0}, {}
    for at in range(len(said) + 1):
        for on in range(len(heard) + 1):
            ways = []
            if at and on:
                changed = 4 * (said[at - 1] != heard[on - 1])
                ways.append((costs[at - 1, on - 1] + changed, (at - 1, on - 1)))
            if on:
                ways.append((costs[at, on - 1] + 3, (at, on - 1)))
            if at:
                ways.append((costs[at - 1, on] + 3, (at - 1, on)))
            if ways:  # the first of the cheapest
                costs[at, on], origins[at, on] = min(ways, key=lambda way: way[0])
    place, pairs = (len(said), len(heard)), []
    while place in origins:
        before = origins[place]
        pairs.append(
            (
                before[0] if before[0] < place[0] else None,
                before[1] if before[1] < place[1] else None,
            )
        )
        place = before
    return pairs[::-1]


@given(WORDS, WORDS)
@settings(deadline=None, max_examples=300)
def test_the_alignment_is_that_of_its_slow_twin(reference, hypothesis):
    said, heard = reference.split(), hypothesis.split()
    assert weighted_alignment(said, heard) == slow_alignment(said, heard)


@given(UTTERANCES)
@settings(deadline=None)
def test_biased_and_unbiased_counts_add_up_to_all(utterances):
    references, hypotheses, rare = map(list, zip(*utterances, strict=True))
    found = biasing_error_rates(references, hypotheses, rare, 5)
    parts = zip(counts(found.unbiased), counts(found.biased), strict=True)
    assert tuple(map(sum, parts)) == counts(found.words)
    assert found.words.rate == total(found.words) / found.words.reference
    biased = [w for said, _, own in utterances for w in said.split() if w in own]
    assert found.biased.reference == len(biased)


@given(WORDS.filter(bool), WORDS)
@settings(deadline=None, max_examples=300)
def test_wer_is_jiwers_unless_many_words_are_substituted(reference, hypothesis):
    """The weights may prefer other errors to substitutions, a third more of them at most."""
    found = biasing_error_rates([reference], [hypothesis], [set()], 2).words
    least = jiwer.process_words(reference, hypothesis)
    fewest = least.substitutions + least.deletions + least.insertions
    assert fewest <= total(found) <= fewest + least.substitutions / 3
    if least.substitutions < 3:
        assert found.rate == least.wer
