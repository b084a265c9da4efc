"""Every audio type of the installed openai package has been thought of: a newer one that has more
makes a test fail, which names what is new.

The application is the real one, the client is OpenAI's, and what it sends is read from the types.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pkgutil import iter_modules
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import openai
import pytest
from application import TRANSCRIBE, Handle, client, encode, made, served
from application import transcribe as heard
from openai import OpenAI
from openai._models import BaseModel
from openai.types import audio, audio_model, audio_response_format
from openai.types.audio import (
    transcription_create_params,
    transcription_create_response,
    transcription_include,
    transcription_stream_event,
    translation_create_params,
)
from pydantic import ValidationError

from mmrag import shipped
from mmrag.model.vocabulary import Vocabulary
from mmrag.records import Word

SENTENCE = "please call on friday"
"""What the decoder of these tests hears."""
WALKED = {
    "transcription",
    "transcription_create_params",
    "transcription_create_response",
    "transcription_diarized",
    "transcription_diarized_segment",
    "transcription_include",
    "transcription_language",
    "transcription_segment",
    "transcription_stream_event",
    "transcription_text_delta_event",
    "transcription_text_done_event",
    "transcription_text_segment_event",
    "transcription_verbose",
    "transcription_word",
    "translation",
    "translation_create_params",
    "translation_create_response",
    "translation_verbose",
}
"""Modules of openai.types.audio that these tests look into."""
OF_SPEAKING = {
    "speech_create_params",
    "speech_model",
    "voice",
    "voice_consent",
    "voice_consent_create_params",
    "voice_consent_deleted",
    "voice_consent_list_params",
    "voice_consent_update_params",
    "voice_create_params",
    "voice_deleted",
}
"""Modules for text to speech, which is no part of this service."""
NONSENSE: dict[str, tuple[Any, type[openai.APIStatusError], dict[str, Any]]] = {
    "file": (("a", b"not audio"), openai.BadRequestError, {}),
    "model": ("whisper-0", openai.NotFoundError, {}),
    "chunking_strategy": ({"type": "no_vad"}, openai.BadRequestError, {}),
    "include": (["nonsense"], openai.BadRequestError, {}),
    "keywords": (["..."], openai.BadRequestError, {}),
    "language": ("xx", openai.BadRequestError, {}),
    "languages": (["xx"], openai.BadRequestError, {}),
    "prompt": (",".join(map("name {}".format, range(501))), openai.BadRequestError, {}),
    "response_format": ("xml", openai.UnprocessableEntityError, {}),
    "temperature": (2, openai.UnprocessableEntityError, {}),
    "timestamp_granularities": (["letter"], openai.UnprocessableEntityError, {}),
    "stream": (True, openai.BadRequestError, {"response_format": "srt"}),
}
"""Field that is used -> a value that shows it, by being refused, with what else is sent."""
REFUSED: dict[str, Any] = {
    "known_speaker_names": ["ann"],
    "known_speaker_references": ["data:audio/wav;base64,UklGRg=="],
}
"""Field that is refused -> a value that it may have."""
NEVER_ANSWERED = {"TranscriptionTextDeltaEvent.segment_id"}
"""Of diarization."""


def fields(*typed: type) -> dict[str, Any]:
    """The fields of typed dictionaries, with their types."""
    return {name: kind for one in typed for name, kind in get_type_hints(one).items()}


def literals(kind: Any) -> set[str]:
    """The values of a type that is, or holds, literals."""
    if get_origin(kind) is Literal:
        return set(get_args(kind))
    return {value for part in get_args(kind) for value in literals(part)}


PARAMS = fields(
    transcription_create_params.TranscriptionCreateParamsNonStreaming,
    transcription_create_params.TranscriptionCreateParamsStreaming,
)


@cache
def vocabulary() -> Vocabulary:
    return Vocabulary.load(shipped.find(shipped.DEFAULT) / "lm")


async def transcribe(request):
    """The sentence, as the decoder answers."""
    plain = await heard(request)
    tokens = tuple(vocabulary().encode(SENTENCE))
    ends = tuple(end for _, end in vocabulary().word_ends(tokens))
    words = tuple(
        Word(text, 0.9, 0.8, start=0.1 * n, end=0.1 * n + 0.1)
        for n, text in enumerate(SENTENCE.split())
    )
    timed = request.output.timed or request.output.evidence
    return replace(
        plain,
        text=SENTENCE,
        tokens=tokens,
        logps=tuple(-0.1 * n for n in range(len(tokens))),
        words=words if timed else (),
        ends=ends if timed else (),
    )


async def stream(request):
    yield SENTENCE
    yield await transcribe(request)


def application(**settings):
    return made(
        Handle(transcribe=transcribe, stream=stream),
        encoder=Handle(encode=encode),
        settings=settings,
    )


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(application()) as address:
        yield address


@pytest.fixture
def create(url, second):
    """OpenAI's own method, with a file and a model where the test names none."""
    api = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    usual = {"model": "whisper-1", **second}
    return lambda **given: api.audio.transcriptions.create(**(usual | given))


