"""Models that come with the package: `mmrag:small` names the one in `models/small/`."""

from __future__ import annotations

from pathlib import Path

from mmrag.storage import Location, located

DIRECTORY = Path(__file__).parent / "models"
PREFIX = "mmrag:"
TINY = "mmrag:tiny"
"""Small enough for tests and the demo."""
DEFAULT = "mmrag:small"
"""What transcribes where nobody names a model."""
SEGMENT_SECONDS = {DEFAULT: 8.0}
"""The longest segments that a model has learned to read, other than those of `segment_seconds`."""


def find(name: Location | str) -> Location:
    """The directory of a model: `hubert/`, `codebook/` and `lm/` below it.

    A name with PREFIX is a model of this package, anything else a path or a URL. Raises ValueError
    for a model that the package does not have.
    """
    text = str(name)
    if not text.startswith(PREFIX):
        return located(name)
    directory = DIRECTORY / text.removeprefix(PREFIX)
    shipped = sorted(each.parent.name for each in DIRECTORY.glob("*/lm"))
    if directory.parent != DIRECTORY or directory.name not in shipped:
        raise ValueError(f"no model {text!r} in the package, which has {shipped}")
    return directory


def segment_seconds(name: Path | str) -> float:
    """The longest segment that a model is given where nobody says so."""
    return SEGMENT_SECONDS.get(str(name), 4.0)
