"""Words with times become subtitles that somebody can read."""

import re

from hypothesis import given
from hypothesis import strategies as st

from mmrag.records import Word
from serve import captions
from serve.captions import CUE_LETTERS, CUE_SECONDS, PAUSE_SECONDS, Cue


def said(*words, gap=0.0, length=0.5, start=0.0):
    """Words one after the other, `gap` seconds between them."""
    found = []
    for word in words:
        found.append(Word(word, 1.0, 1.0, start=start, end=start + length))
        start += length + gap
    return found


def test_words_in_a_row_are_one_cue():
    [cue] = captions.cues(said("please", "call", "maria"))
    assert cue == Cue(0, 2, 0.0, 1.5, "please call maria")


def test_a_pause_starts_a_cue():
    words = [*said("one", "two"), *said("three", start=1.0 + PAUSE_SECONDS)]
    assert [cue.text for cue in captions.cues(words)] == ["one two", "three"]
    words = [*said("one", "two"), *said("three", start=0.99 + PAUSE_SECONDS)]
    assert [cue.text for cue in captions.cues(words)] == ["one two three"]


def test_a_cue_that_would_become_too_long_ends():
    letters = "a" * (CUE_LETTERS // 2)
    cues = captions.cues(said(letters, letters[1:], "b"))
    assert [len(cue.text) for cue in cues] == [CUE_LETTERS, 1]
    assert [cue.last for cue in captions.cues(said(*"abcdefgh", length=1.5))] == [3, 7]


def test_no_words_are_no_cues():
    assert captions.cues([]) == [] and captions.srt([]) == "" and captions.vtt([]) == "WEBVTT\n"


@given(
    st.lists(
        st.tuples(
            st.text("abc", min_size=1, max_size=100), st.floats(0, 2), st.floats(0.01, CUE_SECONDS)
        )
    )
)
def test_cues_hold_every_word_once_and_none_is_too_long(parts):
    words, now = [], 0.0
    for text, pause, length in parts:
        words.append(Word(text, 1.0, 1.0, start=now + pause, end=now + pause + length))
        now += pause + length
    cues = captions.cues(words)
    assert [n for cue in cues for n in range(cue.first, cue.last + 1)] == list(range(len(words)))
    assert " ".join(cue.text for cue in cues) == " ".join(word.text for word in words)
    for cue in cues:
        assert (cue.start, cue.end) == (words[cue.first].start, words[cue.last].end)
        alone = cue.first == cue.last
        assert alone or (cue.end - cue.start <= CUE_SECONDS and len(cue.text) <= CUE_LETTERS)


def test_subrip_numbers_its_cues_and_counts_hours():
    cues = [Cue(0, 0, 0.0, 1.25, "one"), Cue(1, 1, 3600.0, 3661.9996, "two")]
    assert captions.srt(cues) == (
        "1\n00:00:00,000 --> 00:00:01,250\none\n\n2\n01:00:00,000 --> 01:01:02,000\ntwo\n"
    )


def test_webvtt_says_what_it_is():
    cues = [Cue(0, 0, 0.0, 59.9999, "one"), Cue(1, 1, 60.0, 61.0, "two")]
    assert captions.vtt(cues) == (
        "WEBVTT\n\n00:00:00.000 --> 00:01:00.000\none\n\n00:01:00.000 --> 00:01:01.000\ntwo\n"
    )


@given(st.floats(0, 1e5))
def test_a_clock_never_shows_sixty(seconds):
    shown = captions.srt([Cue(0, 0, seconds, seconds, "a")])
    assert re.match(r"1\n\d{2,}:[0-5]\d:[0-5]\d,\d{3} --> ", shown)
