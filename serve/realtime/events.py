"""The wire of a realtime session: what clients may send, what is sent to them, in OpenAI's shapes.

Knows JSON and names; neither sound nor models.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmrag.config import SLUG, RetrievalMode
from mmrag.records import Word
from serve.errors import TYPES, ApiError, explained
from serve.realtime.formats import RATES

LOGPROBS = "item.input_audio_transcription.logprobs"
TRANSCRIPTION = "conversation.item.input_audio_transcription"
SHOWN = 40
"""Characters of a wrong value that an error repeats."""
Milliseconds = Annotated[int, Field(ge=0, le=10_000)]
Texts = list[str | dict[str, Any]]
"""Phrases, or entries that say how they are written and said."""


class Refused(Exception):
    """A client's event that is not done; the client is told, and the session goes on."""

    def __init__(
        self,
        message: str,
        code: str = "invalid_value",
        param: str | None = None,
        event: str | None = None,
        kind: str = "invalid_request_error",
    ) -> None:
        """`event` is the client's id of the event, `kind` OpenAI's type of the error."""
        super().__init__(message)
        self.message, self.code, self.param, self.event, self.kind = (
            message,
            code,
            param,
            event,
            kind,
        )

    @classmethod
    def of(cls, error: ApiError, event: str | None = None, param: str | None = None) -> Refused:
        """An error of the HTTP API as one of a session."""
        usual = "server_error" if error.status >= 500 else "invalid_request_error"
        kind = TYPES.get(error.status, usual)
        return cls(error.message, error.code or "invalid_value", param or error.param, event, kind)


class Wire(BaseModel):
    """What a client sends: every field is known, and has its type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Format(Wire):
    """`audio/pcm` is 16 bits, mono, little-endian, at 24 kHz; the other two are G.711 at 8 kHz."""

    type: Literal["audio/pcm", "audio/pcmu", "audio/pcma"] = "audio/pcm"
    rate: int | None = None

    @model_validator(mode="after")
    def _its_rate(self) -> Format:
        if self.rate not in (None, RATES[self.type]):
            raise ValueError(f"{self.type} has {RATES[self.type]} samples a second")
        return self


class TurnDetection(Wire):
    """When somebody begins and has finished to speak."""

    type: Literal["server_vad"] = "server_vad"
    threshold: float = Field(0.5, ge=0, le=1)
    prefix_padding_ms: Milliseconds = 300
    silence_duration_ms: Annotated[int, Field(ge=100, le=10_000)] = 500
    create_response: Literal[False] | None = None
    interrupt_response: Literal[False] | None = None
    idle_timeout_ms: None = None


class Transcription(Wire):
    """What is listened for. The last four are ours."""

    model: str | None = None
    language: str | None = None
    languages: list[str] | None = None
    prompt: str | None = None
    keywords: Texts | None = None
    delay: None = None
    context: Texts | None = None
    datastore: str | None = Field(None, pattern=SLUG)
    shortlist: int | None = Field(None, ge=0, le=1000)
    retrieval: RetrievalMode | None = None


class Input(Wire):
    """The client's audio."""

    format: Format = Format()
    transcription: Transcription = Transcription()
    noise_reduction: None = None
    turn_detection: TurnDetection | None = TurnDetection()


class Audio(Wire):
    """The client's audio; nothing is said to it."""

    input: Input = Input()


