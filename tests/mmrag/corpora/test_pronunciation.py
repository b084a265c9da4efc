import pytest

from mmrag.corpora.pronunciation import Pronunciation
from mmrag.records import Timed, Utterance

pytest.importorskip("espeakng_loader")


def test_a_text_is_pronounced_word_by_word_and_an_alignment_is_taken_as_it_is():
    say = Pronunciation()
    assert say(Utterance("one", text="the cat")) == ("ð", "ə", "", "k", "æ", "t")
    assert say(Utterance("two", text="--")) == ()
    aligned = Utterance("three", text="a", phones=(Timed("ə", 0, 1), Timed("t", 1, 2)))
    assert say(aligned) == ("ə", "t")
