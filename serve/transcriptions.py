"""POST /v1/audio/transcriptions: a form is checked, its file transcribed, the answer given.

Forms are read in `forms`, answers written in `answers`. POST /v1/audio/translations says why not.
"""

from __future__ import annotations

import json
import logging
import time
from asyncio import timeout
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response, StreamingResponse
from ray.serve.metrics import Counter, Histogram

from mmrag.model.vocabulary import Vocabulary
from serve import errors, forms, schema
from serve.access.bodies import TRANSCRIBE, TRANSLATE
from serve.answers import Answer
from serve.errors import ApiError
from serve.forms import TranscriptionForm
from serve.pipeline import Pipeline, RequestBuilder, TranscriptionOptions
from serve.settings import Settings

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
            TRANSCRIBE,
            response_model=kinds,
            dependencies=[Depends(forms.FieldCheck(self._settings.unknown_fields))],
        )(self.transcriptions)
        router.post(TRANSLATE)(self.translations)
        return router

    async def transcriptions(
        self, request: Request, form: Annotated[TranscriptionForm, Depends()]
    ) -> Any:
        """Transcribe an upload. With `stream`, server-sent events."""
        form.check(self._settings)
        caller = request.state.caller
        chunking = form.chunking and form.chunking.model_dump(exclude={"type"})
        options = TranscriptionOptions(
            datastore=form.datastore and caller.tenant.datastore(form.datastore),
            tenant=caller.tenant.name,
            phrases=form.phrases(self._settings, self._vocabulary),
            shortlist=form.shortlist,
            retrieval=form.retrieval,
            output=form.output,
            languages=form.language_codes,
        )
        data, seconds = await self._upload(form)
        answer = Answer(form, self._settings, self._vocabulary, seconds)
        started = time.perf_counter()
        async with timeout(self._settings.limits.timeout_seconds):
            # What cannot be served is refused before a stream begins.
            build = await self._pipeline.request_builder(options)
            request.state.quotas.audio(caller, seconds)
            if form.stream:
                stream = self._events(request, answer, data, build, chunking)
                response = StreamingResponse(stream, media_type="text/event-stream")
            else:
                for one in await self._pipeline.complete(data, build, chunking):
                    answer.add(one)
                self._count(request, answer, started)
                response = answer.response()
        response.headers.update(forms.warning(request))
        return response

    async def translations(self, request: Request) -> Response:
        """Refuse to translate, once whoever sends a file has sent it and listens."""
        async for _ in request.stream():
            pass
        message = (
            "nothing is translated here: the model writes down what is said, in the language in "
            "which it is said; ask for a transcription"
        )
        raise ApiError(400, message, "unsupported")

    async def _upload(self, form: TranscriptionForm) -> tuple[bytes, float]:
        """The file of a form, and its length, seconds; ApiError for one that is too long."""
        data = await form.file.read()
        seconds = await self._pipeline.seconds(data)
        longest = self._settings.limits.audio_seconds
        if seconds > longest:
            message = f"{seconds:.0f} s of audio, at most {longest:g} s are transcribed at a time"
            raise ApiError(413, message, "too_long", "file")
        return data, seconds

    async def _events(
        self,
        request: Request,
        answer: Answer,
        data: bytes,
        build: RequestBuilder,
        chunking: dict[str, Any] | None,
    ) -> AsyncIterator[str]:
        """A transcript as server-sent events."""
        started = time.perf_counter()
        try:
            async with timeout(self._settings.limits.timeout_seconds):
                async for part in self._pipeline.transcribe(data, build, chunking):
                    for event in answer.events(part):
                        yield _event(event)
            self._count(request, answer, started)
            yield _event(answer.done())
        except Exception as error:  # the status is sent: what is left is to say so
            yield _event(errors.body(errors.explained(error)))

    def _count(self, request: Request, answer: Answer, started: float) -> None:
        request.state.quotas.tokens(request.state.caller, answer.tokens)
        if self._settings.logs.transcripts:
            log.warning("transcript: %s", answer.text)
        self._audio.inc(answer.seconds)
        self._factor.observe((time.perf_counter() - started) / max(answer.seconds, 1e-3))


def _event(fields: dict[str, Any]) -> str:
    return f"data: {json.dumps(fields, ensure_ascii=False)}\n\n"
