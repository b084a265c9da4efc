"""Models that come with the package: `mmrag:tiny` names the one in `models/tiny/`."""

from __future__ import annotations

from pathlib import Path

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
    here = Path(__file__).parent / "models"
    directory = here / text.removeprefix(PREFIX)
    shipped = sorted(each.parent.name for each in here.glob("*/lm"))
    if directory.parent != here or directory.name not in shipped:
        raise ValueError(f"no model {text!r} in the package, which has {shipped}")
    return directory
