"""Models that come with the package: `mmrag:tiny` names the one in `models/tiny/`."""

from __future__ import annotations

from pathlib import Path

DIRECTORY = Path(__file__).parent / "models"
PREFIX = "mmrag:"
TINY = "mmrag:tiny"


def find(name: Path | str) -> Path:
    """The directory of a model: `hubert/`, `codebook/` and `lm/` below it.

    A name with PREFIX is a model of this package, anything else a path. Raises ValueError for a
    model that the package does not have.
    """
    text = str(name)
    if not text.startswith(PREFIX):
        return Path(name)
    directory = DIRECTORY / text.removeprefix(PREFIX)
    shipped = sorted(each.parent.name for each in DIRECTORY.glob("*/lm"))
    if directory.parent != DIRECTORY or directory.name not in shipped:
        raise ValueError(f"no model {text!r} in the package, which has {shipped}")
    return directory