class Session(Wire):
    """A session as a client may set it."""

    type: Literal["transcription"] = "transcription"
    audio: Audio = Audio()
    include: list[Literal[LOGPROBS]] | None = None

    def updated(self, update: Session) -> Session:
        """The session with what the update says; what it leaves out stays as it is, but the rate of
        another format. Raises Refused, which names the field that is wrong."""
        before, given = self.model_dump(), update.model_dump(exclude_unset=True)
        if "type" in given.get("audio", {}).get("input", {}).get("format", {}):
            before["audio"]["input"]["format"] = {}
        return session_of(_merged(before, given))

    def listening_for(self, transcription: Transcription) -> Session:
        """The session with another wish for what is listened for."""
        inner = self.audio.input.model_copy(update={"transcription": transcription})
        return self.model_copy(update={"audio": Audio(input=inner)})

    def told(self, **more: Any) -> dict[str, Any]:
        """The session as the client is told of it, in force."""
        inner = self.audio.input
        detection = inner.turn_detection
        shown = {"type", "threshold", "prefix_padding_ms", "silence_duration_ms"}
        return {
            "type": self.type,
            "object": "realtime.transcription_session",
            **more,
            "audio": {
                "input": {
                    "format": {"type": inner.format.type, "rate": RATES[inner.format.type]},
                    "transcription": inner.transcription.model_dump(exclude_none=True),
                    "noise_reduction": None,
                    "turn_detection": detection and detection.model_dump(include=shown),
                }
            },
            "include": self.include,
        }


class ClientEvent(Wire):
    """What every event of a client has."""

    event_id: str | None = Field(None, max_length=512)


class Update(ClientEvent):
    """Changes the session."""

    type: Literal["session.update"]
    session: Session


class Append(ClientEvent):
    """More audio, base64."""

    type: Literal["input_audio_buffer.append"]
    audio: str


class Commit(ClientEvent):
    """What has been said is a turn."""

    type: Literal["input_audio_buffer.commit"]


class Clear(ClientEvent):
    """What has been said is to be forgotten."""

    type: Literal["input_audio_buffer.clear"]


KINDS: dict[str, type[ClientEvent]] = {
    "session.update": Update,
    "input_audio_buffer.append": Append,
    "input_audio_buffer.commit": Commit,
    "input_audio_buffer.clear": Clear,
}
ELSEWHERE = ("response.", "conversation.", "output_audio_buffer.")
"""Events of sessions that answer; this one only transcribes."""


def parsed(text: str | bytes) -> ClientEvent:
    """A client's event. Raises Refused, which names the field that is wrong."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        raise Refused("an event is a JSON object", "invalid_json") from None
    if not isinstance(given, dict):
        raise Refused("an event is a JSON object", "invalid_json")
    name, event = given.get("type"), given.get("event_id")
    event = event if isinstance(event, str) and len(event) <= 512 else None
    if name == "transcription_session.update":
        given = {**given, "type": "session.update", "session": _nested(given.get("session"))}
    kind = KINDS.get(given["type"]) if isinstance(name, str) else None
    if kind is None:
        raise Refused(_no_event(name), "invalid_value", "type", event)
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        message, param = _problem(error)
        raise Refused(message, "invalid_value", param, event) from None


def session_of(given: object) -> Session:
    """A session as a client secret is asked for with; Refused names the field that is wrong."""
    try:
        return Session.model_validate(given)
    except ValidationError as error:
        message, inner = _problem(error)
        raise Refused(f"session.{message}", param=f"session.{inner}".strip(".")) from None


def new_id(kind: str) -> str:
    """A name that nothing else has: `event_…`, `item_…`, `sess_…`."""
    return f"{kind}_{uuid4().hex[:24]}"


def refusal(error: Exception) -> Refused:
    """Any error as a client sees it. One that nobody foresaw is logged and not shown."""
    return error if isinstance(error, Refused) else Refused.of(explained(error))


def error_event(error: Refused) -> dict[str, Any]:
    """What a client is told of its own event, or of the session's end."""
    told = {
        "type": error.kind,
        "code": error.code,
        "message": error.message,
        "param": error.param,
        "event_id": error.event,
    }
    return {"type": "error", "error": told}


def failed(item: str, error: Refused) -> dict[str, Any]:
    """A turn that could not be transcribed."""
    told = {
        "type": error.kind,
        "code": error.code,
        "message": error.message,
        "param": error.param,
    }
    return {"type": f"{TRANSCRIPTION}.failed", "item_id": item, "content_index": 0, "error": told}


