"""What a stage could not use, and why: a list beside its output."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from mmrag.records import Rejection

REJECTED = "rejected.jsonl"
"""The file of a stage's output that names what could not be used, and why."""


def write_rejections(path: Path, rejected: Iterable[Rejection]) -> None:
    """One JSON object a line, UTF-8: the source and the reason."""
    lines = [json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in rejected]
    path.write_bytes("".join(lines).encode("utf-8", "backslashreplace"))


def read_rejections(path: Path) -> list[Rejection]:
    """What `write_rejections` wrote."""
    with path.open("rb") as stream:
        return [Rejection(**json.loads(line)) for line in stream]
