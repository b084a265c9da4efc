"""A packed corpus is the list of examples that it was made from, on disk."""

import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrag.model import packed
from mmrag.model.curriculum import Curriculum, TrainingError
from mmrag.model.examples import examples, speakable, unspeakable
from mmrag.model.packed import Packed, PackError, fingerprint, made, segment, stamps, write
from mmrag.model.train import collate
from mmrag.model.vocabulary import SentencePieces, Vocabulary
from mmrag.records import Units, Utterance
from mmrag.speech.tokenized import Tokenized, read_part, write_part
from tests.mmrag.model.test_train import MIXED, WORDS, phase, recipe

VOCABULARY = Vocabulary(SentencePieces.train(WORDS, 45), units=20)
OTHER = Vocabulary(SentencePieces.train(WORDS, 45), units=21)

TEXTS = st.lists(st.sampled_from([*WORDS, "日本"]), max_size=6).map(" ".join)
UNITS = st.lists(st.integers(0, 19), max_size=9).map(
    lambda ids: Units(np.array(ids, np.int32), np.ones(len(ids), np.int32))
)
SAID = st.builds(
    lambda name, text, units, entities: Tokenized(
        Utterance(id=name, text=text, entities=tuple(entities)), units
    ),
    st.text(max_size=3),
    TEXTS | st.none(),
    UNITS | st.none(),
    st.lists(st.text(max_size=4), max_size=2),
)
CORPORA = st.lists(st.lists(SAID, max_size=4), min_size=1, max_size=3)


def parts_of(directory, corpus):
    paths = []
    for number, said in enumerate(corpus):
        paths.append(directory / f"part-{number:05d}.parquet")
        write_part(paths[-1], said)
    return paths


def packed_from(directory, parts, vocabulary=VOCABULARY):
    identity = {"vocabulary": fingerprint(vocabulary), "parts": stamps(parts)}

    def fill(aside):
        return write(aside, (segment(part, vocabulary) for part in parts), vocabulary)

    return Packed(made(directory / "corpus", identity, fill), vocabulary)


def plain(one):
    """An example as `examples` gives it, that leaves its spelling for later."""
    return one._replace(letters=None)


@settings(max_examples=40, deadline=None)
@given(CORPORA)
def test_a_pack_is_the_list_of_its_parts_examples(tmp_path_factory, corpus):
    directory = tmp_path_factory.mktemp("packed")
    data = packed_from(directory, parts_of(directory, corpus))
    told = [one for said in corpus for one in said]
    kept = list(speakable(told, VOCABULARY))
    listed = examples(kept, VOCABULARY)
    assert [plain(one) for one in data] == listed and len(data) == len(listed)
    for one in data:
        assert one.letters == VOCABULARY.spelling(one.text)
    assert list(data.names) == [one.utterance.id for one in kept]
    assert list(data.entities) == [one.utterance.entities for one in kept]
    assert data.texts.tolist() == [len(one.text) for one in listed]
    assert data.units.tolist() == [len(one.units or ()) for one in listed]
    left_out = [{"id": one.source, "reason": one.reason} for one in unspeakable(told, VOCABULARY)]
    assert list(data.rejected()) == left_out
    assert data.counts["rejected"] == len(left_out)
    assert data.counts["utterances"] == len(kept)


def lively(count=60, seed=3):
    random = np.random.default_rng(seed)
    said = []
    for number in range(count):
        text = " ".join(random.choice(WORDS, random.integers(1, 6))) if number % 7 else None
        ids = random.integers(0, 20, random.integers(1, 40)).astype(np.int32)
        units = Units(ids, np.ones_like(ids)) if number % 5 or text is None else None
        said.append(Tokenized(Utterance(id=f"u{number}", text=text), units))
    return said


@pytest.fixture
def both(tmp_path):
    """The same utterances as a list and packed, in three parts."""
    said = lively()
    parts = parts_of(tmp_path, [said[:25], said[25:26], said[26:]])
    told = [one for part in parts for one in read_part(part)]
    return examples(told, VOCABULARY), packed_from(tmp_path, parts)


