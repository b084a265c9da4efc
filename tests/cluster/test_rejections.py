"""What stages leave beside their parts."""

from cluster.rejections import (
    PIECES,
    Unread,
    join_rejections,
    read_rejections,
    write_rejections,
)
from mmrag.records import Rejection


def test_rejections_are_read_as_they_were_written(tmp_path):
    """Line separators of Unicode stand in names and reasons as they are."""
    rejected = [Rejection("a\u2028b.wav", "café \x85 is no audio"), Rejection("c", "d")]
    write_rejections(tmp_path / "rejected.jsonl", rejected)
    assert read_rejections(tmp_path / "rejected.jsonl") == rejected


def test_what_was_not_read_stands_in_front_of_what_parts_reject(tmp_path):
    def some(*names: str) -> list[Rejection]:
        return [Rejection(name, "why") for name in names]

    (tmp_path / "lm").mkdir()
    write_rejections(tmp_path / "lm" / ".part-00000.rejected.jsonl", some("c", "d"))
    for number, names in enumerate(["a", "b"]):
        Unread("lm/part", number, some(names)).keep(tmp_path)
    pieces = sorted((tmp_path / "lm").glob(PIECES))
    assert join_rejections(tmp_path / "all.jsonl", pieces) == 4
    assert read_rejections(tmp_path / "all.jsonl") == some("a", "b", "c", "d")
    assert read_rejections(tmp_path / "all.jsonl", 3) == some("a", "b", "c")
