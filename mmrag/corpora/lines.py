"""Files of text, a sentence or a phrase a line."""

from __future__ import annotations

from pathlib import Path


def read(path: Path) -> list[tuple[int, str]]:
    """The lines of a UTF-8 file that are not blank, stripped, with their numbers from 1.

    A byte-order mark is not part of the first line. Raises ValueError that names the line for a
    file that is not UTF-8, OSError for one that cannot be read.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{number}: not UTF-8 text: {error.reason}") from None
    # Not splitlines: it also splits at characters that no editor counts as a new line.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
