"""What a session makes of a client's events, without a WebSocket and without models."""

import asyncio
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from realtime_clients import CLEAR, COMMIT, LONGEST, MANUAL, PREFIX, connected
from spoken_levels import LevelDetector, Levels

from mmrag.retrieval.display import Display
from serve.errors import ApiError
from serve.messages import Unavailable
from serve.realtime import session as sessions
from serve.realtime import turn
from serve.realtime.load import Load
from serve.realtime.session import STRIKES, Over


@pytest.fixture(scope="module")
def load():
    return Load()


@pytest.fixture(autouse=True)
def by_loudness(monkeypatch):
    monkeypatch.setattr(sessions, "TurnDetector", LevelDetector)


@pytest.fixture
def eager(monkeypatch):
    """A partial transcript of every bit of new audio."""
    for name in ("PAUSE_SECONDS", "REST", "STEP"):
        monkeypatch.setattr(turn, name, 0)


def test_a_committed_buffer_is_an_item_with_a_transcript(load):
    async def talk():
        async with connected(load) as client:
            client.send(MANUAL)
            client.say(3, 1, 2)
            client.send(COMMIT)
            await client.settle()
            return client.told

    told = asyncio.run(talk())
    kinds = [event["type"].removeprefix(PREFIX) for event in told]
    assert kinds[:2] == ["session.created", "session.updated"]
    assert [kind for kind in kinds[2:] if kind != "delta"] == [
        "input_audio_buffer.committed",
        "conversation.item.added",
        "segment",
        "completed",
        "conversation.item.done",
    ]
    [completed] = [event for event in told if event["type"].endswith("completed")]
    assert completed["transcript"] == "word3 word1 word2"
    assert completed["usage"] == {"type": "duration", "seconds": pytest.approx(0.75, abs=0.01)}
    [segment] = [event for event in told if event["type"].endswith("segment")]
    assert [word["word"] for word in segment["words"]] == ["word3", "word1", "word2"]
    assert segment["words"][1]["start"] == pytest.approx(0.25, abs=0.01)
    assert told[-1]["item"]["content"][0]["transcript"] == "word3 word1 word2"


def test_two_turns_are_found_and_told_in_order(load):
    async def talk():
        async with connected(load) as client:
            client.say(0, 0, 1, 2, 0, 0, 0, 3, 0, 0, 0)
            await client.settle()
            return client

    client = asyncio.run(talk())
    assert client.transcripts() == ["word1 word2", "word3"]
    started, stopped = (
        client.of("input_audio_buffer.speech_started"),
        client.of("input_audio_buffer.speech_stopped"),
    )
    committed = client.of("input_audio_buffer.committed")
    items = [event["item_id"] for event in committed]
    assert [event["item_id"] for event in started] == items
    assert [event["item_id"] for event in stopped] == items
    assert [event["previous_item_id"] for event in committed] == [None, items[0]]
    assert started[0]["audio_start_ms"] == pytest.approx(200, abs=40)
    assert stopped[0]["audio_end_ms"] == pytest.approx(1500, abs=40)
    [_, second] = client.of("segment")
    assert second["start"] == pytest.approx(1.75, abs=0.05), "by the session's clock"


def test_words_are_told_while_somebody_speaks_and_never_taken_back(load, eager):
    async def talk():
        ears = Levels()
        async with connected(load, ears) as client:
            client.send(MANUAL)
            await client.with_time(ears, 1, 2, 3, 4, 5, 6)
            before = "".join(event["delta"] for event in client.of("delta"))
            client.send(COMMIT)
            await client.settle()
            return client, ears, before

    client, ears, before = asyncio.run(talk())
    [completed] = client.of("completed")
    assert before and completed["transcript"].startswith(before)
    assert completed["transcript"] == "word1 word2 word3 word4 word5 word6"
    assert client.deltas(completed["item_id"]) == completed["transcript"]
    assert ears.most == 1, "one at a time"
    assert any(request.begins for request in ears.decoded), "later ones begin with what was told"


@pytest.mark.parametrize("paced", [0.0, 0.01])
def test_a_long_turn_is_finished_in_pieces_and_none_is_heard_again(load, paced):
    levels = [1, 2, 3, 4, 5, 0, 6, 7, 8, 9, 10, 11, 12, 0, 13, 14, 15, 16, 17, 18, 19, 20, 0, 21]

    async def talk():
        ears = Levels()
        async with connected(load, ears) as client:
            client.send(MANUAL)
            await client.slowly(*levels, seconds=paced)
            client.send(COMMIT)
            await client.settle()
            return client, ears

    client, ears = asyncio.run(talk())
    [text] = client.transcripts()
    assert text.split() == [f"word{level}" for level in levels if level]
    assert len(client.of("segment")) >= 3
    assert max(ears.spans) <= (LONGEST + 0.2) * 16_000
    spoken = [word for event in client.of("segment") for word in event["words"]]
    assert [word["word"] for word in spoken] == text.split()
    assert all(a["end"] <= b["start"] + 0.02 for a, b in pairwise(spoken))


