"""Whatever lhotse reads: cuts, recordings with supervisions, a Kaldi data directory.

A supervision is an utterance, as long as it is and wherever its cut begins; a cut without any is
one without a transcript. What comes out is a file, an offset and a duration: a cut that is more
than that (a mix, an augmented recording, one channel of several in a file, audio that is not in a
file) is rejected by name. Samples are not read, and no command is run. lhotse itself is an optional
extra and imported when a corpus is read.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from mmrag.corpora import kaldi
from mmrag.corpora.manifest import within_a_day
from mmrag.corpora.splits import ALL, Corpus, CorpusError, Row, by_split, sound, split_of
from mmrag.records import Rejection, Timed, Utterance

MANIFEST = re.compile(
    r"(?P<before>.*?)(?P<kind>cuts|recordings|supervisions)(?P<after>.*?)\.(jsonl|json|yaml)(\.gz)?$"
)
TOLERANCE = 0.025
"""Seconds by which lhotse lets a recording be shorter than it is said to be."""
READ_ANYHOW = "Resample"
"""The one transform that changes nothing here: all audio is brought to one sample rate."""


def read(path: Path) -> Corpus:
    """A manifest (.jsonl, .json, .yaml, each also .gz), or a directory: Kaldi's, or of manifests.

    In a directory each `recordings` manifest goes with the `supervisions` manifest of the same
    name; where there are `cuts` manifests they alone are read. The name of a manifest says its
    split, and is its utterances' domain.

    Raises ImportError without lhotse, CorpusError if nothing in it is a cut or a recording.
    """
    _require()
    path = path.absolute()
    if path.is_file():
        return Corpus({ALL: sound(_file(path, ""), str(path))})
    if (path / kaldi.WAVS).is_file():
        return Corpus({ALL: sound(_kaldi(path), str(path))})
    parts = _parts(path)
    splits = {
        ours: sound(chain.from_iterable(rows for _, rows in named), str(path))
        for ours, named in by_split(path, parts).items()
    }
    return Corpus(splits)


def _require() -> None:
    try:
        import lhotse  # noqa: F401
    except ImportError:
        raise ImportError("lhotse manifests need lhotse: pip install mmrag[corpora]") from None


def _parts(directory: Path) -> dict[str, Iterator[Row]]:
    """Name of each part of a directory of manifests -> its rows."""
    found: dict[str, dict[tuple[str, str], Path]] = {}
    for file in sorted(directory.iterdir()) if directory.is_dir() else ():
        if (named := MANIFEST.match(file.name)) and file.is_file():
            files = found.setdefault(named["kind"], {})
            _add(files, (named["before"], named["after"]), file, file)
    if list(directory.glob("recording.*.tar")):
        raise CorpusError(
            f"{directory}: lhotse's Shar keeps audio in archives, and only files are read; write "
            "it out with CutSet.save_audios"
        )
    parts: dict[str, Iterator[Row]] = {}
    for key, file in found.get("cuts", {}).items():
        _add(parts, _name(key), _file(file, _domain(key)), file)
    if parts:
        return parts
    recordings, supervisions = found.get("recordings", {}), found.get("supervisions", {})
    alone = [file.name for key, file in supervisions.items() if key not in recordings]
    if recordings and alone:
        raise CorpusError(f"{directory}: no recordings of the same name for {', '.join(alone)}")
    for key, file in recordings.items():
        _add(parts, _name(key), _pair(file, supervisions.get(key), _domain(key)), file)
    if not parts:
        raise CorpusError(
            f"{directory}: no cuts, no recordings (.jsonl, .jsonl.gz) and no {kaldi.WAVS}"
        )
    return parts


def _add(named: dict[Any, Any], name: Any, value: Any, file: Path) -> None:
    if name in named:
        raise CorpusError(f"{file}: another manifest beside it goes by the same name: name one")
    named[name] = value


def _name(key: tuple[str, str]) -> str:
    """What a manifest's name says besides its kind: `dev-clean` of librispeech_cuts_dev-clean."""
    before, after = (each.strip("_-. ") for each in key)
    if after and (split_of(after) or not split_of(before)):
        return after
    return before or ALL


