"""POST /v1/audio/transcriptions: OpenAI's form in, OpenAI's formats out, ours on top of both."""

from __future__ import annotations

import json
import math
import re
import time
import zlib
from asyncio import timeout
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, File, Form, UploadFile
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from ray.serve.metrics import Counter, Histogram

from mmrag.config import SLUG, RetrievalMode
from mmrag.records import Word
from serve import captions, errors, middleware, schema
from serve.errors import ApiError
from serve.messages import OutputOptions
from serve.pipeline import Pipeline, RequestBuilder, TranscribedSegment, TranscriptionOptions
from serve.settings import Settings

LANGUAGES = {"en": "english", "es": "spanish", "de": "german", "fr": "french"}
"""How OpenAI's verbose answers call a language; others are called by their code."""
FILE = "wav, flac, mp3, ogg, opus, webm, m4a, mp4, mov, 3gp, amr, aac, aiff, au or caf"
PROMPT_WORDS = 6
"""Longest part of a prompt that is taken for a name."""


class Transcriptions:
    """The route, and what it counts."""

    def __init__(self, settings: Settings, pipeline: Pipeline) -> None:
        self._settings = settings
        self._pipeline = pipeline
        self._audio = Counter("mmrag_audio_seconds_total", "Audio transcribed, seconds.")
        self._factor = Histogram(
            "mmrag_real_time_factor",
            "Time to transcribe an upload over its length.",
            boundaries=[0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2],
        )

    def router(self) -> APIRouter:
        """The route."""
        router = APIRouter()
        kinds = schema.VerboseTranscription | schema.Transcription
        router.post(middleware.TRANSCRIBE, response_model=kinds)(self.transcriptions)
        return router

    async def transcriptions(
        self,
        file: Annotated[UploadFile, File(description=FILE)],
        model: Annotated[str | None, Form()] = None,
        language: Annotated[str | None, Form(description="ISO 639-1")] = None,
        prompt: Annotated[
            str | None, Form(description="names to listen for, separated by commas or line breaks")
        ] = None,
        temperature: Annotated[float, Form(ge=0, le=1)] = 0.0,
        response_format: Annotated[schema.ResponseFormat, Form()] = "json",
        stream: Annotated[bool, Form()] = False,
        timestamp_granularities: Annotated[
            list[schema.Granularity], Form(alias="timestamp_granularities[]")
        ] = ["segment"],  # noqa: B006 - FastAPI copies defaults
        include: Annotated[
            list[str], Form(alias="include[]", description="`retrieval`: evidence for each word")
        ] = [],  # noqa: B006
        datastore: Annotated[str | None, Form(pattern=SLUG)] = None,
        context: Annotated[
            list[str],
            Form(alias="context[]", description="phrases to listen for in this request"),
        ] = [],  # noqa: B006
        retrieval: Annotated[RetrievalMode | None, Form()] = None,
    ) -> Any:
        """Transcribe an upload. With `stream`, server-sent events."""
        self._check(model, language)
        evidence = "retrieval" in include
        plain = response_format in ("json", "text")
        options = TranscriptionOptions(
            datastore=datastore,
            phrases=self._phrases(context, prompt),
            retrieval=retrieval,
            output=OutputOptions(temperature, timed=not plain or evidence, evidence=evidence),
        )
        data = await file.read()
        seconds = await self._pipeline.seconds(data)
        if seconds > self._settings.limits.audio_seconds:
            longest = self._settings.limits.audio_seconds
            message = f"{seconds:.0f} s of audio, at most {longest:g} s are transcribed at a time"
            raise ApiError(413, message, "too_long", "file")
        started = time.perf_counter()
        async with timeout(self._settings.limits.timeout_seconds):
            build = await self._pipeline.request_builder(
                options
            )  # what cannot be is refused before a stream
            if stream:
                told = self._events(data, build, seconds, evidence)
                return StreamingResponse(told, media_type="text/event-stream")
            transcribed = await self._pipeline.complete(data, build)
        self._count(seconds, started)
        if response_format == "json":
            return _plain(schema.Transcription, transcribed, seconds, evidence)
        if response_format == "text":
            return PlainTextResponse(_text(transcribed) + "\n")
        if response_format in ("srt", "vtt"):
            write = captions.srt if response_format == "srt" else captions.vtt
            cut = [
                cue for one in transcribed if one.result for cue in captions.cues(one.result.words)
            ]
            kind = "application/x-subrip" if response_format == "srt" else "text/vtt"
            return PlainTextResponse(write(cut), media_type=kind)
        return self._verbose(transcribed, seconds, temperature, timestamp_granularities, evidence)

    def _check(self, model: str | None, language: str | None) -> None:
        if model not in (None, "", self._settings.name):
            known = self._settings.name
            message = f"no model {model!r} here: this is {known!r}"
            raise ApiError(404, message, "model_not_found", "model")
        if language and language.lower() not in self._settings.languages:
            known = ", ".join(self._settings.languages)
            message = f"language {language!r}: this model understands {known}"
            raise ApiError(400, message, "unsupported_language", "language")

    def _phrases(self, context: Sequence[str], prompt: str | None) -> list[str]:
        """What a request listens for: its context, and the names that its prompt lists."""
        named = [part.strip() for part in re.split(r"[,;\n]", prompt or "")]
        named = [part for part in named if 0 < len(part.split()) <= PROMPT_WORDS]
        limits = self._settings.limits
        return schema.bounded_texts([*context, *named], limits.phrases, "context[]", limits)

    async def _events(
        self, data: bytes, build: RequestBuilder, seconds: float, evidence: bool
    ) -> AsyncIterator[str]:
        """A transcript as server-sent events."""
        transcribed, started = [], time.perf_counter()
        try:
            async with timeout(self._settings.limits.timeout_seconds):
                async for part in self._pipeline.transcribe(data, build):
                    if isinstance(part, TranscribedSegment):
                        transcribed.append(part)
                    else:
                        yield _event(schema.Delta(delta=part).model_dump())
            self._count(seconds, started)
            done = _plain(schema.Done, transcribed, seconds, evidence, duration=seconds)
            yield _event(json.loads(done.body))
        except Exception as error:  # the status is sent: what is left is to say so
            yield _event(errors.body(errors.explained(error)))

    def _count(self, seconds: float, started: float) -> None:
        self._audio.inc(seconds)
        self._factor.observe((time.perf_counter() - started) / max(seconds, 1e-3))

    def _verbose(
        self,
        transcribed: Sequence[TranscribedSegment],
        seconds: float,
        temperature: float,
        granularities: Sequence[schema.Granularity],
        evidence: bool,
    ) -> JSONResponse:
        segments = [
            schema.Segment(
                id=0,
                seek=round(one.start * 100),
                start=cue.start,
                end=cue.end,
                text=cue.text,
                tokens=list(one.result.tokens_of(cue.first, cue.last)),
                temperature=temperature,
                avg_logprob=one.result.mean_logp,
                compression_ratio=len(cue.text) / len(zlib.compress(cue.text.encode())),
            )
            for one in transcribed
            if one.result
            for cue in captions.cues(one.result.words)
        ]
        segments = [one.model_copy(update={"id": n}) for n, one in enumerate(segments)]
        language = self._settings.languages[0]
        words = [
            schema.PlainWord(word=word.text, start=word.start, end=word.end)
            for word in _words(transcribed)
        ]
        more: dict[str, Any] = {
            "task": "transcribe",
            "language": LANGUAGES.get(language, language),
            "duration": seconds,
        }
        if "segment" in granularities:
            more["segments"] = segments
        if "word" in granularities and not evidence:
            more["words"] = words
        return _plain(schema.VerboseTranscription, transcribed, seconds, evidence, **more)


