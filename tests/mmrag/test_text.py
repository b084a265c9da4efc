import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrag.text import APOSTROPHES, normalise

TEXT = st.text(max_size=30) | st.text("aB'’´ \n.-é1\u00ad\u0301", max_size=12)


@pytest.mark.parametrize("apostrophe", [chr(code) for code in APOSTROPHES])
def test_every_apostrophe_becomes_the_plain_one(apostrophe):
    assert normalise(f"Don{apostrophe}t {apostrophe}tis") == "don't tis"


@given(TEXT)
def test_what_is_left_is_words_of_letters_and_digits_between_single_spaces(text):
    for word in normalise(text).split(" ") if normalise(text) else []:
        assert word
        assert word == word.strip("'")
        assert all(c == "'" or unicodedata.category(c)[0] in "LMN" for c in word)


@given(TEXT, TEXT)
def test_sentences_are_normalised_word_by_word(first, second):
    together = normalise(f"{first}\n{second}")
    assert together == f"{normalise(first)} {normalise(second)}".strip()


@given(st.text("abcdefghijklmnopqrstuvwxyz' ", max_size=30))
def test_capitals_make_no_difference(text):
    assert normalise(text.upper()) == normalise(text)
