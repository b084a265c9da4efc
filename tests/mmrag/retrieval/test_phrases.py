"""Phrases are spoken in a few sentences; each time one was is a window that holds all of it."""

import numpy as np
import pytest
import torch

from mmrag.config import ESPEAK, KNN, LanguageModel, Speaking
from mmrag.model.lm import LM
from mmrag.model.vocabulary import SentencePieces, Vocabulary
from mmrag.records import Units
from mmrag.retrieval import datastore
from mmrag.retrieval.compaction import compact
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.entries import read_entries
from mmrag.retrieval.phrases import (
    BATCH,
    CARRIERS,
    WINDOW,
    Phrases,
    are_phrases,
    description,
    read_lists,
    remember,
    speak,
    typical_distance,
    untuned,
    utterances,
)
from mmrag.retrieval.segment import Description, Segment, windows_of
from mmrag.speech.tokenized import Tokenized

NAMES = ["maria lopez", "rome", "the old lighthouse"]


def store_of(directory, parts, window=6):
    """A datastore of spoken phrases: each part lists (utterance, phrase, first token, length)."""
    datastore.create(directory, Description(4, window, "l2", "none", {}))
    for number, part in enumerate(parts):
        said = [np.arange(first, first + length) for *_, first, length in part]
        tokens = np.concatenate([np.empty(0, int), *said])
        segment = Segment(
            keys=np.zeros((len(tokens), 4)),
            tokens=tokens,
            windows=np.concatenate([np.empty((0, window)), *(windows_of(s, window) for s in said)]),
            positions=np.concatenate([np.empty(0, int), *(np.arange(len(s)) + 2 for s in said)]),
            utterances=np.repeat(np.arange(len(said)), [len(s) for s in said]),
            names=[(utterance, phrase) for utterance, phrase, *_ in part],
        )
        datastore.write_segment(directory, f"part-{number}", segment)
    datastore.publish(directory, [f"part-{number}" for number in range(len(parts))])
    return Datastore.open(directory)


SPOKEN = [
    [("u0", "maria", 10, 3), ("u1", "rome", 20, 1), ("u2", "maria", 10, 3)],
    [("u3", "peter", 30, 6), ("u4", "maria", 10, 3), ("u4", "rome", 20, 1)],
]


def test_every_phrase_is_spoken_in_every_carrier():
    said = list(utterances(NAMES))
    assert len(said) == len(NAMES) * len(CARRIERS)
    assert len({one.id for one in said}) == len(said)
    for number, name in enumerate(NAMES):
        own = said[number * len(CARRIERS) : (number + 1) * len(CARRIERS)]
        assert [one.text for one in own] == [c.format(phrase=name) for c in CARRIERS]
        assert {one.document for one in own} == {name}
        assert {one.entities for one in own} == {(name,)}
        assert all(name in one.text for one in own)


def test_a_phrase_that_is_named_twice_is_spoken_once():
    assert list(utterances([*NAMES, *NAMES[::-1]])) == list(utterances(NAMES))
    assert list(utterances([])) == []


def test_carriers_may_be_others():
    said = list(utterances(["rome", "oslo"], ["to {phrase}"]))
    assert [one.text for one in said] == ["to rome", "to oslo"]


def test_each_time_a_phrase_was_spoken_is_a_window_of_its_own_tokens(tmp_path):
    store = store_of(tmp_path, SPOKEN)
    known = Phrases(store)
    assert known.names == ["maria", "rome", "peter"]
    assert [len(known.mentions(name)) for name in known.names] == [3, 2, 1]
    for name, tokens in {"maria": [10, 11, 12], "rome": [20], "peter": [*range(30, 36)]}.items():
        found = store.passages(np.array(known.mentions(name)))
        for row, present in zip(found.tokens, found.present, strict=True):
            assert row[present].tolist() == tokens
    said = [store.origins(np.array(known.mentions(name))) for name in known.names]
    assert said == [
        [("maria", "u0"), ("maria", "u2"), ("maria", "u4")],
        [("rome", "u1"), ("rome", "u4")],
        [("peter", "u3")],
    ]


