"""What the load of realtime sessions counts, against a server that knows when a turn ends."""

import asyncio
import json
import wave

import numpy as np
import pytest
from websockets.asyncio.server import serve

from jobs.benchmark import live, realtime
from jobs.benchmark.live import TRANSCRIPTION, Final, Sessions


@pytest.fixture
def clip(tmp_path):
    """A third of a second of anything, as a WAV file at 16 kHz."""
    path = tmp_path / "clip.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(np.full(5_333, 1000, "<i2").tobytes())
    return path


def told(kind, **more):
    return json.dumps({"type": kind, "item_id": "item", **more})


async def server(socket):
    """Takes every tenth chunk for the end of a turn; every third turn fails."""
    chunks = turns = 0
    async for message in socket:
        chunks += json.loads(message)["type"] == "input_audio_buffer.append"
        if chunks and chunks % 10 == 0:
            chunks, turns = 0, turns + 1
            await socket.send(told(f"{TRANSCRIPTION}delta", delta="hello"))
            await socket.send(told("input_audio_buffer.speech_stopped", audio_end_ms=400))
            if turns % 3 == 0:
                problem = {"error": {"message": "no room"}}
                await socket.send(told(f"{TRANSCRIPTION}failed", **problem))
            else:
                await socket.send(told(f"{TRANSCRIPTION}completed", transcript="hello"))


def test_sessions_tell_what_became_of_every_turn(clip, monkeypatch):
    monkeypatch.setattr(live, "CHUNK_SECONDS", 0.01)
    monkeypatch.setattr(live, "LAST_SECONDS", 0.1)
    raw = realtime._raw(clip)

    async def measured():
        async with serve(server, "127.0.0.1", 0) as running:
            port = running.sockets[0].getsockname()[1]
            return await live.hold(Sessions(f"ws://127.0.0.1:{port}/", (raw,), 2, 0.5))

    found = realtime.step(2, asyncio.run(measured()))
    assert found["turns"] >= 4 and found["lost"] >= 2
    assert found["problems"] == {"no room": found["lost"]}
    assert not realtime.live(found)


def test_a_server_that_is_not_there_loses_every_session(clip):
    plan = Sessions("ws://127.0.0.1:9/", (realtime._raw(clip),), 3, 0.1)
    found = realtime.step(3, asyncio.run(live.hold(plan)))
    assert (found["turns"], found["lost"]) == (0, 3) and not realtime.live(found)


def test_finals_that_come_late_are_no_live_session():
    soon = [Final(0, 0.1, "a", 2)] * 96 + [Final(0, 3.0, "a", 1)] * 4
    assert realtime.live(realtime.step(1, soon))
    assert not realtime.live(realtime.step(1, [*soon, *[Final(0, 3.0)] * 4]))
    assert realtime.step(1, soon)["early"] == pytest.approx(0.96)


def test_the_rate_of_changes_is_of_words_told():
    lines = [
        'ray_mmrag_realtime_words_total{became="told",x="1"} 30.0',
        'ray_mmrag_realtime_words_total{became="told",x="2"} 10.0',
        'ray_mmrag_realtime_words_total{became="revised",x="1"} 6.0',
    ]
    assert realtime.changes("\n".join(lines)) == pytest.approx(0.15)
    assert realtime.changes("") is None


def test_a_clip_is_played_at_24_khz(clip):
    with open(realtime._raw(clip), "rb") as file:
        samples = np.frombuffer(file.read(), "<i2")
    assert len(samples) == pytest.approx(8_000, abs=2)
    assert np.abs(samples[200:-200] - 1000).max() <= 2
