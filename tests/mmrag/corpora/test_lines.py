import pytest

from mmrag.corpora import lines


def test_lines_keep_the_numbers_an_editor_shows(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffzanab kuri\r\n\r\n  port\u2028darnby \rruto\n".encode())
    assert lines.read(path) == [(1, "zanab kuri"), (3, "port\u2028darnby"), (4, "ruto")]


def test_a_file_in_another_encoding_is_named_with_the_line(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes("zanab\njosé\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"names\.txt:2: not UTF-8 text: invalid continuation"):
        lines.read(path)
