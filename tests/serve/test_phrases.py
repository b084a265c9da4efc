"""Phrases of requests: each spoken once for a tenant, by the voices that are set or in a hurry."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest

from mmrag.config import LanguageModel
from mmrag.model.vocabulary import SentencePieces, Vocabulary
from mmrag.retrieval.segment import Segment
from mmrag.retrieval.wording import Entry
from serve import phrases
from serve.additions import Additions
from serve.messages import InvalidRequest
from serve.phrases import SpokenPhrases
from serve.settings import Speaking

SHAPE = LanguageModel(width=16, layers=1, heads=2, kv_heads=2, feed_forward=24, tied=True)
VOCABULARY = Vocabulary(SentencePieces.train(["turn the light on", "call me"], 40), units=12)
KOKORO = {"kokoro": 1.0}


class Spoken:
    """Additions that hurry from a third phrase on, and remember what they were asked for."""

    def __init__(self):
        self.calls = []

    def hurried(self, given):
        return len(given) > 2

    async def phrases(self, new, keep, hurried):
        self.calls.append(([one.text for one in new], hurried))
        keep({one.text: f"{one.text} {'quick' if hurried else 'set'}" for one in new})


@pytest.fixture
def spoken(monkeypatch):
    monkeypatch.setattr(phrases, "join", lambda segments: segments[1:])
    monkeypatch.setattr(phrases, "replace", lambda joined, wordings: joined)
    return Spoken()


@pytest.fixture
def ask(spoken):
    """`ask(*texts)`: the digest of a tenant's phrases, and the segments that they are."""
    kept = SpokenPhrases(spoken, 4)

    def of(*given, tenant="acme"):
        return asyncio.run(kept.of(given, tenant))

    return of


def test_a_phrase_that_one_tenant_sent_is_new_to_the_other(ask, spoken):
    """Spoken again, and its entries under another digest: no time tells of anybody else's."""
    keys = [ask("olaf", tenant=whose)[0] for whose in ("acme", "acme", "globex")]
    assert [new for new, _ in spoken.calls] == [["olaf"], [], ["olaf"]]
    assert keys[0] == keys[1] != keys[2]


def test_a_long_list_is_said_in_a_hurry_once_and_a_short_one_of_it_as_it_is_set(ask, spoken):
    names = ["olaf", "mira", "zoe"]
    first, made = ask(*names)
    assert made == ["olaf quick", "mira quick", "zoe quick"]
    assert ask(*names) == (first, made)
    assert spoken.calls == [(names, True), ([], True)]
    _, short = ask("mira", "zoe")
    assert short == ["mira set", "zoe set"] and spoken.calls[-1] == (["mira", "zoe"], False)
    mixed, made = ask(*names)
    assert made == ["olaf set", "mira set", "zoe set"], "one is left to be said"
    assert mixed != first, "other keys are another list"


def test_what_was_said_as_it_is_set_stays_so_in_a_longer_list(ask, spoken):
    ask("olaf")
    _, made = ask("olaf", "mira", "zoe", "ida")
    assert made == ["olaf set", "mira quick", "zoe quick", "ida quick"]


def test_phrases_that_are_spotted_are_not_spoken_and_their_digest_is_no_others(spoken, monkeypatch):
    monkeypatch.undo()  # the segments are real ones
    kept = SpokenPhrases(spoken, 4)
    loud = Entry("olaf", weight=2.0)
    given = [["olaf"], ["olaf"], ["olaf", "mira"], [loud]]
    told = [kept.worded(one, "acme") for one in given] + [kept.worded(["olaf"], "globex")]
    keys = [key for key, _ in told]
    assert keys[0] == keys[1] and len(set(keys)) == 4 and spoken.calls == []
    assert [list(segment.wordings) for _, segment in told[1:3]] == [["olaf"], ["olaf", "mira"]]
    assert told[3][1].wordings == {"olaf": loud}
    assert not any(len(segment.tokens) for _, segment in told), "no entries"


def test_what_weighs_nothing_is_not_spoken_and_what_cannot_be_is_named(ask, spoken, monkeypatch):
    assert ask(Entry("olaf", weight=0), "mira")[1] == ["mira set"]

    async def nothing(new, keep, hurried):
        pass

    monkeypatch.setattr(spoken, "phrases", nothing)
    with pytest.raises(InvalidRequest, match="nothing to listen for in 'zoe'"):
        ask("zoe")


@pytest.mark.parametrize(
    ("speaking", "hurried"),
    [
        (Speaking(), False),
        (Speaking(takes=8), False),
        (Speaking(voices=KOKORO, seconds=17), False),
        (Speaking(voices=KOKORO, seconds=16), True),
        (Speaking(voices=KOKORO, seconds=17, takes=2), True),
        (Speaking(voices={"espeak": 1000, "kokoro": 1e-9}, seconds=0), False),
    ],
)
def test_it_is_hurried_where_slow_voices_would_speak_for_too_long(speaking, hurried):
    """Three phrases in three carriers: 180 letters, or 16.4 s."""
    given = [Entry("olaf lund"), Entry("mira lund"), Entry("zoe maas")]
    assert Additions(None, None, VOCABULARY, speaking).hurried(given) is hurried


class Parts:
    """An encoder and a decoder that remember what they were asked to say, and give nothing back."""

    def __init__(self):
        self.said = []
        self.synthesize = self.entries = self.transcribe = self

    async def remote(self, given, how=None):
        if isinstance(how, bool):
            self.said.append((list(given), how))
            return given
        if how is None:
            return SimpleNamespace(text="heard")
        names = [(one.utterance.id, one.utterance.document) for one in given]
        return replace(Segment.empty(4, 3), names=names)


@pytest.mark.parametrize("hurried", [False, True])
def test_texts_are_said_in_all_their_takes_unless_they_are_in_a_hurry(hurried):
    parts = Parts()
    additions = Additions(parts, parts, VOCABULARY, Speaking(takes=2))
    sentence = "the meeting with the new people was moved to friday"
    made = asyncio.run(additions.spoken([Entry("olaf"), Entry(sentence)], hurried))
    assert {how for _, how in parts.said} == {hurried}
    lines = [one for lines, _ in parts.said for one in lines]
    takes = [0 if isinstance(one, str) else one.take for one in lines]
    assert takes == ([0] * 4 if hurried else [0, 0, 0, 1, 1, 1, 0, 1])
    assert {document for one in made for _, document in one.names} == {"olaf", sentence}
    [told] = asyncio.run(additions.heard(Entry("olaf"), hurried))
    assert told.heard == "heard" and parts.said[-1] == (["please call olaf today"], hurried)


def test_sentences_count_as_phrases_do_and_ipa_does_not():
    additions = Additions(None, None, VOCABULARY, Speaking(voices=KOKORO, seconds=3))
    sentence = "the meeting with the new people was moved to friday"
    assert additions.hurried([Entry(sentence)])
    assert not additions.hurried([Entry("olaf lund", pronunciations=("/oʊləf lʊnd/",))] * 9)