@pytest.mark.parametrize("kept", [1, 10**9], ids=["kept on disk", "laid out in memory"])
def test_packed_and_listed_examples_make_the_same_batches_tensor_by_tensor(both, tmp_path, kept):
    listed, data = both
    settings = recipe(phases=[phase({"text": 1}, 5), phase(MIXED, 20)], unit_dropout=0.3)
    one = Curriculum(listed, settings, seed=4)
    other = Curriculum(data, settings, 4, tmp_path / "epochs", kept)
    for step in range(settings.steps):
        (_, expected), (_, found) = one.step(step), other.step(step)
        assert found == expected
        for number, chosen in enumerate(expected):
            seed = (4, step, number)
            first = collate(listed, chosen, VOCABULARY, 0.3, seed)
            second = collate(data, chosen, VOCABULARY, 0.3, seed)
            assert first.windows is second.windows is None
            for name in ("ids", "targets", "speech", "letters", "letter_counts"):
                mine, theirs = getattr(first, name), getattr(second, name)
                assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), name


def test_what_is_left_out_and_too_long_is_found_in_a_pack_too(both):
    listed, data = both
    settings = recipe(micro_batch_tokens=30, leave_out=("u3", "u8"), phases=[phase(MIXED, 30)])
    one, other = Curriculum(listed, settings, seed=0), Curriculum(data, settings, seed=0)
    assert one.too_long() == other.too_long() != []
    assert [one.step(step) for step in range(30)] == [other.step(step) for step in range(30)]
    unknown = settings.model_copy(update={"leave_out": ("nobody",)})
    with pytest.raises(TrainingError, match="no utterance nobody to train on"):
        Curriculum(data, unknown, seed=0)


def test_an_empty_corpus_is_packed_and_refused(tmp_path):
    data = packed_from(tmp_path, parts_of(tmp_path, [[]]))
    assert list(data) == []
    with pytest.raises(TrainingError, match="no examples to train on"):
        Curriculum(data, recipe(), seed=0)


@pytest.mark.parametrize("index", [-1, 60])
def test_there_is_no_example_beyond_the_last(both, index):
    with pytest.raises(IndexError, match=f"example {index} of 60"):
        both[1][index]


def test_a_pack_of_the_same_parts_is_found_and_a_stale_one_made_again(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        packed, "examples", lambda *told: asked.append(len(told[0])) or examples(*told)
    )
    [part] = parts_of(tmp_path, [lively(9)])
    assert len(packed_from(tmp_path, [part])) == len(packed_from(tmp_path, [part])) == 9
    assert asked == [9], "made once"
    write_part(part, lively(9, seed=5))  # as many utterances, of the same names
    assert [plain(one) for one in packed_from(tmp_path, [part])] == examples(
        list(read_part(part)), VOCABULARY
    )
    os.utime(part, ns=(1, 1))
    packed_from(tmp_path, [part])
    assert asked == [9, 9, 9]
    assert len(packed_from(tmp_path, [part], OTHER)) == 9
    assert asked == [9, 9, 9, 9]


def test_a_pack_of_another_vocabulary_is_refused(both):
    _, data = both
    with pytest.raises(PackError, match=f"{fingerprint(VOCABULARY)}, this one is"):
        Packed(data.directory, OTHER)


def test_a_pack_that_was_not_finished_is_nowhere_and_the_old_one_stays(tmp_path):
    good, torn = parts_of(tmp_path, [lively(4), lively(5)])
    with pytest.raises(PackError, match="is no packed corpus"):
        Packed(tmp_path / "corpus", VOCABULARY)
    packed_from(tmp_path, [good])
    torn.write_bytes(torn.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is not a tokenized part"):
        packed_from(tmp_path, [good, torn])
    assert len(Packed(tmp_path / "corpus", VOCABULARY)) == 4
    packed_from(tmp_path, [good], OTHER)
    scratch = [path for path in tmp_path.iterdir() if path.name.startswith(".corpus")]
    assert scratch == [], "what a killed run left goes with the next"


def test_a_damaged_description_is_no_pack(both):
    _, data = both
    (data.directory / packed.FILE).write_text(json.dumps({"identity": {}}))
    with pytest.raises(PackError, match="is no packed corpus"):
        Packed(data.directory, VOCABULARY)


def test_a_pack_that_lost_a_part_of_a_file_is_made_again(tmp_path):
    [part] = parts_of(tmp_path, [lively(9)])
    expected = list(packed_from(tmp_path, [part]))
    file = tmp_path / "corpus" / "ids.npy"
    file.write_bytes(file.read_bytes()[:-1])
    assert list(packed_from(tmp_path, [part])) == expected
