"""Several arrays in one file that other tools open, and nothing but what was written is read."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from mmrag.retrieval.tensors import digest, open_tensors, overwrite, write_tensors

ARRAYS = {
    "text": np.frombuffer(b"abc", np.uint8),
    "keys": np.arange(6, dtype=np.float16).reshape(3, 2),
    "ids": np.array([-1, -1, -1], np.int32),
    "none": np.zeros((0, 5), np.int32),
    "digests": np.array([7, 2**63], np.uint64),
    "offsets": np.array([0, 3, -4], np.int64),
}


def write(path, arrays=ARRAYS, changing=("ids",), rows=2):
    """Written `rows` rows at a time."""
    return write_tensors(
        path,
        {name: (values.dtype, values.shape) for name, values in arrays.items()},
        lambda name: (arrays[name][at : at + rows] for at in range(0, len(arrays[name]), rows)),
        changing,
    )


@pytest.fixture
def path(tmp_path):
    write(tmp_path / "arrays.safetensors")
    return tmp_path / "arrays.safetensors"


def test_arrays_come_back_mapped_aligned_and_read_only(path):
    opened = open_tensors(path)
    assert opened.arrays.keys() == ARRAYS.keys()
    for name, values in ARRAYS.items():
        found = opened.arrays[name]
        np.testing.assert_array_equal(found, values)
        assert (found.dtype, found.shape) == (values.dtype, values.shape)
        assert found.flags.aligned and not found.flags.writeable
        if name != "ids":
            assert opened.header.digests[name] == digest([values])
    assert "ids" not in opened.header.digests


def test_the_safetensors_library_reads_the_file(path):
    found = load_file(path)
    assert found.keys() == ARRAYS.keys()
    for name, values in ARRAYS.items():
        np.testing.assert_array_equal(found[name], values)
        assert found[name].dtype == values.dtype


def test_the_header_that_was_written_is_the_one_that_is_read(path):
    assert open_tensors(path).header == write(path)


def test_an_array_that_may_change_is_overwritten_in_its_place_and_others_are_not(path):
    before = open_tensors(path)
    overwrite(path, "ids", np.array([4, 5, 6], np.int32))
    after = open_tensors(path)
    assert after.header == before.header
    for name, values in ARRAYS.items():
        assert after.arrays[name].tolist() == ([4, 5, 6] if name == "ids" else values.tolist())
    assert before.arrays["ids"].tolist() == [4, 5, 6], "a map shows it"
    for name, values in (
        ("offsets", ARRAYS["offsets"]),
        ("ids", np.zeros(3, np.int64)),
        ("ids", np.zeros(2, np.int32)),
    ):
        with pytest.raises(ValueError, match=f"{name} is not"):
            overwrite(path, name, values)


def test_zeros_are_holes_and_a_negative_zero_is_none(tmp_path):
    keys = np.zeros((4096, 64), np.float16)
    keys[1000] = 1
    keys[2000] = -0.0
    write(tmp_path / "a", {"keys": keys, "text": np.zeros(9000, np.uint8)}, (), rows=4096)
    opened = open_tensors(tmp_path / "a")
    assert opened.arrays["keys"].tobytes() == keys.tobytes()
    assert opened.header.digests["keys"] == digest([opened.arrays["keys"]]) == digest([keys])
    status = (tmp_path / "a").stat()
    assert status.st_size > keys.nbytes + 9000 and status.st_blocks * 512 < keys.nbytes / 8


def test_rows_that_are_not_those_that_were_said_are_refused(tmp_path):
    for rows in (2, 4):
        with pytest.raises(ValueError, match=r"rows of ids are not those of int32 \(3,\)"):
            write_tensors(
                tmp_path / "a",
                {"ids": (np.dtype(np.int32), (3,))},
                lambda name, rows=rows: [np.zeros(rows, np.int32)],
            )


def fields_of(path):
    whole = path.read_bytes()
    stop = 8 + int.from_bytes(whole[:8], "little")
    return json.loads(whole[8:stop]), whole[stop:]


def swapped(fields):
    """Two arrays each at the other's place."""
    first, second = fields["offsets"], fields["digests"]
    first["data_offsets"], second["data_offsets"] = second["data_offsets"], first["data_offsets"]


HEADERS = [
    lambda fields: fields["keys"].update(data_offsets=[0, 12]),
    lambda fields: fields["keys"].update(shape=[3, 3]),
    lambda fields: fields["keys"].update(shape=[-3, -2]),
    lambda fields: fields["keys"].update(shape=[3.0, 2]),
    lambda fields: fields["keys"].update(shape=[True, 6]),
    lambda fields: fields["keys"].update(shape="32"),
    lambda fields: fields["keys"].update(shape=[2**70, 2]),
    lambda fields: fields["keys"].update(dtype="BF16"),
    lambda fields: fields["keys"].update(dtype=["F16"]),
    lambda fields: fields["keys"].update(more=1),
    lambda fields: fields["keys"].pop("shape"),
    lambda fields: fields.pop("keys"),
    lambda fields: fields.pop("__metadata__"),
    lambda fields: fields.update(__metadata__=[]),
    lambda fields: fields.update(__metadata__={"keys": 7}),
    lambda fields: fields.update(keys=3),
    lambda fields: fields.update({"keys": fields.pop("keys")}),
    swapped,
]


@pytest.mark.parametrize("change", HEADERS, ids=range(len(HEADERS)))
def test_a_header_that_is_not_written_here_is_refused(path, change):
    fields, data = fields_of(path)
    change(fields)
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(ValueError, match=r"its header is not|it has \d+ bytes, not"):
        open_tensors(path)


def test_no_byte_of_a_header_may_be_another(path):
    whole = path.read_bytes()
    written = open_tensors(path).header
    for byte in range(len(whole) - len(fields_of(path)[1])):
        path.write_bytes(whole[:byte] + bytes([whole[byte] ^ 1]) + whole[byte + 1 :])
        try:
            assert open_tensors(path).header.digest != written.digest, "which a list has"
        except ValueError:
            continue


def test_a_file_of_another_size_is_refused(path):
    whole = path.read_bytes()
    for part in (b"", whole[:7], whole[:200], whole[:-1], whole + b"0", bytes(8) + whole[8:]):
        path.write_bytes(part)
        with pytest.raises(ValueError, match=r"its|it has"):
            open_tensors(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        open_tensors(path)
