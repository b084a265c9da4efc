"""Real sentences from text files, each in one split by what it says.

Which split a sentence belongs to depends on its words alone: not on its file, its neighbours, a
seed, or how it is punctuated. So a sentence that is tested is never trained on, whichever corpora
are made of whichever files.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from mmrag.text import fold, read_lines, spoken

WORDS = range(2, 31)
"""Shorter lines are scraps, longer ones no sentence that is said in one breath."""


def read(files: Sequence[Path | str], held_out: float) -> dict[str, list[tuple[str, str]]]:
    """(sentence, file's name) of lm, dev and test, as they are spoken, in the order of the files.

    dev and test have the share `held_out` each. What stands twice, has letters that English lacks
    or is too short or too long is left out. Raises OSError or ValueError, which name the file.
    """
    splits: dict[str, list[tuple[str, str]]] = {"lm": [], "dev": [], "test": []}
    seen: set[str] = set()
    for file in map(Path, files):
        for _, line in read_lines(file):
            text = fold(spoken(line))
            if text in seen or not re.fullmatch(r"[a-z' ]+", text) or _count(text) not in WORDS:
                continue
            seen.add(text)
            splits[split_of(text, held_out)].append((text, file.stem))
    return splits


def split_of(text: str, held_out: float) -> str:
    """`lm`, `dev` or `test`, by the words of `text`."""
    digest = hashlib.sha256(fold(spoken(text)).encode()).digest()
    place = int.from_bytes(digest[:8]) / 2**64
    return "dev" if place < held_out else "test" if place < 2 * held_out else "lm"


def _count(text: str) -> int:
    return len(text.split())
