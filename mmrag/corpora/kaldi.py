"""Kaldi data directories: their tables checked line by line, then imported by lhotse.

lhotse's importer gives up a directory for one bad line and would run a `wav.scp` entry that ends in
a pipe; here such a line is rejected and the rest goes on. Nothing is run: a command in `wav.scp` is
refused. Files that `wav.scp` names are relative to the working directory, as Kaldi has it, or to
the data directory. Only their headers are read, and only where `reco2dur` does not say how long
they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mmrag.corpora.ids import Ids
from mmrag.corpora.splits import CorpusError, lines
from mmrag.records import Rejection
from mmrag.speech import audio
from mmrag.speech.audio import AudioError

WAVS = "wav.scp"


def read(directory: Path) -> tuple[Any, Any, list[Rejection]]:
    """lhotse's RecordingSet and SupervisionSet (None without transcripts), and what was rejected.

    Without `segments` a recording is one utterance. Raises CorpusError if no recording is left.
    """
    from lhotse.kaldi import load_kaldi_data_dir

    rejected: list[Rejection] = []
    wavs = dict(_table(directory / WAVS, rejected, lambda cell: _file(cell, directory)))
    known = dict(_table(directory / "reco2dur", rejected, _seconds))
    durations: dict[str, float] = {}
    for name, path in wavs.items():
        try:
            durations[name] = known[name] if name in known else audio.duration(path)
        except AudioError as error:
            rejected.append(Rejection(f"{directory / WAVS}: {name}", str(error)))
    if not durations:
        reason = f"; the first: {rejected[0].reason}" if rejected else ""
        raise CorpusError(f"{directory / WAVS}: no recording that can be read{reason}")
    texts = dict(_table(directory / "text", rejected, str))
    speakers = dict(_table(directory / "utt2spk", rejected, str))
    if (directory / "segments").is_file():
        segments = list(_segments(directory / "segments", durations, rejected))
    elif texts or speakers:
        segments = [(name, f"{name} 0 -1") for name in durations]
    else:
        segments = []
    named = {name for name, _ in segments}
    absent = [name for name in texts if name not in named]
    rejected += [
        Rejection(f"{directory / 'text'}: {name}", "no such recording or segment is read")
        for name in absent
    ]
    with TemporaryDirectory() as checked:
        tables = {
            WAVS: [(name, str(wavs[name])) for name in durations],
            "reco2dur": [(name, str(seconds)) for name, seconds in durations.items()],
        }
        if segments:
            tables["segments"] = segments
            tables["text"] = [(name, texts.get(name, "")) for name, _ in segments]
            tables["utt2spk"] = [(name, speakers.get(name, name)) for name, _ in segments]
        for name, rows in tables.items():
            text = "".join(f"{key} {value}\n" for key, value in rows)
            (Path(checked) / name).write_text(text, encoding="utf-8")
        recordings, supervisions, _ = load_kaldi_data_dir(checked, audio.SAMPLE_RATE)
    return recordings, supervisions, rejected


def _table(
    path: Path, rejected: list[Rejection], parse: Callable[[str], Any]
) -> Iterator[tuple[str, Any]]:
    """The rows of `key value`, of a file that may be absent; each key once."""
    if not path.is_file():
        return
    seen = Ids()
    for line in lines(path):
        if isinstance(line, Rejection):
            rejected.append(line)
            continue
        number, text = line
        key, _, value = text.strip().replace("\t", " ").partition(" ")
        try:
            if seen.first(key) is not None:
                raise ValueError(f"{key!r} stands twice")
            yield key, parse(value.strip())
        except ValueError as error:
            rejected.append(Rejection(f"{path}:{number}", str(error)))


def _file(cell: str, directory: Path) -> Path:
    if cell.endswith("|") or cell.startswith("|"):
        raise ValueError(
            f"a shell command, which is not run: {cell:.80}. Write its output to a file and name "
            f"that in {WAVS}"
        )
    if not cell:
        raise ValueError("no file")
    for candidate in (Path(cell).absolute(), (directory / cell).absolute()):
        if candidate.is_file():
            return candidate
    raise ValueError(f"no such file: {cell}")


def _seconds(cell: str) -> float:
    seconds = float(cell)
    if not math.isfinite(seconds) or seconds <= 0:
        raise ValueError(f"not a duration: {cell}")
    return seconds


def _segments(
    path: Path, durations: dict[str, float], rejected: list[Rejection]
) -> Iterator[tuple[str, str]]:
    """Segments of recordings that are read: their names, and the rest of their lines."""

    def parse(cell: str) -> str:
        fields = cell.split()
        if len(fields) != 3:
            raise ValueError("not a segment, its recording, its start and its end")
        recording, start, end = fields[0], float(fields[1]), float(fields[2])
        if recording not in durations:
            raise ValueError(f"its recording {recording!r} is not read")
        if not math.isfinite(start) or not math.isfinite(end):
            raise ValueError(f"not a time: {fields[1]} {fields[2]}")
        return f"{recording} {start} {-1 if end == -1 else end}"  # lhotse knows "-1", not "-1.0"

    yield from _table(path, rejected, parse)