def _domain(key: tuple[str, str]) -> str:
    return "" if _name(key) == ALL else _name(key)


def _file(path: Path, domain: str) -> Iterator[Row]:
    """The utterances of a manifest of cuts or recordings."""
    from lhotse import Recording
    from lhotse.cut import Cut

    used, reasons = False, []
    for where, one in _rows(path):
        if isinstance(one, Recording):
            one = one.to_cut()
        if isinstance(one, Cut):
            used = True
            yield from _utterances(one, where, path.parent, domain)
            continue
        reason = one if isinstance(one, str) else f"a {type(one).__name__}, not a cut"
        reasons.append(reason)
        yield Rejection(where, reason)
    if not used:
        first = f"; its first row: {reasons[0]}" if reasons else ""
        raise CorpusError(f"{path}: holds no cut and no recording of lhotse's{first}")


def _pair(recordings: Path, supervisions: Path | None, domain: str) -> Iterator[Row]:
    from lhotse import SupervisionSegment

    if supervisions is None:
        yield from _file(recordings, domain)
        return
    said: dict[str, list[Any]] = {}
    places: dict[int, str] = {}
    for where, one in _rows(supervisions):
        if isinstance(one, SupervisionSegment):
            said.setdefault(one.recording_id, []).append(one)
            places[id(one)] = where
        else:
            reason = one if isinstance(one, str) else f"a {type(one).__name__}, not a supervision"
            yield Rejection(where, reason)
    yield from _joined(recordings.parent, _rows(recordings), said, domain)
    for recording, left in said.items():
        for one in left:
            reason = f"supervision {one.id!r}: no recording {recording!r} in {recordings.name}"
            yield Rejection(places[id(one)], reason)


def _kaldi(directory: Path) -> Iterator[Row]:
    recordings, supervisions, rejected = kaldi.read(directory)
    yield from rejected
    said: dict[str, list[Any]] = {}
    for one in supervisions or ():
        said.setdefault(one.recording_id, []).append(one)
    rows = ((f"{directory / kaldi.WAVS}: {one.id}", one) for one in recordings)
    yield from _joined(directory, rows, said, "")


