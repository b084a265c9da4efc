import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrag.names import Lookup, Names, NamesWriter, digest

NAMES = st.lists(st.text(max_size=4), max_size=12)


def written(directory, *batches):
    writer = NamesWriter(directory, "names")
    for batch in batches:
        writer.append(Names.of(batch))
    writer.close()
    every = [digest(name) for batch in batches for name in batch]
    Lookup.write(directory, np.array(every, np.uint64))
    return Names.open(directory, "names")


@settings(max_examples=25, deadline=None)
@given(NAMES, NAMES)
def test_names_are_read_back_and_found(tmp_path_factory, first, second):
    directory = tmp_path_factory.mktemp("names")
    names, told = written(directory, first, second), [*first, *second]
    assert list(names) == told and len(names) == len(told)
    find = Lookup(directory, names)
    for name in {*told, "nobody's"}:
        assert find(name).tolist() == [at for at, one in enumerate(told) if one == name]


@pytest.mark.parametrize("number", [-1, 2])
def test_there_is_no_name_beyond_the_last(number):
    with pytest.raises(IndexError, match=f"name {number} of 2"):
        Names.of(["a", "b"])[number]


def test_names_of_the_same_digest_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("mmrag.names.digest", len)
    writer = NamesWriter(tmp_path, "names")
    writer.append(Names.of(["ab", "cd", "e", "ab"]))
    writer.close()
    Lookup.write(tmp_path, np.array([2, 2, 1, 2], np.uint64))
    find = Lookup(tmp_path, Names.open(tmp_path, "names"))
    assert [find(name).tolist() for name in ("ab", "cd", "xy", "e")] == [[0, 3], [1], [], [2]]