@pytest.mark.parametrize("window", [1, 2, 5, 6, 7])
@pytest.mark.parametrize("length", range(1, 9))
def test_the_window_holds_all_of_a_phrase_or_as_much_as_it_can(tmp_path, window, length):
    parts = [[("a", "before", 1, 3), ("b", "phrase", 50, length), ("c", "behind", 9, 3)]]
    store = store_of(tmp_path, parts, window)
    found = store.passages(np.array(Phrases(store).mentions("phrase")))
    read = found.tokens[0][found.present[0]].tolist()
    assert len(read) == min(length, window)
    assert set(read) <= set(range(50, 50 + length))


def test_mentions_can_be_limited_and_an_unknown_phrase_has_none(tmp_path):
    known = Phrases(store_of(tmp_path, SPOKEN))
    everything = known.mentions("maria")
    assert known.mentions("maria", 2) == everything[:2]
    assert known.mentions("maria", 9) == everything
    assert known.mentions("oslo") == known.mentions("oslo", 2) == []


def test_first_mentions_are_those_of_each_phrase_in_the_order_asked_for(tmp_path):
    known = Phrases(store_of(tmp_path, SPOKEN))
    maria, rome, peter = (known.mentions(name) for name in ("maria", "rome", "peter"))
    assert known.first_mentions().tolist() == [maria[0], rome[0], peter[0]]
    assert known.first_mentions(["peter", "oslo", "maria"]).tolist() == [peter[0], maria[0]]
    assert known.first_mentions(most=2).tolist() == [*maria[:2], *rome, *peter]
    none = known.first_mentions(["oslo"])
    assert (none.dtype, none.shape) == (np.int64, (0,))


def test_a_deleted_phrase_was_not_spoken_and_may_be_spoken_again(tmp_path):
    parts = [*SPOKEN, [("u5", "rome", 20, 2)]]
    store = store_of(tmp_path, parts)
    before = Phrases(store)
    datastore.delete(tmp_path, store.entries_of(["maria"]))
    datastore.delete(tmp_path, before.mentions("rome")[:1])
    store.refresh()
    known = Phrases(store)
    assert known.names == ["peter", "rome"]
    assert known.mentions("maria") == []
    assert known.mentions("rome") == before.mentions("rome")[1:]
    assert known.mentions("peter") == before.mentions("peter")


def test_utterances_without_entries_are_passed_over(tmp_path):
    parts = [[("u0", "nothing", 0, 0), ("u1", "rome", 20, 2), ("u2", "nothing", 0, 0)], []]
    known = Phrases(store_of(tmp_path, parts))
    assert known.names == ["rome"]
    assert known.mentions("rome") == [1]


def test_a_datastore_without_entries_knows_no_phrase(tmp_path):
    known = Phrases(store_of(tmp_path, [[]]))
    assert known.names == []
    assert known.mentions("rome") == []


SHAPE = LanguageModel(width=8, layers=1, heads=2, kv_heads=2, feed_forward=8, tied=True)
VOCABULARY = Vocabulary(SentencePieces.train([one.text for one in utterances(NAMES)], 60), units=6)
IDENTITY = {"lm": "aaaa", "codebook": "bbbb"}


class Speaker:
    """Says everything in units that depend on the text; remembers what it said."""

    def __init__(self):
        self.said = []

    def __call__(self, texts):
        for text in texts:
            self.said.append(text)
            length = len(text if isinstance(text, str) else text.text)
            drawn = np.random.default_rng(length).integers(0, 6, 5)
            yield Units(drawn.astype(np.int32), np.ones(5, np.int32))


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    return LM(SHAPE, VOCABULARY.size).eval().requires_grad_(False)


