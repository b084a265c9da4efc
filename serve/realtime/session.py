"""One realtime session: what a client sends becomes turns, and turns become events.

Events are handled in the order in which they come, and no event keeps another waiting: whether
somebody speaks is found out, and turns are transcribed, while further ones come in. Knows no
WebSocket: whoever has one calls `receive`, and sends what `tell` is called with.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from mmrag.speech.audio import SAMPLE_RATE
from mmrag.speech.turns import Started, Stopped, TurnDetector
from serve.messages import DecodeResult
from serve.pipeline import TranscriptionOptions
from serve.realtime import events
from serve.realtime.events import Refused, Session, Transcription, TurnDetection
from serve.realtime.formats import AudioDecoder, unpacked
from serve.realtime.load import Load
from serve.realtime.options import param
from serve.realtime.turn import Around, Ears, Lookup, Turn

SHORTEST = SAMPLE_RATE // 10
"""Samples that a turn has at least which a client commits."""
BLOCK = SAMPLE_RATE
"""Samples in which speech is looked for at a time."""
KEPT = 2 * SAMPLE_RATE
"""Samples without speech that are kept: a turn that begins now began a little earlier."""
STRIKES = 20
"""Events in a row that are refused until the session is ended."""
CHANGES = 8
"""Changes of what is looked up that may be under way."""
REFRESH_SECONDS = 1.0
"""How often a datastore is looked up anew while it is listened for: it may have grown."""
log = logging.getLogger("ray.serve")


class Over(Exception):
    """The session is to end; the client has been told why."""


class Resolver(Ears, Protocol):
    """What a session needs of `pipeline.Pipeline`."""

    async def request_builder(self, options: TranscriptionOptions) -> Any:
        """As the pipeline's."""


