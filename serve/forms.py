"""What callers send: fields and parameters by their names, in every spelling that clients use.

Nothing is passed over in silence: an unknown name, or a field given twice, is an error.
"""

# No `from __future__ import annotations`: FastAPI reads the types of a class that it calls.

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, get_type_hints

from fastapi import File, Form, Request, UploadFile
from fastapi.params import Form as FormField
from starlette.datastructures import FormData, QueryParams

from mmrag.config import SLUG, RetrievalMode
from mmrag.model.vocabulary import Vocabulary
from mmrag.retrieval.wording import Entry
from serve import schema, wordings
from serve.errors import ApiError
from serve.messages import OutputOptions
from serve.settings import Settings

FILE = "wav, flac, mp3, ogg, opus, webm, m4a, mp4, mov, 3gp, amr, aac, aiff, au or caf"
MORE_FIELDS = 1000
"""So many beyond a limit are parsed for the answer to say of which field there are too many."""
PROMPT_WORDS = 6
"""Longest part of a prompt that is taken for a name."""
EVIDENCE = "retrieval"
"""What `include` may ask for."""
_Texts = list[str] | None
_Granularities = list[schema.Granularity] | None
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
    prompt: Annotated[
        str | None, Form(description="names to listen for, separated by commas or line breaks")
    ] = None
    temperature: Annotated[float, Form(ge=0, le=1)] = 0.0
    response_format: Annotated[schema.ResponseFormat, Form()] = "json"
    stream: Annotated[bool, Form()] = False
    chunking_strategy: Annotated[str | None, Form(description="`auto`: in pauses")] = None
    timestamp_granularities: Annotated[_Granularities, Form()] = None
    timestamp_granularities_: Annotated[_Granularities, Form(alias="timestamp_granularities[]")] = (
        None
    )
    include: Annotated[_Texts, Form(description="`retrieval`: evidence for each word")] = None
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
        return bool(self._included)

    @property
    def output(self) -> OutputOptions:
        """How text is chosen, and what comes with it."""
        plain = self.response_format in ("json", "text")
        return OutputOptions(self.temperature, not plain or self.evidence, self.evidence)

    def phrases(self, settings: Settings, vocabulary: Vocabulary) -> list[Entry]:
        """What is listened for: the context, and the names that the prompt lists.

        A prompt is free text: what of it cannot be listened for is passed over.
        """
        limits = settings.limits
        fields = (self.context, self.context_, self.keywords, self.keywords_)
        texts = [text for field in fields for text in field or ()]
        how = limits, vocabulary, settings.languages
        listed = wordings.checked(texts, limits.phrases, "context[]", *how, lines=True)
        named = [
            part
            for part in schema.evened(re.split(r"[,;\n]", self.prompt or ""))
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
        if self.model not in (None, "", settings.name):
            message = f"no model {self.model!r} here: this is {settings.name!r}"
            raise ApiError(404, message, "model_not_found", "model")
        self._check_languages(settings.languages)
        unknown = [value for value in self._included if value != EVIDENCE]
        if unknown:
            raise _refused("include[]", f"{unknown[0]!r} is not served, only {EVIDENCE!r}")
        if self.chunking_strategy not in (None, "auto"):
            raise _refused("chunking_strategy", "only 'auto' is served")
        kind = self.response_format
        if self.evidence and kind not in ("json", "verbose_json"):
            raise _refused("include[]", f"response_format {kind!r} has no place for it")
        if self.stream and kind not in ("json", "text"):
            raise _refused("stream", f"response_format {kind!r} is not streamed")
        timed = self.timestamp_granularities or self.timestamp_granularities_
        if timed and kind != "verbose_json":
            raise _refused("timestamp_granularities[]", "they need response_format 'verbose_json'")

    @property
    def _included(self) -> list[str]:
        return [*(self.include or ()), *(self.include_ or ())]

    def _check_languages(self, understood: Sequence[str]) -> None:
        asked = [("language", self.language)] if self.language else []
        listed = [*(self.languages or ()), *(self.languages_ or ())]
        for param, given in [*asked, *(("languages[]", one) for one in listed)]:
            if re.split("[-_]", given.lower())[0] not in understood:
                message = f"{param} {given!r}: this model understands {', '.join(understood)}"
                raise ApiError(400, message, "unsupported_language", param)


async def transcription_fields(request: Request) -> None:
    """A dependency: refuses what the form has besides the fields of `TranscriptionForm`."""
    check_fields(await request.form(), SINGLE, MANY)


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