@pytest.mark.parametrize("speaks", [False, True])
def test_phrases_are_remembered_as_entries_of_their_own_tokens(lm, tmp_path, speaks):
    say = Speaker() if speaks else None
    store = remember(tmp_path, NAMES, lm, VOCABULARY, IDENTITY, say)
    assert store.description == Description(
        SHAPE.width, WINDOW, "l2", "spoken" if speaks else "none", IDENTITY
    )
    batch = [Tokenized(one, say and next(say([one.text]))) for one in utterances(NAMES)]
    expected = read_entries(lm, VOCABULARY, batch, WINDOW, "entities")
    np.testing.assert_array_equal(store.tokens, expected.tokens)
    stored = store.keys(0, store.entries)
    np.testing.assert_allclose(stored, expected.keys, atol=1e-3, rtol=1e-2)
    known = Phrases(store)
    assert known.names == NAMES
    for name in NAMES:
        found = store.passages(np.array(known.mentions(name)))
        assert len(found.tokens) == len(CARRIERS)
        for tokens, present in zip(found.tokens, found.present, strict=True):
            assert VOCABULARY.decode(tokens[present]) == name


def test_the_same_phrases_are_spoken_once(lm, tmp_path):
    say = Speaker()
    first = remember(tmp_path, NAMES, lm, VOCABULARY, IDENTITY, say)
    assert len(say.said) == len(NAMES) * len(CARRIERS)
    again = remember(tmp_path, [*NAMES, NAMES[0]], lm, VOCABULARY, IDENTITY, say)
    assert again.directory == first.directory
    assert len(say.said) == len(NAMES) * len(CARRIERS)
    assert [path.name for path in tmp_path.iterdir()] == [first.directory.name]


def test_other_phrases_other_models_and_other_speech_are_remembered_apart(lm, tmp_path):
    asked = [
        (NAMES, IDENTITY, None),
        (NAMES[:2], IDENTITY, None),
        (NAMES, {**IDENTITY, "lm": "cccc"}, None),
        (NAMES, IDENTITY, Speaker()),
    ]
    stores = [remember(tmp_path, names, lm, VOCABULARY, who, say) for names, who, say in asked]
    assert len({store.directory for store in stores}) == len(asked)


def test_many_phrases_are_remembered_batch_by_batch(lm, tmp_path):
    names = [f"{first} {second}" for first in "abcdefgh" for second in "klmnop"]
    assert len(names) * len(CARRIERS) > 2 * BATCH
    store = remember(tmp_path, names, lm, VOCABULARY, IDENTITY, None)
    assert len(store.segments) == 3
    assert Phrases(store).names == names


def test_phrases_are_spoken_batch_by_batch_as_they_are_asked_for(lm):
    say, names = Speaker(), [f"{one} {other}" for one in "bcdefg" for other in "klmnop"]
    segments = speak(names, lm, VOCABULARY, say)
    assert say.said == []
    first = next(segments)
    assert say.said == [one.text for one in utterances(names)][:BATCH]
    assert len(first.names) == BATCH
    rest = list(segments)
    assert len(say.said) == len(names) * len(CARRIERS)
    assert [document for part in (first, *rest) for _, document in part.names] == [
        name for name in names for _ in CARRIERS
    ]


@pytest.mark.parametrize("speaks", [False, True])
def test_spoken_phrases_in_memory_are_the_remembered_ones(lm, tmp_path, speaks):
    say = Speaker() if speaks else None
    remembered = remember(tmp_path, NAMES, lm, VOCABULARY, IDENTITY, say)
    described = description(lm, IDENTITY, say)
    held = Datastore.of(described, list(speak(NAMES, lm, VOCABULARY, say)))
    everything = np.arange(remembered.entries)
    assert held.description == remembered.description
    np.testing.assert_array_equal(held.keys_of(everything), remembered.keys_of(everything))
    np.testing.assert_array_equal(held.windows(everything), remembered.windows(everything))
    assert held.origins(everything) == remembered.origins(everything)


