"""A corpus as training reads it, packed on disk: one mapped array of ids, and where each begins.

Made once from the tokenized Parquet, part by part, for one vocabulary: a million utterances take a
process no more memory than ten. An utterance's word pieces lie before its units. `Packed` is a
sequence of the examples that `examples` would give, in the same order.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import numpy as np

from mmrag import durable
from mmrag.arrays import Growing, mapped
from mmrag.artifact import write_json
from mmrag.model.examples import Example, examples, speakable, unspeakable
from mmrag.model.vocabulary import Vocabulary
from mmrag.names import Lookup, Names, NamesWriter, digest
from mmrag.records import Rejection
from mmrag.speech.tokenized import read_part

FILE = "pack.json"
"""What a packed directory was made from."""
REJECTED = "rejected.jsonl"
"""Utterances that are not in it, for no piece writes their text."""
SCHEMA = 1


class PackError(ValueError):
    """A packed directory is missing, damaged or made from something else."""


@dataclass(frozen=True)
class Segment:
    """What some utterances add to a pack."""

    ids: np.ndarray
    """(T,): the pieces and units of one utterance after the other."""
    texts: np.ndarray
    """(N,): word pieces of each."""
    units: np.ndarray
    """(N,): units of each; -1 where nobody spoke it."""
    letters: np.ndarray
    """(L,): the spelling of one text after the other."""
    letter_counts: np.ndarray
    """(N,)"""
    names: Names
    entities: Names
    """JSON lists; "" for an utterance without."""
    digests: np.ndarray
    """(N,) uint64, of the names."""
    rejected: Sequence[Rejection] = ()


def segment(part: Path, vocabulary: Vocabulary) -> Segment:
    """The utterances of one Parquet part; TokensError if it is none."""
    told = list(read_part(part, letters=False))
    corpus = list(speakable(told, vocabulary))
    data = examples(corpus, vocabulary)
    letters = [vocabulary.spelling(one.text) for one in data]
    named = [json.dumps(said) if (said := one.utterance.entities) else "" for one in corpus]
    return Segment(
        ids=_joined([part for one in data for part in (one.text, one.units or [])]),
        texts=np.array([len(one.text) for one in data], np.int64),
        units=np.array([-1 if one.units is None else len(one.units) for one in data], np.int64),
        letters=_joined(letters),
        letter_counts=np.array([len(one) for one in letters], np.int64),
        names=Names.of(one.name for one in data),
        entities=Names.of(named),
        digests=np.array([digest(one.name) for one in data], np.uint64),
        rejected=list(unspeakable(told, vocabulary)),
    )


def _joined(rows: Sequence[Sequence[int]]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *(np.array(row, np.int64) for row in rows)])


def write(directory: Path, segments: Iterable[Segment], vocabulary: Vocabulary) -> dict[str, int]:
    """Fill an empty directory with a pack; one segment is in memory at a time, and 24 bytes an
    utterance at the end. Returns what it holds, counted."""
    kinds = {
        "ids": np.min_scalar_type(vocabulary.size - 1),
        "id_offsets": np.int64,
        "texts": np.uint32,
        "units": np.uint32,
        "spoken": np.bool_,
        "letters": np.min_scalar_type(len(vocabulary.alphabet)),
        "letter_offsets": np.int64,
    }
    files = {name: Growing(directory / f"{name}.npy", kind) for name, kind in kinds.items()}
    names, entities = NamesWriter(directory, "names"), NamesWriter(directory, "entities")
    files["id_offsets"].append(np.zeros(1, np.int64))
    files["letter_offsets"].append(np.zeros(1, np.int64))
    digests, counted = [np.zeros(0, np.uint64)], {"utterances": 0, "units": 0, "rejected": 0}
    with (directory / REJECTED).open("w", encoding="utf-8") as rejected:
        for one in segments:
            units = np.maximum(one.units, 0)
            ends = len(files["ids"]) + np.cumsum(one.texts + units)
            letters = len(files["letters"]) + np.cumsum(one.letter_counts)
            values = {"ids": one.ids, "id_offsets": ends, "texts": one.texts, "units": units}
            values |= {"spoken": one.units >= 0}
            values |= {"letters": one.letters, "letter_offsets": letters}
            for name, value in values.items():
                files[name].append(value)
            names.append(one.names)
            entities.append(one.entities)
            digests.append(one.digests)
            for each in one.rejected:
                rejected.write(_line({"id": each.source, "reason": each.reason}))
            counted["utterances"] += len(one.texts)
            counted["units"] += int(units.sum())
            counted["rejected"] += len(one.rejected)
    for file in (*files.values(), names, entities):
        file.close()
    Lookup.write(directory, np.concatenate(digests))
    return counted


def _line(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False) + "\n"


def made(
    directory: Path, identity: Mapping[str, Any], fill: Callable[[Path], Mapping[str, int]]
) -> Path:
    """`directory`, filled by `fill` unless it is there and was made from just this `identity`.

    It is there whole or not at all, and one that was made from something else is never used.
    `fill` returns what it counted.
    """
    wanted = json.loads(json.dumps({"schema": SCHEMA, **identity}))
    if _identity(directory) == wanted:
        return directory
    for stale in directory.parent.glob(f".{directory.name}.*"):
        shutil.rmtree(stale)
    aside, old = (directory.with_name(f".{directory.name}.{uuid4().hex}") for _ in range(2))
    aside.mkdir(parents=True)
    counts = dict(fill(aside))
    sizes = {file.name: file.stat().st_size for file in aside.iterdir()}
    write_json(aside / FILE, {"identity": wanted, "counts": counts, "sizes": sizes})
    if directory.exists():
        directory.rename(old)
    durable.rename(aside, directory)
    shutil.rmtree(old, ignore_errors=True)
    return directory


def _identity(directory: Path) -> Any:
    """What a directory was made from; None for one that is not there or not whole."""
    try:
        about = json.loads((directory / FILE).read_text(encoding="utf-8"))
        sizes = {name: (directory / name).stat().st_size for name in about["sizes"]}
        return about["identity"] if sizes == about["sizes"] else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def stamps(parts: Iterable[Path]) -> list[list[Any]]:
    """What tells files from those that stood there before: folder, name, size and time."""
    known = ((part, part.stat()) for part in parts)
    return [[one.parent.name, one.name, at.st_size, at.st_mtime_ns] for one, at in known]


def fingerprint(vocabulary: Vocabulary) -> str:
    """16 hex digits over what a vocabulary is stored as."""
    with TemporaryDirectory() as directory:
        vocabulary.save(Path(directory))
        hashed = hashlib.sha256()
        for file in sorted(Path(directory).iterdir()):
            hashed.update(f"\0{file.name}\0".encode() + file.read_bytes())
    return hashed.hexdigest()[:16]


class Entities(Sequence[tuple[str, ...]]):
    """The entities of each utterance, read where they are asked for."""

    def __init__(self, lists: Names) -> None:
        self._lists = lists

    def __len__(self) -> int:
        return len(self._lists)

    def __getitem__(self, index: int) -> tuple[str, ...]:
        stored = self._lists[index]
        return tuple(json.loads(stored)) if stored else ()


class Packed(Sequence[Example]):
    """The examples of a packed corpus; opening it takes no longer for a large one."""

    def __init__(self, directory: Path, vocabulary: Vocabulary) -> None:
        """PackError if there is none, or it was made for another vocabulary."""
        self.directory = directory
        try:
            about = json.loads((directory / FILE).read_text(encoding="utf-8"))
            arrays = ("ids", "id_offsets", "texts", "units", "spoken", "letters", "letter_offsets")
            opened = {name: mapped(directory / f"{name}.npy") for name in arrays}
            self.names = Names.open(directory, "names")
            self.entities = Entities(Names.open(directory, "entities"))
            self.find = Lookup(directory, self.names)
            self.counts: dict[str, int] = about["counts"]
            theirs = about["identity"]["vocabulary"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise PackError(f"{directory} is no packed corpus: {error}") from None
        if theirs != (ours := fingerprint(vocabulary)):
            raise PackError(f"{directory} was packed with vocabulary {theirs}, this one is {ours}")
        self.texts: np.ndarray = opened["texts"]
        """(N,) uint32: word pieces of each example."""
        self.units: np.ndarray = opened["units"]
        """(N,) uint32: units of each example; 0 also where nobody spoke it."""
        self._opened = opened

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        of = self._opened
        ids = of["ids"][slice(*of["id_offsets"][index : index + 2].tolist())].tolist()
        letters = of["letters"][slice(*of["letter_offsets"][index : index + 2].tolist())].tolist()
        length = int(self.texts[index])
        units = ids[length:] if of["spoken"][index] else None
        return Example(ids[:length], units, self.names[index], letters)

    def rejected(self) -> Iterator[Mapping[str, str]]:
        """Id and reason of each utterance that is not here, for no piece writes its text."""
        with (self.directory / REJECTED).open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)
