"""Realtime sessions with the clients that people have: OpenAI's, and plain WebSockets."""

import asyncio
import base64
import json
import random
import time
from contextlib import contextmanager

import pytest
import torch
from openai import AsyncOpenAI
from openai.types.realtime.realtime_server_event import RealtimeServerEvent
from pydantic import TypeAdapter
from service_process import serving
from torchaudio.transforms import Resample
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from mmrag import shipped

TURN, OTHER = "please call priya raghavan tomorrow", "what is the weather in lisbon"
SECONDS = 60
PREFIX = "conversation.item.input_audio_transcription."
OFFICIAL = TypeAdapter(RealtimeServerEvent)
MANUAL = {"type": "transcription", "audio": {"input": {"turn_detection": None}}}
MALFORMED = 500


@pytest.fixture(scope="session")
def spoken(wave):
    """`spoken(sentence)`: 16-bit samples at 24 kHz of somebody saying it."""
    raise_rate = Resample(16_000, 24_000)

    def say(sentence):
        made = raise_rate(torch.from_numpy(wave(sentence))).numpy()
        return (made * 32767).clip(-32768, 32767).astype("<i2").tobytes()

    return say


def quiet(seconds):
    return bytes(2 * int(24_000 * seconds))


def appended(data, size=4800):
    """The events that append so many bytes at a time."""
    for start in range(0, len(data), size):
        audio = base64.b64encode(data[start : start + size]).decode()
        yield {"type": "input_audio_buffer.append", "audio": audio}


