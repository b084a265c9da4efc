"""Manifests: one JSON object a line, in NeMo's manner, naming audio, transcript and what is known.

Fields are `audio_filepath` (relative to the manifest's directory, or absolute, or a URL; absent
from a line of text alone), `text`, `offset` and `duration` (seconds: the part of the recording that
is meant), `speaker`, `age` (of the speaker, years), `entities`, `words` (objects of `text`, `start`
and `end`, seconds from the utterance's start), `phones` (likewise), `utterance`, `document`,
`domain`. Words and phones without a text, the silences of an alignment, are left out; other fields
are ignored. Audio is not opened here: a line may name a file that does not exist, or that is
shorter.
"""

from __future__ import annotations

import json
import math
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path, PurePath
from typing import Any

from mmrag.corpora.ids import Ids
from mmrag.folders import printable
from mmrag.records import Rejection, Timed, Utterance
from mmrag.storage import Location, beside, is_url, located

LAST_SECOND = 86_400.0
"""Up to which a word or a phone may last, from the utterance's start: a day."""


class ManifestError(ValueError):
    """A manifest as a whole cannot be read or written; the message names it."""


def read(path: Location | str) -> Iterator[Utterance | Rejection]:
    """Each line's utterance, or why there is none; blank lines are passed over.

    `path` may be a URL, next to which its recordings lie or which names them by URLs.

    An utterance's id is `utterance`, else `audio_filepath` without its suffix (with an `offset`:
    `name@offset`), else `line-N`; its document is its id unless the line says otherwise, with an
    `offset` the recording that it is a part of. Raises ManifestError at once if `path` is not a
    readable file.
    """
    path = located(path)
    try:
        path.open("rb").close()
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte in it
        reason = getattr(error, "strerror", None) or error
        raise ManifestError(f"cannot read manifest {printable(path)}: {reason}") from None
    return _read(path)


def write(path: Path | str, utterances: Iterable[Utterance]) -> int:
    """Write a manifest that `read` gives back; the number of its lines.

    Raises ManifestError for an id that stands twice; the file then ends before it.
    """
    path = Path(path)
    seen = Ids()
    with path.open("w", encoding="utf-8") as stream:
        for utterance in utterances:
            if seen.first(utterance.id) is not None:
                raise ManifestError(f"{path}: utterance {utterance.id!r} stands twice")
            stream.write(json.dumps(row(utterance, path.parent), ensure_ascii=False) + "\n")
    return len(seen)


def row(utterance: Utterance, root: Path) -> dict[str, Any]:
    """The utterance as a line of a manifest in directory `root`; empty fields are left out."""
    audio = utterance.audio and utterance.audio.absolute()
    if audio and audio.is_relative_to(root.absolute()):
        audio = audio.relative_to(root.absolute())
    fields = {
        "audio_filepath": audio and audio.as_posix(),
        "offset": utterance.offset,
        "duration": utterance.duration,
        "text": utterance.text,
        "speaker": utterance.speaker or None,
        "age": utterance.age,
        "entities": list(utterance.entities) or None,
        "words": [asdict(word) for word in utterance.words] or None,
        "phones": [asdict(phone) for phone in utterance.phones] or None,
        "utterance": utterance.id,
        "document": utterance.document or None,
        "domain": utterance.domain or None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _read(path: Location) -> Iterator[Utterance | Rejection]:
    seen = Ids()
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.removeprefix(BOM_UTF8).strip():
                continue
            try:
                utterance = _parse(line, number, path.parent)
                if (first := seen.first(utterance.id, number)) is not None:
                    raise ValueError(f"utterance {utterance.id!r} is also on line {first}")
            except (ValueError, OverflowError, RecursionError) as error:
                yield Rejection(f"{printable(path)}:{number}", str(error))
            else:
                yield utterance


def _parse(line: bytes, number: int, root: Location) -> Utterance:
    """One line; raises ValueError with the reason why it cannot be used."""
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"not a JSON object but {type(fields).__name__}")
    audio, text = _string(fields, "audio_filepath"), _string(fields, "text")
    if not audio and not text:
        raise ValueError("neither audio_filepath nor text")
    duration = None if fields.get("duration") is None else _seconds(fields, "duration")
    offset = None if fields.get("offset") is None else _seconds(fields, "offset")
    recording = _unsuffixed(audio) if audio else f"line-{number}"
    derived = recording if offset is None else f"{recording}@{offset:.9g}"
    id = _string(fields, "utterance") or derived
    return Utterance(
        id=id,
        text=text,
        audio=beside(root, audio) if audio else None,
        duration=duration,
        offset=offset,
        speaker=_speaker(fields),
        age=_age(fields),
        document=_string(fields, "document") or (id if offset is None else recording),
        domain=_string(fields, "domain") or "",
        entities=tuple(_checked(entity, "entities") for entity in _list(fields, "entities")),
        words=tuple(_timed(fields, "words")),
        phones=tuple(_timed(fields, "phones")),
    )


def _unsuffixed(audio: str) -> str:
    """What a recording is called, without what says its format, or signs a URL."""
    shown = str(located(audio)) if is_url(audio) else audio
    path = PurePath(shown)
    return shown.removesuffix(path.suffix) if is_url(shown) else path.with_suffix("").as_posix()


def _string(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    return None if value is None else _checked(value, name)


def _speaker(fields: Mapping[str, Any]) -> str:
    """A name, or a number, as corpora have them."""
    value = fields.get("speaker")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _string(fields, "speaker") or ""


def _age(fields: Mapping[str, Any]) -> float | None:
    """Years; None for what is no such number: corpora also say "twenties"."""
    value = fields.get("age")
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if known and 0 <= value < math.inf else None


def _checked(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is not a string but {value!r:.80}")
    value.encode()  # JSON can escape half a character, which no file could then hold
    return value


def _seconds(fields: Mapping[str, Any], name: str) -> float:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is not a number but {value!r:.80}")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} is not a time: {value}")
    return float(value)


def _timed(fields: Mapping[str, Any], name: str) -> Iterator[Timed]:
    for one in _list(fields, name):
        if not isinstance(one, dict):
            raise ValueError(f"{name} holds not an object but {one!r:.80}")
        text = _checked(one.get("text"), f"the text of {name}")
        timed = Timed(text, _seconds(one, "start"), _seconds(one, "end"))
        if timed.end < timed.start:
            raise ValueError(f"{name}: {timed.text!r} ends before it starts")
        within_a_day(timed, f"{name}: ")
        if timed.text:
            yield timed


def within_a_day(timed: Timed, where: str = "") -> Timed:
    """A word or a phone; ValueError, which says `where`, for one that no recording is so long as:
    what is made of it has a place a frame."""
    if timed.end > LAST_SECOND:
        raise ValueError(f"{where}{timed.text!r} ends after {timed.end:g} s, more than a day")
    return timed


def _list(fields: Mapping[str, Any], name: str) -> list[Any]:
    value = fields.get(name)
    if value is not None and not isinstance(value, list):
        raise ValueError(f"{name} is not a list but {value!r:.80}")
    return value or []
