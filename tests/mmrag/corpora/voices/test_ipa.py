"""IPA is said in the phones that it writes."""

import pytest

from mmrag.corpora.voices import ipa, phones
from mmrag.corpora.voices.espeak import VOICES, Synthesizer
from mmrag.corpora.voices.phones import CONSONANTS, VOWELS

AMERICAN = VOICES["train"][0]


@pytest.fixture(scope="module")
def synthesizer() -> Synthesizer:
    return Synthesizer()


def said(synthesizer: Synthesizer, text: str) -> list[str]:
    return [phone.text for phone in synthesizer.speak(text, AMERICAN, phonetic=True).phones]


@pytest.mark.parametrize("vowel", VOWELS)
def test_a_voice_says_each_vowel_that_is_written(synthesizer, vowel):
    assert said(synthesizer, f"/b{vowel}d/") == ["b", vowel, "d"]


@pytest.mark.parametrize("consonant", CONSONANTS)
def test_a_voice_says_each_consonant_that_is_written(synthesizer, consonant):
    heard = said(synthesizer, f"/ˈæ{consonant}oʊ/")
    assert heard == list(phones.folded(f"æ{consonant}oʊ"))


def test_ipa_stands_within_a_sentence(synthesizer):
    heard = said(synthesizer, "please call /zɒlˈpɪdɛm/ today")
    plain = said(synthesizer, "please call today")
    assert "".join(heard) != "".join(plain)
    assert "".join(phones.folded("zɒlpɪdɛm")) in "".join(heard)


def test_slashes_are_no_ipa_where_nobody_says_so(synthesizer):
    one, other = "either /or/ both", "please call /zɒlˈpɪdɛm/ today"
    for text in (one, other):
        plain = synthesizer.speak(text, AMERICAN)
        assert (
            plain.wave.tolist() == synthesizer.speak(text, AMERICAN, phonetic=False).wave.tolist()
        )


@pytest.mark.parametrize(
    ("written", "why"),
    [("ʘa", "'ʘ'"), ("北京", "'北', '京'"), ("ˈ", "nothing to say"), ("[[a]]", "'[', ']'")],
)
def test_what_no_voice_says_is_refused_by_name(written, why):
    assert why in ipa.refusal(written)
    with pytest.raises(ValueError, match=r"IPA|nothing to say"):
        ipa.mnemonics(written)


def test_stress_and_words_are_kept():
    assert ipa.mnemonics("zɒlˈpɪdɛm") == "z|A:|l|'p|I|d|E|m"
    assert ipa.mnemonics("ˌoʊ ˈtiː") == ",oU 't|i:"