def test_what_was_transcribed_while_it_was_quiet_is_the_final_transcript(load):
    async def talk():
        ears = Levels()
        async with connected(load, ears) as client:
            client.say(1, 2, 0)
            await client.until(lambda: any(one.output.timed for one in ears.decoded))
            before = len(ears.decoded)
            client.say(0, 0)
            await client.settle()
            return client, before, len(ears.decoded)

    client, before, after = asyncio.run(talk())
    assert client.transcripts() == ["word1 word2"]
    assert before == after >= 1, "nothing was left to do when the turn ended"


def test_a_word_after_a_pause_belongs_to_the_turn(load):
    async def talk():
        ears = Levels()
        async with connected(load, ears) as client:
            client.say(1, 0)
            await client.until(lambda: any(one.output.timed for one in ears.decoded))
            client.say(2, 0, 0, 0)
            await client.settle()
            return client

    assert asyncio.run(talk()).transcripts() == ["word1 word2"]


DISPLAY = Display([(("word2", "word3"), "W23")])


@pytest.mark.parametrize("known", [True, False])
def test_entries_are_told_as_they_are_written(load, eager, known):
    async def talk():
        ears = Levels(display=lambda shown: DISPLAY if known or shown else Display())
        async with connected(load, ears) as client:
            client.send(MANUAL)
            await client.with_time(ears, *range(1, 9))
            client.send(COMMIT)
            await client.settle()
            return client

    client = asyncio.run(talk())
    [completed] = client.of("completed")
    told = "word1 W23" if known else "word1 word2 word3"
    assert completed["transcript"] == f"{told} word4 word5 word6 word7 word8"
    assert client.deltas(completed["item_id"]) == completed["transcript"]


def update(**transcription):
    inner = {"input": {"transcription": transcription}}
    return {"type": "session.update", "event_id": "mine", "session": {"audio": inner}}


def test_a_name_given_in_the_middle_of_a_turn_is_in_its_transcript(load):
    async def talk():
        async with connected(load, Levels(seconds=0.01)) as client:
            client.send(MANUAL)
            client.say(1)
            client.send(update(context=["Zoë-2"]))
            client.say(2)
            client.send(COMMIT)
            await client.settle()
            client.say(2)
            client.send(COMMIT)
            await client.settle()
            return client

    client = asyncio.run(talk())
    assert client.transcripts() == ["word1 Zoë-2", "Zoë-2"]
    shown = client.of("session.updated")[-1]["session"]["audio"]["input"]["transcription"]
    assert shown["context"] == ["Zoë-2"]


def test_a_datastore_that_is_not_there_is_refused_and_the_old_one_stays(load):
    async def talk():
        async with connected(load) as client:
            client.send(MANUAL, update(datastore="names"), update(datastore="gone"))
            client.say(1)
            client.send(COMMIT)
            await client.settle()
            return client

    client = asyncio.run(talk())
    [error] = client.of("error")
    assert error["error"]["event_id"] == "mine"
    assert error["error"]["param"] == "session.audio.input.transcription.datastore"
    assert error["error"]["code"] == "datastore_not_found"
    assert client.transcripts() == ["word1"]
    assert client.session.settings.audio.input.transcription.datastore == "names"


def test_changes_that_come_faster_than_they_are_made_are_refused(load):
    async def talk():
        async with connected(load, Levels(seconds=0.01)) as client:
            client.send(*[update(context=[f"name-{number}"]) for number in range(12)])
            await client.settle()
            return client

    client = asyncio.run(talk())
    assert client.problems() == ["busy"] * 4 and len(client.of("session.updated")) == 8
    assert client.session.settings.audio.input.transcription.context == ["name-7"]


def test_clearing_forgets_what_was_said(load):
    async def talk():
        async with connected(load) as client:
            client.send(MANUAL)
            client.say(1, 2)
            client.send(CLEAR, COMMIT)
            client.say(3)
            client.send(COMMIT)
            await client.settle()
            return client

    client = asyncio.run(talk())
    assert client.of("input_audio_buffer.cleared")
    assert client.problems() == ["input_audio_buffer_commit_empty"]
    assert client.transcripts() == ["word3"]


