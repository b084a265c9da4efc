"""A process that does nothing but send requests and time the answers.

A plan comes in as a line of JSON, the answers go out as one. Where the plan names a concurrency,
that many callers each wait for their answer before they ask again (a closed loop); where it names a
rate, requests are sent at random moments whatever becomes of those before (an open loop), and time
counts from the moment at which one was due. It stops early when its input ends, so that it never
outlives whoever started it. Knows nothing of models or of the service behind the address.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import aiohttp

CONNECTION, HANG = "connection", "hang"
"""What stands in place of a status: nobody answered, or not in time."""
PAUSE_SECONDS = 0.1
"""Before a caller of a closed loop asks again who was refused."""
BOUNDARY = "a-clip-and-what-it-is-asked-with"


@dataclass(frozen=True)
class Plan:
    """What to send, how fast, and for how long."""

    url: str
    clips: tuple[str, ...]
    """WAV files, sent in turn."""
    seconds: float
    """For how long requests are sent; then the last answers are waited for."""
    concurrency: int | None = None
    rate: float | None = None
    """Requests a second, on average."""
    requests: int | None = None
    """Send at most so many."""
    timeout: float = 30
    """Seconds after which a request counts as lost."""
    fields: tuple[tuple[str, str], ...] = ()
    """Form fields that every `every`-th request has."""
    every: int = 1
    key: str | None = None
    """API key."""
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """A request and what became of it; `sent` counts in seconds from the start of the load."""

    sent: float
    seconds: float
    status: str
    clip: int
    text: str = ""
    """The transcript."""

    @property
    def done(self) -> float:
        """When the answer was there."""
        return self.sent + self.seconds


def poisson(rate: float, seconds: float, seed: int) -> Iterator[float]:
    """Moments in [0, seconds) at which requests arrive that know nothing of each other."""
    draw, now = Random(seed), 0.0
    while (now := now + draw.expovariate(rate)) < seconds:
        yield now


async def send(plan: Plan, stop: asyncio.Event) -> list[Answer]:
    """Carry out a plan; ValueError unless it names either a concurrency or a rate."""
    if (plan.concurrency is None) == (plan.rate is None):
        raise ValueError("a load has either a concurrency or a rate")
    connector = aiohttp.TCPConnector(limit=0)
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    if plan.key:
        headers["Authorization"] = f"Bearer {plan.key}"
    limit = aiohttp.ClientTimeout(total=plan.timeout)
    async with aiohttp.ClientSession(
        connector=connector, headers=headers, timeout=limit
    ) as session:
        sender = _Sender(plan, session)
        if plan.rate is None:
            await asyncio.gather(*(_caller(sender, plan, stop) for _ in range(plan.concurrency)))
        else:
            await _arrivals(sender, plan, stop)
        return sender.answers


class _Sender:
    """Sends one request after the other and keeps the answers."""

    def __init__(self, plan: Plan, session: aiohttp.ClientSession) -> None:
        self.answers: list[Answer] = []
        self._plan = plan
        self._session = session
        self._numbers = itertools.count()
        clips = [Path(clip).read_bytes() for clip in plan.clips]
        self._plain = [body(clip, ()) for clip in clips]
        self._special = [body(clip, plan.fields) for clip in clips]
        self._started = asyncio.get_running_loop().time()

    def now(self) -> float:
        """Seconds since the start."""
        return asyncio.get_running_loop().time() - self._started

    async def send(self, due: float | None = None) -> Answer | None:
        """The next request, which was due at some moment or is now; None if there are no more."""
        number, plan = next(self._numbers), self._plan
        if plan.requests is not None and number >= plan.requests:
            return None
        sent = self.now() if due is None else due
        clip = number % len(self._plain)
        bodies = self._special if (number + 1) % plan.every == 0 else self._plain
        status, text = await self._ask(bodies[clip])
        self.answers.append(Answer(sent, self.now() - sent, status, clip, text))
        return self.answers[-1]

    async def _ask(self, content: bytes) -> tuple[str, str]:
        try:
            async with self._session.post(self._plan.url, data=content) as reply:
                told = await reply.read()
                return str(reply.status), json.loads(told)["text"] if reply.status == 200 else ""
        except TimeoutError:
            return HANG, ""
        except (aiohttp.ClientError, OSError):
            return CONNECTION, ""


def body(clip: bytes, fields: tuple[tuple[str, str], ...]) -> bytes:
    """A multipart form of a recording and fields; made once, as sending is to cost little."""
    parts = [(f'name="{name}"', value.encode()) for name, value in fields]
    parts.append(('name="file"; filename="clip.wav"\r\nContent-Type: audio/wav', clip))
    start = f"--{BOUNDARY}\r\nContent-Disposition: form-data; "
    told = [f"{start}{about}\r\n\r\n".encode() + value + b"\r\n" for about, value in parts]
    return b"".join(told) + f"--{BOUNDARY}--\r\n".encode()


async def _caller(sender: _Sender, plan: Plan, stop: asyncio.Event) -> None:
    while not stop.is_set() and sender.now() < plan.seconds:
        answer = await sender.send()
        if answer is None:
            return
        if answer.status != "200":
            await asyncio.sleep(PAUSE_SECONDS)


async def _arrivals(sender: _Sender, plan: Plan, stop: asyncio.Event) -> None:
    under_way = set()
    moments = poisson(plan.rate, plan.seconds, plan.seed)
    for due in itertools.islice(moments, plan.requests):
        await asyncio.sleep(max(0.0, due - sender.now()))
        if stop.is_set():
            break
        request = asyncio.create_task(sender.send(due))
        under_way.add(request)
        request.add_done_callback(under_way.discard)
    await asyncio.gather(*under_way)


async def _told(plan: Plan) -> list[Answer]:
    """Carry out a plan until it is done or standard input ends."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 1):  # not sys.stdin: its lock would outlast the process
            pass
        loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=wait, daemon=True).start()
    return await send(plan, stop)


def read(line: str | bytes) -> Plan:
    """A plan from JSON."""
    told = json.loads(line)
    told |= {"clips": tuple(told["clips"]), "fields": tuple(map(tuple, told["fields"]))}
    return Plan(**told)


def main() -> None:
    """Read a plan, carry it out, write the answers."""
    answers = asyncio.run(_told(read(sys.stdin.buffer.readline())))
    json.dump([asdict(answer) for answer in answers], sys.stdout)


if __name__ == "__main__":
    main()
