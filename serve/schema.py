"""What the HTTP API takes and gives, as OpenAPI shows it. OpenAI's names where OpenAI has one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmrag.model.vocabulary import Vocabulary
from mmrag.retrieval import wording
from serve.errors import ApiError
from serve.settings import Limits

ResponseFormat = Literal["json", "text", "srt", "vtt", "verbose_json"]
Granularity = Literal["word", "segment"]
ErrorType = Literal[
    "invalid_request_error", "authentication_error", "rate_limit_error", "server_error"
]


class Error(BaseModel):
    """What went wrong."""

    message: str
    type: ErrorType
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    """Every answer that is not a success."""

    error: Error


class DurationUsage(BaseModel):
    """What was transcribed: audio, begun seconds."""

    type: Literal["duration"] = "duration"
    seconds: int


class InputTokens(BaseModel):
    """What the model was given: units (or frames) of speech, and text before it."""

    audio_tokens: int
    text_tokens: int = 0
    """Of phrases none: they are looked up, and no part of the prompt."""


class TokenUsage(BaseModel):
    """What was transcribed: tokens in and out."""

    type: Literal["tokens"] = "tokens"
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_token_details: InputTokens


class Language(BaseModel):
    """A language that was heard, by ISO 639-1."""

    code: str


class Logprob(BaseModel):
    """A token of the transcript: what it adds to the text, blank included, and how likely it was.

    Where a letter takes several tokens, the last of them adds it.
    """

    token: str
    bytes: list[int]
    """`token` in UTF-8."""
    logprob: float
    """Natural logarithm of its probability, retrieval included."""


class Evidence(BaseModel):
    """The datastore entry that spoke for a word."""

    entry: int
    distance: float | None
    attention: float | None
    document: str
    utterance: str
    text: str


class TimedWord(BaseModel):
    """A word, with the evidence for it where that was asked for."""

    word: str
    start: float | None
    end: float | None
    probability: float
    lm_probability: float
    changed: bool
    confidence: float | None = None
    """Calibrated probability that the word is right; null where the model is not calibrated."""
    unclear: bool = False
    """Whether its segment is too unsure to rely on."""
    source: Evidence | None = None


class PlainWord(BaseModel):
    """A word and its times, seconds."""

    word: str
    start: float
    end: float


class Segment(BaseModel):
    """A part of the transcript, as long as a subtitle."""

    id: int
    seek: int
    start: float
    end: float
    text: str
    tokens: list[int]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float = 0.0
    """How likely it is that nobody speaks, by the speech detector, which looks no further where it
    is below 0.01; 0 where it is off."""
    confidence: float | None = None
    """Share of the words that is expected to be right; null where the model is not calibrated."""
    unclear: bool = False
    """Whether that is too little to rely on them."""


class Transcription(BaseModel):
    """The transcript; `words` and `missing_shards` with include[]=retrieval."""

    text: str
    usage: DurationUsage | TokenUsage = Field(discriminator="type")
    languages: list[Language] | None = None
    """Those heard; empty where nobody speaks, or nothing says in which."""
    logprobs: list[Logprob] | None = None
    """With include[]=logprobs."""
    words: list[TimedWord] | None = None
    missing_shards: int | None = None
    """Index shards that did not answer: what they hold was not found."""


class VerboseTranscription(Transcription):
    """The transcript with times."""

    task: Literal["transcribe"] = "transcribe"
    language: str
    duration: float
    segments: list[Segment] | None = None
    words: list[TimedWord] | list[PlainWord] | None = None


class Delta(BaseModel):
    """More text of a stream."""

    type: Literal["transcript.text.delta"] = "transcript.text.delta"
    delta: str
    logprobs: list[Logprob] | None = None


class SegmentEvent(BaseModel):
    """A segment of a stream is complete (verbose_json)."""

    type: Literal["transcript.text.segment"] = "transcript.text.segment"
    id: str
    start: float
    end: float
    text: str
    speaker: Literal[""] = ""
    """OpenAI's event has one; speakers are not told apart here, so it is always empty."""


