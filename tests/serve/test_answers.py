"""What an answer says of a transcript: its tokens, its languages, what it took."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrag import shipped
from mmrag.model.vocabulary import Vocabulary
from mmrag.model.whisper import EncodedAudio
from mmrag.records import Units, Word
from serve.answers import Answer, token_logprobs
from serve.forms import TranscriptionForm
from serve.messages import DecodeResult, OutputOptions
from serve.pipeline import TranscribedSegment, _kept, told
from serve.settings import read

VOCABULARY = Vocabulary.load(shipped.find(shipped.TINY) / "lm")


class Bytes:
    """A vocabulary whose tokens are bytes, as those of some models are."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace").strip()


def result(tokens, vocabulary=VOCABULARY, **more):
    """What a decoder makes of these tokens."""
    return DecodeResult(
        text=vocabulary.decode(tokens),
        words=(),
        tokens=tuple(tokens),
        ends=(),
        mean_logp=-1.0,
        stopped=True,
        confidence=None,
        unclear=False,
        logps=tuple(-0.5 * n for n in range(len(tokens))),
        **more,
    )


def answer(*results, languages=("en",), **form):
    """An answer with these segments, of four seconds each."""
    settings = read({"languages": list(languages)})
    form = TranscriptionForm(file=None, **form)
    made = Answer(form, settings, VOCABULARY, 4.0 * len(results))
    for n, one in enumerate(results):
        made.add(TranscribedSegment(4.0 * n, 4.0 * n + 4, one))
    return made


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(VOCABULARY.first_piece, VOCABULARY.first_unit - 1), max_size=12))
def test_the_tokens_of_a_segment_joined_are_its_text(tokens):
    made = result(tokens)
    for before in ("", " "):
        found = token_logprobs(made, VOCABULARY, before)
        assert "".join(one.token for one in found) == (before + made.text if made.text else "")
        assert [one.logprob for one in found] == (list(made.logps) if made.text else [])
        assert all(bytes(one.bytes).decode() == one.token for one in found)


@given(st.text(max_size=12))
def test_a_letter_of_several_tokens_is_added_by_the_last_of_them(text):
    made = result(text.encode(), Bytes())
    found = token_logprobs(made, Bytes(), " ")
    assert "".join(one.token for one in found) == (" " + made.text if made.text else "")
    assert len(found) == (len(made.tokens) if made.text else 0)


def test_text_that_was_left_out_as_unclear_has_no_tokens():
    made = replace(result(VOCABULARY.encode("a word")), text="")
    assert token_logprobs(made, VOCABULARY) == []


def test_segments_have_a_blank_between_them_as_the_text_has():
    said, silent = result(VOCABULARY.encode("a word")), replace(result([]), text="")
    told = answer(silent, said, None, said, include=["logprobs"]).done()
    assert told["text"] == "a word a word"
    assert "".join(one["token"] for one in told["logprobs"]) == told["text"]


def test_usage_counts_what_the_model_was_given_and_what_it_made():
    said = result(VOCABULARY.encode("a word"), heard=30)
    usage = answer(said, None, said).done()["usage"]
    made = 2 * len(said.tokens)
    assert usage == {
        "type": "tokens",
        "input_tokens": 60,
        "output_tokens": made,
        "total_tokens": 60 + made,
        "input_token_details": {"audio_tokens": 60, "text_tokens": 0},
    }


@pytest.mark.parametrize(
    ("understood", "heard", "listed", "named"),
    [
        (["en"], [None], ["en"], "english"),
        (["en", "es"], ["es", "es", "en"], ["es", "en"], "spanish"),
        (["en", "es"], [None], [], "english"),
        (["xx"], ["xx"], ["xx"], "xx"),
        (["en"], [], [], "english"),
    ],
)
def test_languages_are_those_that_were_heard(understood, heard, listed, named):
    tokens = VOCABULARY.encode("a word")
    made = [result(tokens, language=code) for code in heard]
    told = answer(*made, languages=understood, response_format="verbose_json").done()
    assert [one["code"] for one in told["languages"]] == listed
    assert told["language"] == named


def test_a_model_that_finds_out_the_language_is_told_which_it_may_be():
    wide = EncodedAudio(torch.zeros(2, 4), 1.0, 0.02, "es")
    assert told(wide, ()) is told(wide, ("en", "es")) is wide
    assert told(wide, ("en", "de")).language == "en"
    single = replace(wide, language=None)
    units = Units(np.arange(3), np.ones(3, int))
    assert told(single, ("en",)) is single and told(units, ("en",)) is units


def test_of_a_segment_that_shares_words_only_those_that_count_have_tokens():
    said = "please call priya on friday"
    tokens = VOCABULARY.encode(said)
    ends = tuple(end for _, end in VOCABULARY.word_ends(tokens))
    words = tuple(Word(text, 1.0, 1.0) for text in said.split())
    whole = replace(result(tokens), words=words, ends=ends)
    made = _kept(TranscribedSegment(0, 4, whole), OutputOptions(), slice(1, 4)).result
    assert made.text == "call priya on"
    assert made.logps == whole.logps[ends[0] : ends[3]]
    assert "".join(one.token for one in token_logprobs(made, VOCABULARY)) == made.text