def test_each_take_of_a_phrase_has_keys_of_its_own_behind_those_that_are_read(lm, tmp_path):
    say, thrice = Speaker(), Speaking(takes=3)
    once = remember(tmp_path, NAMES, lm, VOCABULARY, IDENTITY, Speaker())
    store = remember(tmp_path, NAMES, lm, VOCABULARY, IDENTITY, say, speaking=thrice)
    assert store.entries == 3 * once.entries and len(say.said) == 3 * len(NAMES) * len(CARRIERS)
    assert [line.take for line in say.said[len(CARRIERS) : 2 * len(CARRIERS)]] == [1, 1, 1]
    known = Phrases(store)
    assert [len(known.mentions(name)) for name in NAMES] == [3 * len(CARRIERS)] * len(NAMES)
    read = store.origins(known.first_mentions())
    assert read == once.origins(Phrases(once).first_mentions()), "the first take's"


def test_who_speaks_is_remembered_and_as_ever_where_nobody_said_who(lm, tmp_path):
    both = Speaking(voices={"espeak": 1.0, "kokoro": 1.0})
    elsewhere = both.model_copy(update={"kokoro": "/elsewhere"})
    made = [
        remember(tmp_path, NAMES, lm, VOCABULARY, IDENTITY, Speaker(), speaking=speaking).directory
        for speaking in (ESPEAK, Speaking(voices={"espeak": 1}), both, elsewhere)
    ]
    assert made[0] == made[1] != made[2] == made[3]
    assert made[0] == remember(tmp_path, NAMES, lm, VOCABULARY, IDENTITY, Speaker()).directory


def test_a_phrase_is_spoken_as_it_is_read_and_keeps_the_name_it_was_given(lm, tmp_path):
    say, written = Speaker(), ["Renée A1C", "Łódź"]
    store = remember(tmp_path, written, lm, VOCABULARY, IDENTITY, say)
    assert say.said == [c.format(phrase=p) for p in ("Renee eigh one C", "Lodz") for c in CARRIERS]
    known = Phrases(store)
    assert known.names == written
    for phrase, said in zip(written, ("renee a one c", "lodz"), strict=True):
        found = store.passages(np.array(known.mentions(phrase)))
        assert len(found.tokens) == len(CARRIERS)
        for tokens, present in zip(found.tokens, found.present, strict=True):
            assert VOCABULARY.decode(tokens[present]) == said


