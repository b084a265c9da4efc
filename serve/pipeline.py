"""An upload through the deployments: cut, encoded, decoded with retrieval; no HTTP here.

A call whose replica dies under it is made again on another one: nothing that the deployments do for
a transcript changes anything, so doing it twice does no harm.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from mmrag.config import RetrievalMode
from mmrag.contents import Lookup
from mmrag.recogniser import is_whisper
from mmrag.records import Word
from mmrag.speech import audio, cutting
from serve.handles import SizedHandle, by_reference
from serve.messages import (
    DecodeRequest,
    DecodeResult,
    Encoded,
    EncodedSegment,
    InvalidRequest,
    OutputOptions,
    PhraseList,
    ResolvedDatastore,
    Unavailable,
    weight,
)
from serve.settings import Settings

ATTEMPTS = 5
PAUSE_SECONDS = 0.2
"""Before the second attempt; twice as long before each further one."""
HIGHEST_DENSITY = 768_000
"""Samples a second over all channels (eight at 96 kHz): a small file may unpack to more."""


@dataclass(frozen=True)
class TranscriptionOptions:
    """What a caller asks for besides the upload."""

    datastore: str | None = None
    phrases: Sequence[str] = ()
    shortlist: int | None = None
    """As in `DecodeRequest`."""
    retrieval: RetrievalMode | None = None
    """None: kNN-LM and cross-attention where there is something to look up."""
    output: OutputOptions = field(default_factory=OutputOptions)


@dataclass(frozen=True)
class TranscribedSegment:
    """A part of the upload between `start` and `end` (seconds), and what is said in it.

    `result` is None where nobody speaks; its words' times count from the upload's start.
    """

    start: float
    end: float
    result: DecodeResult | None
    speech: float | None = None
    """As in `EncodedSegment`."""


RequestBuilder = Callable[[EncodedSegment], DecodeRequest]
"""An encoded segment -> the request to decode it."""


class Pipeline:
    """Handles to the deployments, and how they are called."""

    def __init__(
        self,
        settings: Settings,
        encoder: DeploymentHandle,
        retriever: DeploymentHandle,
        decoder: DeploymentHandle,
    ) -> None:
        self.settings = settings
        self.encoder = encoder
        self.retriever = by_reference(retriever)
        self.decoder = decoder
        self._encoder = SizedHandle(encoder)
        self._large = is_whisper(settings.model)
        """Whether a short clip may be encoded to much: a Whisper's states are of whole windows."""
        self._decoder = SizedHandle(decoder)
        self._streaming_decoder = SizedHandle(decoder.options(stream=True))
        self._reads: bool | None = None

    async def seconds(self, data: bytes) -> float:
        """Length of an upload: what it decodes to, or as much of it as exceeds what is taken.

        AudioError if it cannot be read, or unpacks to too much.
        """
        enough = self.settings.limits.audio_seconds
        length, density = await asyncio.to_thread(audio.extent, data, enough)
        if density > HIGHEST_DENSITY:
            message = f"uploaded audio: {density} samples a second, at most {HIGHEST_DENSITY}"
            raise audio.AudioError(message)
        return length

    async def transcribe(
        self, data: bytes, build: RequestBuilder
    ) -> AsyncIterator[str | TranscribedSegment]:
        """Text as it is made, and each segment of the upload when it is complete.

        The text of every segment but the first starts with a blank.
        """
        first = True
        async for start, end, encoded in self._encoded(data):
            if encoded is None:
                yield TranscribedSegment(start, end, None)
                continue
            begun, blank = False, "" if first else " "
            async for part in self._decoded(build(encoded)):
                if isinstance(part, DecodeResult):
                    first = first and not part.text
                    result = _later(part, start + encoded.start)
                    yield TranscribedSegment(start, end, result, encoded.speech)
                else:
                    yield part if begun else blank + part
                    begun = begun or bool(part)

    async def complete(self, data: bytes, build: RequestBuilder) -> list[TranscribedSegment]:
        """The whole of an upload, segment by segment."""
        found = []
        async for start, end, encoded in self._encoded(data):
            if encoded is None:
                found.append(TranscribedSegment(start, end, None))
                continue
            request = build(encoded)
            decoder = self._decoder.of(request.size)
            result = await self.call(decoder.transcribe, request)
            result = _later(result, start + encoded.start)
            found.append(TranscribedSegment(start, end, result, encoded.speech))
        return found

    async def waves(self, data: bytes) -> list[np.ndarray]:
        """An upload cut into waves, as the encoder takes them."""
        return [segment.wave.numpy() async for segment in _each(self._segments(data))]

    async def encode(self, wave: np.ndarray) -> EncodedSegment | None:
        """A wave's units; None where nobody speaks."""
        encoder = self._encoder.of(None if self._large else wave.nbytes)
        return await self.call(encoder.encode, wave)

    async def look_up(self, name: str, asked: str | Encoded, k: int) -> list[Lookup]:
        """What a datastore finds before each token of a text, or of what is said.

        Raises UnknownDatastore, DatastoreError or InvalidRequest where that cannot be.
        """
        found = await self.call(self.retriever.resolve, name)
        size = len(asked.encode()) if isinstance(asked, str) else weight(asked)
        return await self.call(self._decoder.of(size).look_up, found, asked, k)

    async def call(self, method: Callable[..., Any], *arguments: object) -> Any:
        """Call a deployment, again if its replica dies meanwhile.

        Raises what it raises; Unavailable if nobody answers after all.
        """
        for attempt in range(ATTEMPTS):
            try:
                return await method.remote(*arguments)
            except RayTaskError as error:
                raise error.cause from None
            except (RayActorError, DeploymentUnavailableError):
                await asyncio.sleep(PAUSE_SECONDS * 2**attempt)
        raise Unavailable("a part of the service does not answer: try again")

    def _segments(self, data: bytes) -> Iterator[cutting.Segment]:
        return cutting.segments(data, self.settings.decode.max_seconds)

    async def _encoded(
        self, data: bytes
    ) -> AsyncIterator[tuple[float, float, EncodedSegment | None]]:
        """Each segment's start, end and units; the next one is encoded meanwhile."""
        encoding: asyncio.Task | None = None
        where: tuple[float, float] = (0.0, 0.0)
        try:
            async for segment in _each(self._segments(data)):
                ahead = asyncio.create_task(self.encode(segment.wave.numpy()))
                done, encoding = encoding, ahead
                if done is not None:
                    yield *where, await done
                where = segment.start, segment.end
            if encoding is not None:
                done, encoding = encoding, None
                yield *where, await done
        finally:
            if encoding is not None:
                encoding.cancel()

    async def request_builder(self, options: TranscriptionOptions) -> RequestBuilder:
        """What makes a decode request of an encoded segment: its retrieval is resolved here, once.

        Raises UnknownDatastore, DatastoreError or InvalidRequest where that cannot be.
        """
        self._check_shortlist(options)
        found: ResolvedDatastore | None = None
        phrase_list: PhraseList | None = None
        mode = options.retrieval or "both"
        if mode != "none" and options.datastore is not None:
            found = await self.call(self.retriever.resolve, options.datastore)
        if mode != "none" and options.phrases:
            phrase_list = await self._phrase_list(options.phrases)
        if found is None and phrase_list is None:
            if options.retrieval not in (None, "none"):
                raise InvalidRequest(f"retrieval {options.retrieval} needs a datastore or context")
            mode = "none"
        if options.shortlist and phrase_list is None and found.phrases is None:
            name = options.datastore
            message = f"shortlist: the documents of {name!r} are no phrases"
            raise InvalidRequest(message, "shortlist")
        if options.retrieval is None and mode != "none" and not await self.reads():
            mode = "knn"
        return lambda encoded: DecodeRequest(
            units=encoded.units,
            audible=encoded.audible,
            mode=mode,
            datastore=found,
            phrases=phrase_list,
            shortlist=options.shortlist,
            output=options.output,
        )

    def _check_shortlist(self, options: TranscriptionOptions) -> None:
        """InvalidRequest where it would have no effect."""
        if options.shortlist is None:
            return
        given = [bool(options.datastore), bool(options.phrases)]
        if options.retrieval == "none" or not any(given):
            message = "shortlist: there is nothing to look up that it shortens"
            raise InvalidRequest(message, "shortlist")
        if all(given):
            message = "shortlist: of a datastore or of context, and not of both"
            raise InvalidRequest(message, "shortlist")

    async def _phrase_list(self, phrases: Sequence[str]) -> PhraseList:
        """Phrases as entries, put where every decoder finds them.

        This process owns them: they last as long as the request that it works on.
        """
        key, segment = await self.call(self.retriever.phrases, list(phrases))
        return PhraseList(key, await asyncio.to_thread(ray.put, segment))

    async def reads(self) -> bool:
        """Whether the model has an adapter to read with."""
        if self._reads is None:
            _, self._reads = await self.call(self.decoder.describe)
        return self._reads

    async def _decoded(self, request: DecodeRequest) -> AsyncIterator[str | DecodeResult]:
        """A segment's text piece by piece, then its result.

        A stream that breaks is begun again, and what was sent already is passed over.
        """
        sent, decoder = "", self._streaming_decoder.of(request.size)
        for attempt in range(ATTEMPTS):
            again = ""
            try:
                async for part in decoder.stream.remote(request):
                    if isinstance(part, DecodeResult):
                        yield part
                        return
                    again += part
                    if len(again) > len(sent) and again.startswith(sent):
                        yield again[len(sent) :]
                        sent = again
            except RayTaskError as error:
                raise error.cause from None
            except (RayActorError, DeploymentUnavailableError):
                await asyncio.sleep(PAUSE_SECONDS * 2**attempt)
        raise Unavailable("a part of the service does not answer: try again")


async def _each(items: Iterator[Any]) -> AsyncIterator[Any]:
    """Walk through an iterator that works, without holding up the event loop."""
    end = object()
    while (one := await asyncio.to_thread(next, items, end)) is not end:
        yield one


def _later(result: DecodeResult, start: float) -> DecodeResult:
    """A result whose words are timed from the upload's start."""

    def shifted(word: Word) -> Word:
        if word.start is None:
            return word
        return replace(word, start=word.start + start, end=word.end + start)

    return replace(result, words=tuple(map(shifted, result.words)))