def conversation_item(
    kind: Literal["added", "done"], item: str, before: str | None, transcript: str | None
) -> dict[str, Any]:
    """A turn as an item of the conversation."""
    return {
        "type": f"conversation.item.{kind}",
        "previous_item_id": before,
        "item": {
            "id": item,
            "object": "realtime.item",
            "type": "message",
            "status": "completed" if kind == "done" else "in_progress",
            "role": "user",
            "content": [{"type": "input_audio", "transcript": transcript}],
        },
    }


def delta(item: str, text: str, logprobs: Sequence[dict[str, Any]] | None) -> dict[str, Any]:
    """More of a turn's transcript."""
    more = {} if logprobs is None else {"logprobs": list(logprobs)}
    return {
        "type": f"{TRANSCRIPTION}.delta",
        "item_id": item,
        "content_index": 0,
        "delta": text,
        **more,
    }


def segment(
    item: str,
    text: str,
    start: float,
    end: float,
    words: Sequence[dict[str, Any]],
    unclear: bool = False,
) -> dict[str, Any]:
    """A part of a turn that will not change; times are seconds of all audio of the session.
    `unclear`: its words may be nothing that was said."""
    return {
        "type": f"{TRANSCRIPTION}.segment",
        "id": new_id("seg"),
        "item_id": item,
        "content_index": 0,
        "text": text,
        "speaker": "",
        "start": round(start, 3),
        "end": round(end, 3),
        "words": list(words),
        "unclear": unclear,
    }


def completed(
    item: str, transcript: str, seconds: float, logprobs: Sequence[dict[str, Any]] | None
) -> dict[str, Any]:
    """The whole transcript of a turn."""
    more = {} if logprobs is None else {"logprobs": list(logprobs)}
    return {
        "type": f"{TRANSCRIPTION}.completed",
        "item_id": item,
        "content_index": 0,
        "transcript": transcript,
        "usage": {"type": "duration", "seconds": round(seconds, 3)},
        **more,
    }


def timed(word: Word) -> dict[str, Any]:
    """A word of a segment."""
    return {"word": word.text, "start": word.start, "end": word.end}


def _no_event(name: object) -> str:
    if isinstance(name, str) and name.startswith(ELSEWHERE):
        return f"{name[:SHOWN]}: a transcription session does not answer, it has no such event"
    return f"{str(name)[:SHOWN]!r} is no event here, which are: {', '.join(KINDS)}"


def _problem(error: ValidationError) -> tuple[str, str]:
    """What is wrong first, and the dotted name of the field."""
    first = error.errors(include_url=False)[0]
    param = ".".join(str(part) for part in first["loc"] if not str(part).startswith("function"))
    if first["type"] == "extra_forbidden":
        return f"{param}: there is no such field", param
    given = "" if first["type"] == "missing" else f", not {str(first['input'])[:SHOWN]!r}"
    return f"{param}: {first['msg'][:200]}{given}", param


def _merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    both = {
        name: _merged(one[name], value)
        for name, value in other.items()
        if isinstance(value, dict) and isinstance(one.get(name), dict)
    }
    return {**one, **other, **both}


FLAT_FORMATS = {"pcm16": "audio/pcm", "g711_ulaw": "audio/pcmu", "g711_alaw": "audio/pcma"}


def _nested(given: object) -> object:
    """A session in the flat shape of older clients, in today's."""
    if not isinstance(given, dict):
        return given
    inner = {
        name: given[f"input_audio_{name}"]
        for name in ("transcription", "noise_reduction")
        if f"input_audio_{name}" in given
    }
    if "turn_detection" in given:
        inner["turn_detection"] = given["turn_detection"]
    if (kind := given.get("input_audio_format")) is not None:
        inner["format"] = {"type": FLAT_FORMATS.get(kind, kind) if isinstance(kind, str) else kind}
    moved = {"input_audio_format", "input_audio_transcription", "input_audio_noise_reduction"}
    rest = {name: value for name, value in given.items() if name not in {*moved, "turn_detection"}}
    return {**rest, "audio": {"input": inner}}