class Done(Transcription):
    """The end of a stream: the whole transcript, whatever the deltas said."""

    type: Literal["transcript.text.done"] = "transcript.text.done"
    duration: float


class VerboseDone(VerboseTranscription, Done):
    """The same with times."""


class Model(BaseModel):
    """A model that transcribes."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mmrag"
    root: str
    """The model that answers to this id: another's where the id is an alias."""
    aliases: list[str]
    """Further ids that it answers to."""
    version: str | None = None
    """Of a registered model."""
    languages: list[str]
    retrieval: list[str]
    fingerprints: dict[str, str]


class Models(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[Model]


class DayOfUsage(BaseModel):
    """What a tenant used on a day."""

    day: str
    requests: int
    sessions: int
    audio_seconds: float
    tokens: int


class TenantUsage(BaseModel):
    """What a tenant has used, has, and may have (null: whatever the service has room for)."""

    object: Literal["usage"] = "usage"
    tenant: str
    data: list[DayOfUsage]
    datastores: int
    entries: int
    quotas: dict[str, float | None]


class ServerVad(BaseModel):
    """Where to cut an upload: after each silence of `silence_duration_ms`."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["server_vad"]
    threshold: float = Field(default=0.5, ge=0, le=1)
    """From which probability on a sound is speech."""
    prefix_padding_ms: int = Field(default=300, ge=0, le=10_000)
    """Audio to keep before the speech."""
    silence_duration_ms: int = Field(default=200, ge=0, le=10_000)


class Status(BaseModel):
    """Whether the service works."""

    status: Literal["ok", "starting", "stopping"]


def server_vad(fields: Mapping[str, Any]) -> ServerVad:
    """The chunking strategy of these fields; ApiError (400) names the one that is wrong."""
    try:
        return ServerVad.model_validate(fields)
    except ValidationError as error:
        problem = error.errors()[0]
        param = "chunking_strategy" + "".join(f"[{part}]" for part in problem["loc"])[:40]
        message = f"{param}: {problem['msg']}"
        raise ApiError(400, message, "unsupported_value", param) from None


def evened(texts: Iterable[str]) -> list[str]:
    """The texts, blanks and control characters evened out and empty ones dropped."""
    return [even for even in map(wording.evened, texts) if even]


def bounded_texts(
    texts: Sequence[str], most: int, param: str, limits: Limits, vocabulary: Vocabulary
) -> list[str]:
    """The texts, `evened`.

    Raises ApiError (400) if there are more than `most`, or one is too long, or nothing that can be
    spoken with this vocabulary.
    """
    found = evened(texts)
    if len(found) > most:
        raise ApiError(400, f"{param}: {len(found)} are too many, at most {most}", None, param)
    for text in found:
        if len(text) > limits.text_length:
            message = f"{param}: {text[:20]!r}… has {len(text)} characters"
            raise ApiError(400, f"{message}, at most {limits.text_length}", None, param)
        if refusal := vocabulary.refusal(text):
            raise ApiError(400, f"{param}: {refusal}", None, param)
    return found


def check_length(texts: Sequence[str], param: str, limits: Limits) -> None:
    """Raises ApiError (400) if the texts together have more characters than may be spoken."""
    length = sum(map(len, texts))
    if length > limits.texts_length:
        message = f"{param}: {length} characters in all, at most {limits.texts_length}"
        raise ApiError(400, f"{message} in a request", None, param)


class ExpiresAfter(BaseModel):
    """When a client secret expires."""

    model_config = ConfigDict(extra="forbid")

    anchor: Literal["created_at"] = "created_at"
    seconds: int = Field(600, ge=10, le=7200)


class ClientSecretRequest(BaseModel):
    """What a client secret is to be."""

    model_config = ConfigDict(extra="forbid")

    expires_after: ExpiresAfter = ExpiresAfter()
    session: dict[str, Any] = Field(
        default_factory=dict, description="a session as `session.update` has it"
    )


class ClientSecret(BaseModel):
    """A key for the realtime sessions of a browser."""

    value: str
    expires_at: int
    session: dict[str, Any]
