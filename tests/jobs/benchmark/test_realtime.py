"""What the load of realtime sessions counts, against a server that knows when a turn ends."""

import asyncio
import base64
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
    return json.dumps({"type": kind, "item_id": "item"} | more)


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


async def words(socket):
    """Hears each clip for one turn, in which its first sample is said: 1 to 3 words."""
    heard, turns = bytearray(), 0
    async for message in socket:
        event = json.loads(message)
        if event["type"] != "input_audio_buffer.append":
            continue
        heard += base64.b64decode(event["audio"])
        samples = np.frombuffer(bytes(heard), "<i2")
        loud = np.flatnonzero(samples)
        if not len(loud) or len(samples) - loud[-1] < live.RATE // 20:
            continue
        turns, number = turns + 1, int(samples[loud[0] : loud[-1]].max()) // 1000
        heard[:] = bytes(len(heard))  # so that the session's clock goes on
        ends = 1000 * len(samples) // live.RATE
        stopped = {"item_id": f"item{turns}", "audio_end_ms": ends}
        await socket.send(told("input_audio_buffer.speech_stopped", **stopped))
        kind, more = "completed", {"transcript": "one two three"[: 4 * number - 1].strip()}
        if number == 3:
            kind, more = "failed", {"error": {"message": "no room"}}
        await socket.send(told(f"{TRANSCRIPTION}{kind}", item_id=f"item{turns}", **more))


def played(tmp_path, number):
    """A clip of a tenth of a second that `words` knows by its loudness."""
    path = tmp_path / f"{number}.raw"
    path.write_bytes(np.full(live.RATE // 10, 1000 * number, "<i2").tobytes())
    return str(path)


def test_each_final_is_of_the_clip_that_was_played(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "CHUNK_SECONDS", 0.01)
    monkeypatch.setattr(live, "SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(live, "LAST_SECONDS", 1.0)
    raw = tuple(played(tmp_path, number) for number in (1, 2, 3, 0))

    async def measured():
        async with serve(words, "127.0.0.1", 0) as running:
            port = running.sockets[0].getsockname()[1]
            return await live.hold(Sessions(f"ws://127.0.0.1:{port}/", raw, 1, 1.5))

    finals = asyncio.run(measured())
    heard = realtime.transcripts(finals)
    assert set(heard[0]) == {"one"} and set(heard[1]) == {"one two"}
    assert 2 not in heard, "a turn of it was lost"
    assert set(heard[3]) == {""}, "nobody spoke in it"
    found = realtime.step(1, finals)
    assert (found["unheard"], found["problems"]) == (len(heard[3]), {"no room": found["lost"]})


def test_turns_of_a_clip_are_one_transcript_and_playings_are_several():
    turns = [
        Final(0, 0.1, "please call", clip=4, playing=0),
        Final(0, 0.1, "zoë", clip=4, playing=0),
    ]
    turns += [Final(1, 0.1, "please", clip=4, playing=0), Final(1, None, clip=5, playing=1)]
    assert realtime.transcripts(turns) == {4: ["please call zoë", "please"]}


def test_live_transcripts_are_held_against_the_files_and_against_what_is_said():
    heard, whole = (
        {0: ["a b c d", "a b c"], 1: ["e f"], 2: ["not compared"]},
        {0: "a b x d", 1: "e f"},
    )
    found = realtime.quality(heard, whole, ["a b c d", "e f g h", ""])
    rates = {name: found[f"realtime.{name}"]["rate"] for name in ("wer", "wer_file", "wer_between")}
    assert rates == {"wer": 3 / 12, "wer_file": 4 / 12, "wer_between": 3 / 10}
    assert found["realtime.playings"] == 3
    assert found["realtime.wer"]["words"] == 12 and found["realtime.wer"]["errors"] == 3
    alone = realtime.quality(heard, whole, None)
    assert alone["realtime.wer"] is None and alone["realtime.wer_between"]["rate"] == 3 / 10
    assert realtime.quality({}, {}, [])["realtime.wer_between"] is None


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
