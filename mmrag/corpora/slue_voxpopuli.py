"""SLUE-VoxPopuli (arXiv 2111.10367): European parliament speeches with their named entities.

A directory as published: `slue-voxpopuli_{fine-tune,dev,test}.tsv` with a header, and the audio
`{split}/{id}.ogg` beside them. The columns that are read are `id`, `normalized_text`, `speaker_id`
and `normalized_ner`, a list of [label, start character, length] over `normalized_text`. The
fine-tune split becomes lm; a sitting of the parliament is a document. Audio is not opened here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmrag.corpora.splits import DEV, LM, TEST, Corpus, CorpusError, Row, lines, sound
from mmrag.records import Rejection, Utterance

SPLITS = {"fine-tune": LM, "dev": DEV, "test": TEST}
COLUMNS = ("id", "normalized_text", "speaker_id", "normalized_ner")
NOTHING = ("", "None", "none", "nan")
"""How tools write that a row has no entities."""


def read(directory: Path) -> Corpus:
    """The splits whose tables are there. Raises CorpusError for none, or one without a column."""
    tables = {name: directory / f"slue-voxpopuli_{name}.tsv" for name in SPLITS}
    found = {name: path for name, path in tables.items() if path.is_file()}
    if not found:
        raise CorpusError(
            f"{directory}: holds none of {', '.join(p.name for p in tables.values())}"
        )
    return Corpus(
        {
            SPLITS[name]: sound(_read(path, directory / name), str(path))
            for name, path in found.items()
        }
    )


def _read(path: Path, audio: Path) -> Iterator[Row]:
    header: list[str] | None = None
    for line in lines(path):
        if isinstance(line, Rejection):
            yield line
            continue
        number, text = line
        cells = text.split("\t")  # a quotation mark in a speech opens nothing
        if header is None:
            header = _header(path, cells)
            continue
        try:
            yield _utterance(_row(header, cells), audio)
        except ValueError as error:
            yield Rejection(f"{path}:{number}", str(error))
    if header is None:
        raise CorpusError(f"{path}: is empty")


def _header(path: Path, cells: list[str]) -> list[str]:
    missing = [name for name in COLUMNS if name not in cells]
    if missing:
        raise CorpusError(f"{path}: no column {', '.join(missing)} among {', '.join(cells)}")
    return cells


def _row(header: Sequence[str], cells: Sequence[str]) -> dict[str, str]:
    if len(cells) != len(header):
        raise ValueError(f"{len(cells)} columns, the header has {len(header)}")
    return dict(zip(header, cells, strict=True))


def _utterance(row: dict[str, str], audio: Path) -> Utterance:
    id, text = row["id"].strip(), row["normalized_text"]
    if not id or "/" in id or id in (".", ".."):
        raise ValueError(f"the id {id!r} names no file")
    if not text.strip() or text.strip() in NOTHING:
        raise ValueError(f"{id}: no normalized_text")
    return Utterance(
        id=id,
        text=text,
        audio=audio / f"{id}.ogg",
        speaker="" if row["speaker_id"] in NOTHING else row["speaker_id"],
        document=id.partition("_")[0],
        entities=_entities(id, text, row["normalized_ner"].strip()),
    )


def _entities(id: str, text: str, written: str) -> tuple[str, ...]:
    if written in NOTHING:
        return ()
    try:
        spans = ast.literal_eval(written)  # single-quoted, as Python prints a list
        named = [(start, start + length) for _, start, length in spans]
        inside = all(0 <= start < end <= len(text) for start, end in named)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise ValueError(
            f"{id}: normalized_ner is not a list of [label, start, length]: {written:.80}"
        ) from None
    if not inside:
        raise ValueError(f"{id}: an entity reaches out of the text: {written:.80}")
    return tuple(name for start, end in named if (name := text[start:end].strip()))
