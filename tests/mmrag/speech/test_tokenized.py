from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrag.records import Letters, Timed, Units, Utterance
from mmrag.speech.tokenized import (
    SCHEMA,
    Count,
    Tokenized,
    TokensError,
    count_part,
    read,
    read_part,
    read_texts,
    write_part,
)

NAMES = st.text(max_size=6)
UNITS = st.lists(st.tuples(st.integers(0, 1999), st.integers(1, 90)), max_size=5).map(
    lambda runs: Units(*np.array(runs, np.int32).reshape(-1, 2).T)
)
SPELLED = UNITS.map(lambda one: replace(one, letters=spelled(one.durations.sum(), " äb")))
WORDS = st.builds(Timed, NAMES, st.floats(0, 30), st.floats(0, 30))
UTTERANCES = st.builds(
    Utterance,
    id=NAMES,
    text=NAMES | st.none(),
    duration=st.floats(0, 1e4) | st.none(),
    speaker=NAMES,
    document=st.text(min_size=1, max_size=6),
    domain=NAMES,
    entities=st.lists(NAMES, max_size=2).map(tuple),
    words=st.lists(WORDS, max_size=2).map(tuple),
)


def said(name, units=(3, 1), alphabet=None):
    ids = np.array(units, np.int32)
    letters = alphabet and spelled(len(ids), alphabet)
    return Tokenized(Utterance(id=name), Units(ids, np.ones_like(ids), letters))


def spelled(frames, alphabet):
    random = np.random.default_rng(frames)
    return Letters(alphabet, random.integers(0, 256, (frames, 1 + len(alphabet)), np.uint8))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.builds(Tokenized, UTTERANCES, UNITS | SPELLED | st.none()), max_size=3))
def test_what_is_written_is_read_back(tmp_path_factory, tokenized):
    path = tmp_path_factory.mktemp("tokens") / "part-00000.parquet"
    write_part(path, tokenized)
    read_back = list(read_part(path))
    assert [one.utterance for one in read_back] == [one.utterance for one in tokenized]
    for one, other in zip(read_back, tokenized, strict=True):
        assert (one.units is None) == (other.units is None)
        if one.units is not None:
            assert one.units.ids.dtype == one.units.durations.dtype == np.int32
            np.testing.assert_array_equal(one.units.ids, other.units.ids)
            np.testing.assert_array_equal(one.units.durations, other.units.durations)
            assert (one.units.letters is None) == (other.units.letters is None)
            if one.units.letters is not None:
                assert one.units.letters.alphabet == other.units.letters.alphabet
                np.testing.assert_array_equal(one.units.letters.costs, other.units.letters.costs)


def test_an_utterance_is_its_own_document_unless_it_names_one(tmp_path):
    path = tmp_path / "part-00000.parquet"
    write_part(path, [said("u1"), Tokenized(Utterance(id="u2", document="call"), None)])
    assert [one.utterance.document for one in read_part(path)] == ["u1", "call"]


def test_parts_are_read_in_the_order_of_their_names_and_scratch_files_are_not(tmp_path):
    write_part(tmp_path / "part-00001.parquet", [said("later")])
    write_part(tmp_path / "part-00000.parquet", [said("first"), said("second")])
    (tmp_path / ".part-00002.parquet.77").write_bytes(b"a killed writer's half")
    assert [one.utterance.id for one in read(tmp_path)] == ["first", "second", "later"]


def test_a_part_that_could_not_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "part-00000.parquet"
    write_part(path, [said("old")])
    with pytest.raises(pa.ArrowInvalid):
        write_part(path, [said("new"), Tokenized(Utterance(id="bad", duration="long"), None)])
    assert [one.utterance.id for one in read(tmp_path)] == ["old"]


def test_a_part_without_letters_has_the_columns_that_it_always_had(tmp_path):
    path = tmp_path / "part-00000.parquet"
    write_part(path, [said("u"), Tokenized(Utterance(id="written"), None)])
    assert (schema := pq.read_schema(path)).equals(SCHEMA) and schema.metadata is None
    assert [one.units and one.units.letters for one in read_part(path)] == [None, None]


def test_letters_are_bytes_in_a_last_column_and_the_part_names_their_alphabet(tmp_path):
    path = tmp_path / "part-00000.parquet"
    spoken = said("u", alphabet=" ab")
    spoken = replace(spoken, utterance=replace(spoken.utterance, duration=0.5))
    write_part(path, [Tokenized(Utterance(id="written"), None), spoken])
    assert count_part(path) == Count(2, 0.5, 2)
    table = pq.read_table(path)
    costs = spoken.units.letters.costs
    assert table.column_names == [*SCHEMA.names, "letters"]
    assert table["letters"].to_pylist() == [None, costs.tobytes()]
    assert table.schema.metadata == {b"alphabet": b" ab"}
    assert [one.units and one.units.letters for one in read_part(path, letters=False)] == [None] * 2


def test_a_part_has_one_alphabet(tmp_path):
    with pytest.raises(ValueError, match=r"several alphabets in one part: \[' a', ' ab'\]"):
        write_part(tmp_path / "part-00000.parquet", [said(x, alphabet=x) for x in (" ab", " a")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [({b"alphabet": b" abc"}, "cannot reshape"), (None, "frames have letters in as many")],
)
def test_letters_that_are_not_of_the_parts_alphabet_are_no_part(tmp_path, metadata, reason):
    path = tmp_path / "part-00000.parquet"
    write_part(path, [said("u", (3, 1, 3), alphabet=" ab")])
    pq.write_table(pq.read_table(path).replace_schema_metadata(metadata), path)
    with pytest.raises(TokensError, match=f"{path} is not a tokenized part: .*{reason}"):
        list(read_part(path))


def test_a_directory_without_parts_is_named(tmp_path):
    with pytest.raises(TokensError, match=f"no tokenized parts in {tmp_path}"):
        list(read(tmp_path))


def other_columns(path):
    pq.write_table(pa.table({"utterance": ["u"], "text": ["hello"]}), path)


def other_types(path):
    pq.write_table(pa.table({"utterance": [["u"]]}), path)


def torn(path):
    write_part(path, [said("u")])
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize("damage", [other_columns, other_types, torn, lambda path: None])
def test_a_file_that_is_no_part_is_named(tmp_path, damage):
    path = tmp_path / "part-00000.parquet"
    damage(path)
    with pytest.raises(TokensError, match=f"{path} is not a tokenized part"):
        list(read_part(path))


def test_texts_are_read_without_the_rest(tmp_path):
    def written(*texts):
        return [Tokenized(Utterance(id=str(n), text=text), None) for n, text in enumerate(texts)]

    write_part(tmp_path / "part-00001.parquet", written("later"))
    write_part(tmp_path / "part-00000.parquet", written("first", None, "", "second"))
    assert list(read_texts(tmp_path)) == ["first", "second", "later"]
    with pytest.raises(TokensError, match="no tokenized parts in"):
        list(read_texts(tmp_path / "nothing"))
