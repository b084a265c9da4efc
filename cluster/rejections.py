"""What a stage could not use, and why: a list beside its output.

Whoever meets a rejection lists it in a file of its own beside the parts; the lists are joined at
the end, piece by piece, so that nobody has to hold them all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from mmrag.records import Rejection

REJECTED = "rejected.jsonl"
"""The file of a stage's output that names what could not be used, and why."""
PIECES = ".*.rejected.jsonl"
"""The lists beside the parts of an output."""


@dataclass(frozen=True)
class Unread:
    """Lines of a corpus that could not be read, met on the way to its parts."""

    of: str
    """What the parts are named: `lm/part`."""
    number: int
    """Which list of those of the same parts this is."""
    rejected: list[Rejection]

    def keep(self, directory: Path) -> None:
        """List them beside the parts in `directory`, in front of what those reject."""
        path = directory / self.of
        path.parent.mkdir(parents=True, exist_ok=True)
        listed = path.with_name(f".lines-{path.name}-{self.number:05d}.rejected.jsonl")
        write_rejections(listed, self.rejected)


def write_rejections(path: Path, rejected: Iterable[Rejection]) -> int:
    """One JSON object a line, UTF-8: the source and the reason. Returns how many there are."""
    count = 0
    with path.open("wb") as stream:
        for one in rejected:
            line = json.dumps(asdict(one), ensure_ascii=False) + "\n"
            stream.write(line.encode("utf-8", "backslashreplace"))
            count += 1
    return count


def read_rejections(path: Path, at_most: int | None = None) -> list[Rejection]:
    """What `write_rejections` wrote, or the first so many of it."""
    with path.open("rb") as stream:
        return [Rejection(**json.loads(line)) for line in islice(stream, at_most)]


def join_rejections(path: Path, pieces: Iterable[Path]) -> int:
    """Write the lists `pieces` as one, in their order; how many rejections they hold."""
    count = 0
    with path.open("wb") as stream:
        for piece in pieces:
            with piece.open("rb") as lines:
                for line in lines:
                    stream.write(line)
                    count += 1
    return count
