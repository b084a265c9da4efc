"""Hugging Face datasets with audio: saved to disk (`save_to_disk`), or a directory of Parquet.

Their audio is bytes in a table, and the stages read files. So a dataset is unpacked once, row by
row, into a corpus of our own: `audio/` and a manifest a split, an artifact that a stopped run goes
on with. It takes as much disk as the dataset. No sample is decoded here; whether the bytes are
audio shows when they are read. `datasets` itself is an optional extra and imported when needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

from mmrag import artifact
from mmrag.artifact import Artifact
from mmrag.corpora import manifest
from mmrag.corpora.ids import Ids
from mmrag.corpora.splits import ALL, Corpus, CorpusError, Row, by_split, sound
from mmrag.records import Rejection, Utterance
from mmrag.speech.audio import SUFFIXES
from mmrag.storage import Location

AUDIO = "audio"
TEXTS = ("text", "sentence", "transcription", "transcript", "normalized_text", "raw_text")
IDS = ("utterance", "id", "segment_id", "audio_id")
SPEAKERS = ("speaker", "speaker_id", "client_id")
"""Columns by the names that published datasets give them; the first of each that is there."""
REJECTED = "rejected.jsonl"
FOLDER = 1000
"""Files in one directory."""
SHARD = re.compile(r"-\d+-of-\d+$")


def read(directory: Path, unpacked: Location) -> Corpus:
    """The dataset's splits; its audio is unpacked below `unpacked`, unless that was done before.

    Raises ImportError without `datasets`, CorpusError for what is no dataset or has neither audio
    nor text.
    """
    made = _unpack(directory.absolute(), unpacked)
    rejected: dict[str, list[Rejection]] = {}
    for line in (made.path / REJECTED).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rejected.setdefault(row.pop("split"), []).append(Rejection(**row))
    return Corpus(
        {
            split: chain(manifest.read(made.place / f"{split}.jsonl"), rejected.get(split, ()))
            for split in made.summary["splits"]
        }
    )


def _unpack(directory: Path, unpacked: Location) -> Artifact:
    source = {"source": artifact.outside(directory)}
    path = unpacked / f"huggingface-{source['source'].fingerprint}"
    if done := artifact.finished(path, "corpus", {}, source):
        return done
    parts = _open(directory)
    with artifact.create(path, "corpus", {}, source, bulk=("audio/",)) as draft:
        rejected: list[tuple[str, Rejection]] = []
        draft.summary["splits"] = []
        for split, named in by_split(directory, parts).items():
            rows = sound(
                (
                    row
                    for name, dataset in named
                    for row in _rows(dataset, directory, name, draft.path)
                ),
                str(directory),
            )

            def kept(rows: Iterator[Row] = rows, split: str = split) -> Iterator[Utterance]:
                for row in rows:
                    if isinstance(row, Rejection):
                        rejected.append((split, row))
                    else:
                        yield row

            written = manifest.write(draft.path / f"{split}.jsonl", kept())
            draft.summary["splits"].append(split)
            draft.summary[f"{split}_utterances"] = written
        lines = [json.dumps({"split": split, **asdict(one)}) + "\n" for split, one in rejected]
        (draft.path / REJECTED).write_text("".join(lines), encoding="utf-8")
    return artifact.load(path, "corpus")


def _open(directory: Path) -> dict[str, Any]:
    """Name of each published split -> what iterates over its rows, audio as bytes."""
    try:
        import datasets
    except ImportError:
        raise ImportError(
            "Hugging Face datasets need datasets: pip install mmrag[corpora]"
        ) from None
    saved = any((directory / name).is_file() for name in ("dataset_dict.json", "state.json"))
    files = sorted(directory.rglob("*.parquet"))
    if not saved and not files:
        raise CorpusError(
            f"{directory}: neither a dataset that was saved to disk (dataset_dict.json, state.json)"
            " nor a directory of .parquet"
        )
    try:
        if saved:
            found = datasets.load_from_disk(str(directory))
            return dict(found) if isinstance(found, Mapping) else {ALL: found}
        named: dict[str, list[str]] = {}
        for file in files:
            named.setdefault(_split(file, directory), []).append(str(file))
        # Not `load_dataset`, which tells Hugging Face that it was called.
        parquet = datasets.Dataset.from_parquet
        return {name: parquet(paths, streaming=True) for name, paths in named.items()}
    except Exception as error:  # whatever a damaged table brings about in it
        raise CorpusError(f"{directory}: not a dataset that can be read: {error}") from None


def _split(file: Path, root: Path) -> str:
    """`train` of train-00000-of-00004.parquet and of train/0000.parquet."""
    stem = SHARD.sub("", file.stem)
    inside = file.relative_to(root).parent.name
    return inside if re.fullmatch(r"\d+|part[-_.]?\d*", stem) and inside else stem


def _rows(dataset: Any, directory: Path, name: str, into: Path) -> Iterator[Row]:
    from datasets import Audio

    columns = list(dataset.features or ())
    sounding = [c for c in columns if isinstance(dataset.features[c], Audio)]
    audio = sounding[0] if sounding else AUDIO if AUDIO in columns else None
    text, id, speaker = (_first(columns, names) for names in (TEXTS, IDS, SPEAKERS))
    if audio is None and text is None:
        raise CorpusError(
            f"{directory}: split {name} has neither audio nor text among its columns: "
            f"{', '.join(columns) or 'none'}"
        )
    if audio is not None and not _plain(dataset.features[audio]):
        dataset = dataset.cast_column(audio, Audio(decode=False))
    seen = Ids()
    for number, row in _numbered(dataset, directory, name):
        where = f"{directory}: {name} row {number}"
        own = str(row[id]) if id and row[id] is not None else f"{name}-{number:08d}"
        if seen.first(own) is not None:  # FLEURS counts sentences: several recordings of one
            own = f"{own}#{number}"
            seen.first(own)
        try:
            yield Utterance(
                id=own,
                text=_text(row, text),
                audio=_audio(row.get(audio), directory, into / "audio" / name, number),
                speaker=str(row[speaker]) if speaker and row[speaker] is not None else "",
                document=own,
                domain="" if name == ALL else name,
            )
        except ValueError as error:
            yield Rejection(where, str(error))


def _numbered(dataset: Any, directory: Path, name: str) -> Iterator[tuple[int, Any]]:
    try:
        yield from enumerate(dataset)
    except Exception as error:
        raise CorpusError(f"{directory}: split {name} cannot be read on: {error}") from None


def _first(columns: list[str], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in columns), None)


def _plain(feature: Any) -> bool:
    """Whether a column holds bytes or paths as they are."""
    return getattr(feature, "dtype", None) in ("string", "large_string", "binary", "large_binary")


def _text(row: Mapping[str, Any], column: str | None) -> str | None:
    text = row[column] if column else None
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{column} is not a string but {text!r:.80}")
    return text if text and text.strip() else None


def _audio(value: Any, directory: Path, into: Path, number: int) -> Path | None:
    """The file of a row's audio, written if the table holds it; None for a row of text alone."""
    fields = value if isinstance(value, Mapping) else {}
    data = value if isinstance(value, bytes) else fields.get("bytes")
    path = value if isinstance(value, str) else fields.get("path")
    if not data and not path:
        return None
    if not data:
        file = (directory / path).absolute()
        if "://" in path or not file.is_file():
            raise ValueError(f"its audio is no file here: {path:.200}")
        return file
    suffix = PurePath(path or "").suffix.lower()
    folder = into / f"{number // FOLDER:05d}"
    file = folder / f"{number:08d}{suffix if suffix in SUFFIXES else '.audio'}"
    if not file.exists() or file.stat().st_size != len(data):
        folder.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f"{file.name}.partial")
        aside.write_bytes(data)
        aside.replace(file)
    return file
