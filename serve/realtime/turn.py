"""One turn of a session: heard now and then while it goes on, and told as far as it is certain.

The turn so far is encoded and decoded as often as there is room for it, never twice at a time. What
two transcripts in a row agree on is told, and every later one begins with it. A turn that grows too
long is cut in a pause; what lies before the cut is finished, and not heard again. Once nobody
speaks, it is transcribed as if it were over, and if it is, nobody waits. Knows neither events of
clients nor how turns are found.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from mmrag.decoding.partial import LETTERS_A_SECOND, Agreement
from mmrag.records import Word
from mmrag.retrieval.display import Display
from mmrag.speech import cutting
from mmrag.speech.audio import SAMPLE_RATE
from serve.messages import DecodeRequest, DecodeResult, EncodedSegment, OutputOptions
from serve.pipeline import RequestBuilder
from serve.realtime import events
from serve.realtime.load import Load

STEP = SAMPLE_RATE // 4
"""New audio that a further partial transcript is worth."""
PAUSE_SECONDS = 0.3
"""From one partial transcript's beginning to the next one's, at least."""
REST = 3.0
"""And so many times as long as the last one took: a session takes a quarter of its time at most."""
SETTLED = SAMPLE_RATE // 10
"""So long is nobody heard before a turn is transcribed as if it were over: the end of a word is
softer than the word."""
log = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Lookup:
    """What a session's turns are looked up in."""

    version: int
    build: RequestBuilder


class Ears(Protocol):
    """What turns sound into text: `pipeline.Pipeline`."""

    async def encode(self, wave: np.ndarray) -> EncodedSegment | None:
        """(T,) float32 at 16 kHz; None where nobody speaks."""

    async def decode(self, request: DecodeRequest) -> DecodeResult:
        """What is said."""


@dataclass(frozen=True)
class Around:
    """What a turn needs of its session."""

    ears: Ears
    load: Load
    longest: float
    """Seconds that are decoded at once."""
    patience: float
    """Seconds that this may take."""
    lookup: Callable[[], Awaitable[Lookup]]
    """What to look up in, as it is now."""
    settled: Callable[[], Awaitable[Lookup]]
    """The same, once every change that was asked for is there."""
    tell: Callable[[dict[str, Any]], None]
    """Send an event."""
    logprobs: Callable[[DecodeResult, int], list[dict[str, Any]]]
    """Of the tokens of so many words."""


@dataclass
class _Heard:
    """The piece under way, transcribed up to a sample."""

    until: int
    version: int
    complete: bool
    """Whether it is made as a final transcript is: with times."""
    result: DecodeResult | None = None
    start: float = 0.0
    """When its units begin, seconds of the piece."""


