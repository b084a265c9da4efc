"""Entries are written as their owner writes them, no other word is touched, and times are kept."""

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrag import shipped
from mmrag.model.vocabulary import Vocabulary
from mmrag.records import Transcript, Word
from mmrag.retrieval.display import Display
from mmrag.retrieval.wording import Entry, entry

VOCABULARY = Vocabulary.load(shipped.find(shipped.TINY) / "lm")


def shown(*given):
    """How these entries are written by the shipped model's letters."""
    return Display.of(map(entry, given), VOCABULARY.spoken)


def words_of(text, second=0.5):
    return tuple(
        Word(one, 0.5, 0.25, start=n * second, end=(n + 1) * second, confidence=0.9 - n / 10)
        for n, one in enumerate(text.split())
    )


@pytest.mark.parametrize(
    ("given", "heard", "read"),
    [
        ("A1C", "her a one c is high", "her A1C is high"),
        ("O'Brien-Smith", "call o'brien smith today", "call O'Brien-Smith today"),
        ("Zoë", "call zoe today", "call Zoë today"),
        ("5-HTP", "take five htp today", "take 5-HTP today"),
        ("Mira Kapoor", "call mira kapoor", "call Mira Kapoor"),
        (
            {"text": "zolpidem", "display_as": "Zolpidem 10 mg"},
            "take zolpidem",
            "take Zolpidem 10 mg",
        ),
        ({"text": "beijing", "display_as": "北京"}, "fly to beijing", "fly to 北京"),
        ("Zoë", "is zoe's file here", "is Zoë's file here"),
        ("Zoë", "call zoey today", "call zoey today"),
        ("A1C", "a one c one", "A1C one"),
        ("A1C", "a one", "a one"),
        ("rome", "Rome is far", "Rome is far"),
        ("Yahoo!", "Open yahoo! Now.", "Open Yahoo! Now."),
        ("O'Brien-Smith", "it was O'Brien, Smith said", "it was O'Brien, Smith said"),
        ("Zoë", '"Zoe," she said', '"Zoë," she said'),
    ],
)
def test_an_entry_comes_out_as_it_was_written(given, heard, read):
    assert shown(given).of_text(heard) == read


def test_the_longest_entry_counts_and_of_two_for_the_same_words_the_first():
    display = shown("New York", "New York City", "Zoë", {"text": "zoe", "display_as": "ZOE"})
    assert (
        display.of_text("new york city or new york with zoe")
        == "New York City or New York with Zoë"
    )
    assert (shown({"text": "zoe", "display_as": "ZOE"}) | display).of_text("zoe") == "ZOE"


def test_several_words_that_become_one_have_the_time_and_the_evidence_of_all():
    heard = Transcript("her a one c rose", words_of("her a one c rose"))
    found = shown("A1C").of_transcript(heard)
    assert found.text == "her A1C rose"
    assert [word.text for word in found.words] == ["her", "A1C", "rose"]
    own = found.words[1]
    assert (own.start, own.end) == (0.5, 2.0)
    assert own.probability == 0.5**3 and own.lm_probability == 0.25**3
    assert own.confidence == pytest.approx(0.6)
    assert found.words[0] == heard.words[0] and found.words[2] == heard.words[4]


def test_a_word_that_becomes_several_shares_its_time_among_them():
    display = shown({"text": "ibm", "display_as": "International Business Machines"})
    found = display.of_words(words_of("at ibm now"))
    assert [word.text for word in found[1:4]] == ["International", "Business", "Machines"]
    assert found[1].start == 0.5 and found[3].end == 1.0
    assert found[1].end == found[2].start and found[2].end == found[3].start


def test_a_transcript_without_entries_is_the_same_object():
    heard = Transcript("call  mira", words_of("call mira"))
    assert shown("Zoë").of_transcript(heard) is heard
    assert Display().of_transcript(heard) is heard


LETTERS = st.sampled_from(["a", "one", "c", "zoe", "zoe's", "the", "who", "o'brien", "smith"])
SENTENCES = st.lists(LETTERS, max_size=12)
GIVEN = st.lists(
    st.sampled_from(["A1C", "Zoë", "The Who", "O'Brien-Smith", "C", "Who"]), unique=True
)


@settings(max_examples=200, deadline=None)
@given(SENTENCES, GIVEN)
def test_no_other_word_is_touched_and_times_are_kept(said, given):
    display, words = shown(*given), words_of(" ".join(said))
    found = display.of_words(words)
    met = display.met(said)
    kept = [word for n, word in enumerate(words) if not any(a <= n < b for a, b, _ in met)]
    assert [word for word in found if word in words] == kept
    keys = {"A1C": "a one c", "Zoë": "zoe", "The Who": "the who", "C": "c", "Who": "who"}
    keys["O'Brien-Smith"] = "o'brien smith"
    allowed = {keys[one]: one for one in given}
    for first, last, written in met:
        bare = re.sub("'s$", "", " ".join(said[first:last]))
        assert allowed[bare] == re.sub("'s$", "", " ".join(written))
    if words:
        assert (found[0].start, found[-1].end) == (words[0].start, words[-1].end)
        assert all(one.end <= two.start for one, two in pairwise(found))
    assert " ".join(word.text for word in found) == display.of_text(" ".join(said))


@settings(max_examples=200, deadline=None)
@given(SENTENCES, GIVEN)
def test_what_is_told_of_a_growing_transcript_is_never_taken_back(said, given):
    display, text = shown(*given), " ".join(said)
    told = ""
    for length in range(len(text) + 1):
        now = display.settled(text[:length])
        assert now.startswith(told)
        told = now
    assert display.settled(text, over=True).startswith(told)
    assert display.among(said).of_text(text) == display.of_text(text)


def test_a_model_without_entries_tells_every_letter():
    assert Display().settled("call zo") == "call zo"
    assert shown("Zoë").settled("call zo") == "call"


def test_words_that_a_model_writes_itself_in_capitals_stay():
    assert not Display.of([Entry("rome")], str)
    assert Display.of([Entry("rome", "rome")], str).of_text("In Rome") == "In rome"
