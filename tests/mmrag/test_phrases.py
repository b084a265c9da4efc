"""Phrases are spoken in a few sentences; each time one was is a window that holds all of it."""

import numpy as np
import pytest

from mmrag import datastore
from mmrag.datastore import Datastore, Description, Segment, windows_of
from mmrag.phrases import CARRIERS, Phrases, utterances

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
    said = [[store.utterance_name(e) for e in known.mentions(name)] for name in known.names]
    assert said == [["u0", "u2", "u4"], ["u1", "u4"], ["u3"]]


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


def test_utterances_without_entries_are_passed_over(tmp_path):
    parts = [[("u0", "nothing", 0, 0), ("u1", "rome", 20, 2), ("u2", "nothing", 0, 0)], []]
    known = Phrases(store_of(tmp_path, parts))
    assert known.names == ["rome"]
    assert known.mentions("rome") == [1]


def test_a_datastore_without_entries_knows_no_phrase(tmp_path):
    known = Phrases(store_of(tmp_path, [[]]))
    assert known.names == []
    assert known.mentions("rome") == []
