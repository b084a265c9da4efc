"""An entry as somebody gives it: how it is written, how it is said, and how much it weighs.

`text` is what a model writes, in its own letters; a transcript then has what the caller wants to
read in its place. Knows neither models nor synthesizers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mmrag.records import Line
from mmrag.text import read_lines

HEAVIEST = 2.0
"""Twice the votes of an entry that nobody weighed."""
MOST_PRONUNCIATIONS = 8
LETTER_A = "eigh"
"""How the letter A is called, for a synthesizer that would read the article."""
_SPLIT_A = re.compile(r"(?<![^\W\d_])[Aa](?=\d)|(?<=\d)[Aa](?![^\W\d_])")
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8})*")


@dataclass(frozen=True)
class Entry:
    """A name or phrase to listen for, or a sentence to find again."""

    text: str
    display_as: str | None = None
    """What transcripts have in its place; None: `text` as it stands."""
    pronunciations: tuple[str, ...] = ()
    """Respellings ("zole pie dem") or IPA between slashes; none: as `text` is read."""
    weight: float = 1.0
    """Of its votes, 0 (never retrieved) to HEAVIEST."""
    language: str | None = None
    """In which it is said (BCP 47); None: the model's own."""

    @property
    def code(self) -> str | None:
        """Its language by ISO 639-1 or -3, whatever the region; None for the model's own."""
        return self.language and re.split("[-_]", self.language.lower())[0]

    @property
    def foreign(self) -> bool:
        """Whether it is of another language than the sentences in which phrases are spoken."""
        return self.code not in (None, "en")

    @property
    def written(self) -> str:
        """What a reader of the transcript sees."""
        return self.text if self.display_as is None else self.display_as

    @property
    def spoken(self) -> Entry:
        """What of it is heard: entries that are alike in this have the same keys."""
        return replace(self, display_as=None, weight=1.0)

    def lines(self, carrier: str, spoken: str) -> list[str | Line]:
        """A carrier sentence about it, said in each of its ways; `spoken` is how the model writes
        it, which is what is said where no pronunciation is given."""
        said = self.said(spoken)
        return [self._line(carrier.format(phrase=one), one) for one in said]

    def said(self, spoken: str) -> tuple[str, ...]:
        """The ways in which it is said; `spoken` as in `lines`."""
        said = spoken if self.foreign else _lettered(spoken, self.text)
        return self.pronunciations or (said,)

    def _line(self, sentence: str, pronunciation: str) -> str | Line:
        phonetic = bool(self.pronunciations) and is_ipa(pronunciation)
        return Line(sentence, phonetic, self.language) if phonetic or self.language else sentence

    @property
    def plain(self) -> bool:
        """Whether it is a text and nothing else."""
        return self == Entry(self.text)

    def fields(self) -> dict[str, Any]:
        """What was said of it, by field: as JSON has it, and as `entry` takes it."""
        usual = asdict(Entry(self.text))
        told = {name: value for name, value in asdict(self).items() if value != usual[name]}
        if self.pronunciations:
            told["pronunciations"] = list(self.pronunciations)
        return {"text": self.text, **told}


def is_ipa(pronunciation: str) -> bool:
    """Whether a pronunciation is IPA, and not a respelling."""
    return len(pronunciation) > 2 and pronunciation[0] == pronunciation[-1] == "/"


def _lettered(spoken: str, text: str) -> str:
    """A text as it is `spoken`, with each A that is a letter called by its name: "A1C" is "eigh one
    C". One is where `text` has it beside a digit, beside another letter that stands alone (A B C),
    and at the end (vitamin A): there no article stands."""
    words = spoken.split()
    beside_digit = _SPLIT_A.search(text) is not None
    alone = any(word in ("a", "A") for word in text.split())

    def is_letter(place: int) -> bool:
        around = words[max(0, place - 1) : place] + words[place + 1 : place + 2]
        return (
            (beside_digit and (words[place] == "A" or not alone))
            or place == len(words) - 1
            or any(len(word) == 1 and word.isalpha() and word not in "aA" for word in around)
        )

    named = [
        LETTER_A if word in ("a", "A") and is_letter(place) else word
        for place, word in enumerate(words)
    ]
    return " ".join(named) if LETTER_A in named else spoken


FIELDS = tuple(field.name for field in fields(Entry))


def entry(given: str | Mapping[str, Any] | Entry) -> Entry:
    """A text, or the fields of an entry, as one; ValueError, which names the field, for another.

    Blanks and control characters are evened out.
    """
    if isinstance(given, Entry):
        return given
    if isinstance(given, str):
        given = {"text": given}
    if not isinstance(given, Mapping):
        raise ValueError(f"an entry is a text or an object of {', '.join(FIELDS)}")
    if unknown := [name for name in given if name not in FIELDS]:
        raise ValueError(f"{str(unknown[0])[:40]!r} is no field of an entry: {', '.join(FIELDS)}")
    if "text" not in given:
        raise ValueError("text: an entry needs one")
    return Entry(
        text=_text("text", given["text"]),
        display_as=_optional("display_as", given.get("display_as")),
        pronunciations=_pronunciations(given.get("pronunciations")),
        weight=_weight(given.get("weight")),
        language=_language(given.get("language")),
    )


def line(given: str) -> Entry:
    """An entry of a line of a file, or of a form's field: a JSON object where it begins with a
    brace, else a text. ValueError as for `entry`."""
    if not given.lstrip().startswith("{"):
        return entry(given)
    try:
        read = json.loads(given)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a JSON object: {error}") from None
    return entry(read)


def read_entries(file: Path) -> list[Entry]:
    """The entries of a file, one a line (`line`); ValueError, which names the line, for what is
    none, OSError for a file that cannot be read."""
    found = []
    for number, text in read_lines(file):
        try:
            found.append(line(text))
        except ValueError as error:
            raise ValueError(f"{file}:{number}: {error}") from None
    return entries(found)


def entries(given: Iterable[str | Mapping[str, Any] | Entry]) -> list[Entry]:
    """Entries by their texts, each once: the last wording counts, the first place."""
    found: dict[str, Entry] = {}
    for one in map(entry, given):
        found[one.text] = one
    return list(found.values())


def evened(text: str) -> str:
    """`text` with blanks and control characters as single blanks."""
    return " ".join(_CONTROL.sub(" ", text).split())


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""A synthesizer takes the first for the end of what it is to say."""


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: a text, not {type(value).__name__}")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{name}: half a character is no text")
    return evened(value)


def _optional(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if not (text := _text(name, value)):
        raise ValueError(f"{name}: nothing to write; leave it out for the text itself")
    return text


def _pronunciations(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise ValueError("pronunciations: a list of texts")
    if len(value) > MOST_PRONUNCIATIONS:
        raise ValueError(f"pronunciations: {len(value)}, at most {MOST_PRONUNCIATIONS}")
    said = [_text(f"pronunciations[{number}]", one) for number, one in enumerate(value)]
    if "" in said:
        raise ValueError(f"pronunciations[{said.index('')}]: nothing to say")
    return tuple(dict.fromkeys(said))


def _weight(value: Any) -> float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= HEAVIEST:
        raise ValueError(f"weight: a number from 0 to {HEAVIEST:g}, not {str(value)[:40]!r}")
    return float(value)


def _language(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not _LANGUAGE.fullmatch(value):
        raise ValueError(f"language: a code such as 'en', 'en-GB' or 'es', not {str(value)[:40]!r}")
    return value