def test_every_module_has_been_looked_at():
    found = {module.name for module in iter_modules(audio.__path__)}
    assert found - WALKED - OF_SPEAKING == set(), "new in openai.types.audio: decide what it is"
    assert found >= WALKED


def test_every_field_of_a_request_is_used_or_refused():
    known = NONSENSE.keys() | REFUSED.keys()
    assert PARAMS.keys() - known == set(), "a new field of audio.transcriptions.create"
    assert known == PARAMS.keys()


@pytest.mark.parametrize("name", NONSENSE)
def test_a_field_that_is_used_is_refused_for_nonsense(create, name):
    value, error, more = NONSENSE[name]
    with pytest.raises(error) as refused:
        create(**{name: value, **more})
    said = f"{refused.value.param} {refused.value.body}"
    assert name in said or name == "keywords", "the error names the field"


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_of_diarization_is_refused_by_name_with_the_reason(create, name):
    with pytest.raises(openai.BadRequestError, match="no diarization") as refused:
        create(**{name: REFUSED[name]})
    assert refused.value.param == f"{name}[]"


def test_every_format_is_served_but_that_of_diarization(create):
    formats = literals(audio_response_format.AudioResponseFormat)
    assert formats - {"json", "text", "srt", "vtt", "verbose_json", "diarized_json"} == set()
    for one in formats - {"diarized_json"}:
        told = create(response_format=one)
        assert SENTENCE in (told if isinstance(told, str) else told.text)
    with pytest.raises(openai.BadRequestError, match="no diarization") as refused:
        create(response_format="diarized_json")
    assert refused.value.param == "response_format"


def test_every_model_of_openais_is_answered_for_but_that_of_diarization(create):
    models = literals(audio_model.AudioModel)
    assert "whisper-1" in models
    for one in models - {"gpt-4o-transcribe-diarize"}:
        assert create(model=one).text == SENTENCE, one
    with pytest.raises(openai.NotFoundError, match="no diarization"):
        create(model="gpt-4o-transcribe-diarize")


def test_every_value_of_a_list_is_served(create):
    for one in literals(transcription_include.TranscriptionInclude):
        assert getattr(create(include=[one]), one), one
    for one in literals(PARAMS["timestamp_granularities"]):
        told = create(response_format="verbose_json", timestamp_granularities=[one])
        assert getattr(told, f"{one}s"), one


def test_every_way_to_cut_is_served(create):
    strategy = transcription_create_params.ChunkingStrategyVadConfig
    values = {
        "type": "server_vad",
        "prefix_padding_ms": 100,
        "silence_duration_ms": 300,
        "threshold": 0.4,
    }
    assert fields(strategy).keys() == values.keys(), "a new setting of server_vad"
    for name in values.keys() - {"type"}:
        with pytest.raises(openai.BadRequestError) as refused:
            create(chunking_strategy={"type": "server_vad", name: -1})
        assert refused.value.param == f"chunking_strategy[{name}]"
    create(chunking_strategy=values)
    others = literals(transcription_create_params.ChunkingStrategy)
    assert others == {"auto"} and create(chunking_strategy="auto").text == SENTENCE
    assert create(chunking_strategy=None).text == SENTENCE


