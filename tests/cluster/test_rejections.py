"""What stages leave beside their parts."""

from cluster.rejections import read_rejections, write_rejections
from mmrag.records import Rejection


def test_rejections_are_read_as_they_were_written(tmp_path):
    """Line separators of Unicode stand in names and reasons as they are."""
    rejected = [Rejection("a\u2028b.wav", "café \x85 is no audio"), Rejection("c", "d")]
    write_rejections(tmp_path / "rejected.jsonl", rejected)
    assert read_rejections(tmp_path / "rejected.jsonl") == rejected
