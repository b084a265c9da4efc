import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrag.arrays import Growing, mapped

PIECES = st.lists(st.lists(st.integers(0, 65_535), max_size=5), max_size=6)


@settings(max_examples=25, deadline=None)
@given(PIECES)
def test_what_was_appended_piece_by_piece_is_one_array(tmp_path_factory, pieces):
    path = tmp_path_factory.mktemp("arrays") / "a.npy"
    growing = Growing(path, np.uint16)
    for piece in pieces:
        growing.append(np.array(piece, np.int64))
    growing.close()
    whole = [value for piece in pieces for value in piece]
    assert len(growing) == len(whole)
    for read in (mapped(path), np.load(path, allow_pickle=False)):
        assert read.dtype == np.uint16
        assert read.tolist() == whole


def test_a_header_has_room_for_any_length(tmp_path):
    growing = Growing(tmp_path / "a.npy", np.uint8)
    for _ in range(30):
        growing.append(np.ones(100_001, np.uint8))
    growing.close()
    assert mapped(tmp_path / "a.npy").sum() == 30 * 100_001


def test_rows_keep_their_width(tmp_path):
    growing = Growing(tmp_path / "a.npy", np.int64, width=3)
    growing.append(np.arange(6).reshape(2, 3))
    growing.append(np.zeros((0, 3), np.int64))
    with pytest.raises(ValueError, match=r"rows of shape \(2,\) where \(3,\) are kept"):
        growing.append(np.zeros((1, 2), np.int64))
    growing.close()
    assert mapped(tmp_path / "a.npy").tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("value", [256, -1])
def test_a_value_that_does_not_fit_is_refused(tmp_path, value):
    growing = Growing(tmp_path / "a.npy", np.uint8)
    with pytest.raises(ValueError, match="values that uint8 cannot hold"):
        growing.append(np.array([1, value]))


def test_what_is_mapped_cannot_be_written(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(3))
    with pytest.raises(ValueError, match="read-only"):
        mapped(tmp_path / "a.npy")[0] = 1


def test_python_objects_are_not_read(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}], object))
    with pytest.raises(ValueError):
        mapped(tmp_path / "a.npy")