def test_a_phrase_that_cannot_be_spoken_is_named(lm, tmp_path):
    with pytest.raises(ValueError, match=r"'東京 tower' cannot be spoken: .* '東', '京'"):
        remember(tmp_path, ["rome", "東京 tower"], lm, VOCABULARY, IDENTITY, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("phrases", [[], ["rome", "!?"], [""]])
def test_nothing_to_listen_for_is_an_error(lm, tmp_path, phrases):
    with pytest.raises(ValueError, match="nothing to listen for"):
        speak(phrases, lm, VOCABULARY, None)
    with pytest.raises(ValueError, match="nothing to listen for"):
        remember(tmp_path, phrases, lm, VOCABULARY, IDENTITY, None)
    assert list(tmp_path.iterdir()) == []


def test_lists_are_read_by_utterance_and_a_line_that_is_none_is_named(tmp_path):
    path = tmp_path / "phrases.jsonl"
    path.write_text('{"utterance": "a", "phrases": ["rome"]}\n{"utterance": "b", "phrases": []}\n')
    assert read_lists(path) == {"a": ["rome"], "b": []}
    path.write_text('{"utterance": "a"}\n')
    with pytest.raises(ValueError, match=r"phrases\.jsonl:1: not a JSON object of utterance"):
        read_lists(path)
    with pytest.raises(ValueError, match=r"has no gone\.jsonl: its corpus has no list of phrases"):
        read_lists(tmp_path / "gone.jsonl")


@pytest.mark.parametrize("speaks", [False, True])
def test_whoever_waits_for_phrases_is_told_of_every_sentence(lm, tmp_path, speaks):
    names = [f"{one} {other}" for one in "bcdefg" for other in "klmnop"]
    total, told = len(names) * len(CARRIERS), []
    arguments = (tmp_path, names, lm, VOCABULARY, IDENTITY, Speaker() if speaks else None)
    remember(*arguments, progress=lambda *counts: told.append(counts))
    assert told == [(done, total) for done in range(1, total + 1)]
    remember(*arguments, progress=lambda *counts: told.append(counts))
    assert len(told) == total, "what is remembered is there at once"


class Lettered:
    """A vocabulary whose tokens are letters."""

    def decode(self, tokens):
        return "".join(map(chr, tokens))

    def spoken(self, text):
        return text


@pytest.mark.parametrize(
    ("said", "phrases"),
    [
        ({"Maria Lopez": "maria lopez", "Rome": "rome"}, True),
        ({"Maria Lopez": "maria lopez", "call-17": "she is in rome"}, False),
        ({"one two three four five six": "one two three four five six"}, False),
        ({}, False),
    ],
)
def test_documents_are_phrases_where_they_are_called_what_is_said(tmp_path, said, phrases):
    datastore.create(tmp_path, Description(4, WINDOW, "l2", "none", {}))
    for number, (name, text) in enumerate(said.items()):
        tokens = np.array([*map(ord, text)])
        one = Segment(
            keys=np.zeros((len(tokens), 4)),
            tokens=tokens,
            windows=windows_of(tokens, WINDOW),
            positions=np.arange(len(tokens)),
            utterances=np.zeros(len(tokens), int),
            names=[(f"u{number}", name)],
        )
        datastore.write_segment(tmp_path, f"s-{number}", one)
    datastore.publish(tmp_path, [f"s-{number}" for number in range(len(said))])
    assert are_phrases(Datastore.open(tmp_path), Lettered(), list(said)) == phrases


def lettered(directory, said):
    """A datastore of (document, text), a token a letter, keys far from each other."""
    datastore.create(directory, Description(4, WINDOW, "l2", "none", {}))
    tokens = [np.array([*map(ord, text)]) for _, text in said]
    lengths = [len(one) for one in tokens]
    segment = Segment(
        keys=np.random.default_rng(0).standard_normal((sum(lengths), 4)),
        tokens=np.concatenate(tokens),
        windows=np.concatenate([windows_of(one, WINDOW) for one in tokens]),
        positions=np.concatenate([np.arange(length) for length in lengths]),
        utterances=np.repeat(np.arange(len(said)), lengths),
        names=[(f"u{number}", name) for number, (name, _) in enumerate(said)],
    )
    datastore.write_segment(directory, "s", segment)
    datastore.publish(directory, ["s"])
    return Datastore.open(directory)


def test_what_was_deleted_does_not_tell_whether_documents_are_phrases(tmp_path):
    sentence = "she was seen in rome"
    store = lettered(tmp_path, [("old", sentence)] * 40 + [("notes", sentence), ("new", sentence)])
    datastore.delete(tmp_path, store.entries_of(["old", "new"]))
    store.refresh()
    assert not are_phrases(store, Lettered(), ["notes"])
    datastore.delete(tmp_path, store.entries_of(["notes"]))
    store.refresh()
    assert not are_phrases(store, Lettered(), ["notes"]), "nothing is left to look at"


def test_keys_that_were_erased_are_no_neighbours_of_each_other(tmp_path):
    """Erased keys are all alike: zeros."""
    store = lettered(tmp_path, [("old" if n % 4 else "kept", f"note {n}") for n in range(60)])
    whole = typical_distance(store)
    datastore.delete(tmp_path, store.entries_of(["old"]))
    compact(tmp_path, everything=True)
    erased = Datastore.open(tmp_path)
    assert 0.3 * whole < typical_distance(erased) < 3 * whole
    assert untuned(KNN(k=2, weight=0.5, temperature=1.0), erased).temperature > 0.01 * whole


def test_a_datastore_of_nothing_has_a_scale_of_one(tmp_path):
    assert typical_distance(store_of(tmp_path, [[]])) == 1.0


def test_what_sounds_alike_is_told_by_phrases_of_several_pronunciations(tmp_path):
    store = store_of(tmp_path, SPOKEN)
    known = Phrases(store)
    known._ways = {"maria": 2}
    assert len(known.first_mentions()) == 4, "each pronunciation is read"
    alike = {name: {name, *others} for name, others in known.alike(2).items()}
    assert alike == {name: {"maria", "rome", "peter"} for name in ("maria", "rome", "peter")}
