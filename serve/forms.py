"""What callers send: fields and parameters by their names, in every spelling that clients use.

Nothing is passed over in silence: a field given twice is an error, and so is an unknown name, or it
is named in a header of the answer.
"""

# No `from __future__ import annotations`: FastAPI reads the types of a class that it calls.

import json
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_type_hints

from fastapi import File, Form, Request, UploadFile
from fastapi.params import Form as FormField
from starlette.datastructures import FormData, QueryParams

from mmrag.config import SLUG, RetrievalMode
from mmrag.model.vocabulary import Vocabulary
from mmrag.retrieval.wording import Entry
from serve import languages, schema, wordings
from serve.errors import ApiError
from serve.messages import OutputOptions
from serve.settings import Settings

FILE = "wav, flac, mp3, ogg, opus, webm, m4a, mp4, mov, 3gp, amr, aac, aiff, au or caf"
MORE_FIELDS = 1000
"""So many beyond a limit are parsed for the answer to say of which field there are too many."""
PROMPT_WORDS = 6
"""Longest part of a prompt that is taken for a name."""
EVIDENCE, LOGPROBS = "retrieval", "logprobs"
"""What `include` may ask for."""
NO_SPEAKERS = "this service does not tell speakers apart (no diarization)"
REFUSED = {
    f"known_speaker_{kind}{brackets}": NO_SPEAKERS
    for kind in ("names", "references")
    for brackets in ("", "[]")
}
"""Fields of OpenAI's that are never served, and why not."""
DIARIZED = "diarized_json"
_NAMED_FIELDS = 20
"""So many fields that nobody reads are named to who sent them."""
_Texts = list[str] | None
_Granularities = list[schema.Granularity] | None
_PROMPT = "names to listen for, separated by commas or line breaks"
_CHUNKING = "`auto`: in pauses; or a server_vad object as JSON, or its fields one by one"
_CONTEXT = (
    "phrases to listen for in this request: texts, or JSON objects of text, display_as, "
    "pronunciations, weight and language"
)
_SHORTLIST = (
    "of many phrases, listen in each segment for so many that sound most like what was heard "
    "without them; 0: for all; else for ten, where there are more phrases than are read whole"
)


