import pytest

from mmrag.corpora.voices.phones import PHONES, folded, timed
from mmrag.records import Timed


@pytest.mark.parametrize(
    ("ipa", "phones"),
    [
        ("ˈɔː", ("ɔ",)),
        ("ɒ", ("ɑ",)),
        ("ɑːɹ", ("ɑ", "ɹ")),
        ("ɚ", ("ə", "ɹ")),
        ("ˌəʊ", ("oʊ",)),
        ("oʊ", ("oʊ",)),
        ("oːɹ", ("ɔ", "ɹ")),
        ("eː", ("eɪ",)),
        ("aɪɚ", ("aɪ", "ə", "ɹ")),
        ("tʃ", ("tʃ",)),
        ("t̪", ("t",)),
        ("n̩", ("n",)),
        ("r", ("ɹ",)),
        ("ˈ", ()),
        ("?", ()),
    ],
)
def test_accents_are_folded_into_the_same_forty_phones(ipa, phones):
    assert folded(ipa) == phones
    assert len(set(PHONES)) == len(PHONES) == 40


def test_phones_of_one_piece_share_its_time_and_marks_have_none():
    pieces = [Timed("ɚ", 1.0, 1.2), Timed("ˈ", 1.2, 1.3), Timed("t", 1.3, 1.3)]
    first, second = timed(pieces)
    assert (first.text, second.text) == ("ə", "ɹ")
    assert (first.start, second.end) == (1.0, 1.2)
    assert first.end == second.start == pytest.approx(1.1)
