"""A datastore that is whole, and one in which anything at all was changed."""

import numpy as np
import pytest
from small_datastores import DESCRIPTION, fill, flip, place_of, store_arrays, stored_arrays

from mmrag.retrieval.compaction import compact
from mmrag.retrieval.datastore import LIST, create, delete
from mmrag.retrieval.segment import DatastoreError
from mmrag.retrieval.stored import segment_file
from mmrag.retrieval.verify import verify


@pytest.fixture
def directory(tmp_path):
    create(tmp_path / "store", DESCRIPTION)
    fill(tmp_path / "store", 3)
    delete(tmp_path / "store", [4, 9])
    return tmp_path / "store"


def test_what_was_written_is_whole_before_and_after_it_is_merged(directory):
    assert list(verify(directory)) == []
    compact(directory, everything=True)
    assert list(verify(directory)) == []


@pytest.mark.parametrize("merged", [False, True])
def test_a_flipped_bit_is_found_wherever_it_is(directory, merged):
    if merged:
        compact(directory, everything=True)
    files = sorted(directory.glob("segments/*"))
    assert len(files) == (1 if merged else 3)
    for file in files:
        for byte in range(0, file.stat().st_size, 13):
            flip(file, byte)
            problems = list(verify(directory))
            assert problems and all(str(file) in one for one in problems), byte
            flip(file, byte)
    assert list(verify(directory)) == []


def test_the_array_is_named_whose_bit_is_flipped(directory):
    file = segment_file(directory, "s-1")
    for field in stored_arrays(directory, "s-1"):
        byte = place_of(file, field)
        flip(file, byte)
        assert any(f"{file}: its {field} are not as they" in one for one in verify(directory))
        flip(file, byte)


def test_what_is_missing_or_not_what_was_published_is_named(directory):
    first, second, third = sorted((directory / "segments").iterdir())
    first.unlink()
    second.write_bytes(third.read_bytes())
    missing, other = verify(directory)
    assert missing == f"segment s-0 of {directory} is missing"
    assert other == f"{second} is not the segment that was published: its header is another"


@pytest.mark.parametrize(
    ("field", "change", "problem"),
    [
        ("utterances", lambda array: array[::-1], "utterances are not in order"),
        ("utterances", lambda array: array + 9, "an entry's utterance is not one of 2"),
        ("utterance_documents", lambda array: array + 2, "document is not one of 2"),
        ("document_digests", lambda array: array[::-1], "documents are not in order"),
        ("document_ids", lambda array: array + 9, "number is not one of 4"),
        ("utterance_offsets", lambda array: array + 1, "utterance names do not add up"),
    ],
)
def test_numbers_that_contradict_each_other_are_found_under_good_checksums(
    directory, field, change, problem
):
    arrays = stored_arrays(directory, "s-1")
    store_arrays(directory, "s-1", arrays | {field: change(arrays[field])})
    [found] = verify(directory)
    assert problem in found and str(segment_file(directory, "s-1")) in found


def test_deletions_that_are_none_are_found(directory):
    [file] = directory.glob("deleted-*.npy")
    np.save(file, np.array([9, 4]))
    assert list(verify(directory)) == [f"{file}: not ascending entries below 18"]
    file.unlink()
    assert list(verify(directory)) == [f"{file} is missing"]


def test_a_list_that_cannot_be_read_is_an_error(directory):
    (directory / LIST).write_text("{")
    with pytest.raises(DatastoreError, match=r"segments\.json is damaged"):
        list(verify(directory))