def _plain(
    kind: type[schema.Transcription],
    transcribed: Sequence[TranscribedSegment],
    seconds: float,
    evidence: bool,
    **more: Any,
) -> JSONResponse:
    """A transcript as JSON, without the fields that nobody asked for."""
    fields: dict[str, Any] = {
        "text": _text(transcribed),
        "usage": schema.Usage(seconds=math.ceil(seconds)),
        **more,
    }
    if evidence:
        fields["words"] = [_word(word) for word in _words(transcribed)]
        missing = [one.result.missing_shards for one in transcribed if one.result]
        fields["missing_shards"] = max(missing, default=0)
    made = kind(**fields)
    unasked = kind.model_fields.keys() - fields.keys() - {"type", "task"}
    return JSONResponse(made.model_dump(mode="json", exclude=unasked))


def _text(transcribed: Sequence[TranscribedSegment]) -> str:
    return " ".join(one.result.text for one in transcribed if one.result and one.result.text)


def _words(transcribed: Sequence[TranscribedSegment]) -> list[Word]:
    return [word for one in transcribed if one.result for word in one.result.words]


def _word(word: Word) -> schema.TimedWord:
    source = word.source and schema.Evidence(**vars(word.source))
    fields = vars(word) | {"source": source, "word": word.text}
    return schema.TimedWord(**{name: fields[name] for name in schema.TimedWord.model_fields})


def _event(fields: dict[str, Any]) -> str:
    return f"data: {json.dumps(fields, ensure_ascii=False)}\n\n"
