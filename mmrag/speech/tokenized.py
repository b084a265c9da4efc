"""The tokenized corpus on disk: Parquet parts of utterances with their units.

A part of an encoder with a CTC head has one column more, `letters`, and names their alphabet.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmrag.artifact import local
from mmrag.records import Letters, Timed, Units, Utterance
from mmrag.storage import Location

SCHEMA = pa.schema(
    [
        ("utterance", pa.string()),
        ("units", pa.list_(pa.int32())),
        ("durations", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("speaker", pa.string()),
        ("document", pa.string()),
        ("domain", pa.string()),
        ("seconds", pa.float64()),
        ("entities", pa.list_(pa.string())),
        (
            "words",
            pa.list_(
                pa.struct([("text", pa.string()), ("start", pa.float64()), ("end", pa.float64())])
            ),
        ),
    ]
)
LETTERS = "letters"
"""Column of a part that an encoder with a CTC head made: each clip's costs (F, 1 + A), a byte each,
one frame after the other."""
SPELLED = SCHEMA.append(pa.field(LETTERS, pa.binary()))
ALPHABET = b"alphabet"
"""Key of that part's metadata: the letters, UTF-8."""


class TokensError(ValueError):
    """A tokens directory or part is missing or damaged."""


@dataclass(frozen=True)
class Tokenized:
    """An utterance and its units; None where nobody spoke it."""

    utterance: Utterance
    units: Units | None


def write_part(path: Path, tokenized: Iterable[Tokenized]) -> None:
    """Write one Parquet part; `path` appears only once it is whole.

    It has a column of letters if any of the units have some. ValueError for several alphabets.
    """
    heard = list(tokenized)
    table = pa.Table.from_pylist([_row(one) for one in heard], schema=SCHEMA)
    letters = [None if one.units is None else one.units.letters for one in heard]
    if spelled := any(one is not None for one in letters):
        table = _with_letters(table, letters)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(table, aside, compression="zstd" if spelled else "snappy")
    aside.replace(path)


def read(directory: Location) -> Iterator[Tokenized]:
    """Every utterance of the parts in `directory`, in the order of the parts' names."""
    for part in parts(directory):
        yield from read_part(part)


def read_part(path: Path, letters: bool = True) -> Iterator[Tokenized]:
    """Every utterance of one part, its units without their `letters` if nobody wants them.

    TokensError if the file is missing, damaged or another's.
    """
    table = _table(path, None if letters else SCHEMA.names)
    alphabet = None
    if LETTERS in table.column_names:
        alphabet = (table.schema.metadata or {}).get(ALPHABET, b"").decode()
    try:
        for row in table.to_pylist():
            yield _tokenized(row, alphabet)
    except ValueError as error:
        raise TokensError(f"{path} is not a tokenized part: {error}") from None


def read_texts(directory: Location) -> Iterator[str]:
    """What is written in the parts of `read`, in that order, without the rest; no empty text."""
    for part in parts(directory):
        yield from filter(None, _table(part, ["text"])["text"].to_pylist())


def parts(directory: Location) -> list[Path]:
    """The parts in `directory`, in the order in which they are read; TokensError if none is.

    Of a directory at a URL they are those of this machine's copy.
    """
    directory = local(directory)
    found = sorted(directory.glob("part-*.parquet"))
    if not found:
        raise TokensError(f"no tokenized parts in {directory}")
    return found


@dataclass(frozen=True)
class Count:
    """How much a part holds: utterances, and seconds and units of those that were spoken."""

    utterances: int
    seconds: float
    units: int


def count_part(path: Path) -> Count:
    """What `read_part` would give, counted by column, without making an utterance of each row."""
    table = _table(path, ["units", "seconds"])
    spoken = table.filter(pc.is_valid(table["units"]))
    return Count(
        utterances=len(table),
        seconds=math.fsum(spoken["seconds"].to_numpy()),
        units=pc.sum(pc.list_value_length(spoken["units"])).as_py() or 0,
    )


def _table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A part's columns, or all of them; TokensError if it is none."""
    try:
        if not (schema := pq.read_schema(path)).equals(SCHEMA) and not schema.equals(SPELLED):
            raise TokensError(f"{path} is not a tokenized part: its columns are {schema.names}")
        return pq.read_table(path, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise TokensError(f"{path} is not a tokenized part: {error}") from None


def _with_letters(table: pa.Table, letters: Sequence[Letters | None]) -> pa.Table:
    """A part with one column more, and the alphabet of all its letters."""
    alphabets = {one.alphabet for one in letters if one is not None}
    if len(alphabets) > 1:
        raise ValueError(f"letters of several alphabets in one part: {sorted(alphabets)}")
    costs = [None if one is None else one.costs.tobytes() for one in letters]
    spelled = table.append_column(SPELLED.field(LETTERS), pa.array(costs, pa.binary()))
    return spelled.replace_schema_metadata({ALPHABET: alphabets.pop().encode()})


def _row(one: Tokenized) -> dict[str, object]:
    said, units = one.utterance, one.units
    return {
        "utterance": said.id,
        "units": None if units is None else units.ids,
        "durations": None if units is None else units.durations,
        "text": said.text,
        "speaker": said.speaker,
        "document": said.document or said.id,
        "domain": said.domain,
        "seconds": said.duration,
        "entities": list(said.entities),
        "words": [vars(word) for word in said.words],
    }


def _tokenized(row: dict, alphabet: str | None) -> Tokenized:
    units = None
    if row["units"] is not None:
        ids, durations = (np.array(row[name], np.int32) for name in ("units", "durations"))
        units = Units(ids, durations, _letters(row, alphabet))
    said = Utterance(
        id=row["utterance"],
        text=row["text"],
        duration=row["seconds"],
        speaker=row["speaker"],
        document=row["document"],
        domain=row["domain"],
        entities=tuple(row["entities"]),
        words=tuple(Timed(**word) for word in row["words"]),
    )
    return Tokenized(said, units)


def _letters(row: dict, alphabet: str | None) -> Letters | None:
    """ValueError for bytes that are no frames of that alphabet."""
    if alphabet is None or row[LETTERS] is None:
        return None
    return Letters(alphabet, np.frombuffer(row[LETTERS], np.uint8).reshape(-1, 1 + len(alphabet)))