def models(kind: Any) -> list[type[BaseModel]]:
    """The models that a type is, or holds."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    if get_origin(kind) in (Annotated, Union, UnionType, list):
        return [one for part in get_args(kind) for one in models(part)]
    return []


def absent(kind: type[BaseModel], body: dict[str, Any]) -> set[str]:
    """Fields of a model, and of the models in it, that a body has not; it must be one, strictly."""
    kind.model_validate(body, strict=True)
    missing = {f"{kind.__name__}.{name}" for name in kind.model_fields.keys() - body.keys()}
    for name, field in kind.model_fields.items():
        inner = models(field.annotation)
        values = body.get(name) or []
        for value in (values if isinstance(values, list) else [values]) if inner else ():
            missing |= absent(one_of(inner, value), value)
    return missing


def one_of(kinds: list[type[BaseModel]], body: dict[str, Any]) -> type[BaseModel]:
    """The one of some models that a body is, strictly."""
    found = []
    for kind in kinds:
        try:
            kind.model_validate(body, strict=True)
            found.append(kind)
        except ValidationError:
            continue
    [only] = found
    return only


EVERYTHING = {
    "include[]": ["logprobs", "retrieval"],
    "timestamp_granularities[]": ["word", "segment"],
}


def body(app: Any, second: dict[str, Any], **form: Any) -> dict[str, Any]:
    answer = client(app).post(TRANSCRIBE, files=second, data=form)
    assert answer.status_code == 200, answer.text
    return json.loads(answer.text, parse_constant=pytest.fail)


def test_every_kind_of_answer_is_known():
    kinds = models(transcription_create_response.TranscriptionCreateResponse)
    assert {kind.__name__ for kind in kinds} == {
        "Transcription",
        "TranscriptionVerbose",
        "TranscriptionDiarized",
    }


@pytest.mark.parametrize("usage", ["duration", "tokens"])
def test_json_holds_every_field_of_openais_type(second, usage):
    told = body(application(usage=usage), second, **{"include[]": EVERYTHING["include[]"]})
    assert absent(audio.Transcription, told) == set(), "fields that no answer holds"
    assert told["usage"]["type"] == usage
    least = body(application(usage=usage), second)
    assert absent(audio.Transcription, least) == {"Transcription.logprobs"}


def test_verbose_json_holds_every_field_of_openais_type(second):
    asked = {"response_format": "verbose_json"}
    told = body(application(usage="tokens"), second, **asked, **EVERYTHING)
    assert absent(audio.TranscriptionVerbose, told) == set(), "fields that no answer holds"
    assert told["segments"] and told["words"]
    least = body(application(), second, **asked)
    assert absent(audio.TranscriptionVerbose, least) == {"TranscriptionVerbose.words"}


EVENTS = {
    get_args(kind.model_fields["type"].annotation)[0]: kind
    for kind in models(transcription_stream_event.TranscriptionStreamEvent)
}


@pytest.mark.parametrize("form", ["json", "text", "verbose_json"])
@pytest.mark.parametrize("logprobs", [True, False])
def test_every_event_of_a_stream_is_one_of_openais(second, form, logprobs):
    if form == "text" and logprobs:
        return
    given = {"stream": "true", "response_format": form}
    if form == "verbose_json":
        given["timestamp_granularities[]"] = EVERYTHING["timestamp_granularities[]"]
    given |= {"include[]": "logprobs"} if logprobs else {}
    answer = client(application()).post(TRANSCRIBE, files=second, data=given)
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line]
    missing = set.union(*(absent(EVENTS[event["type"]], event) for event in events))
    unasked = {
        "TranscriptionTextDeltaEvent.logprobs",
        "TranscriptionTextDoneEvent.logprobs",
    }
    assert missing - NEVER_ANSWERED == (set() if logprobs else unasked), "fields of no event"
    told = {event["type"] for event in events}
    segments = {"transcript.text.segment"}
    assert told == (set(EVENTS) if form == "verbose_json" else EVENTS.keys() - segments)
    assert events[-1]["type"] == "transcript.text.done"
    assert "".join(event.get("delta", "") for event in events) == events[-1]["text"] != ""


def test_openais_client_reads_every_event(create):
    told = list(create(stream=True, response_format="verbose_json", include=["logprobs"]))
    assert [type(event) for event in told] == [EVENTS[event.type] for event in told]
    *_, delta, segment, done = told
    assert delta.delta == segment.text == done.text == SENTENCE
    assert "".join(one.token for one in delta.logprobs) == done.text
    pairs = zip(delta.logprobs, done.logprobs, strict=True)
    assert all(one.model_dump() == other.model_dump() for one, other in pairs)
    assert done.usage.type == "tokens"
    assert (segment.id, segment.speaker) == ("0", "")


def test_every_field_of_a_translation_is_answered_with_the_reason(url, second):
    known = {"file", "model", "prompt", "response_format", "temperature"}
    found = fields(translation_create_params.TranslationCreateParams).keys()
    assert found == known, "a new field of audio.translations.create"
    translate = OpenAI(base_url=f"{url}/v1", api_key="none").audio.translations.create
    more = {"prompt": "a", "response_format": "text", "temperature": 0}
    with pytest.raises(openai.BadRequestError, match="nothing is translated here"):
        translate(model="whisper-1", **second, **more)


def test_a_field_that_is_new_is_found():
    class More(audio.Transcription):
        speakers: int | None = None

    found = absent(More, {"text": "a"})
    assert "More.speakers" in found and "More.text" not in found
    with pytest.raises(ValidationError):
        absent(audio.Transcription, {"text": 1})
