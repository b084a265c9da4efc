"""A client of a realtime session that is spoken to directly: no WebSocket, and fakes behind it.

Every event that it is told is one of OpenAI's types, and has a name of its own.
"""

import asyncio
import json
from contextlib import asynccontextmanager

from openai.types.realtime.realtime_server_event import RealtimeServerEvent
from pydantic import TypeAdapter
from spoken_levels import Levels, base64_of, said

from serve.pipeline import TranscriptionOptions
from serve.realtime.session import RealtimeSession

MANUAL = {"type": "session.update", "session": {"audio": {"input": {"turn_detection": None}}}}
COMMIT, CLEAR = {"type": "input_audio_buffer.commit"}, {"type": "input_audio_buffer.clear"}
PREFIX = "conversation.item.input_audio_transcription."
OFFICIAL = TypeAdapter(RealtimeServerEvent)
LONGEST = 2.0
"""Seconds that are decoded at once."""


def options(session):
    asked = session.audio.input.transcription
    return TranscriptionOptions(datastore=asked.datastore, phrases=asked.context or ())


class Client:
    """Sends events, and holds what it was told."""

    def __init__(self, session, told):
        self.session, self.told = session, told

    def send(self, *given):
        for one in given:
            self.session.receive(one if isinstance(one, str) else json.dumps(one))

    def say(self, *levels, step=0.1):
        """Words, in events of `step` seconds."""
        wave, size = said(*levels), int(24_000 * step)
        for start in range(0, len(wave), size):
            part = base64_of(wave[start : start + size])
            self.send({"type": "input_audio_buffer.append", "audio": part})

    async def until(self, condition):
        """Return once it is so."""
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.005)

    async def with_time(self, ears, *levels):
        """Words, each of which is heard before the next one is said."""
        for level in levels:
            count = len(ears.decoded)
            self.say(level, step=0.25)
            await self.until(lambda count=count: len(ears.decoded) > count)
            await self.until(lambda: not ears.under_way)

    async def slowly(self, *levels, seconds=0.02):
        """Words, one after the other, with time to hear each."""
        for level in levels:
            self.say(level)
            await asyncio.sleep(seconds)

    async def settle(self):
        """Return when everything has been told."""
        await asyncio.sleep(0)
        session = self.session
        async with asyncio.timeout(20):
            while session._work or session._changing or len(session._running) > bool(session._turn):
                await asyncio.sleep(0.005)

    def of(self, kind):
        return [event for event in self.told if event["type"].removeprefix(PREFIX) == kind]

    def transcripts(self):
        return [event["transcript"] for event in self.of("completed")]

    def deltas(self, item):
        return "".join(event["delta"] for event in self.of("delta") if event["item_id"] == item)

    def problems(self):
        return [event["error"]["code"] for event in self.of("error")]


@asynccontextmanager
async def connected(load, ears=None, *, charge=lambda seconds: None, **given):
    told = []
    how = {"longest": LONGEST, "buffered": 60, "patience": 20} | given
    session = RealtimeSession(ears or Levels(), load, told.append, options, charge, **how)
    session.begin()
    running = asyncio.create_task(session.run())
    try:
        yield Client(session, told)
        assert not running.done(), running.exception()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        for event in told:
            assert OFFICIAL.validate_python(event).type == event["type"]
        assert len({event["event_id"] for event in told}) == len(told)
