"""POST /v1/audio/transcriptions: OpenAI's form in, OpenAI's formats out, ours on top of both."""

from __future__ import annotations

import json
import logging
import math
import time
import zlib
from asyncio import timeout
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from ray.serve.metrics import Counter, Histogram

from mmrag.model.vocabulary import Vocabulary
from mmrag.records import Word
from serve import captions, errors, forms, middleware, schema
from serve.errors import ApiError
from serve.forms import TranscriptionForm
from serve.pipeline import Pipeline, RequestBuilder, TranscribedSegment, TranscriptionOptions
from serve.settings import Settings

LANGUAGES = {"en": "english", "es": "spanish", "de": "german", "fr": "french"}
"""How OpenAI's verbose answers call a language; others are called by their code."""
log = logging.getLogger("ray.serve")


class Transcriptions:
    """The route, and what it counts."""

    def __init__(self, settings: Settings, pipeline: Pipeline, vocabulary: Vocabulary) -> None:
        self._settings = settings
        self._pipeline = pipeline
        self._vocabulary = vocabulary
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
        router.post(
            middleware.TRANSCRIBE,
            response_model=kinds,
            dependencies=[Depends(forms.transcription_fields)],
        )(self.transcriptions)
        return router

    async def transcriptions(
        self, request: Request, form: Annotated[TranscriptionForm, Depends()]
    ) -> Any:
        """Transcribe an upload. With `stream`, server-sent events."""
        form.check(self._settings)
        caller = request.state.caller
        options = TranscriptionOptions(
            datastore=form.datastore and caller.tenant.datastore(form.datastore),
            tenant=caller.tenant.name,
            phrases=form.phrases(self._settings, self._vocabulary),
            shortlist=form.shortlist,
            retrieval=form.retrieval,
            output=form.output,
        )
        data = await form.file.read()
        seconds = await self._pipeline.seconds(data)
        if seconds > self._settings.limits.audio_seconds:
            longest = self._settings.limits.audio_seconds
            message = f"{seconds:.0f} s of audio, at most {longest:g} s are transcribed at a time"
            raise ApiError(413, message, "too_long", "file")
        started = time.perf_counter()
        async with timeout(self._settings.limits.timeout_seconds):
            # What cannot be served is refused before a stream begins.
            build = await self._pipeline.request_builder(options)
            request.state.quotas.audio(caller, seconds)
            if form.stream:
                stream = self._events(request, data, build, seconds, form.evidence)
                return StreamingResponse(stream, media_type="text/event-stream")
            transcribed = await self._pipeline.complete(data, build)
        self._count(request, transcribed, seconds, started)
        return self._formatted(form, transcribed, seconds)

    def _formatted(
        self, form: TranscriptionForm, transcribed: Sequence[TranscribedSegment], seconds: float
    ) -> Response:
        """A transcript in the format that was asked for."""
        kind = form.response_format
        if kind == "json":
            return _plain(schema.Transcription, transcribed, seconds, form.evidence)
        if kind == "text":
            return PlainTextResponse(_text(transcribed) + "\n")
        if kind in ("srt", "vtt"):
            write = captions.srt if kind == "srt" else captions.vtt
            cues = [
                cue for one in transcribed if one.result for cue in captions.cues(one.result.words)
            ]
            media_type = "application/x-subrip" if kind == "srt" else "text/vtt"
            return PlainTextResponse(write(cues), media_type=media_type)
        return self._verbose(
            transcribed, seconds, form.temperature, form.granularities, form.evidence
        )

    async def _events(
        self, request: Request, data: bytes, build: RequestBuilder, seconds: float, evidence: bool
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
            self._count(request, transcribed, seconds, started)
            done = _plain(schema.Done, transcribed, seconds, evidence, duration=seconds)
            yield _event(json.loads(done.body))
        except Exception as error:  # the status is sent: what is left is to say so
            yield _event(errors.body(errors.explained(error)))

    def _count(
        self,
        request: Request,
        transcribed: Sequence[TranscribedSegment],
        seconds: float,
        started: float,
    ) -> None:
        tokens = sum(len(one.result.tokens) for one in transcribed if one.result)
        request.state.quotas.tokens(request.state.caller, tokens)
        if self._settings.logs.transcripts:
            log.warning("transcript: %s", _text(transcribed))
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
                no_speech_prob=None if one.speech is None else 1 - one.speech,
                confidence=one.result.confidence,
                unclear=one.result.unclear,
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
