"""An upload through the deployments: cut, encoded, decoded with retrieval; no HTTP here.

A call whose replica dies under it is made again on another one: nothing that the deployments do for
a transcript changes anything, so doing it twice does no harm.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from mmrag.config import RetrievalMode
from mmrag.contents import Lookup
from mmrag.decoding.spotting import spells_all
from mmrag.decoding.stitch import Stitcher
from mmrag.model.whisper import EncodedAudio
from mmrag.recogniser import is_whisper
from mmrag.records import Timed, Word
from mmrag.retrieval.terms import MOST
from mmrag.retrieval.wording import Entry
from mmrag.speech import audio, cutting
from serve import probe, traces
from serve.access.tenants import DEFAULT, own_name
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
GONE = (RayActorError, ObjectLostError, DeploymentUnavailableError)
"""What a call raises whose replica died, or whose result went with the node that it lay on."""
AHEAD, ALL_AHEAD = 4, 8
"""Segments of an upload that are decoded at a time; of all uploads, besides the first of each."""
HIGHEST_DENSITY = 768_000
"""Samples a second over all channels (eight at 96 kHz): a small file may unpack to more."""


@dataclass(frozen=True)
class TranscriptionOptions:
    """What a caller asks for besides the upload."""

    datastore: str | None = None
    phrases: Sequence[Entry] = ()
    shortlist: int | None = None
    """As in `DecodeRequest`."""
    retrieval: RetrievalMode | None = None
    """None: kNN-LM and cross-attention where there is something to look up."""
    output: OutputOptions = field(default_factory=OutputOptions)
    tenant: str = DEFAULT
    """Whose phrases they are: what is kept of them is kept for that tenant alone."""
    languages: tuple[str, ...] = ()
    """ISO 639-1 codes of what may be spoken, the likeliest first; none: whatever it is. For a model
    that finds out for itself, and is told otherwise by them."""


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
        self._ways: frozenset[RetrievalMode] | None = None
        self._ahead = 0
        """Segments under way besides the first of each upload."""

    async def warm_up(self) -> None:
        """Transcribe the probe in every way that callers may ask for: whole, streamed, timed."""
        data = probe.FILE.read_bytes()
        await self.seconds(data)
        timed = TranscriptionOptions(output=OutputOptions(timed=True))
        for options in (TranscriptionOptions(), timed):
            await self.complete(data, await self.request_builder(options))
        async for _ in self.transcribe(data, await self.request_builder(TranscriptionOptions())):
            pass

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
        self, data: bytes, build: RequestBuilder, chunking: Mapping[str, Any] | None = None
    ) -> AsyncIterator[str | TranscribedSegment]:
        """Text as it is made, and each segment of the upload when it is complete.

        The text of every segment but the first starts with a blank. `chunking` are settings of
        `cutting.turns`, by which the upload is cut then.
        """
        first, stitcher = True, Stitcher()
        async for segment, encoded in self._encoded(data, chunking):
            if encoded is not None and not (segment.before or segment.after):
                begun, blank = False, "" if first else " "
                async for part in self._decoded(build(encoded)):
                    if isinstance(part, DecodeResult):
                        first = first and not part.text
                        result = _later(part, segment.start + encoded.start).shown()
                        yield TranscribedSegment(segment.start, segment.end, result, encoded.speech)
                    else:
                        yield part if begun else blank + part
                        begun = begun or bool(part)
                continue
            for made in _add(stitcher, segment, *await self._whole(segment, encoded, build)):
                if made.result is not None and made.result.text:
                    yield made.result.text if first else f" {made.result.text}"
                    first = False
                yield made

    async def complete(
        self, data: bytes, build: RequestBuilder, chunking: Mapping[str, Any] | None = None
    ) -> list[TranscribedSegment]:
        """The whole of an upload, segment by segment; some of them are decoded at a time.

        `chunking` as in `transcribe`.
        """
        found: list[TranscribedSegment] = []
        stitcher = Stitcher()
        under_way: deque[tuple[cutting.Segment, asyncio.Task]] = deque()

        async def finish() -> None:
            segment, task = under_way.popleft()
            self._ahead -= bool(under_way)
            found.extend(_add(stitcher, segment, *await task))

        try:
            async for segment in _each(self._segments(data, chunking)):
                while under_way and (len(under_way) == AHEAD or self._ahead >= ALL_AHEAD):
                    await finish()
                self._ahead += bool(under_way)
                making = asyncio.create_task(self._made(segment, build))
                under_way.append((segment, making))
            while under_way:
                await finish()
        finally:
            self._ahead -= max(0, len(under_way) - 1)
            for _, task in under_way:
                task.cancel()
        return found

    async def _made(
        self, segment: cutting.Segment, build: RequestBuilder
    ) -> tuple[TranscribedSegment, OutputOptions | None]:
        return await self._whole(segment, await self.encode(segment.wave.numpy()), build)

    async def _whole(
        self, segment: cutting.Segment, encoded: EncodedSegment | None, build: RequestBuilder
    ) -> tuple[TranscribedSegment, OutputOptions | None]:
        """All that is heard in a segment, its words timed if it shares some audio; and what the
        caller wanted of it."""
        if encoded is None:
            return TranscribedSegment(segment.start, segment.end, None), None
        request = build(encoded)
        wanted = request.output
        if segment.before or segment.after:
            request = replace(request, output=replace(wanted, timed=True))
        with traces.span("decode"):
            result = await self.decode(request)
        result = _later(result, segment.start - segment.before + encoded.start)
        made = TranscribedSegment(segment.start, segment.end, result, encoded.speech)
        return made, wanted

    async def waves(self, data: bytes) -> list[np.ndarray]:
        """An upload cut into waves, as the encoder takes them."""
        return [segment.wave.numpy() async for segment in _each(self._segments(data))]

    async def encode(self, wave: np.ndarray) -> EncodedSegment | None:
        """A wave's units; None where nobody speaks."""
        encoder = self._encoder.of(None if self._large else wave.nbytes)
        with traces.span("encode", samples=len(wave)):
            return await self.call(encoder.encode, wave)

    async def decode(self, request: DecodeRequest) -> DecodeResult:
        """All that is heard in a segment; its words' times count from the units' beginning."""
        return await self.call(self._decoder.of(request.size).transcribe, request)

    async def look_up(self, name: str, asked: str | Encoded, k: int) -> list[Lookup]:
        """What a datastore finds before each token of a text, or of what is said.

        Raises UnknownDatastore, DatastoreError or InvalidRequest where that cannot be.
        """
        found = await self.call(self.retriever.resolve, name)
        size = len(asked.encode()) if isinstance(asked, str) else weight(asked)
        return await self.call(self._decoder.of(size).look_up, found, asked, k)

    async def call(self, method: Callable[..., Any], *arguments: object) -> Any:
        """Call a deployment, again if its replica dies meanwhile, or its result is lost.

        Raises what it raises; Unavailable if nobody answers after all.
        """
        for attempt in range(ATTEMPTS):
            try:
                return await method.remote(*arguments)
            except RayTaskError as error:
                raise error.cause from None
            except GONE:
                await asyncio.sleep(PAUSE_SECONDS * 2**attempt)
        raise Unavailable("a part of the service does not answer: try again")

    def _segments(
        self, data: bytes, chunking: Mapping[str, Any] | None = None
    ) -> Iterator[cutting.Segment]:
        longest = self.settings.decode.max_seconds
        cutter = cutting.segments if chunking is None else partial(cutting.turns, **chunking)
        cut = cutter(data, longest, overlap=cutting.overlap(longest))
        while True:
            with traces.span("cut"):
                segment = next(cut, None)
            if segment is None:
                return
            yield segment

    async def _encoded(
        self, data: bytes, chunking: Mapping[str, Any] | None
    ) -> AsyncIterator[tuple[cutting.Segment, EncodedSegment | None]]:
        """Each segment and its units; the next one is encoded meanwhile."""
        before: tuple[cutting.Segment, asyncio.Task] | None = None
        try:
            async for segment in _each(self._segments(data, chunking)):
                ahead = asyncio.create_task(self.encode(segment.wave.numpy()))
                done, before = before, (segment, ahead)
                if done is not None:
                    yield done[0], await done[1]
            if before is not None:
                done, before = before, None
                yield done[0], await done[1]
        finally:
            if before is not None:
                before[1].cancel()

    async def request_builder(self, options: TranscriptionOptions) -> RequestBuilder:
        """What makes a decode request of an encoded segment: its retrieval is resolved here, once.

        Raises UnknownDatastore, DatastoreError or InvalidRequest where that cannot be.
        """
        self._check_shortlist(options)
        found: ResolvedDatastore | None = None
        phrase_list: PhraseList | None = None
        if options.retrieval != "none" and options.datastore is not None:
            with traces.span("resolve"):
                found = await self.call(self.retriever.resolve, options.datastore)
        mode = await self._mode(options, found)
        if mode != "none" and options.phrases:
            spotted = mode == "spotting" or await self._spots(options)
            phrase_list = await self._phrase_list(options, spotted)
        return lambda encoded: DecodeRequest(
            units=told(encoded.units, options.languages),
            audible=encoded.audible,
            mode=mode,
            datastore=found,
            phrases=phrase_list,
            shortlist=options.shortlist,
            output=options.output,
        )

    async def _mode(
        self, options: TranscriptionOptions, found: ResolvedDatastore | None
    ) -> RetrievalMode:
        """How what is `found`, and the phrases, are used: as the request says, else phrases and
        terms are spotted where they all can be. InvalidRequest for a way that there is not."""
        asked = options.retrieval
        if asked == "none" or not (found or options.phrases):
            if asked not in (None, "none"):
                message = f"retrieval {asked} needs a datastore or context"
                raise InvalidRequest(message, "retrieval")
            return "none"
        if found is not None and found.phrases is None and options.shortlist:
            message = f"shortlist: the documents of {own_name(options.datastore)!r} are no phrases"
            raise InvalidRequest(message, "shortlist")
        if found is not None and found.spotted is None and asked == "spotting":
            name = own_name(options.datastore)
            message = (
                f"retrieval spotting: {name!r} has neither phrases nor unusual words to spot, or "
                f"more than {MOST:,} entries, which are not looked through for them"
            )
            raise InvalidRequest(message, "retrieval")
        ways = await self._ways_to_use()
        if asked == "spotting" and options.shortlist is not None:
            message = "shortlist: spotting goes through all phrases"
            raise InvalidRequest(message, "shortlist")
        if asked is not None and asked not in ways:
            message = "needs an adapter, which this model has not"
            if asked == "spotting":
                message = "needs an encoder that spells, and this one does not"
            raise InvalidRequest(f"retrieval {asked} {message}", "retrieval")
        if asked is not None:
            return asked
        if (found is None or found.spelled) and await self._spots(options):
            return "spotting"
        return "both" if "both" in ways else "knn"

    async def _spots(self, options: TranscriptionOptions) -> bool:
        """Whether phrases are spotted where the request does not say how they are used, beside
        whatever a datastore is used for."""
        unsaid = options.retrieval is None and options.shortlist is None
        return unsaid and "spotting" in await self._ways_to_use() and spells_all(options.phrases)

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

    async def _phrase_list(self, options: TranscriptionOptions, spotted: bool) -> PhraseList:
        """Phrases, as entries unless they are to be `spotted`, put where every decoder finds them.

        This process owns them: they last as long as the request that it works on.
        """
        phrases, tenant = list(options.phrases), options.tenant
        key, segment = await self.call(self.retriever.phrases, phrases, tenant, not spotted)
        return PhraseList(key, await asyncio.to_thread(ray.put, segment), tenant, spotted)

    async def _ways_to_use(self) -> frozenset[RetrievalMode]:
        """The ways in which the model uses what it is given."""
        if self._ways is None:
            _, self._ways = await self.call(self.decoder.describe)
        return self._ways

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
            except GONE:
                await asyncio.sleep(PAUSE_SECONDS * 2**attempt)
        raise Unavailable("a part of the service does not answer: try again")


