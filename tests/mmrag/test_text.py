import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrag.text import APOSTROPHES, each_line, fold, normalise, read_lines, spell, spoken

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


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("call 2 of 15", "call two of fifteen"),
        ("1,234,000", "one million two hundred and thirty four thousand"),
        ("in 1999, 2005.", "in nineteen ninety nine two thousand and five"),
        ("2024-05-17", "twenty twenty four zero five seventeen"),
        ("the 1990s and '80s", "the nineteen nineties and eighties"),
        ("2nd, 3RD and 21st", "second third and twenty first"),
        ("3.14 and .5", "three point one four and point five"),
        ("-5 to +5", "minus five to plus five"),
        ("1.2.3", "one point two point three"),
        ("10:30, 9:05am and 8:00", "ten thirty nine oh five am and eight o'clock"),
        ("14:00", "fourteen hundred"),
        ("555-1234", "five five five one two three four"),
        ("(555) 123-4567", "five five five one two three four five six seven"),
        ("+44 20 7946 0958", "plus four four two zero seven nine four six zero nine five eight"),
        ("007 12345", "zero zero seven one two three four five"),
        ("10 20 30", "ten twenty thirty"),
        ("10000 or 1000000", "ten thousand or one million"),
        ("A1C", "a one c"),
        ("5-HTP", "five htp"),
        ("COVID-19", "covid nineteen"),
        ("$5, $1 and $5.50", "five dollars one dollar and five dollars and fifty cents"),
        ("£0.99 or 3€", "ninety nine pence or three euros"),
        ("$1.5 million", "one point five million dollars"),
        ("$1950 million", "one thousand nine hundred and fifty million dollars"),
        ("AT&T, 50% @ 20°C", "at and t fifty percent at twenty degrees celsius"),
        ("C#, #1 and #metoo", "c sharp number one and hashtag metoo"),
        ("2½ cups, ¾", "two and a half cups three quarters"),
        ("m² 10⁶ ① ٣", "m two ten six one three"),
        ("Renée's café", "renée's café"),
        ("?& +", ""),
        ("日本語 2", "日本語 two"),
        ("9" * 16 + "th", " ".join(["nine"] * 16)),
    ],
)
def test_numbers_and_symbols_are_words(written, said):
    assert spoken(written) == said


@settings(deadline=None)
@given(st.text(max_size=30) | st.text("0123456789 .,:-+$€%&#sth½²()a", max_size=14))
def test_what_is_spelt_out_has_no_digit_left_and_is_not_spelt_again(text):
    once = spell(text)
    assert not any(map(str.isdecimal, once))
    assert spoken(once) == spoken(text)


@given(st.text("abcXYZ ,.;:!?'\"()-\n", max_size=30))
def test_what_has_no_number_and_no_symbol_stays_letter_for_letter(text):
    assert spell(text) == text


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("Renée Dubois", "Renee Dubois"),
        ("Straße, Łódź, Đặng", "Strasse, Lodz, Dang"),
        ("Þórr Ægir Søren", "Thorr Aegir Soren"),
        ("Dvořa\u0301k\u0301", "Dvorak"),
        ("日本 Москва", "日本 Москва"),
    ],
)
def test_accents_fall_off_and_other_scripts_stay(written, plain):
    assert fold(written) == plain


def test_a_letter_that_is_known_keeps_its_accent():
    assert fold("señor Ruíz", "ñ".__contains__) == "señor Ruiz"


at_once_or_one_by_one = pytest.mark.parametrize(
    "read", [read_lines, lambda path: list(each_line(path))], ids=["at once", "one by one"]
)


@at_once_or_one_by_one
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_of_a_file_have_no_byte_order_mark_and_no_carriage_return(tmp_path, mark, end, read):
    file = tmp_path / "names.txt"
    file.write_bytes(f"{mark}Renée Dubois{end} {end}rome{end}".encode())
    assert read(file) == [(1, "Renée Dubois"), (3, "rome")]


@at_once_or_one_by_one
def test_a_file_that_is_no_text_is_named(tmp_path, read):
    file = tmp_path / "names.txt"
    file.write_bytes("rome".encode("utf-16"))
    with pytest.raises(ValueError, match=rf"{file}:1: not UTF-8 text"):
        read(file)


@at_once_or_one_by_one
def test_lines_keep_the_numbers_an_editor_shows(tmp_path, read):
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffzanab kuri\r\n\r\n  port\u2028darnby \rruto\n".encode())
    assert read(path) == [(1, "zanab kuri"), (3, "port\u2028darnby"), (4, "ruto")]


@at_once_or_one_by_one
def test_a_file_in_another_encoding_is_named_with_the_line(tmp_path, read):
    path = tmp_path / "names.txt"
    path.write_bytes("zanab\njosé\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"names\.txt:2: not UTF-8 text: invalid continuation"):
        read(path)
