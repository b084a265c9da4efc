"""Real sentences from text files, each in one split by what it says.

Which split a sentence belongs to depends on its words alone: not on its file, its neighbours, a
seed, or how it is punctuated. So a sentence that is tested is never trained on, whichever corpora
are made of whichever files.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence

from mmrag.folders import printable
from mmrag.records import Rejection
from mmrag.storage import Location, located
from mmrag.text import fold, read_lines, spoken

WORDS = range(2, 31)
"""Shorter lines are scraps, longer ones no sentence that is said in one breath."""


def read(
    files: Sequence[Location | str], held_out: float, taken: set[str]
) -> Iterator[tuple[str, str, str]]:
    """(split, sentence, file's name) as it is spoken, in the order of the files; a split is lm, dev
    or test.

    dev and test have the share `held_out` each. What is `taken` is not there, nor what stands
    before, which is added to it; and what is `left_out` not at all. Raises OSError or ValueError,
    which name the file.
    """
    for file, _, text in _lines(files):
        if text not in taken and refusal(text) is None:
            taken.add(text)
            yield split_of(text, held_out), text, file.stem


def left_out(files: Sequence[Location | str]) -> Iterator[Rejection]:
    """The lines that nobody is to say, and why."""
    for file, number, text in _lines(files):
        if (reason := refusal(text)) is not None:
            yield Rejection(f"{printable(file)}:{number}", reason)


def _lines(files: Sequence[Location | str]) -> Iterator[tuple[Location, int, str]]:
    """Each line as it is spoken, with its file and number."""
    for file in map(located, files):
        for number, line in read_lines(file):
            yield file, number, fold(spoken(line))


def refusal(text: str) -> str | None:
    """Why a text is no sentence to be said; None if it is one."""
    if not re.fullmatch(r"[a-z' ]*", text):
        return f"letters that English lacks in {text!r}"
    if (count := len(text.split())) not in WORDS:
        return f"{count} words, and {WORDS.start} to {WORDS.stop - 1} are said in one breath"
    return None


def split_of(text: str, held_out: float) -> str:
    """`lm`, `dev` or `test`, by the words of `text`."""
    digest = hashlib.sha256(fold(spoken(text)).encode()).digest()
    place = int.from_bytes(digest[:8]) / 2**64
    return "dev" if place < held_out else "test" if place < 2 * held_out else "lm"