def test_silence_is_kept_for_two_seconds_and_no_longer(load):
    async def talk():
        async with connected(load) as client:
            for _ in range(60):
                client.say(*[0] * 4, step=1)
                await client.settle()
            return client.session.held, len(client.session._recent), len(client.told)

    held, recent, told = asyncio.run(talk())
    assert (held, told) == (0, 1) and recent <= 2.5 * 16_000


def test_more_than_may_wait_is_refused_and_who_goes_on_has_to_go(load):
    async def talk():
        async with connected(load, Levels(seconds=5), buffered=2) as client:
            client.send(MANUAL)
            with pytest.raises(Over):
                client.say(*range(1, 80), step=0.25)
            return client

    client = asyncio.run(talk())
    assert set(client.problems()) == {"input_audio_buffer_full"}
    assert len(client.problems()) == STRIKES


def test_audio_beyond_the_quota_is_refused_by_its_name(load):
    def charge(seconds):
        raise ApiError(429, "more than 1 s of audio a minute", "quota_audio_seconds")

    async def talk():
        async with connected(load, charge=charge) as client:
            client.say(1, step=1)
            return client

    client = asyncio.run(talk())
    [error] = client.of("error")
    assert error["error"]["code"] == "quota_audio_seconds"
    assert error["error"]["type"] == "rate_limit_error"


def test_a_turn_that_cannot_be_transcribed_says_so_and_the_next_one_is(load):
    async def talk():
        ears = Levels(failing=Unavailable("a part of the service does not answer: try again"))
        async with connected(load, ears) as client:
            client.send(MANUAL)
            client.say(1)
            client.send(COMMIT)
            await client.settle()
            ears.failing = None
            client.say(2)
            client.send(COMMIT)
            await client.settle()
            return client

    client = asyncio.run(talk())
    [failed] = client.of("failed")
    assert failed["error"]["code"] == "unavailable" and failed["error"]["type"] == "server_error"
    assert client.transcripts() == ["word2"]


def test_a_decoder_that_never_answers_is_not_waited_for(load):
    async def talk():
        ears = Levels(seconds=100)
        async with connected(load, ears, patience=0.05) as client:
            client.send(MANUAL)
            client.say(*range(1, 20))
            client.send(COMMIT)
            await client.settle()
            return client

    [failed] = asyncio.run(talk()).of("failed")
    assert failed["error"]["code"] == "timeout"


REFUSED = [
    ("{", "invalid_json", None),
    ("[]", "invalid_json", None),
    ("null", "invalid_json", None),
    ('{"type": 3}', "invalid_value", "type"),
    ('{"type": "response.create"}', "invalid_value", "type"),
    ('{"type": "input_audio_buffer.append"}', "invalid_value", "audio"),
    ('{"type": "input_audio_buffer.append", "audio": "?"}', "invalid_value", "audio"),
    ('{"type": "input_audio_buffer.append", "audio": 1}', "invalid_value", "audio"),
    ('{"type": "input_audio_buffer.commit", "more": 1}', "invalid_value", "more"),
    ('{"type": "session.update"}', "invalid_value", "session"),
    (
        '{"type": "session.update", "session": {"type": "realtime"}}',
        "invalid_value",
        "session.type",
    ),
    ('{"type": "session.update", "session": {"voice": "x"}}', "invalid_value", "session.voice"),
]
INNER = [
    ("turn_detection", {"type": "semantic_vad"}, "turn_detection.type"),
    ("turn_detection", {"type": "server_vad", "threshold": 2}, "turn_detection.threshold"),
    ("turn_detection", {"create_response": True}, "turn_detection.create_response"),
    ("turn_detection", {"idle_timeout_ms": 1}, "turn_detection.idle_timeout_ms"),
    ("noise_reduction", {"type": "near_field"}, "noise_reduction"),
    ("format", {"type": "audio/opus"}, "format.type"),
    ("format", {"type": "audio/pcm", "rate": 16_000}, "format"),
    ("transcription", {"delay": "low"}, "transcription.delay"),
    ("transcription", {"retrieval": "all"}, "transcription.retrieval"),
    ("transcription", {"datastore": "../x"}, "transcription.datastore"),
    ("transcription", None, "transcription"),
]


@pytest.mark.parametrize(("text", "code", "param"), REFUSED)
def test_what_is_no_event_is_refused_by_the_name_of_its_field(load, text, code, param):
    async def talk():
        async with connected(load) as client:
            client.send(text)
            return client

    [error] = asyncio.run(talk()).of("error")
    assert (error["error"]["code"], error["error"]["param"]) == (code, param)


