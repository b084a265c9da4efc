"""What was told stays told, and was agreed on."""

from hypothesis import given
from hypothesis import strategies as st

from mmrag.decoding.partial import Agreement, beginnings, common, sayable


def split(text):
    return text.split()


texts = st.lists(st.sampled_from("abc"), max_size=6)
hypotheses = st.lists(texts, max_size=8)


def test_a_word_is_told_once_the_next_hypothesis_has_it_too():
    agreement = Agreement()
    assert agreement.update(split("please")) == []
    assert agreement.update(split("please call my")) == ["please"]
    assert agreement.update(split("please call maria low")) == ["call"]
    assert agreement.update(split("please call maria lopez")) == ["maria"]
    assert agreement.finish(split("please call maria lopez tomorrow")) == ["lopez", "tomorrow"]
    assert agreement.told == split("please call maria lopez tomorrow")
    assert (agreement.revised, agreement.changes) == (2, 0), "my, low"


@given(hypotheses, texts)
def test_what_was_told_is_the_beginning_of_all_that_is_told_later(guesses, final):
    agreement, before = Agreement(), []
    for words in guesses:
        newly = agreement.update(words)
        assert agreement.told == before + newly
        before = list(agreement.told)
    assert agreement.told == before + agreement.finish(final) or not final
    assert agreement.told[: len(before)] == before


@given(hypotheses)
def test_two_hypotheses_in_a_row_had_each_word_at_its_place(guesses):
    agreement, last = Agreement(), []
    for words in guesses:
        place = len(agreement.told)
        for word in agreement.update(words):
            assert words[place] == last[place] == word
            place += 1
        last = words


@given(hypotheses)
def test_hypotheses_that_begin_with_what_was_told_end_in_the_final_transcript(guesses):
    agreement = Agreement()
    for words in guesses:
        agreement.update([*agreement.told, *words])
    final = [*agreement.told, "d"]
    agreement.finish(final)
    assert agreement.told == final and agreement.changes == 0


@given(texts)
def test_a_hypothesis_said_twice_is_told_whole(words):
    agreement = Agreement()
    assert agreement.update(words) == []
    assert agreement.update(words) == words
    assert agreement.revised == 0
    assert agreement.finish(words) == []


def test_a_final_transcript_that_has_it_otherwise_is_counted_and_repeats_nothing():
    agreement = Agreement()
    for _ in range(2):
        agreement.update(split("call maria"))
    assert agreement.update(split("please call maria lopez")) == []
    assert agreement.update(split("please call maria lopez")) == [], "it contradicts what was told"
    assert agreement.finish(split("please call maria lopez")) == ["lopez"]
    assert agreement.changes == 1


def test_a_word_that_there_was_no_time_to_say_is_not_told():
    agreement = Agreement()
    heard = split("please call the head office of crimmer anderson")
    agreement.update(heard, 0.7)
    assert agreement.update(heard, 0.9) == ["please"]
    assert agreement.update(heard, 1.2) == ["call"]
    assert agreement.update(heard, 1.2) == []
    assert agreement.update(heard) == split("the head office of crimmer anderson")


@given(texts, st.floats(0, 10), st.floats(0, 10))
def test_the_longer_somebody_speaks_the_more_words_may_be_told(words, one, other):
    counts = [sayable(words, seconds) for seconds in (*sorted((one, other)), 1000.0)]
    assert counts == sorted(counts) and counts[-1] == len(words)


@given(texts, texts)
def test_beginnings_are_as_far_away_as_edits_say(told, words):
    def edits(one, other):
        if not one or not other:
            return len(one) + len(other)
        return min(
            edits(one[1:], other[1:]) + (one[0] != other[0]),
            edits(one[1:], other) + 1,
            edits(one, other[1:]) + 1,
        )

    found = beginnings(told[:4], words[:4])
    assert found == [edits(told[:4], words[:4][:n]) for n in range(len(words[:4]) + 1)]
    assert words[: common(told, words)] == told[: common(told, words)]
