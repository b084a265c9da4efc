"""Who says nothing for an hour: little is kept for them, their session stays open, and where it
ends they are told by which limit."""

import asyncio
from types import ModuleType

import numpy as np
import pytest
import torch
import uvicorn
from realtime_clients import COMMIT, MANUAL, connected
from spoken_levels import LevelDetector, Levels, base64_of

from mmrag.speech.silero import network
from serve.operations.environment import VARIABLES
from serve.realtime import session as sessions
from serve.realtime.load import Load
from serve.settings import read

HOUR = 3600
EVENT = 20
"""Seconds of audio in each event: a session is to let as much wait."""
MOST = 1_000_000
"""Bytes that a session may hold between two events: 15 s of audio."""
FOUND = {"vad": [], "committed": [MANUAL], "never committed": [MANUAL]}


class Hearing(Levels):
    """Hears, and remembers nothing of it."""

    async def encode(self, wave):
        self.spans.clear()
        return await super().encode(wave)


def held(thing, seen=None):
    """Bytes of the arrays and texts that an object of a session keeps, and the containers' own, but
    for what all sessions share: the network that hears speech."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, (type, ModuleType, Levels, Load, type(network()))):
        return 0
    seen.add(id(thing))
    if isinstance(thing, (np.ndarray, torch.Tensor)):
        return thing.nbytes
    if isinstance(thing, (str, bytes)):
        return len(thing)
    if isinstance(thing, dict):
        inside = [*thing.keys(), *thing.values()]
    elif isinstance(thing, (list, tuple, set)) or type(thing).__name__ == "deque":
        inside = list(thing)
    elif type(thing).__module__.startswith(("serve.realtime", "mmrag.speech", "spoken_levels")):
        inside = list(vars(thing).values()) if hasattr(thing, "__dict__") else []
    else:
        return 0
    return 8 * len(inside) + sum(held(one, seen) for one in inside)


def silent(load, way, seconds):
    """What is held by a session after each event of so many seconds of digital silence, what it
    then hears, and how many turns it has not told yet."""
    audio = base64_of(np.zeros(24_000 * EVENT, np.float32))
    append = {"type": "input_audio_buffer.append", "audio": audio}

    async def talk():
        async with connected(load, Hearing(), longest=8.0) as client:
            client.send(*FOUND[way])
            sizes = []
            for _ in range(seconds // EVENT):
                client.send(append)
                if way == "committed":
                    client.send(COMMIT)
                await client.settle()
                await client.until(lambda: client.session.held <= 9 * 16_000)
                sizes.append(held(client.session))
            return sizes, client

    return asyncio.run(talk())


@pytest.fixture
def one_thread():
    """So small products gain nothing from several, and wait for them where others compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("way", FOUND)
@pytest.mark.parametrize("seconds", [HOUR // 12, pytest.param(HOUR, marks=pytest.mark.slow)])
def test_digital_silence_is_not_kept(monkeypatch, one_thread, way, seconds):
    if seconds < HOUR:
        monkeypatch.setattr(sessions, "TurnDetector", LevelDetector)
    sizes, client = silent(Load(), way, seconds)
    assert len(sizes) == seconds // EVENT and max(sizes) < MOST
    assert max(sizes[-5:]) <= max(sizes[:5]), "it does not grow"
    assert client.problems() == [] and not client.of("input_audio_buffer.speech_started")
    if way == "committed":
        assert client.transcripts() == [""] * len(sizes) and not client.session._running
    else:
        assert client.of("input_audio_buffer.committed") == []


def test_a_client_is_pinged_before_haproxy_takes_it_for_gone():
    """Serve leaves the pings to uvicorn's defaults; a client answers them by itself."""
    pings = uvicorn.Config(lambda: None)
    patience = int(VARIABLES["RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"])
    assert 0 < pings.ws_ping_interval < patience
    assert pings.ws_ping_timeout > 0, "who does not answer is gone"


def test_a_service_as_it_comes_waits_longer_than_an_hour_for_somebody_to_speak():
    settings = read({})
    stops = int(VARIABLES["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"])
    assert HOUR < settings.limits.silent_seconds <= settings.limits.session_seconds <= stops