@pytest.mark.parametrize(("field", "value", "param"), INNER)
def test_what_a_session_cannot_be_is_refused_by_name_and_changes_nothing(load, field, value, param):
    async def talk():
        async with connected(load) as client:
            before = client.session.settings
            session = {"audio": {"input": {field: value}}}
            client.send({"type": "session.update", "event_id": "e1", "session": session})
            assert client.session.settings == before
            return client

    [error] = asyncio.run(talk()).of("error")
    assert error["error"]["param"] == f"session.audio.input.{param}"
    assert error["error"]["event_id"] == "e1"


def test_how_phrases_are_used_may_be_said_and_left_to_the_service_again(load):
    async def talk():
        async with connected(load) as client:
            for way in ("spotting", None, "none", None):
                asked = {"audio": {"input": {"transcription": {"retrieval": way}}}}
                client.send({"type": "session.update", "session": asked})
                assert client.session.settings.audio.input.transcription.retrieval == way
            await client.settle()
            return client

    client = asyncio.run(talk())
    told = [event["session"]["audio"]["input"] for event in client.of("session.updated")]
    ways = [one["transcription"].get("retrieval") for one in told]
    assert ways == ["spotting", None, "none", None] and not client.problems()


def test_the_flat_shape_of_older_clients_is_understood(load):
    flat = {
        "input_audio_format": "g711_ulaw",
        "input_audio_transcription": {"prompt": "names"},
        "turn_detection": {"type": "server_vad", "silence_duration_ms": 300},
        "include": ["item.input_audio_transcription.logprobs"],
    }

    async def talk():
        async with connected(load) as client:
            client.send({"type": "transcription_session.update", "session": flat})
            await client.settle()
            return client

    [updated] = asyncio.run(talk()).of("session.updated")
    inner = updated["session"]["audio"]["input"]
    assert inner["format"] == {"type": "audio/pcmu", "rate": 8000}
    assert inner["transcription"]["prompt"] == "names"
    assert inner["turn_detection"]["silence_duration_ms"] == 300
    assert updated["session"]["include"] == flat["include"]


def formatted(**fields):
    return {"type": "session.update", "session": {"audio": {"input": {"format": fields}}}}


def test_another_format_has_its_own_rate_and_a_rate_that_is_not_its_own_is_refused(load):
    async def talk():
        async with connected(load) as client:
            client.send(formatted(type="audio/pcm", rate=24_000), formatted(type="audio/pcmu"))
            client.send(formatted(rate=24_000))
            await client.settle()
            return client.of("session.updated"), client.of("error")

    updated, [error] = asyncio.run(talk())
    formats = [one["session"]["audio"]["input"]["format"] for one in updated]
    assert formats == [
        {"type": "audio/pcm", "rate": 24_000},
        {"type": "audio/pcmu", "rate": 8000},
    ]
    assert error["error"]["param"] == "session.audio.input.format"


def test_too_many_wrong_events_in_a_row_end_the_session(load):
    async def talk():
        async with connected(load) as client:
            client.send(*["?"] * (STRIKES - 1), CLEAR, *["?"] * (STRIKES - 1))
            with pytest.raises(Over, match="in a row"):
                client.send("?")

    asyncio.run(talk())


VAD = {"audio": {"input": {"turn_detection": {"type": "server_vad"}}}}
ORDERS = st.lists(
    st.one_of(
        st.tuples(st.just("say"), st.lists(st.integers(0, 9), min_size=1, max_size=6)),
        st.sampled_from([MANUAL, COMMIT, CLEAR, update(context=["a-1"]), update(datastore="gone")]),
        st.just({"type": "session.update", "session": VAD}),
        st.just({"type": "input_audio_buffer.append", "audio": ""}),
        st.just("nothing"),
        st.just("wait"),
    ),
    max_size=14,
)


@given(ORDERS)
@settings(max_examples=60, deadline=None)
def test_no_order_of_events_breaks_a_session(load, events):
    async def talk():
        async with connected(load) as client:
            for event in events:
                if event == "wait":
                    await asyncio.sleep(0.002)
                elif isinstance(event, tuple):
                    client.say(*event[1])
                else:
                    client.send(event)
            await client.settle()
            await client.session.finish()
            client.say(7)
            client.send(MANUAL, COMMIT)
            await client.settle()
            return client

    client = asyncio.run(talk())
    committed = [event["item_id"] for event in client.of("input_audio_buffer.committed")]
    ended = [event["item_id"] for event in (*client.of("completed"), *client.of("failed"))]
    assert sorted(committed) == sorted(ended), "every item has its transcript, once"
    for event in client.of("completed"):
        assert client.deltas(event["item_id"]) == event["transcript"]
    assert client.session.held == 0