@dataclass
class TranscriptionForm:
    """The fields of POST /v1/audio/transcriptions; lists are sent with brackets or without."""

    file: Annotated[UploadFile, File(description=FILE)]
    model: Annotated[str | None, Form()] = None
    language: Annotated[
        str | None, Form(description="ISO 639-1, or BCP 47, of which the language counts (en-US)")
    ] = None
    languages: Annotated[_Texts, Form(description="each of them as `language`")] = None
    languages_: Annotated[_Texts, Form(alias="languages[]")] = None
    prompt: Annotated[str | None, Form(description=_PROMPT)] = None
    hotwords: Annotated[str | None, Form(description="another name of `prompt`")] = None
    temperature: Annotated[float, Form(ge=0, le=1)] = 0.0
    response_format: Annotated[schema.ResponseFormat, Form()] = "json"
    stream: Annotated[bool, Form()] = False
    chunking_strategy: Annotated[str | None, Form(description=_CHUNKING)] = None
    vad_type: Annotated[str | None, Form(alias="chunking_strategy[type]")] = None
    vad_threshold: Annotated[str | None, Form(alias="chunking_strategy[threshold]")] = None
    vad_padding: Annotated[str | None, Form(alias="chunking_strategy[prefix_padding_ms]")] = None
    vad_silence: Annotated[str | None, Form(alias="chunking_strategy[silence_duration_ms]")] = None
    timestamp_granularities: Annotated[_Granularities, Form()] = None
    timestamp_granularities_: Annotated[_Granularities, Form(alias="timestamp_granularities[]")] = (
        None
    )
    include: Annotated[
        _Texts, Form(description="`logprobs`: of each token; `retrieval`: evidence for each word")
    ] = None
    include_: Annotated[_Texts, Form(alias="include[]")] = None
    datastore: Annotated[str | None, Form(pattern=SLUG)] = None
    context: Annotated[_Texts, Form(description=_CONTEXT)] = None
    context_: Annotated[_Texts, Form(alias="context[]", description=_CONTEXT)] = None
    keywords: Annotated[_Texts, Form(description="another name of `context`")] = None
    keywords_: Annotated[_Texts, Form(alias="keywords[]")] = None
    shortlist: Annotated[int | None, Form(ge=0, le=1000, description=_SHORTLIST)] = None
    retrieval: Annotated[RetrievalMode | None, Form()] = None

    @property
    def granularities(self) -> list[schema.Granularity]:
        """What verbose_json is to give times of."""
        asked = [*(self.timestamp_granularities or ()), *(self.timestamp_granularities_ or ())]
        return asked or ["segment"]

    @property
    def evidence(self) -> bool:
        """Whether words are to come with the evidence for them."""
        return EVIDENCE in self._included

    @property
    def logprobs(self) -> bool:
        """Whether the log-probability of each token is to come along."""
        return LOGPROBS in self._included

    @property
    def output(self) -> OutputOptions:
        """How text is chosen, and what comes with it."""
        plain = self.response_format in ("json", "text")
        return OutputOptions(self.temperature, not plain or self.evidence, self.evidence)

    @property
    def language_codes(self) -> tuple[str, ...]:
        """ISO 639-1 codes of the languages that may be spoken, the one that is first; none: any."""
        given = [one for _, one in self._languages]
        return tuple(dict.fromkeys(map(languages.code, given)))

    @property
    def chunking(self) -> schema.ServerVad | None:
        """Where the upload is to be cut; None for pauses, as always. ApiError names what is wrong
        with it."""
        given = self.chunking_strategy
        nested = {
            "type": self.vad_type,
            "threshold": self.vad_threshold,
            "prefix_padding_ms": self.vad_padding,
            "silence_duration_ms": self.vad_silence,
        }
        nested = {name: value for name, value in nested.items() if value is not None}
        if nested and given:
            raise _refused("chunking_strategy", "it was given as a whole and in parts")
        if given:
            nested = _parsed(given)
        return schema.server_vad(nested) if nested and nested != {"type": "auto"} else None

    def phrases(self, settings: Settings, vocabulary: Vocabulary) -> list[Entry]:
        """What is listened for: the context, and the names that the prompt lists.

        A prompt is free text: what of it cannot be listened for is passed over.
        """
        limits = settings.limits
        fields = (self.context, self.context_, self.keywords, self.keywords_)
        texts = [text for field in fields for text in field or ()]
        how = limits, vocabulary, settings.languages
        listed = wordings.checked(texts, limits.phrases, "context[]", *how, lines=True)
        prose = f"{self.prompt or ''}\n{self.hotwords or ''}"
        named = [
            part
            for part in schema.evened(re.split(r"[,;\n]", prose))
            if len(part.split()) <= PROMPT_WORDS
            and len(part) <= limits.text_length
            and vocabulary.refusal(part) is None
        ]
        most = limits.phrases - len(listed)
        prompted = wordings.checked(named, most, "prompt", *how)
        told = {one.text for one in listed}
        found = [*listed, *(one for one in prompted if one.text not in told)]
        wordings.check_length(found, "context[]", limits)
        return found

    def check(self, settings: Settings) -> None:
        """Raises ApiError, which names the field, for what is not served or has no effect."""
        check_model(self.model or settings.name, settings)
        self._check_languages(settings.languages)
        unknown = [value for value in self._included if value not in (EVIDENCE, LOGPROBS)]
        if unknown:
            reason = f"{unknown[0]!r} is not served, only {LOGPROBS!r} and {EVIDENCE!r}"
            raise _refused("include[]", reason)
        kind = self.response_format
        if self._included and kind not in ("json", "verbose_json"):
            raise _refused("include[]", f"response_format {kind!r} has no place for it")
        if self.stream and kind in ("srt", "vtt"):
            raise _refused("stream", f"response_format {kind!r} is not streamed")
        timed = self.timestamp_granularities or self.timestamp_granularities_
        if timed and kind != "verbose_json":
            raise _refused("timestamp_granularities[]", "they need response_format 'verbose_json'")

    @property
    def _included(self) -> list[str]:
        return [*(self.include or ()), *(self.include_ or ())]

    @property
    def _languages(self) -> list[tuple[str, str]]:
        """The languages that were given, each with its field."""
        one = (self.language or "").strip()
        asked = [("language", one)] if one and one.lower() != languages.UNKNOWN else []
        listed = [*(self.languages or ()), *(self.languages_ or ())]
        return [*asked, *(("languages[]", one) for one in listed if one.strip())]

    def _check_languages(self, understood: Sequence[str]) -> None:
        for param, given in self._languages:
            if languages.code(given) not in understood:
                message = f"{param} {given!r}: this model understands {', '.join(understood)}"
                raise ApiError(400, message, "unsupported_language", param)


