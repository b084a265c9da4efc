"""Digits, capitals, hyphens and accents in an entry: it has pieces, is favoured, is said as
people say it, and comes out as it was given."""

import unicodedata

import numpy as np
import pytest
import torch

from mmrag import shipped
from mmrag.corpora.voices.espeak import Synthesizer
from mmrag.decoding.boost import Boost
from mmrag.model.vocabulary import Vocabulary
from mmrag.retrieval.confusion import heard, hearing, written
from mmrag.retrieval.display import Display
from mmrag.retrieval.phrases import CARRIERS, phrases_and_sentences, sayings
from mmrag.retrieval.wording import Entry, entry
from mmrag.text import spoken

FORMS = {
    "A1C": ("a one c", "eɪ w ʌ n s i"),
    "O'Brien-Smith": ("o'brien smith", "oʊ b ɹ aɪ ə n s m ɪ θ"),
    "Zoë": ("zoe", "z oʊ i"),
    "5-HTP": ("five htp", "f aɪ v eɪ tʃ t i p i"),
}
VARIANTS = {
    "O\N{RIGHT SINGLE QUOTATION MARK}Brien\N{NON-BREAKING HYPHEN}Smith": "O'Brien-Smith",
    "5\N{NON-BREAKING HYPHEN}HTP": "5-HTP",
    unicodedata.normalize("NFD", "Zoë"): "Zoë",
    "ZOË": "Zoë",
    "a1c": "A1C",
}
"""The same as other keyboards write it."""
SAID = [*((text, *FORMS[text]) for text in FORMS), *((v, *FORMS[VARIANTS[v]]) for v in VARIANTS)]
GIVEN = [(given, writes) for given, writes, _ in SAID]


@pytest.fixture(scope="module", params=[shipped.TINY, "mmrag:small"])
def vocabulary(request):
    return Vocabulary.load(shipped.find(request.param) / "lm")


@pytest.fixture(scope="module")
def synthesizer():
    return Synthesizer()


@pytest.mark.parametrize(("given", "writes"), GIVEN)
def test_a_form_is_written_in_pieces_that_are_its_words(vocabulary, given, writes):
    new = entry(given)
    assert vocabulary.refusal(given) is None
    assert phrases_and_sentences([new]) == ([new], [])
    assert written(new, vocabulary) == writes == spoken(vocabulary.decode(vocabulary.encode(given)))
    sentence = f"please call {given} today"
    assert vocabulary.decode(vocabulary.encode(sentence)) == f"please call {writes} today"


@pytest.mark.parametrize(("given", "writes"), GIVEN)
def test_a_form_comes_out_as_it_was_given(vocabulary, given, writes):
    display = Display.of([entry(given)], vocabulary.spoken)
    assert display.of_text(f"please call {writes} today") == f"please call {given} today"
    assert display.of_text(f"{writes}'s") == f"{given}'s"


@pytest.mark.parametrize("given", [given for given, _ in GIVEN])
def test_each_piece_of_a_form_is_favoured_after_those_before_it(vocabulary, given):
    starts = torch.from_numpy(np.asarray(vocabulary.word_starts()))
    pieces = vocabulary.encode(given)
    boost = Boost([pieces], 1.5, starts)
    state = boost.advance(np.zeros(1, np.int64), np.array(vocabulary.encode("please")[-1:]))
    for piece in pieces:
        assert float(boost.bonus(state)[0, piece]) == 1.5
        state = boost.advance(state, np.array([piece]))


@pytest.mark.parametrize(("given", "writes", "phones"), SAID)
def test_a_form_is_said_as_people_say_it(vocabulary, synthesizer, given, writes, phones):
    new = entry(given)
    said = sayings([new], CARRIERS, vocabulary.spoken)
    for carrier, (utterance, line) in zip(CARRIERS, said, strict=True):
        [told] = synthesizer.pronounce([line])
        assert f" {phones} " in f" {' '.join(told)} ", line
        assert spoken(utterance.text) == carrier.format(phrase=writes), "as the model writes it"
    [known] = heard(new, vocabulary, [f"please call {writes} today"], hearing(new, vocabulary))
    assert known.right and known.sentence == f"please call {known.pronunciation} today"


@pytest.mark.parametrize(
    ("text", "spoken", "said"),
    [
        ("A1C", "A one C", "eigh one C"),
        ("1A", "one A", "one eigh"),
        ("vitamin A", "vitamin A", "vitamin eigh"),
        ("a b c", "a b c", "eigh b c"),
        ("take a A1C", "take a A one C", "take a eigh one C"),
        ("once upon a time", "once upon a time", "once upon a time"),
        ("A Team", "A Team", "A Team"),
        ("¼ cup", "a quarter cup", "a quarter cup"),
    ],
)
def test_the_letter_a_is_called_by_its_name_and_the_article_is_not(text, spoken, said):
    assert Entry(text).said(spoken) == (said,)
    assert Entry(text, language="es").said(spoken) == (spoken,), "another language has its own"
    assert Entry(text, pronunciations=("so",)).said(spoken) == ("so",)
