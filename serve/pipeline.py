"""An upload through the deployments: cut, encoded, looked up, decoded; no HTTP here.

A call whose replica dies under it is made again on another one: nothing that the deployments do for
a transcript changes anything, so doing it twice does no harm.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from mmrag import audio
from mmrag.config import Retrieves
from mmrag.records import Word
from serve.messages import Found, Heard, Listed, Order, Refused, Reply, Unavailable
from serve.settings import Settings

ATTEMPTS = 5
PAUSE_SECONDS = 0.2
"""Before the second attempt; twice as long before each further one."""
HIGHEST_DENSITY = 768_000
"""Samples a second over all channels (eight at 96 kHz): a small file may unpack to more."""


@dataclass(frozen=True)
class Ask:
    """What a caller wants to know of an upload."""

    datastore: str | None = None
    phrases: Sequence[str] = ()
    retrieval: Retrieves | None = None
    """None: both ways where there is something to look up."""
    temperature: float = 0.0
    timed: bool = False
    evidence: bool = False


@dataclass(frozen=True)
class Stretch:
    """A part of the upload between `start` and `end` (seconds), and what is said in it.

    `reply` is None where nobody speaks; its words' times count from the upload's start.
    """

    start: float
    end: float
    reply: Reply | None


Ordered = Callable[[Heard], Order]
"""What is heard in a stretch -> what to do with it."""


class Pipeline:
    """Handles to the deployments, and how they are asked."""

    def __init__(
        self,
        settings: Settings,
        encoder: DeploymentHandle,
        retriever: DeploymentHandle,
        decoder: DeploymentHandle,
    ) -> None:
        self.settings = settings
        self.encoder = encoder
        self.retriever = retriever
        self.decoder = decoder
        self._stream = decoder.options(stream=True)
        self._reads: bool | None = None

    async def seconds(self, data: bytes) -> float:
        """Length of an upload, by its header; AudioError if it has none or unpacks to too much."""
        length, density = await asyncio.to_thread(audio.extent, data)
        if density > HIGHEST_DENSITY:
            message = f"uploaded audio: {density} samples a second, at most {HIGHEST_DENSITY}"
            raise audio.AudioError(message)
        return length

    async def transcribe(self, data: bytes, order: Ordered) -> AsyncIterator[str | Stretch]:
        """Text as it is made, and after each stretch of the upload the stretch.

        The text of a stretch that follows another one starts with a blank.
        """
        first = True
        async for start, end, heard in self._heard(data):
            if heard is None:
                yield Stretch(start, end, None)
                continue
            told, blank = "", "" if first else " "
            async for part in self._decoded(order(heard)):
                if isinstance(part, Reply):
                    first = first and not part.text
                    yield Stretch(start, end, _later(part, start + heard.start))
                else:
                    yield part if told else blank + part
                    told += part

    async def complete(self, data: bytes, order: Ordered) -> list[Stretch]:
        """The whole of an upload, stretch by stretch."""
        found = []
        async for start, end, heard in self._heard(data):
            reply = None
            if heard is not None:
                reply = await self.ask(self.decoder.transcribe, order(heard))
                reply = _later(reply, start + heard.start)
            found.append(Stretch(start, end, reply))
        return found

    async def waves(self, data: bytes) -> list[np.ndarray]:
        """An upload cut into waves, as the encoder takes them."""
        return [segment.wave.numpy() async for segment in _each(self._segments(data))]

    async def ask(self, method: Callable[..., Any], *arguments: object) -> Any:
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

    def _segments(self, data: bytes) -> Iterator[audio.Segment]:
        return audio.segments(data, self.settings.decode.max_seconds)

    async def _heard(self, data: bytes) -> AsyncIterator[tuple[float, float, Heard | None]]:
        """Each stretch and what is heard in it; the next one is encoded meanwhile."""
        encoding: asyncio.Task | None = None
        where: tuple[float, float] = (0.0, 0.0)
        try:
            async for segment in _each(self._segments(data)):
                ahead = asyncio.create_task(self.ask(self.encoder.listen, segment.wave.numpy()))
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

    async def order(self, ask: Ask) -> Ordered:
        """What to do with whatever is heard: where to look things up, and how.

        Raises UnknownDatastore, DatastoreError or Refused where that cannot be.
        """
        found: Found | None = None
        listed: Listed | None = None
        mode = ask.retrieval or "both"
        if mode != "none" and ask.datastore is not None:
            found = await self.ask(self.retriever.resolve, ask.datastore)
        if mode != "none" and ask.phrases:
            listed = await self.ask(self.retriever.listed, list(ask.phrases))
        if found is None and listed is None:
            if ask.retrieval not in (None, "none"):
                raise Refused(f"retrieval {ask.retrieval} needs a datastore or context")
            mode = "none"
        elif ask.retrieval is None and not await self.reads():
            mode = "knn"
        return lambda heard: Order(
            units=heard.units,
            audible=heard.audible,
            mode=mode,
            datastore=found,
            phrases=listed,
            temperature=ask.temperature,
            timed=ask.timed,
            evidence=ask.evidence,
        )

    async def reads(self) -> bool:
        """Whether the model has an adapter to read with."""
        if self._reads is None:
            _, self._reads = await self.ask(self.decoder.describe)
        return self._reads

    async def _decoded(self, order: Order) -> AsyncIterator[str | Reply]:
        """A stretch's text piece by piece, then the reply.

        A stream that breaks is asked for again, and what was told already is passed over.
        """
        told = ""
        for attempt in range(ATTEMPTS):
            again = ""
            try:
                async for part in self._stream.stream.remote(order):
                    if isinstance(part, Reply):
                        yield part
                        return
                    again += part
                    if len(again) > len(told) and again.startswith(told):
                        yield again[len(told) :]
                        told = again
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


def _later(reply: Reply, start: float) -> Reply:
    """A reply whose words are timed from the upload's start."""

    def shifted(word: Word) -> Word:
        if word.start is None:
            return word
        return replace(word, start=word.start + start, end=word.end + start)

    return replace(reply, words=tuple(map(shifted, reply.words)))
