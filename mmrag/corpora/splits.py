"""What readers of published corpora share: names of splits, tables of lines, rows that are sound.

A published corpus has splits of its own ("train-clean-100", "validation"); ours are the names that
the stages know. What the rows mean is the readers' business.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from mmrag.corpora.ids import Ids
from mmrag.records import Rejection, Utterance

LM, DEV, TEST, ALL = "lm", "dev", "test", "all"
ORDER = (LM, "text", "adapter", "datastore", DEV, TEST)
"""Our splits; the codebook is fitted on the first that a corpus has."""

_NAMES = {
    LM: r"lm|train(ing)?|fine-?tune",
    "text": "text",
    "adapter": "adapter",
    "datastore": "datastore",
    DEV: r"dev|val|valid(ation)?",
    TEST: "test",
}

Row = Utterance | Rejection
Part = TypeVar("Part")


class CorpusError(ValueError):
    """A corpus as a whole cannot be read; the message names it."""


@dataclass(frozen=True)
class Corpus:
    """The rows of each of our splits, read once, and the lists that come with utterances."""

    splits: dict[str, Iterable[Row]]
    phrases: dict[str, list[str]] = field(default_factory=dict)
    """Utterance id -> the phrases among which are those it may hold (dynamic context)."""


def split_of(name: str) -> str | None:
    """Our name of a published split: `train-clean-100` is lm, `validation` dev; None if unknown."""
    for ours, pattern in _NAMES.items():
        if re.match(rf"({pattern})(?![a-z])", name.lower()):
            return ours
    return None


def by_split(path: Path, parts: Mapping[str, Part]) -> dict[str, list[tuple[str, Part]]]:
    """A corpus's parts, by name, under our splits in `ORDER`; one alone of unknown name is `all`.

    Raises CorpusError for parts whose names say no split.
    """
    unknown = [name for name in parts if split_of(name) is None]
    if unknown and len(parts) == 1:
        return {ALL: list(parts.items())}
    if unknown:
        raise CorpusError(
            f"{path}: which split is {', '.join(map(repr, unknown))}? The names of several parts "
            "begin with train, dev, valid or test; name one part alone to read it without splits"
        )
    found: dict[str, list[tuple[str, Part]]] = {}
    for name, part in parts.items():
        found.setdefault(split_of(name), []).append((name, part))
    return {ours: found[ours] for ours in ORDER if ours in found}


def sound(rows: Iterable[Row], source: str) -> Iterator[Row]:
    """The rows, with those rejected whose id stood before or whose text no file could hold."""
    seen = Ids()
    for row in rows:
        if isinstance(row, Rejection):
            yield row
        elif broken := _unwritable(row):
            yield Rejection(source, f"utterance {row.id!r}: half a character in its {broken}")
        elif seen.first(row.id) is not None:
            yield Rejection(source, f"utterance {row.id!r} stands twice")
        else:
            yield row


def lines(path: Path) -> Iterator[tuple[int, str] | Rejection]:
    """The numbered lines of a text file that are not blank, without their ends.

    A line that is not UTF-8 is a Rejection. Raises CorpusError if the file cannot be opened.
    """
    try:
        stream = path.open("rb")
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror}") from None
    with stream:
        for number, line in enumerate(stream, start=1):
            try:
                text = line.decode("utf-8-sig").rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield Rejection(f"{path}:{number}", f"not UTF-8: {error.reason}")
                continue
            if text.strip():
                yield number, text


def _unwritable(row: Utterance) -> str | None:
    fields = {
        "id": [row.id],
        "text": [row.text or ""],
        "speaker": [row.speaker],
        "document": [row.document],
        "entities": row.entities,
        "words": [word.text for word in row.words],
    }
    for name, values in fields.items():
        try:
            "".join(values).encode()
        except UnicodeEncodeError:
            return name
    return None
