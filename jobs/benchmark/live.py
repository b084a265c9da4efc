"""A process that does nothing but hold realtime sessions, each fed as somebody speaks.

A plan comes in as a line of JSON, what became of every turn goes out as one. A session plays its
clips in turn, silence between them, a chunk when its time has come. Knows nothing of models or of
the service behind the address.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp

RATE = 24_000
CHUNK_SECONDS = 0.1
SILENCE_SECONDS = 1.2
"""Between two clips: longer than the silence that ends a turn."""
LAST_SECONDS = 5.0
"""How long the last transcripts are waited for."""
UNHEARD = "no turn was found in it"
"""The problem of a clip in which nobody was heard to speak."""
TRANSCRIPTION = "conversation.item.input_audio_transcription."


@dataclass(frozen=True)
class Sessions:
    """How many, and what is said in them."""

    url: str
    """Of the WebSocket."""
    clips: tuple[str, ...]
    """Raw 16-bit samples at 24 kHz."""
    sessions: int
    seconds: float
    silence_ms: int = 500
    """Silence that ends a turn."""
    key: str | None = None


@dataclass(frozen=True)
class Final:
    """A turn: `seconds` from the moment at which its end had been sent to its transcript; None
    where none came. `clip` is what was played, the session's `playing`-th; None where no turn is
    to be blamed for a problem."""

    session: int
    seconds: float | None
    text: str = ""
    deltas: int = 0
    """Events that told a part of it."""
    problem: str = ""
    clip: int | None = None
    playing: int | None = None


class _Talk:
    """One session."""

    def __init__(self, number: int, plan: Sessions, socket: aiohttp.ClientWebSocketResponse):
        self._number, self._plan, self._socket = number, plan, socket
        self._sent: list[float] = []
        """When each chunk was sent."""
        self._ends: dict[str, float] = {}
        self._deltas: dict[str, int] = {}
        self._played: list[tuple[int, int]] = []
        """The clips, and the chunk with which each began."""
        self._of: dict[str, int] = {}
        """Which of them each turn is of."""
        self.finals: list[Final] = []
        self.problems: list[tuple[str, str | None]] = []
        """Each with the turn that has it, where it is one's."""

    async def run(self, clips: list[bytes]) -> list[Final]:
        """Speak and listen; a turn without a transcript is one that was lost."""
        detection = {"type": "server_vad", "silence_duration_ms": self._plan.silence_ms}
        session = {"type": "transcription", "audio": {"input": {"turn_detection": detection}}}
        await self._socket.send_json({"type": "session.update", "session": session})
        listening = asyncio.create_task(self._listen())
        try:
            await self._speak(clips)
            deadline = _now() + LAST_SECONDS
            while self._awaited and _now() < deadline and not listening.done():
                await asyncio.sleep(0.05)
        except (aiohttp.ClientError, OSError) as error:
            self.problems.append((type(error).__name__, None))
        finally:
            listening.cancel()
        lost = [self._final(one, None, problem="no transcript") for one in self._ends]
        failed = [self._final(item, None, problem=one) for one, item in self.problems]
        unheard = [
            Final(self._number, None, problem=UNHEARD, clip=clip, playing=playing)
            for playing, (clip, _) in enumerate(self._played)
            if playing not in self._of.values()
        ]
        return [*self.finals, *lost, *failed, *unheard]

    @property
    def _awaited(self) -> bool:
        """Whether a transcript is still to come: of a turn, or of the last clip."""
        return bool(self._ends) or len(self._played) - 1 not in self._of.values()

    def _final(self, item: str | None, seconds: float | None, **more: Any) -> Final:
        playing = self._of.get(item)
        clip = None if playing is None else self._played[playing][0]
        return Final(self._number, seconds, clip=clip, playing=playing, **more)

    async def _speak(self, clips: list[bytes]) -> None:
        size = 2 * int(RATE * CHUNK_SECONDS)
        started, number = _now(), self._number
        while _now() - started < self._plan.seconds:
            self._played.append((number % len(clips), len(self._sent)))
            data = clips[number % len(clips)] + bytes(2 * int(RATE * SILENCE_SECONDS))
            for start in range(0, len(data) // size * size, size):
                due = started + len(self._sent) * CHUNK_SECONDS
                await asyncio.sleep(max(0.0, due - _now()))
                audio = base64.b64encode(data[start : start + size]).decode()
                await self._socket.send_json({"type": "input_audio_buffer.append", "audio": audio})
                self._sent.append(_now())
            number += self._plan.sessions

    async def _listen(self) -> None:
        async for message in self._socket:
            event = message.json()
            kind, item = event["type"].removeprefix(TRANSCRIPTION), event.get("item_id")
            if kind == "input_audio_buffer.speech_stopped":
                chunk = int(event["audio_end_ms"] / 1000 / CHUNK_SECONDS)
                self._ends[item] = self._sent[min(chunk, len(self._sent) - 1)]
                # It ends in the silence behind its clip, and may begin in that before it.
                begun = sum(first <= chunk for _, first in self._played)
                self._of[item] = max(0, begun - 1)
            elif kind == "delta":
                self._deltas[item] = self._deltas.get(item, 0) + 1
            elif kind == "completed":
                seconds = _now() - self._ends.pop(item)
                told = {"text": event["transcript"], "deltas": self._deltas.pop(item, 0)}
                self.finals.append(self._final(item, seconds, **told))
            elif kind in ("failed", "error"):
                self._ends.pop(item, None)
                self.problems.append((event["error"]["message"], item))


def _now() -> float:
    return asyncio.get_running_loop().time()


async def _one(number: int, plan: Sessions, http: aiohttp.ClientSession) -> list[Final]:
    clips = [Path(clip).read_bytes() for clip in plan.clips]
    await asyncio.sleep(number * 0.37 % 3)  # people do not begin at the same moment
    try:
        async with http.ws_connect(f"{plan.url}?intent=transcription") as socket:
            return await _Talk(number, plan, socket).run(clips)
    except (aiohttp.ClientError, OSError) as error:
        return [Final(number, None, problem=f"{type(error).__name__}: {error}")]


async def hold(plan: Sessions) -> list[Final]:
    """Hold the sessions; what became of their turns."""
    headers = {"Authorization": f"Bearer {plan.key}"} if plan.key else {}
    async with aiohttp.ClientSession(headers=headers) as http:
        found = await asyncio.gather(*(_one(n, plan, http) for n in range(plan.sessions)))
    return [final for one in found for final in one]


def main() -> None:
    """Read a plan, carry it out, write what became of it."""
    told = json.loads(sys.stdin.buffer.readline())
    plan = Sessions(**told | {"clips": tuple(told["clips"])})
    json.dump([asdict(one) for one in asyncio.run(hold(plan))], sys.stdout)


if __name__ == "__main__":
    main()