def check_model(name: str, settings: Settings) -> None:
    """Raises ApiError (404) for a model that is not here, which names those that are."""
    if name in settings.names:
        return
    own, *others = map(repr, settings.names)
    known = f"{own}, which also answers to {', '.join(others)}" if others else own
    reason = f"; {NO_SPEAKERS}" if "diarize" in name else ""
    message = f"no model {name[:100]!r} here: this is {known}{reason}"
    raise ApiError(404, message, "model_not_found", "model")


@dataclass(frozen=True)
class FieldCheck:
    """A dependency: refuses what the form has besides the fields of `TranscriptionForm`, or lets it
    pass and remembers it for `warning`."""

    unknown: Literal["refuse", "warn"]

    async def __call__(self, request: Request) -> None:
        form = await request.form()
        for name, _ in form.multi_items():
            if name in REFUSED:
                raise _refused(name, REFUSED[name])
        if DIARIZED in form.getlist("response_format"):
            raise _refused("response_format", f"{DIARIZED!r}: {NO_SPEAKERS}")
        extra = [name for name in dict.fromkeys(form) if name not in (*SINGLE, *MANY)]
        request.state.unused = extra if self.unknown == "warn" else []
        check_fields(form, SINGLE, [*MANY, *request.state.unused])


def warning(request: Request) -> dict[str, str]:
    """The header (RFC 7234, 5.5) that names the fields which nobody has read, if there are any."""
    unused = [re.sub(r"[^ !#-\[\]-~]", "?", name[:40]) for name in request.state.unused]
    if not unused:
        return {}
    named = ", ".join(unused[:_NAMED_FIELDS]) + ", ..." * (len(unused) > _NAMED_FIELDS)
    return {"Warning": f'299 - "no field of this form, and not used: {named}"'}


async def query_parameters(request: Request) -> None:
    """A dependency: refuses parameters that the route does not know, and one given twice."""
    known = [field.alias for field in request.scope["route"].dependant.query_params]
    _check_names(request.query_params, known, (), "parameter")


def check_fields(form: FormData, single: Collection[str], many: Collection[str]) -> None:
    """Raises ApiError for a field that is in neither, and for one of `single` given twice."""
    _check_names(form, single, many, "field")


def _check_names(
    given: FormData | QueryParams, single: Collection[str], many: Collection[str], kind: str
) -> None:
    counts = Counter(name for name, _ in given.multi_items())
    for name, count in counts.items():
        if name not in single and name not in many:
            raise _unknown(name, [*single, *many], kind)
        if name in single and count > 1:
            raise _refused(name, "it was given more than once")


def _parsed(strategy: str) -> dict[str, Any]:
    """The fields of a chunking strategy given as a whole."""
    if strategy == "auto":
        return {"type": strategy}
    try:
        fields = json.loads(strategy)
    except (ValueError, RecursionError):
        fields = None
    if fields == "auto":
        return {"type": fields}
    if not isinstance(fields, dict):
        raise _refused("chunking_strategy", 'send auto, or {"type": "server_vad"}')
    return fields


def _unknown(name: str, known: Collection[str], kind: str) -> ApiError:
    listed = ", ".join(known) or "none"
    return ApiError(400, f"{name[:40]!r} is no {kind} here, which are: {listed}", "unknown", name)


def _refused(param: str, reason: str) -> ApiError:
    return ApiError(400, f"{param}: {reason}", "unsupported_value", param)


def _fields() -> tuple[list[str], list[str]]:
    """Names of the form's fields as they are sent: those that come once, and the lists."""
    single, many = [], []
    for name, annotated in get_type_hints(TranscriptionForm, include_extras=True).items():
        [field] = [one for one in annotated.__metadata__ if isinstance(one, FormField)]
        repeated = annotated.__origin__ in (_Texts, _Granularities)
        (many if repeated else single).append(field.alias or name)
    return single, many


SINGLE, MANY = _fields()
"""Fields of the transcription form that come once, and those that may be repeated."""
