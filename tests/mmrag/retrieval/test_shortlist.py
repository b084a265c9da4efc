"""A shortlist holds what was said, spelled as it was misheard, among very many phrases."""

from random import Random

import numpy as np
import pytest

from mmrag.config import KNN
from mmrag.corpora.synthetic import make_names
from mmrag.corpora.voices.espeak import Synthesizer
from mmrag.retrieval.interpolation import Retrieval
from mmrag.retrieval.phrases import Phrases
from mmrag.retrieval.shortlist import Remembered, Shortlist, SoundIndex
from tests.mmrag.retrieval.test_phrases import SPOKEN, store_of

MISHEARD = {
    "granit xhaka": "send a message to granite jaka tonight",
    "siobhan o'connor": "please call shivon okoner today",
    "metoprolol succinate": "she takes metropolol suxinate in the morning",
    "aoife byrne": "text eefa burn that i am late",
}
ANY = KNN(k=1, weight=0.5, temperature=1)


@pytest.fixture(scope="module")
def pronounce():
    return Synthesizer().pronounce


@pytest.fixture(scope="module")
def others():
    """Two thousand other people."""
    names, draw = make_names(1), Random(0)
    families = sorted(name for group in names.family.values() for name in group)
    return sorted({f"{draw.choice(names.first)} {draw.choice(families)}" for _ in range(2000)})


@pytest.fixture(scope="module")
def sounds(pronounce, others):
    return SoundIndex([*others, *MISHEARD], pronounce)


def test_a_phrase_that_is_misheard_is_near(sounds, others):
    for number, heard in enumerate(MISHEARD.values(), start=len(others)):
        assert number in sounds.near(heard, 20)


def test_a_phrase_is_nearest_to_itself(pronounce, sounds, others):
    said = pronounce(others)
    for name in others[::100]:
        [first, *_] = sounds.near(f"call {name} now", 10)
        assert said[first] == said[others.index(name)]


def test_a_shorter_list_begins_a_longer_one(sounds):
    text = "please call shivon okoner today"
    longest = sounds.near(text, 500).tolist()
    assert len(set(longest)) == 500
    assert sounds.near(text, 7).tolist() == longest[:7]
    assert len(sounds.near(text, 10_000)) <= len(sounds)


@pytest.mark.parametrize("text", ["", "…", "zh"])
def test_nothing_is_near_to_what_has_no_sound_of_theirs(pronounce, text):
    assert len(SoundIndex(["mama", "no one"], pronounce).near(text, 5)) == 0


def test_phrases_that_cannot_be_said_are_never_near(pronounce):
    sounds = SoundIndex(["…", "rome", "—"], pronounce)
    assert sounds.near("we met in rome", 3).tolist() == [1]
    assert len(SoundIndex([], pronounce).near("we met in rome", 3)) == 0


def test_a_clip_is_given_every_entry_of_the_phrases_that_it_may_have_said(tmp_path, pronounce):
    datastore = store_of(tmp_path / "store", SPOKEN)
    phrases = Phrases(datastore)
    assert phrases.entries(["maria", "rome"]).tolist() == [0, 1, 2, 4, 5, 6, 13, 14, 15, 3, 16]
    assert phrases.entries(["nobody"]).tolist() == []
    shortlist = Shortlist.of(phrases, pronounce, most=1)
    retrieval, attention = shortlist.given("call mariya", Retrieval(None, ANY), None)
    assert attention is None and retrieval.settings is ANY
    found = retrieval.retriever.search(np.zeros((1, 4), np.float32), 20)
    [numbers] = found.documents
    assert set(datastore.document_names(numbers[numbers >= 0])) == {"maria"}
    assert shortlist.given("", Retrieval(None, ANY), None) == (None, None)


def test_a_list_that_grew_by_a_phrase_is_not_pronounced_again(pronounce):
    asked = []

    def watched(texts):
        asked.append(list(texts))
        return pronounce(texts)

    remembered = Remembered(watched, most=4)
    texts = ["rome", "maria", "rome"]
    assert remembered(texts) == pronounce(texts)
    assert remembered(["maria", "oslo"]) == pronounce(["maria", "oslo"])
    assert asked == [["rome", "maria"], ["oslo"]]
    more = ["lima", "cairo", "rome"]
    assert remembered(more) == pronounce(more) and asked[-1] == ["lima", "cairo"]
    assert remembered(["oslo"]) == pronounce(["oslo"])
    assert asked[-1] == ["oslo"], "so many are remembered, and no more"