def _joined(
    root: Path, recordings: Iterable[tuple[str, Any]], said: dict[str, list[Any]], domain: str
) -> Iterator[Row]:
    """Recordings with their supervisions, which are taken out of `said`."""
    from lhotse import Recording

    for where, one in recordings:
        if not isinstance(one, Recording):
            reason = one if isinstance(one, str) else f"a {type(one).__name__}, not a recording"
            yield Rejection(where, reason)
            continue
        cut = one.to_cut()
        cut.supervisions = said.pop(one.id, [])
        yield from _utterances(cut, where, root, domain)


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Place and object of each row of a manifest; a str, the reason, for one that is none."""
    from lhotse import load_manifest
    from lhotse.serialization import deserialize_item

    if ".jsonl" not in path.suffixes:
        try:
            yield from ((f"{path}: {one.id}", one) for one in load_manifest(path))
        except Exception as error:  # lhotse's answer to a damaged file is any of many
            raise CorpusError(f"{path}: not a manifest of lhotse's: {error}") from None
        return
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield f"{path}:{number}", _parsed(line, deserialize_item)
    except (OSError, EOFError, zlib.error) as error:
        yield f"{path}:{number + 1}", f"cannot be read on: {error}"


def _parsed(line: bytes, deserialize: Any) -> Any:
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    if not isinstance(fields, dict):
        return f"not a JSON object but {type(fields).__name__}"
    try:
        return deserialize(fields)
    except Exception as error:  # whatever a row of another kind brings about in lhotse
        return f"not a row of lhotse's: {type(error).__name__}: {error}"


def _utterances(cut: Any, where: str, root: Path, domain: str) -> Iterator[Row]:
    try:
        recording = _recording(cut)
    except ValueError as error:
        yield Rejection(where, f"cut {cut.id!r}: {error}")
        return
    if not cut.supervisions:
        try:
            yield _utterance(cut, recording, cut, cut.start, root, domain)
        except (ValueError, TypeError) as error:
            yield Rejection(where, f"cut {cut.id!r}: {error}")
    for said in cut.supervisions:
        try:
            yield _utterance(cut, recording, said, cut.start + said.start, root, domain)
        except (ValueError, TypeError) as error:
            yield Rejection(where, f"supervision {said.id!r}: {error}")


def _recording(cut: Any) -> Any:
    """The recording that a cut is a stretch of; ValueError for what is more than a stretch."""
    from lhotse.cut import MonoCut, MultiCut

    if not isinstance(cut, MonoCut | MultiCut):
        raise ValueError(
            f"a {type(cut).__name__} is no stretch of one recording; write it out with lhotse's "
            "CutSet.save_audios"
        )
    if cut.recording is None:
        raise ValueError("it has no recording, only features")
    transforms = [
        one["name"] if isinstance(one, dict) else type(one).__name__
        for one in cut.recording.transforms or ()
    ]
    if changed := [name for name in transforms if name != READ_ANYHOW]:
        raise ValueError(
            f"its recording is changed when it is read ({', '.join(changed)}); write it out with "
            "lhotse's CutSet.save_audios"
        )
    return cut.recording


def _utterance(
    cut: Any, recording: Any, said: Any, start: float, root: Path, domain: str
) -> Utterance:
    """A supervision, or a cut without any, as an utterance of its file.

    `start` is seconds into the recording. Raises ValueError for what its file does not hold.
    """
    audio = _source(recording, said.channel, root)
    supervised = said is not cut
    start, duration = _inside(recording.duration, start, said.duration)
    alignment = (said.alignment or {}) if supervised else {}
    text = said.text if supervised else None
    if text is not None and not isinstance(text, str):
        raise ValueError(f"its text is not a string but {text!r:.80}")
    return Utterance(
        id=str(said.id),
        text=text if text and text.strip() else None,
        audio=audio,
        duration=duration,
        offset=start,
        speaker=str((supervised and said.speaker) or ""),
        document=str(recording.id),
        domain=domain,
        words=tuple(_timed(alignment.get("word") or (), said.start)),
        phones=tuple(_timed(alignment.get("phone") or (), said.start)),
    )


def _source(recording: Any, channel: int | list[int], root: Path) -> Path:
    """The file that holds just these channels."""
    wanted = set(channel) if isinstance(channel, list) else {channel}
    holding = [one for one in recording.sources if wanted & set(one.channels)]
    if len(holding) != 1 or set(holding[0].channels) != wanted:
        held = sorted({each for one in recording.sources for each in one.channels})
        raise ValueError(
            f"channels {sorted(wanted)} of {held} have no file of their own, and a file's channels "
            "are heard together; write them out with lhotse's CutSet.save_audios"
        )
    [source] = holding
    if source.type != "file":
        raise ValueError(f"its audio is a {source.type}, and only files are read")
    here = Path(source.source).absolute()
    beside = (root / source.source).absolute()
    return beside if beside.exists() and not here.exists() else here


def _inside(length: float, start: float, duration: float) -> tuple[float, float]:
    """Start and duration, seconds, cut to the recording where they exceed it by a hair."""
    end = start + duration
    if not all(map(math.isfinite, (length, start, end))) or duration <= 0:
        raise ValueError(f"it is no stretch of time: from {start} s, {duration} s long")
    if start < -TOLERANCE or end > length + TOLERANCE:
        raise ValueError(
            f"it reaches from {start:.3f} to {end:.3f} s, past its recording of {length:.3f} s"
        )
    start = max(0.0, start)
    return round(start, 8), round(min(end, length) - start, 8)


def _timed(items: Iterable[Any], begin: float) -> Iterator[Timed]:
    """An alignment, in seconds from the utterance's start; silences are left out."""
    for one in items:
        if one.symbol and one.symbol != "<eps>":
            start = max(0.0, round(one.start - begin, 8))
            end = max(start, round(one.start + one.duration - begin, 8))
            yield within_a_day(Timed(one.symbol, start, end))
