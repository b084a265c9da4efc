"""A datastore that is whole, and one in which anything at all was changed."""

import shutil

import numpy as np
import pytest
from small_datastores import DESCRIPTION, fill

from mmrag.retrieval.compaction import compact
from mmrag.retrieval.datastore import LIST, create, delete
from mmrag.retrieval.segment import DatastoreError
from mmrag.retrieval.stored import seal
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
def test_a_flipped_bit_is_found_in_whatever_file_it_is(directory, tmp_path, merged):
    if merged:
        compact(directory, everything=True)
    files = sorted(one.relative_to(directory) for one in directory.glob("segments/*/*"))
    assert len(files) == (1 if merged else 3) * 13
    for name in files:
        shutil.copytree(directory, tmp_path / "copy")
        file = tmp_path / "copy" / name
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        problems = list(verify(tmp_path / "copy"))
        assert problems and any(str(file.parent) in one for one in problems), name
        if file.suffix == ".npy":
            assert any(str(file) in one for one in problems), problems
        shutil.rmtree(tmp_path / "copy")


def test_what_is_missing_or_too_much_is_named(directory):
    first, second, third = sorted((directory / "segments").iterdir())
    (first / "keys.npy").unlink()
    (second / "checksums.json").unlink()
    np.save(third / "more.npy", np.zeros(3))
    problems = list(verify(directory))
    assert len(problems) == 3
    assert f"{first / 'keys.npy'} is missing" in problems
    assert f"{second / 'checksums.json'} is missing" in problems
    assert any(str(third / "more.npy") in one for one in problems)
    shutil.rmtree(first)
    assert any("segment s-0" in one and "is missing" in one for one in verify(directory))


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
    path = directory / "segments" / "s-1"
    np.save(path / f"{field}.npy", change(np.load(path / f"{field}.npy")))
    seal(path)
    assert any(problem in one and str(path) in one for one in verify(directory))


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
