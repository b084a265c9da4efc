"""What an entry would be confused with is told by sound and by keys, and nothing is changed."""

from dataclasses import replace

import numpy as np
import pytest

from mmrag import shipped
from mmrag.corpora.voices.espeak import Synthesizer
from mmrag.model.vocabulary import Vocabulary
from mmrag.retrieval.confusion import _carriers, common_words, confusable, heard, hearing
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.phrases import CARRIERS, sayings
from mmrag.retrieval.segment import Description, Segment, join
from mmrag.retrieval.shortlist import Remembered, sound_alike
from mmrag.retrieval.wording import Entry, entry

VOCABULARY = Vocabulary.load(shipped.find(shipped.TINY) / "lm")
WIDTH = 4


@pytest.fixture(scope="module")
def pronounce():
    return Remembered(Synthesizer().pronounce)


def spoken(text, place, token, mentions=2):
    """A phrase of one token, said so often with keys around a `place`."""
    keys = np.full((mentions, WIDTH), place, np.float32) + 0.01 * np.arange(mentions)[:, None]
    return Segment(
        keys=keys,
        tokens=np.full(mentions, token),
        windows=np.ones((mentions, 3), np.int32),
        positions=np.zeros(mentions),
        utterances=np.arange(mentions),
        names=[(f"{text}-{n}", text) for n in range(mentions)],
        wordings={text: Entry(text)},
    )


STORE = Datastore.of(
    Description(WIDTH, 3, "l2", "spoken", {}),
    [join([spoken("zaleplon", 0.0, 7), spoken("metformin", 9.0, 8), spoken("prague", 0.05, 9)])],
)
DOCUMENTS = ["zaleplon", "metformin", "prague"]


def told(new, segment, pronounce, words=()):
    among = STORE, DOCUMENTS, words, VOCABULARY, pronounce
    return {one.text: one for one in confusable(new, segment, *among, temperature=0.01)}


def test_sounds_share_phones_and_those_heard_for_each_other_count_half():
    one = ("z", "oʊ", "l")
    [[same, voiceless, other]] = sound_alike([one], [one, ("s", "oʊ", "l"), ("k", "æ", "t")])
    assert same == 1 and other == 0
    assert voiceless == pytest.approx((2 / 3 + 1) / 2)
    assert sound_alike([("z",)], [("ʃ",)]) == 0.5, "whether or not the first of their kind is there"


def test_what_has_its_keys_near_takes_votes_and_what_is_far_takes_none(pronounce):
    found = told(Entry("zolpidem"), spoken("zolpidem", 0.02, 5), pronounce)
    assert found["zaleplon"].loses > 0.2 and found["zaleplon"].takes > 0.2
    assert found["prague"].risk > 0.05, "keys count whatever is written"
    assert "metformin" not in found
    far = told(Entry("zolpidem"), spoken("zolpidem", 5.0, 5), pronounce)
    assert all(one.risk == 0 for one in far.values())


def test_keys_in_the_same_sentence_are_not_compared(pronounce):
    """What two phrases have before them in one carrier sentence is alike, whatever they are."""
    names = [("phrase-000000-0", "zolpidem"), ("phrase-000000-1", "zolpidem")]
    new = replace(spoken("zolpidem", 0.0, 5), names=names)
    stored = [("phrase-000003-0", "metformin"), ("phrase-000003-1", "metformin")]
    other = replace(spoken("metformin", 0.0, 8), names=stored)
    store = Datastore.of(STORE.description, [other])
    among = store, ["metformin"], (), VOCABULARY, pronounce
    [found] = confusable(Entry("zolpidem"), new, *among, temperature=1e-5)
    assert found.loses == found.takes == pytest.approx(0.5, abs=0.01), "one mention each is left"


def test_the_same_token_is_no_confusion(pronounce):
    found = told(Entry("zolpidem"), spoken("zolpidem", 0.0, 7), pronounce)
    assert "zaleplon" not in found or found["zaleplon"].risk == 0


def test_what_weighs_nothing_takes_nothing_and_what_weighs_more_takes_more(pronounce):
    takes = []
    for weight in (0.0, 0.5, 1.0, 2.0):
        new = Entry("zolpidem", weight=weight)
        found = told(new, spoken("zolpidem", 0.02, 5), pronounce)
        takes.append(found["zaleplon"].takes)
    assert takes[0] == 0 and takes == sorted(set(takes))


def test_words_that_sound_like_one_of_its_pronunciations_are_told_by_their_sound(pronounce):
    words = ["there", "prague", "column", "zebra"]
    new = entry({"text": "zolpidem", "pronunciations": ["collum", "/prɑːɡ/"]})
    found = told(new, spoken("zolpidem", 5.0, 5), pronounce, words)
    assert found["column"].kind == "word" and found["column"].sound > 0.8
    assert found["prague"].sound == 1 and "zebra" not in found
    assert found["column"].loses is found["column"].takes is None


def test_what_is_most_alike_comes_first_and_an_entry_is_not_confused_with_itself(pronounce):
    new = Entry("prague")
    found = list(told(new, spoken("prague", 0.05, 9), pronounce, ["prague", "prog"]).values())
    assert "prague" not in [one.text for one in found]
    alike = [max(one.risk, one.sound) for one in found]
    assert alike == sorted(alike, reverse=True) and len(alike) > 1


def test_nothing_is_changed_by_looking(pronounce):
    before = STORE.keys_of(np.arange(STORE.entries)).tolist(), STORE.segments
    told(Entry("zolpidem"), spoken("zolpidem", 0.0, 5), pronounce)
    assert (STORE.keys_of(np.arange(STORE.entries)).tolist(), STORE.segments) == before


def test_common_words_are_those_with_a_piece_of_their_own():
    words = common_words(VOCABULARY)
    assert {"please", "call"} <= set(words) and len(words) > 50
    assert all(len(VOCABULARY.encode(word)) == 1 for word in words)


def test_what_was_heard_is_right_where_all_of_its_words_are_there():
    new = entry({"text": "A1C", "pronunciations": ["ay one see", "/eɪ wʌn siː/"]})
    lines = hearing(new, VOCABULARY)
    assert [getattr(one, "text", one) for one in lines] == [
        "please call ay one see today",
        "please call /eɪ wʌn siː/ today",
    ]
    texts = ["please call a one c today", "please call alan today"]
    assert [one.right for one in heard(new, VOCABULARY, texts, lines)] == [True, False]
    spanish = replace(new, language="es", pronunciations=())
    assert [one.text for one in hearing(spanish, VOCABULARY)] == ["A one C"]


@pytest.mark.parametrize(
    ("one", "carriers"),
    [
        (Entry("zanab kuri"), [0, 1, 2]),
        (Entry("zanab kuri", pronunciations=("zay nab", "za nab")), [0, 0, 1, 1, 2, 2]),
        (Entry("zanab kuri", language="es"), [2]),
    ],
)
@pytest.mark.parametrize("takes", [1, 2])
def test_who_says_it_again_says_it_in_the_same_sentences(one, carriers, takes):
    said = [utterance for utterance, _ in sayings([one], takes=takes)]
    told = _carriers([utterance.id for utterance in said], one).tolist()
    assert told == carriers * takes
    texts = {utterance.text: carrier for utterance, carrier in zip(said, told, strict=True)}
    assert texts == {CARRIERS[n].format(phrase="zanab kuri"): n for n in carriers}