class Turn:
    """Its audio so far, and what of it has been told."""

    def __init__(self, item: str, start: int, around: Around, logprobs: bool) -> None:
        """`start` is its first sample, of all those of the session."""
        self.item, self.start, self.end = item, start, start
        """It ends before the sample `end`."""
        self.quiet: int | None = None
        """The sample since which nobody speaks, of all those of the session."""
        self.over = asyncio.Event()
        """No more audio follows."""
        self.text = ""
        """What has been told."""
        self.held = 0
        """Samples that have not been finished."""
        self.revised = self.words = self.tokens = 0
        self._around = around
        self._logprobs: list[dict[str, Any]] | None = [] if logprobs else None
        self._waves: list[np.ndarray] = []
        self._origin = start
        self._carried: list[str] = []
        """Words told that belong to the piece under way, though they were told with the last."""
        self._agreement = Agreement()
        self._display = Display()
        """How the entries in the last transcript are written."""
        self._said: list[str] = []
        """Words of the piece under way that may be shown, as the model writes them."""
        self._shown = ""
        """What of them has been told, as it is read."""
        self._news = asyncio.Event()
        self._heard: _Heard | None = None
        self._about: _Heard | None = None
        """What the transcript that is being made is about."""
        self._optional: asyncio.Task[_Heard] | None = None
        """A partial transcript that is being made."""
        self._asked = 0
        """Where the audio ended when a partial transcript was last thought of."""
        self._began, self._took = 0.0, 0.0
        self._ended = 0.0
        self._previous: str | None = None

    @property
    def seconds(self) -> float:
        """How long it is."""
        return (self.end - self.start) / SAMPLE_RATE

    def push(self, wave: np.ndarray, quiet: int | None) -> None:
        """More of its audio (T,), float32 at 16 kHz; `quiet` as in `self`."""
        self.quiet = quiet
        self._waves.append(wave)
        self.held += len(wave)
        self.end += len(wave)
        self._news.set()

    def finish(self, quiet: int | None, previous: str | None) -> None:
        """No more audio follows, and nobody has spoken since `quiet`; the item before is
        `previous`."""
        self.quiet, self._previous = quiet, previous
        self._ended = time.monotonic()
        self.over.set()
        self._news.set()
        if self._optional is not None and not self._serves(self._about):
            self._optional.cancel()

    async def run(self, before: asyncio.Task | None) -> None:
        """Listen until it is over, then tell the whole; after the turn `before` it."""
        problem: Exception | None = None
        while not self.over.is_set():
            await self._news.wait()
            self._news.clear()
            if problem is None and not self.over.is_set():
                try:
                    await self._listen()
                except Exception as error:  # told when the turn is over: it has no transcript
                    problem = error
            if problem is not None:
                self._waves, self.held = [], 0
        if before is not None:
            await asyncio.wait([before])
        with self._around.load.final():
            try:
                if problem is not None:
                    raise problem
                await self._finish()
            except Exception as error:
                self._failed(error)
        done = events.conversation_item("done", self.item, self._previous, self.text)
        self._around.tell(done)

    async def _listen(self) -> None:
        """What new audio asks for."""
        longest = int(self._around.longest * SAMPLE_RATE)
        if self.held > longest:
            await self._cut()
        elif self.quiet is not None:
            if self.end - self.quiet >= SETTLED and not self._serves(self._heard):
                await self._partial(complete=True)
        elif self._due():
            if self._around.load.free:
                await self._partial(complete=False)
            else:
                self._around.load.skipped()

    def _due(self) -> bool:
        """Whether it is time for another partial transcript."""
        rest = max(PAUSE_SECONDS, REST * self._took)
        if self.end - self._asked < STEP or time.monotonic() - self._began < rest:
            return False
        self._asked = self.end
        return True

    async def _partial(self, complete: bool) -> None:
        """Hear the piece so far, and tell what is certain. One that fails is not missed: if there
        is something wrong, the final one says so."""
        self._began = time.monotonic()
        try:
            with self._around.load.partial():
                self._optional = asyncio.create_task(self._hear(complete))
                heard = await self._optional
        except asyncio.CancelledError:
            if self.over.is_set() and not asyncio.current_task().cancelling():
                return  # it was given up for the final one
            raise
        except Exception as error:
            log.info("no partial transcript: %s", type(error).__name__)
            return
        finally:
            self._optional.cancel()
            self._optional = None
            self._took = time.monotonic() - self._began
        self._heard = heard
        self._agree(heard)

    async def _hear(self, complete: bool, samples: int | None = None) -> _Heard:
        """Transcribe the piece, or its first `samples`."""
        around, wave = self._around, self._wave()[:samples]
        heard = self._about = _Heard(self._origin + len(wave), -1, complete)
        begins = " ".join([*self._carried, *self._agreement.told])
        async with asyncio.timeout(around.patience):
            encoding = around.ears.encode(wave) if len(wave) else _nothing()
            lookup, encoded = await asyncio.gather(around.lookup(), encoding)
            heard.version = lookup.version
            if encoded is None:
                return heard
            request = lookup.build(encoded)
            request = replace(request, output=OutputOptions(timed=complete), begins=begins)
            heard.result = await around.ears.decode(request)
        heard.start = encoded.start
        self._display = heard.result.display
        return heard

    def _wave(self) -> np.ndarray:
        """The audio of the piece (T,)."""
        if len(self._waves) != 1:
            self._waves = [np.concatenate([np.zeros(0, np.float32), *self._waves])]
        return self._waves[0]

    def _serves(self, heard: _Heard | None) -> bool:
        """Whether a transcript is, or will be, that of the whole piece."""
        if heard is None or not heard.complete:
            return False
        return heard.until >= self.end or (
            self.quiet is not None and heard.until >= self.quiet + SETTLED
        )

    def _agree(self, heard: _Heard) -> None:
        """Tell what this transcript and the one before agree on: while somebody goes on speaking,
        as much of it as there was time to say."""
        words, carried = heard.result.text.split() if heard.result else [], len(self._carried)
        if words[:carried] != self._carried:
            return
        passed = (heard.until - self._origin) / SAMPLE_RATE - heard.start
        own = passed - len(" ".join(self._carried)) / LETTERS_A_SECOND
        seconds = math.inf if heard.complete else own
        self._tell(self._agreement.update(words[carried:], seconds))

    def _tell(self, words: Sequence[str], last: bool = False) -> None:
        """Show these words too; `last`: the piece has no more, and what might have become an entry
        is shown as well."""
        self._said += words
        self.words += len(words)
        text = " ".join(self._said)
        shown = self._display.of_text(text) if last else self._display.settled(text)
        if not shown.startswith(self._shown):  # an entry begins with a word that has been told
            rest = self._said[len(self._shown.split()) :] if last else []
            shown = " ".join([self._shown, *self._display.of_text(" ".join(rest)).split()])
        added, self._shown = shown[len(self._shown) :], shown
        if last:
            self._said, self._shown = [], ""
        if added:
            if self.text and not added.startswith(" "):
                added = f" {added}"
            self.text += added
            self._around.tell(events.delta(self.item, added, None))

    async def _cut(self) -> None:
        """Finish what lies before a pause, and go on behind it."""
        around = self._around
        longest = int(around.longest * SAMPLE_RATE)
        heard = await self._hear(True, longest + cutting.PAUSE_SAMPLES)
        wave = self._wave()
        head = torch.from_numpy(wave[: longest + cutting.PAUSE_SAMPLES])
        words = heard.result.words if heard.result else ()
        cut = cutting.place(head, around.longest) if len(head) > longest else len(head)
        cut = min(max(_between(words, cut, heard.start), cutting.PAUSE_SAMPLES), len(wave))
        ends = cut / SAMPLE_RATE - heard.start
        finished = sum((word.start + word.end) / 2 <= ends for word in words)
        told = [*self._carried, *self._agreement.told]
        texts = [word.text for word in words]
        self._tell(texts[len(told) : finished], last=True)
        self._segment(heard, words[:finished])
        self.revised += self._agreement.revised
        self._carried, self._agreement = told[finished:], Agreement()
        self._waves, self._heard = [wave[cut:].copy()], None
        self.held -= cut
        self._origin += cut
        self._news.set()

    async def _finish(self) -> None:
        """Tell what has not been told, and that it is all."""
        around = self._around
        longest = int(around.longest * SAMPLE_RATE)
        async with asyncio.timeout(around.patience):
            lookup = await around.settled()
        while self.held > longest + cutting.PAUSE_SAMPLES:
            await self._cut()
        heard = self._heard
        if not self._serves(heard) or heard.version != lookup.version:
            heard = await self._hear(True)
        words = heard.result.text.split() if heard.result else []
        self._tell(self._agreement.finish(words[len(self._carried) :]), last=True)
        self._segment(heard, heard.result.words if heard.result else ())
        self.revised += self._agreement.revised
        self._waves, self.held = [], 0
        around.tell(events.completed(self.item, self.text, self.seconds, self._logprobs))
        around.load.ended(time.monotonic() - self._ended, self.words, self.revised)

    def _segment(self, heard: _Heard, words: tuple[Word, ...]) -> None:
        """Tell a part that is finished, with the times of its words."""
        if not words:
            return
        self.tokens += heard.result.ends[len(words) - 1]
        if self._logprobs is not None:
            self._logprobs += self._around.logprobs(heard.result, len(words))
        start = self._origin / SAMPLE_RATE + heard.start
        timed = [
            replace(word, start=start + word.start, end=start + word.end)
            for word in self._display.of_words(words)
        ]
        text = " ".join(word.text for word in timed)
        told = [events.timed(word) for word in timed]
        where, unclear = (timed[0].start, timed[-1].end), heard.result.unclear
        self._around.tell(events.segment(self.item, text, *where, told, unclear))

    def _failed(self, error: Exception) -> None:
        self._waves, self.held = [], 0
        self._around.load.failed()
        self._around.tell(events.failed(self.item, events.refusal(error)))


def _between(words: Sequence[Word], cut: int, start: float) -> int:
    """The sample nearest to `cut` that lies in none of the words, which are timed from `start`
    seconds on."""
    at = cut / SAMPLE_RATE - start
    for number, word in enumerate(words):
        if word.start < at < word.end:
            first = number > 0 and at - word.start < word.end - at
            return round(((word.start if first else word.end) + start) * SAMPLE_RATE)
    return cut


async def _nothing() -> None:
    """No audio has no units."""
