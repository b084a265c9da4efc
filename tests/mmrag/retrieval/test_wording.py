"""An entry is taken as its owner gives it, or refused by the field that is wrong."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrag.records import Line
from mmrag.retrieval.wording import Entry, entries, entry, line, read_entries


def test_a_text_is_an_entry_that_says_no_more():
    assert entry("Mira  Kapoor\n") == Entry("Mira Kapoor")
    assert entry("Mira Kapoor").plain and entry("Mira Kapoor").written == "Mira Kapoor"


def test_an_object_says_how_it_is_written_said_and_weighed():
    given = {
        "text": "zolpidem",
        "display_as": "Zolpidem®",
        "pronunciations": ["zole pie dem", "/zɒlˈpɪdɛm/"],
        "weight": 2,
        "language": "en-GB",
    }
    found = entry(given)
    assert found == Entry("zolpidem", "Zolpidem®", tuple(given["pronunciations"]), 2.0, "en-GB")
    assert found.fields() == given and entry(found.fields()) == found
    assert line(json.dumps(given)) == found


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (7, "an entry is a text or an object of text, display_as"),
        ({}, "text: an entry needs one"),
        ({"text": 7}, "text: a text, not int"),
        ({"text": "a\ud800"}, "text: half a character"),
        ({"text": "a", "sound": "b"}, "'sound' is no field of an entry"),
        ({"text": "a", "display_as": " "}, "display_as: nothing to write"),
        ({"text": "a", "pronunciations": "b"}, "pronunciations: a list"),
        ({"text": "a", "pronunciations": ["b", " "]}, r"pronunciations\[1\]: nothing to say"),
        ({"text": "a", "pronunciations": ["b"] * 9}, "pronunciations: 9, at most 8"),
        ({"text": "a", "weight": 2.5}, "weight: a number from 0 to 2"),
        ({"text": "a", "weight": -0.1}, "weight: a number from 0 to 2"),
        ({"text": "a", "weight": True}, "weight: a number from 0 to 2"),
        ({"text": "a", "weight": float("nan")}, "weight: a number from 0 to 2"),
        ({"text": "a", "language": "english!"}, "language: a code such as"),
    ],
)
def test_what_is_no_entry_is_refused_by_its_field(given, message):
    with pytest.raises(ValueError, match=message):
        entry(given)


@pytest.mark.parametrize("given", ["{", '{"text": ', "{" * 100_000, '{"a":' * 100_000, '{"text"}'])
def test_a_line_that_begins_with_a_brace_is_json_or_refused(given):
    with pytest.raises(ValueError, match="JSON"):
        line(given)


def test_of_two_wordings_of_a_text_the_later_counts():
    found = entries(["a", "b", {"text": "a", "weight": 0.5}])
    assert found == [Entry("a", weight=0.5), Entry("b")]


def test_a_file_has_an_entry_a_line_and_errors_name_the_line(tmp_path):
    file = tmp_path / "phrases.jsonl"
    file.write_text('rome\n\n{"text": "a1c", "display_as": "A1C"}\n')
    assert read_entries(file) == [Entry("rome"), Entry("a1c", "A1C")]
    file.write_text('rome\n{"text": "a1c", "weight": 3}\n')
    with pytest.raises(ValueError, match=r"phrases\.jsonl:2: weight"):
        read_entries(file)


def test_it_is_said_in_each_of_its_ways():
    carrier = "call {phrase} today"
    assert Entry("A1C").lines(carrier, "A one C") == ["call eigh one C today"], "a letter's name"
    said = Entry("x", pronunciations=("zole pie dem", "/zɒl/"), language="en-GB")
    assert said.lines(carrier, "x") == [
        Line("call zole pie dem today", False, "en-GB"),
        Line("call /zɒl/ today", True, "en-GB"),
    ]


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12)


@given(
    st.fixed_dictionaries(
        {"text": texts.filter(str.split)},
        optional={
            "display_as": texts.filter(str.split),
            "pronunciations": st.lists(texts.filter(str.split), max_size=3),
            "weight": st.floats(0, 2),
            "language": st.sampled_from(["en", "es-419", "zh_Hant"]),
        },
    )
)
def test_what_is_written_of_an_entry_reads_back_the_same(given):
    found = entry(given)
    assert entry(json.loads(json.dumps(found.fields()))) == found