def told(encoded: Encoded, languages: Sequence[str]) -> Encoded:
    """Encoded speech as it goes to the decoder: in one of these languages, if it names one.

    A Whisper's encoder names the likeliest of all; where that is none of `languages`, the first of
    them counts.
    """
    named = isinstance(encoded, EncodedAudio) and encoded.language is not None
    if not named or not languages or encoded.language in languages:
        return encoded
    return replace(encoded, language=languages[0])


async def _each(items: Iterator[Any]) -> AsyncIterator[Any]:
    """Walk through an iterator that works, without holding up the event loop."""
    end = object()
    while (one := await asyncio.to_thread(next, items, end)) is not end:
        yield one


def _add(
    stitcher: Stitcher[tuple[TranscribedSegment, OutputOptions | None]],
    segment: cutting.Segment,
    made: TranscribedSegment,
    wanted: OutputOptions | None,
) -> list[TranscribedSegment]:
    """The next segment for a stitcher; those that are complete, with the words that count."""
    timed: list[Timed] = []
    if made.result is not None and (segment.before or segment.after):
        timed = [Timed(word.text, word.start, word.end) for word in made.result.words]
    where = segment.start, segment.before, segment.after
    return [_kept(*one, counted) for one, counted in stitcher.add((made, wanted), timed, *where)]


def _kept(
    made: TranscribedSegment, wanted: OutputOptions | None, counted: slice
) -> TranscribedSegment:
    """A segment with those of its words that count, and without them where only the text is
    wanted; as it is read, which it becomes here: seams are found by the model's own words."""
    result = made.result
    if result is None or wanted is None:
        return made
    first, last, _ = counted.indices(len(result.words))
    if (first, last) != (0, len(result.words)):
        words, ends = result.words[first:last], result.ends[first:last]
        begin = result.ends[first - 1] if first else 0
        end = ends[-1] if ends else begin
        result = replace(
            result,
            text=" ".join(word.text for word in words),
            words=words,
            tokens=result.tokens[begin:end],
            logps=result.logps[begin:end],
            ends=tuple(end - begin for end in ends),
        )
    if not (wanted.evidence or wanted.timed):
        result = replace(result, words=(), ends=())
    return replace(made, result=result.shown())


def _later(result: DecodeResult, start: float) -> DecodeResult:
    """A result whose words are timed from the upload's start."""

    def shifted(word: Word) -> Word:
        if word.start is None:
            return word
        return replace(word, start=word.start + start, end=word.end + start)

    return replace(result, words=tuple(map(shifted, result.words)))
