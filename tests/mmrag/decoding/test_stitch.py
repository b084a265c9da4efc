"""Two sides of a cut in speech become one: no word is lost, and none said twice."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrag.decoding.stitch import seam
from mmrag.records import Timed

SHARED = 1.4
"""Seconds that both sides hear; at least one word lies in them whole."""


def said(words, pace=0.3, start=0.0):
    return [
        Timed(word, start + n * pace, start + (n + 1) * pace)
        for n, word in enumerate(words.split())
    ]


def stitched(left, right, start, end):
    kept, begun = seam(left, right, start, end)
    return " ".join(word.text for word in (*left[:kept], *right[begun:]))


@st.composite
def cut_in_speech(draw, words):
    """What is said, and what either side of a cut heard of it: every word that lies in its audio,
    half a word at the cut as something else or not at all, and times of its own."""
    lengths = st.floats(0.2, 0.6)
    texts = draw(st.lists(st.sampled_from(words), min_size=20, max_size=26))
    ends = np.cumsum([draw(lengths) for _ in texts])
    truth = [
        Timed(text, end - length, end)
        for text, end, length in zip(texts, ends, np.diff(ends, prepend=0), strict=True)
    ]
    start = draw(st.floats(1.0, ends[-1] - SHARED - 1.0))
    end = start + SHARED
    jitter = st.floats(-0.04, 0.04)

    def heard(begin, until):
        found = []
        for word in truth:
            inside = min(word.end, until) - max(word.start, begin)
            if inside <= 0.02:
                continue
            times = max(word.start, begin) + draw(jitter), min(word.end, until) + draw(jitter)
            whole = inside > word.end - word.start - 0.01
            if whole or draw(st.booleans()):
                found.append(Timed(word.text if whole else "uh", min(times), max(times)))
        return found

    return " ".join(texts), heard(0.0, end), heard(start, 1e3), start, end


@settings(max_examples=300, deadline=None)
@given(cut_in_speech(["ann", "bob", "carla", "doris", "e", "f", "g", "h"]))
def test_what_was_cut_in_speech_is_said_once(example):
    text, *sides = example
    assert stitched(*sides) == text


@settings(max_examples=300, deadline=None)
@given(cut_in_speech(["no", "yes"]))
def test_words_said_again_and_again_are_told_apart_by_their_times(example):
    text, *sides = example
    assert stitched(*sides) == text


@given(cut_in_speech(["ann", "bob", "carla"]), st.data())
def test_nothing_is_given_up_that_the_other_side_could_not_hear(example, data):
    _, left, right, start, end = example
    left = [word for word in left if data.draw(st.booleans())]
    right = [Timed("other", word.start, word.end) for word in right if data.draw(st.booleans())]
    kept, begun = seam(left, right, start, end)
    assert 0 <= kept <= len(left) and 0 <= begun <= len(right)
    assert all(word.end > start for word in left[kept:]), "the right side could hear it"
    assert all(word.start < end for word in right[:begun]), "the left side could hear it"


def test_the_right_side_says_what_the_left_one_guessed_at_its_end():
    left = said("remind me to call maria")
    right = said("me to call john today", start=0.3)
    assert stitched(left, right, 0.3, 1.5) == "remind me to call john today"


def test_the_left_side_says_what_the_right_one_guessed_at_its_beginning():
    left = said("the red november door")
    right = said("ember door is open", start=0.6)
    assert stitched(left, right, 0.75, 1.3) == "the red november door is open"


def test_words_are_the_same_whatever_their_case_and_punctuation():
    left, right = said("We left. And, then."), said("and then we came", start=0.6)
    assert stitched(left, right, 0.6, 1.2) == "We left. And, then we came"


def test_a_sound_that_either_side_heard_as_another_word_is_one_word():
    left = [*said("call maria"), Timed("kuri", 0.6, 1.1)]
    right = [Timed("curie", 0.65, 1.15), *said("next week", start=1.15)]
    for start, end in ((0.4, 1.4), (0.6, 1.15), (0.3, 1.2)):
        assert stitched(left, right, start, end) in (
            "call maria kuri next week",
            "call maria curie next week",
        )


def test_what_one_side_did_not_hear_the_other_has_heard():
    words = said("one two three four five six")
    assert stitched(words, [], 0.6, 1.8) == "one two three four five six"
    assert stitched([], words, 0.0, 1.2) == "one two three four five six"
    assert stitched(words[:3], words[3:], 0.6, 1.8) == "one two three four five six"
    assert stitched(words[:4], words[5:], 0.6, 1.8) == "one two three four six"
    assert stitched(words[:2], words[3:], 0.6, 1.8) == "one two four five six"
    assert seam([], [], 0.0, 1.0) == (0, 0)


@pytest.mark.parametrize("start", [0.9, 1.1, 1.3])
def test_a_common_word_far_from_its_own_time_is_another_word(start):
    left = said("the one and the two")
    right = said("two and the four", start=1.2)
    assert stitched(left, right, start, 1.5) == "the one and the two and the four"