class RealtimeSession:
    """A session from its first event to its last."""

    def __init__(
        self,
        ears: Resolver,
        load: Load,
        tell: Callable[[dict[str, Any]], None],
        options: Callable[[Session], TranscriptionOptions],
        charge: Callable[[float], None],
        *,
        longest: float,
        buffered: float,
        patience: float,
        given: Session | None = None,
        logprobs: Callable[[DecodeResult, int], list[dict[str, Any]]] = lambda result, words: [],
        expires: int | None = None,
        count: Callable[[int], None] = lambda tokens: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`options` says what the pipeline is asked for with a session's settings, and refuses
        them; `charge` counts seconds of audio, and raises ApiError where there were too many;
        `count` is told the tokens of each transcript.
        `longest` seconds are decoded at once, which may take `patience` seconds; `buffered`
        seconds may wait; `clock` tells when audio came."""
        self.id = events.new_id("sess")
        self.settings = given or Session()
        self.expires = expires
        self._clock, self.last_audio = clock, clock()
        self._ears, self._load, self._options, self._charge = ears, load, options, charge
        self._send, self._count = tell, count
        self._buffered = int(buffered * SAMPLE_RATE)
        self._around = Around(
            ears, load, longest, patience, self._looked_up, self._settled, self._tell, logprobs
        )
        self._decoder = AudioDecoder(self.settings.audio.input.format.type)
        self._work: deque[tuple[str, Any]] = deque()
        self._news = asyncio.Event()
        self._waiting = 0
        """Samples in `work`."""
        self._heard = 0
        """Samples in which speech has been looked for."""
        self._recent = np.zeros(0, np.float32)
        """The last of them that belong to no turn yet."""
        self._detection = self.settings.audio.input.turn_detection
        self._detector: TurnDetector | None = None
        self._offset = 0
        """Samples heard before the detector's first."""
        self._turn: Turn | None = None
        """The one under way."""
        self._running: dict[Turn, asyncio.Task[None]] = {}
        """Turns without a transcript yet, in order."""
        self._before: str | None = None
        """The last item."""
        self._strikes = 0
        self._turns = self._words = self._revised = 0
        self._options_now = options(self.settings)
        self._found = self.settings.audio.input.transcription
        """What was wanted last that could be found."""
        self._lookup: Lookup | None = None
        self._resolved = 0.0
        self._changing: asyncio.Task[None] | None = None
        """The last change of what is looked up that is under way."""
        self._changes: set[asyncio.Task[None]] = set()

    def begin(self) -> None:
        """The first event."""
        self._detect()
        self._tell({"type": "session.created", "session": self._told()})

    async def run(self) -> None:
        """Hear what comes in, until cancelled."""
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                while self._work:
                    await self._step(*self._work.popleft())
        finally:
            tasks = [*self._running.values(), *self._changes]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def receive(self, text: str | bytes) -> None:
        """An event of the client. Raises Over if it has sent too much that is wrong."""
        event_id = None
        try:
            event = events.parsed(text)
            event_id = event.event_id
            match event:
                case events.Update():
                    self._update(event)
                case events.Append():
                    self._append(event)
                case events.Commit():
                    self._wave(self._decoder.flush())
                    self._queue("commit", event_id)
                case _:
                    self._decoder.flush()
                    self._queue("clear", event_id)
            self._strikes = 0
        except Exception as error:
            refused = events.refusal(error)
            refused.event = refused.event or event_id
            self._tell(events.error_event(refused))
            self._strikes += 1
            if self._strikes >= STRIKES:
                raise Over(f"{STRIKES} events in a row were refused") from None

    async def finish(self) -> None:
        """Take what was said until now for a turn, and return when every turn has been told."""
        self._queue("end", None)
        while self._work or self._turn or self._running:
            await asyncio.sleep(0.02)

    @property
    def summary(self) -> str:
        """What it was, in a line for the log: no word of what was said."""
        told, revised = self._words, self._revised
        return (
            f"session={self.id} seconds={self._heard / SAMPLE_RATE:.1f} turns={self._turns} "
            f"words={told} revised={revised} changes={revised / max(1, told):.3f}"
        )

    @property
    def held(self) -> int:
        """Samples that wait to be heard or to be transcribed."""
        return self._waiting + sum(turn.held for turn in self._running)

    def _tell(self, event: dict[str, Any]) -> None:
        self._send({"event_id": events.new_id("event"), **event})

    def _told(self) -> dict[str, Any]:
        return self.settings.told(id=self.id, expires_at=self.expires)

    def _queue(self, what: str, given: Any) -> None:
        self._work.append((what, given))
        self._news.set()

    def _append(self, event: events.Append) -> None:
        try:
            data = unpacked(event.audio)
        except ValueError as error:
            raise Refused(f"audio: {error}", param="audio") from None
        if data:  # an event without audio is no sign of anybody
            self.last_audio = self._clock()
        seconds = len(data) / self._decoder.bytes_per_second
        if self.held + seconds * SAMPLE_RATE > self._buffered:
            most = self._buffered / SAMPLE_RATE
            message = f"more than {most:g} s of audio wait here: this was dropped, send it slower"
            raise Refused(message, "input_audio_buffer_full", "audio", kind="rate_limit_error")
        self._charge(seconds)
        self._load.heard(seconds)
        self._wave(self._decoder.push(data))

    def _wave(self, wave: np.ndarray) -> None:
        self._waiting += len(wave)
        for start in range(0, len(wave), BLOCK):
            self._queue("audio", wave[start : start + BLOCK])

    def _update(self, event: events.Update) -> None:
        """Take over new settings: the audio's at once, and what is looked up as soon as it has been
        found, for the turn under way too."""
        if len(self._changes) >= CHANGES:
            message = f"{CHANGES} changes of what is looked up are under way: wait for them"
            raise Refused(message, "busy", kind="rate_limit_error")
        settings = self.settings.updated(event.session)
        options = self._options(settings)
        inner = settings.audio.input
        if inner.format.type != self._decoder.kind:
            self._wave(self._decoder.flush())
            self._decoder = AudioDecoder(inner.format.type)
        if inner.turn_detection != self.settings.audio.input.turn_detection:
            self._queue("detection", inner.turn_detection)
        self.settings = settings
        if options == self._options_now and self._changing is None:
            self._tell({"type": "session.updated", "session": self._told()})
            return
        self._options_now = options
        changed = self._change(options, inner.transcription, event.event_id, self._changing)
        self._changing = asyncio.create_task(changed)
        self._changes.add(self._changing)
        self._changing.add_done_callback(self._changes.discard)

    async def _change(
        self,
        options: TranscriptionOptions,
        wanted: Transcription,
        event_id: str | None,
        earlier: asyncio.Task[None] | None,
    ) -> None:
        """Find what is to be looked up from now on. What cannot be found is not wanted any more."""
        if earlier is not None:
            await asyncio.wait([earlier])
        last = self._changing is asyncio.current_task()
        try:
            await self._resolve(options)
            self._found = wanted
            self._tell({"type": "session.updated", "session": self._told()})
        except Exception as error:
            refused = events.refusal(error)
            refused.event, refused.param = event_id, param(refused.param)
            if last:
                self.settings = self.settings.listening_for(self._found)
                self._options_now = self._options(self.settings)
            self._tell(events.error_event(refused))
        finally:
            if self._changing is asyncio.current_task():
                self._changing = None

    async def _resolve(self, options: TranscriptionOptions) -> None:
        build = await self._ears.request_builder(options)
        self._lookup = Lookup(self._lookup.version + 1 if self._lookup else 0, build)
        self._resolved = time.monotonic()

    async def _looked_up(self) -> Lookup:
        """What to look up in, as it is now: a datastore may have grown."""
        old = time.monotonic() - self._resolved > REFRESH_SECONDS
        if self._lookup is None or (old and self._options_now.datastore and not self._changing):
            await self._resolve(self._options_now)
        return self._lookup

    async def _settled(self) -> Lookup:
        """What to look up in, once every change that was asked for is there."""
        while self._changing is not None:
            await asyncio.wait([self._changing])
        return self._lookup or await self._looked_up()

    async def _step(self, what: str, given: Any) -> None:
        """One piece of work, in the order in which it came."""
        if what == "audio":
            self._waiting -= len(given)
            await self._hear(given)
        elif what == "detection":
            self._change_detection(given)
        elif what == "clear":
            self._clear()
        elif what == "commit":
            self._commit(given)
        elif self._turn is not None:
            self._end(None)

    async def _hear(self, wave: np.ndarray) -> None:
        """The next samples: begin and end turns in them."""
        found: list[Started | Stopped] = []
        if self._detector is not None:
            found = await asyncio.to_thread(self._detector.push, torch.from_numpy(wave))
        self._heard += len(wave)
        self._recent = np.concatenate([self._recent, wave])
        for event in found:
            at = event.sample + self._offset
            if isinstance(event, Started) and self._turn is None:
                self._begin_turn(at, spoken=True)
            elif isinstance(event, Stopped) and self._turn is not None:
                self._feed(at)
                self._stop(at, event.quiet + self._offset)
        if self._detector is None and self._turn is None and len(self._recent):
            self._begin_turn(self._heard - len(self._recent))
        if self._turn is not None:
            self._feed(self._heard)
        else:
            self._recent = self._recent[-self._kept :]

    @property
    def _kept(self) -> int:
        padding = self._detection.prefix_padding_ms if self._detection else 0
        return KEPT + padding * SAMPLE_RATE // 1000

    def _begin_turn(self, sample: int, spoken: bool = False) -> None:
        """A turn begins with that sample, of all those of the session; `spoken`: because the
        detector says so."""
        first = self._heard - len(self._recent)
        sample = min(max(sample, first), self._heard)
        self._recent = self._recent[sample - first :]
        logprobs = events.LOGPROBS in (self.settings.include or ())
        turn = Turn(events.new_id("item"), sample, self._around, logprobs)
        last = next(reversed(self._running.values()), None)
        self._turn = turn
        running = self._running[turn] = asyncio.create_task(turn.run(last))
        running.add_done_callback(lambda _: self._ran(turn))
        if spoken:
            self._tell(
                {
                    "type": "input_audio_buffer.speech_started",
                    "item_id": turn.item,
                    "audio_start_ms": _milliseconds(sample),
                }
            )

    def _ran(self, turn: Turn) -> None:
        """A turn has its transcript, or was given up."""
        self._running.pop(turn, None)
        self._turns += 1
        self._count(turn.tokens)
        self._words += turn.words
        self._revised += turn.revised

    def _feed(self, until: int) -> None:
        """Hand the turn under way its audio up to a sample."""
        first = self._heard - len(self._recent)
        count = max(0, until - first)
        quiet = self._detector and self._detector.quiet_since
        quiet = None if quiet is None else quiet + self._offset
        if count:
            self._turn.push(self._recent[:count], quiet)
            self._recent = self._recent[count:]

    def _stop(self, sample: int, quiet: int) -> None:
        """The detector has found the end of the turn under way."""
        self._tell(
            {
                "type": "input_audio_buffer.speech_stopped",
                "item_id": self._turn.item,
                "audio_end_ms": _milliseconds(sample),
            }
        )
        self._end(quiet)

    def _end(self, quiet: int | None) -> None:
        """The turn under way is over: an item, whose transcript follows."""
        turn, self._turn = self._turn, None
        before, self._before = self._before, turn.item
        self._tell(
            {
                "type": "input_audio_buffer.committed",
                "item_id": turn.item,
                "previous_item_id": before,
            }
        )
        self._tell(events.conversation_item("added", turn.item, before, None))
        turn.finish(quiet, before)

    def _commit(self, event_id: str | None) -> None:
        """The client says that a turn is over."""
        if self._turn is None and len(self._recent) >= SHORTEST:
            self._detector = None  # whatever it has heard is the client's turn
            self._begin_turn(self._heard - len(self._recent))
            self._feed(self._heard)
        if self._turn is None or self._turn.end - self._turn.start < SHORTEST:
            message = "there is less than 100 ms of audio to commit"
            refused = Refused(message, "input_audio_buffer_commit_empty", event=event_id)
            self._tell(events.error_event(refused))
            return
        self._end(None)
        self._detect()

    def _clear(self) -> None:
        """Forget what was said and has not been committed."""
        if self._turn is not None:
            self._running[self._turn].cancel()
            self._turn = None
        self._recent = np.zeros(0, np.float32)
        self._detect()
        self._tell({"type": "input_audio_buffer.cleared"})

    def _change_detection(self, detection: TurnDetection | None) -> None:
        """Turns are found otherwise from now on; the one under way is over."""
        self._detection = detection
        if self._turn is not None:
            self._end(None)
        self._detect()

    def _detect(self) -> None:
        """Begin to look for speech anew."""
        asked, self._offset = self._detection, self._heard
        self._detector = asked and TurnDetector(
            asked.threshold, asked.prefix_padding_ms, asked.silence_duration_ms
        )


def _milliseconds(sample: int) -> int:
    return round(1000 * sample / SAMPLE_RATE)