class Talk:
    """A plain WebSocket."""

    def __init__(self, socket):
        self.socket, self.told = socket, []

    def send(self, *events):
        for event in events:
            self.socket.send(event if isinstance(event, str | bytes) else json.dumps(event))

    def hear(self, kind):
        """The next event of a kind; what comes before is kept."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            event = json.loads(self.socket.recv(SECONDS))
            OFFICIAL.validate_python(event)
            self.told.append(event)
            if event["type"].removeprefix(PREFIX) == kind:
                return event
        raise TimeoutError(kind)

    def shut_out(self, *events):
        """Send, and read on: with which code the connection is closed; None if it breaks off."""
        try:
            self.send(*events)
            while True:
                self.hear("error")
        except ConnectionClosed as closed:
            return closed.rcvd and closed.rcvd.code


@pytest.fixture(scope="session")
def talk():
    @contextmanager
    def open_one(service, query="intent=transcription", **more):
        url = service.url.replace("http", "ws") + f"/v1/realtime?{query}"
        with connect(url, open_timeout=SECONDS, max_size=None, **more) as socket:
            talking = Talk(socket)
            talking.hear("session.created")
            yield talking

    return open_one


@pytest.fixture
def manual(service, talk):
    """A session whose turns the client commits."""
    with talk(service) as talking:
        talking.send({"type": "session.update", "session": MANUAL})
        talking.hear("session.updated")
        yield talking


def test_openais_client_commits_a_turn_and_reads_it(service, client, clip, spoken):
    expected = service.text(clip(TURN))
    with client.realtime.connect(extra_query={"intent": "transcription"}) as connection:
        connection.session.update(session=MANUAL)
        for event in appended(spoken(TURN)):
            connection.input_audio_buffer.append(audio=event["audio"])
        connection.input_audio_buffer.commit()
        told = []
        for event in connection:
            told.append(event)
            if event.type == "conversation.item.done":
                break
    deltas = "".join(event.delta for event in told if event.type == f"{PREFIX}delta")
    [completed] = [event for event in told if event.type == f"{PREFIX}completed"]
    assert deltas == completed.transcript == expected
    assert completed.usage.type == "duration" and completed.usage.seconds > 1


def test_openais_asynchronous_client_finds_two_turns(service, spoken):
    asked = {"silence_duration_ms": 400, "type": "server_vad"}

    async def listen():
        client = AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none")
        found = []
        async with client.realtime.connect(extra_query={"intent": "transcription"}) as connection:
            session = {"type": "transcription", "audio": {"input": {"turn_detection": asked}}}
            await connection.session.update(session=session)
            data = spoken(TURN) + quiet(0.8) + spoken(OTHER) + quiet(0.8)
            for event in appended(data):
                await connection.input_audio_buffer.append(audio=event["audio"])
            async for event in connection:
                found.append(event)
                if sum(one.type == f"{PREFIX}completed" for one in found) == 2:
                    return found

    found = asyncio.run(asyncio.wait_for(listen(), SECONDS))
    texts = [one.transcript for one in found if one.type == f"{PREFIX}completed"]
    assert texts[0].startswith("please call") and "weather" in texts[1]
    kinds = [one.type for one in found]
    for kind in ("speech_started", "speech_stopped", "committed"):
        assert kinds.count(f"input_audio_buffer.{kind}") == 2


def test_a_name_that_is_given_in_the_middle_of_a_turn_is_right_in_its_transcript(
    service, manual, spoken, clip
):
    sentence = "please call zanab kuri tomorrow"
    assert "zanab kuri" not in service.text(clip(sentence))
    data = spoken(sentence)
    half = len(data) // 4 * 2
    manual.send(*appended(data[:half]))
    inner = {"input": {"transcription": {"context": ["zanab kuri"]}}}
    manual.send({"type": "session.update", "session": {"audio": inner}})
    manual.send(*appended(data[half:]), {"type": "input_audio_buffer.commit"})
    assert "zanab kuri" in manual.hear("completed")["transcript"]


def test_a_datastore_that_is_changed_while_a_session_lasts_is_listened_for(
    service, manual, spoken, datastore
):
    name = datastore("zanab kuri")
    for asked, found in ((name, True), (None, False)):
        inner = {"input": {"transcription": {"datastore": asked}}}
        manual.send({"type": "session.update", "session": {"audio": inner}})
        manual.hear("session.updated")
        manual.send(*appended(spoken("please call zanab kuri tomorrow")))
        manual.send({"type": "input_audio_buffer.commit"})
        assert ("zanab kuri" in manual.hear("completed")["transcript"]) is found


def test_log_probabilities_come_with_a_transcript_that_asks_for_them(service, talk, spoken):
    asked = {**MANUAL, "include": ["item.input_audio_transcription.logprobs"]}
    with talk(service) as talking:
        talking.send({"type": "session.update", "session": asked})
        talking.send(*appended(spoken(TURN)), {"type": "input_audio_buffer.commit"})
        completed = talking.hear("completed")
    tokens = "".join(one["token"] for one in completed["logprobs"])
    assert tokens.strip() == completed["transcript"]
    assert all(one["logprob"] <= 0 for one in completed["logprobs"])


def test_a_client_secret_opens_the_session_that_it_was_made_for(service, client, talk, spoken):
    made = client.realtime.client_secrets.create(
        expires_after={"anchor": "created_at", "seconds": 60}, session=MANUAL
    )
    assert made.value.startswith("ek_") and made.expires_at > time.time()
    assert made.session.type == "transcription" and made.session.audio.input.turn_detection is None
    offered = ["realtime", f"openai-insecure-api-key.{made.value}"]
    with talk(service, query="", subprotocols=offered) as talking:
        assert talking.socket.subprotocol == "realtime"
        assert talking.told[0]["session"]["audio"]["input"]["turn_detection"] is None
        talking.send(*appended(spoken(TURN)), {"type": "input_audio_buffer.commit"})
        assert talking.hear("completed")["transcript"].startswith("please call")


@pytest.mark.parametrize(
    ("session", "param"),
    [
        ({"type": "realtime"}, "session.type"),
        ({"audio": {"input": {"turn_detection": {"type": "semantic_vad"}}}}, None),
        ({"audio": {"input": {"transcription": {"language": "xx"}}}}, None),
    ],
)
def test_a_client_secret_for_a_session_that_cannot_be_is_refused(service, session, param):
    response = service.request("POST", "/v1/realtime/client_secrets", json={"session": session})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(param or "session.audio.input.")


@pytest.mark.parametrize(
    ("query", "status"),
    [("intent=conversation", 400), ("model=nobody", 404), ("call_id=3", 400)],
)
def test_a_session_that_is_not_served_is_refused_before_it_begins(service, talk, query, status):
    with pytest.raises(InvalidStatus) as refused, talk(service, query):
        pass
    assert refused.value.response.status_code == status
    assert json.loads(refused.value.response.body)["error"]["param"] == query.partition("=")[0]


def test_garbage_is_answered_until_there_was_too_much_of_it(service, talk):
    with talk(service) as talking:
        talking.send("?", b"\xff\x00", "[" * 5000, '{"type": "x", "event_id": "mine"}')
        codes = [talking.hear("error")["error"] for _ in range(4)]
        assert [one["code"] for one in codes] == [*["invalid_json"] * 3, "invalid_value"]
        assert codes[3]["event_id"] == "mine"
        assert talking.shut_out(*["?"] * 40) == 1008


def test_who_floods_is_told_and_then_shut_out(service, talk):
    with talk(service) as talking:
        talking.send({"type": "session.update", "session": MANUAL})
        flood = [*appended(quiet(20), size=10**6)] * 60
        code = talking.shut_out(*flood)
    full = [one["error"]["code"] for one in talking.told if one["type"] == "error"]
    assert set(full) <= {"input_audio_buffer_full"}
    assert code == 1008 or (code is None and full), "neither told nor shut out"


def test_clients_that_vanish_leave_nothing_behind(service, talk, spoken):
    for _ in range(3):
        with talk(service) as talking:
            talking.send(*appended(spoken(TURN)))
            talking.socket.socket.close()
    deadline = time.monotonic() + SECONDS
    with talk(service):
        while service.metric("realtime_sessions") != 1:  # 0 until it is reported
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_a_silent_session_stays_open_and_then_listens(service, talk, spoken):
    with talk(service) as talking:
        talking.send(*appended(quiet(100), size=480_000))
        with pytest.raises(TimeoutError):
            talking.socket.recv(3)
        talking.send(*appended(spoken(TURN) + quiet(1)))
        assert talking.hear("completed")["transcript"].startswith("please call")
    kinds = [event["type"] for event in talking.told]
    assert kinds.count("input_audio_buffer.speech_started") == 1


WORDS = ["session.update", "input_audio_buffer.append", "input_audio_buffer.commit", "x", "", None]
NAMES = ["type", "event_id", "audio", "session", "input", "transcription", "turn_detection"]


def value(chance, depth=0):
    """Anything that JSON can say, with names that sessions know."""
    kind = chance.randrange(9 if depth < 4 else 6)
    if kind < 6:
        some = [chance.choice(WORDS), chance.randrange(-9, 10**9), True, "A" * 64, 1e308, "\ud800"]
        return some[kind]
    if kind == 6:
        return [value(chance, depth + 1) for _ in range(chance.randrange(3))]
    return {chance.choice(NAMES): value(chance, depth + 1) for _ in range(chance.randrange(4))}


def malformed(chance):
    """Something that a client might send, and should not."""
    kind = chance.randrange(6)
    if kind == 0:
        return bytes(chance.randrange(256) for _ in range(chance.randrange(40)))
    if kind == 1:
        return "".join(chr(chance.randrange(1, 0xD7FF)) for _ in range(chance.randrange(40)))
    if kind == 2:
        audio = base64.b64encode(chance.randbytes(chance.randrange(3000))).decode()
        return json.dumps({"type": WORDS[1], "audio": audio})
    if kind == 3:
        more = {chance.choice(NAMES): value(chance, 3) for _ in range(chance.randrange(2))}
        return json.dumps({"type": chance.choice(WORDS), **more})
    if kind == 4:
        inner = {chance.choice(NAMES): value(chance)}
        return json.dumps({"type": WORDS[0], "session": {"audio": {"input": inner}}})
    return json.dumps(value(chance))


@pytest.mark.parametrize(
    "sessions", [20, pytest.param(MALFORMED, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
)
def test_malformed_sessions_are_answered_and_the_service_stays_healthy(
    service, talk, spoken, sessions
):
    for seed in range(sessions):
        chance, code = random.Random(seed), None
        with talk(service) as talking:
            try:
                for _ in range(chance.randrange(1, 12)):
                    talking.send(malformed(chance))
                talking.send({"type": "input_audio_buffer.clear"})
                talking.hear("input_audio_buffer.cleared")
            except ConnectionClosed as closed:
                code = closed.rcvd and closed.rcvd.code
        assert code in (None, 1000, 1007, 1008, 1009), seed
        for event in talking.told:
            if event["type"] == "error":
                assert event["error"]["type"] != "server_error", (seed, event)
    with talk(service) as talking:
        talking.send(*appended(spoken(TURN) + quiet(1)))
        assert talking.hear("completed")["transcript"].startswith("please call")


def test_the_metrics_count_turns_and_their_audio(service, manual, spoken):
    def counted():
        turns = service.metric("realtime_turns_total", became="completed")
        return turns, service.metric("realtime_audio_seconds_total")

    turns, seconds = counted()
    data = spoken(TURN)
    manual.send(*appended(data), {"type": "input_audio_buffer.commit"})
    manual.hear("completed")
    deadline = time.monotonic() + SECONDS
    while not (counted()[0] > turns and counted()[1] >= seconds + len(data) / 48_000 - 0.01):
        assert time.monotonic() < deadline, counted()
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_session_goes_on_while_a_replica_dies_under_it(service, talk, spoken, part):
    with talk(service) as talking:
        talking.send(*appended(spoken(TURN)))
        talking.hear("input_audio_buffer.speech_started")
        for process in service.processes(part):
            process.kill()
        talking.send(*appended(quiet(1)))
        event = talking.hear("conversation.item.done")
        told = [one["type"].removeprefix(PREFIX) for one in talking.told]
        assert event["item"]["content"][0]["transcript"] or "failed" in told
        service.ready()
        talking.send(*appended(spoken(TURN) + quiet(1)))
        assert talking.hear("completed")["transcript"].startswith("please call")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_silent_connection_outlives_haproxys_patience(tmp_path, talk, spoken):
    """Through HAProxy, as `make serve` has it: only the service's pings keep the connection."""
    with (
        serving(tmp_path, f"model={shipped.TINY}", "decode.max_seconds=4") as process,
        talk(process, ping_interval=None) as talking,
    ):
        with pytest.raises(TimeoutError):
            talking.socket.recv(50)
        talking.send(*appended(spoken(TURN) + quiet(1)))
        assert talking.hear("completed")["transcript"].startswith("please call")
        process.process.terminate()
        assert talking.hear("error")["error"]["code"] == "server_shutting_down"
        assert talking.shut_out() == 1001
