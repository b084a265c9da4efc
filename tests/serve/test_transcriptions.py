"""POST /v1/audio/transcriptions, as OpenAI's client, curl and everybody else use it."""

import json
import re
import struct
import subprocess
import time
from itertools import pairwise

import numpy as np
import openai
import pytest
import soundfile
from application import TRANSCRIBE, client, made
from encoded_audio import coded

from mmrag.speech import cutting

SENTENCE = "please call priya raghavan tomorrow"
"""The package's model gets the name wrong, unless it is told."""
NAME = "priya raghavan"
SEVERAL = (
    "the curious rabbit ran by the window",
    "how much does the famous hammer cost",
    "we felt angry because they saw a ghost",
)
"""Sentences that it gets right, and with certainty: rounding does not change what it hears."""
LATE = "what time is it in buxbury on friday"
"""One that it gets right after a second of silence, too."""


@pytest.fixture(scope="module")
def file(clip):
    return clip(SENTENCE)


@pytest.fixture(scope="module")
def plain(clip):
    return clip(SEVERAL[0])


@pytest.fixture(scope="module")
def long(clip):
    """A file that is cut into several segments"""
    return clip(*SEVERAL)


def events(response):
    """The events of a stream, parsed."""
    assert response.headers["Content-Type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def test_a_transcript_is_the_one_that_one_process_makes(service, plain, long, heard_here):
    assert service.text(plain) == heard_here(plain) == SEVERAL[0]
    assert service.text(long) == heard_here(long) == " ".join(SEVERAL)


def test_any_common_format_sounds_the_same(service, wave, write):
    for kind in ("WAV", "OGG", "AIFF", "MP3", "AU", "CAF"):
        data = write(wave(SEVERAL[0]), kind)
        assert service.text(data, file_name="of any.name") == SEVERAL[0], kind


def test_stereo_is_mixed_down(service, wave, write):
    assert service.text(write(np.stack([wave(SEVERAL[0])] * 2, axis=1))) == SEVERAL[0]


def test_openais_client_gets_a_transcript(client, plain, duration):
    told = client.audio.transcriptions.create(model="mmrag", file=("a.flac", plain))
    assert told.text == SEVERAL[0]
    assert (told.usage.type, told.usage.seconds) == ("duration", np.ceil(duration(plain)))


def test_openais_client_gets_words_with_their_times(client, long, duration):
    told = client.audio.transcriptions.create(
        model="mmrag",
        file=("a.flac", long),
        response_format="verbose_json",
        timestamp_granularities=["word", "segment"],
    )
    assert told.duration == pytest.approx(duration(long)) and told.language == "english"
    assert " ".join(word.word for word in told.words) == told.text
    assert " ".join(segment.text for segment in told.segments) == told.text
    for timed in (told.words, told.segments):
        times = [time for one in timed for time in (one.start, one.end)]
        assert times == sorted(times) and times[0] >= 0 and times[-1] <= told.duration
    assert [segment.id for segment in told.segments] == list(range(len(told.segments)))
    assert all(segment.tokens and segment.avg_logprob <= 0 for segment in told.segments)
    assert all(0 <= segment.no_speech_prob <= 0.25 for segment in told.segments)
    assert told.words[-1].start > 4, "the words of later segments count from the file's start"


def test_a_word_is_timed_where_it_is_said(service, wave, write):
    """A second of silence before the sentence moves its words by a second."""
    silence = np.zeros(16_000, np.float32)

    def times(wave):
        ask = {"response_format": "verbose_json", "timestamp_granularities": ["word"]}
        words = service.transcribe(write(wave), **ask).json()["words"]
        return {word["word"]: word["end"] for word in words}

    now, later = times(wave(LATE)), times(np.concatenate([silence, wave(LATE)]))
    assert list(now) == list(later) == LATE.split()
    assert [later[word] - now[word] for word in now] == pytest.approx([1] * len(now), abs=0.1)


@pytest.mark.parametrize(
    ("granularities", "shown"),
    [(["word"], {"words"}), (["segment"], {"segments"}), ([], {"segments"})],
)
def test_verbose_json_holds_the_times_that_were_asked_for(service, file, granularities, shown):
    ask = {"response_format": "verbose_json", "timestamp_granularities": granularities}
    told = service.transcribe(file, **ask).json()
    assert shown == told.keys() & {"words", "segments"}


def test_the_deltas_of_a_stream_are_the_transcript(client, plain, long):
    for data, said in [(plain, SEVERAL[0]), (long, " ".join(SEVERAL))]:
        *deltas, done = client.audio.transcriptions.create(
            model="mmrag", file=("a.flac", data), stream=True
        )
        assert {event.type for event in deltas} == {"transcript.text.delta"}
        assert done.type == "transcript.text.done"
        assert "".join(event.delta for event in deltas) == done.text == said
        assert len(deltas) > 3


def test_a_stream_arrives_while_it_is_made(service, clip):
    """The first words of a long file are there well before the last."""
    ask = {"stream": "true"}
    files = {"file": ("a.flac", clip(*SEVERAL * 3))}
    started, arrived = time.monotonic(), []
    with service.request(
        "POST", "/v1/audio/transcriptions", files=files, data=ask, stream=True
    ) as response:
        arrived = [time.monotonic() - started for _ in response.iter_lines()]
    assert arrived[0] < arrived[-1] / 2


def test_a_stream_with_evidence_ends_as_the_whole_answer_does(service, file, datastore):
    ask = {"datastore": datastore(NAME), "include": ["retrieval"]}
    *deltas, done = events(service.transcribe(file, stream="true", **ask))
    whole = service.transcribe(file, **ask).json()
    assert "".join(event["delta"] for event in deltas) == done["text"] == whole["text"] == SENTENCE
    assert done["words"] == whole["words"] and done["missing_shards"] == 0


def test_openais_client_gets_the_log_probability_of_each_token(client, service, long):
    ask = {"model": "whisper-1", "file": ("a.flac", long), "include": ["logprobs"]}
    told = client.audio.transcriptions.create(**ask)
    assert "".join(one.token for one in told.logprobs) == told.text == " ".join(SEVERAL)
    for one in told.logprobs:
        assert one.logprob <= 0 and bytes(map(int, one.bytes)).decode() == one.token
    *deltas, done = client.audio.transcriptions.create(**ask, stream=True)
    assert len(deltas) > 1 and "".join(event.delta for event in deltas) == done.text == told.text
    for event in deltas:
        assert "".join(one.token for one in event.logprobs) == event.delta
    found = [one.logprob for one in told.logprobs]
    assert [one.logprob for one in done.logprobs] == pytest.approx(found, abs=1e-3)
    sent = [one.model_dump() for event in deltas for one in event.logprobs]
    assert sent == [one.model_dump() for one in done.logprobs]


def test_log_probabilities_come_beside_evidence_and_agree_with_it(service, file):
    told = service.transcribe(file, context=[NAME], include=["logprobs", "retrieval"]).json()
    assert told["text"] == SENTENCE and len(told["words"]) == len(SENTENCE.split())
    whole = np.prod([word["probability"] for word in told["words"]])
    assert np.exp(sum(one["logprob"] for one in told["logprobs"])) == pytest.approx(whole, rel=1e-3)


def test_a_stream_with_times_tells_of_each_segment(client, long, duration):
    told = list(
        client.audio.transcriptions.create(
            model="gpt-4o-transcribe",
            file=("a.flac", long),
            stream=True,
            response_format="verbose_json",
            timestamp_granularities=["word", "segment"],
        )
    )
    segments = [event for event in told if event.type == "transcript.text.segment"]
    done = told[-1]
    assert " ".join(event.text for event in segments) == done.text == " ".join(SEVERAL)
    assert [event.id for event in segments] == [str(n) for n in range(len(segments))]
    times = [time for event in segments for time in (event.start, event.end)]
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= duration(long)
    assert told.index(segments[0]) < len(told) - 4, "not only at the end"
    assert [(one["start"], one["end"]) for one in done.segments] == list(
        zip(times[::2], times[1::2], strict=True)
    )
    assert done.usage.output_tokens > 10 < done.usage.input_token_details.audio_tokens
    assert done.languages[0].code == "en" and len(done.words) == len(done.text.split())


@pytest.fixture(scope="module")
def pauses(wave, write):
    """A file with a second and a half of silence around each sentence."""
    quiet = np.zeros(24_000, np.float32)
    return write(np.concatenate([quiet, *(part for s in SEVERAL for part in (wave(s), quiet))]))


@pytest.fixture
def turns_here(service, pauses, write, heard_here):
    """`turns_here(**settings)`: when the parts begin, seconds, and what is said in them, as this
    process cuts the file and hears each part by itself."""

    def cut(**settings):
        parts = list(cutting.turns(pauses, service.settings.decode.max_seconds, **settings))
        heard = [heard_here(write(one.wave.numpy(), "WAV", subtype="FLOAT")) for one in parts]
        return [round(one.start * 100) for one in parts], " ".join(heard)

    return cut


@pytest.mark.parametrize(
    "settings",
    [{}, {"prefix_padding_ms": 700}, {"threshold": 0.9, "prefix_padding_ms": 0}],
)
def test_an_upload_is_cut_where_the_caller_says_that_a_silence_is_long_enough(
    service, pauses, turns_here, settings
):
    settings = {"silence_duration_ms": 500, **settings}
    begun, text = turns_here(**settings)
    assert len(begun) == 3 and begun[0] > 50, "the silence before is in no part"
    fields = {f"chunking_strategy[{name}]": value for name, value in settings.items()}
    asked = {"response_format": "verbose_json", "chunking_strategy[type]": "server_vad", **fields}
    told = service.transcribe(pauses, **asked).json()
    assert told["text"] == text
    assert sorted({one["seek"] for one in told["segments"]}) == begun


def test_openais_client_and_curl_cut_alike(client, service, pauses, turns_here, tmp_path):
    (tmp_path / "a.flac").write_bytes(pauses)
    settings = {"silence_duration_ms": 500, "prefix_padding_ms": 200}
    strategy = {"type": "server_vad", **settings}
    command = ["curl", "-sS", "--fail", "-m", "60", "-F", f"file=@{tmp_path / 'a.flac'}"]
    command += ["-F", f"chunking_strategy={json.dumps(strategy)}", "-F", "include[]=logprobs"]
    command += ["-F", "response_format=verbose_json", f"{service.url}/v1/audio/transcriptions"]
    raw = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    ask = {"model": "whisper-1", "file": tmp_path / "a.flac", "chunking_strategy": strategy}
    told = client.audio.transcriptions.create(**ask, response_format="verbose_json")
    _, text = turns_here(**settings)
    assert told.text == raw["text"] == text
    assert [one.seek for one in told.segments] == [one["seek"] for one in raw["segments"]]
    assert "".join(one["token"] for one in raw["logprobs"]) == raw["text"]
    assert list(client.audio.transcriptions.create(**ask, stream=True))[-1].text == text


@pytest.mark.parametrize("kind", ["text", "srt", "vtt"])
def test_curl_gets_text_and_subtitles(service, plain, kind, tmp_path):
    (tmp_path / "a.flac").write_bytes(plain)
    command = ["curl", "-sS", "--fail", "-m", "60", "-F", f"file=@{tmp_path / 'a.flac'}"]
    command += ["-F", f"response_format={kind}", f"{service.url}/v1/audio/transcriptions"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text, point = SEVERAL[0], "," if kind == "srt" else "."
    if kind == "text":
        assert told == text + "\n"
        return
    times = rf"00:00:00{point}000 --> 00:00:0(\d){point}\d\d\d"
    first = "1\n" if kind == "srt" else "WEBVTT\n\n"
    assert told.startswith(first) and told.endswith(f"\n{text}\n")
    found = [line for line in told.splitlines() if "-->" in line]
    assert len(found) == 1 and re.fullmatch(times, found[0])


@pytest.mark.parametrize("kind", ["json", "text", "srt", "vtt", "verbose_json"])
def test_silence_has_an_empty_transcript(service, write, kind):
    told = service.transcribe(write(np.zeros(5 * 16_000, np.float32)), response_format=kind)
    assert told.status_code == 200
    if "json" in kind:
        assert told.json()["text"] == "" and not told.json().get("segments")
    else:
        assert told.text.strip() in ("", "WEBVTT")


def test_silence_is_streamed_as_an_end_without_a_beginning(service, write):
    silence = write(np.zeros(5 * 16_000, np.float32))
    [done] = events(service.transcribe(silence, stream="true"))
    assert (done["type"], done["text"]) == ("transcript.text.done", "")


def test_noise_is_not_speech(service, write):
    noise = np.random.default_rng(0).normal(0, 0.1, 5 * 16_000).astype(np.float32)
    assert service.text(write(noise)) == ""


@pytest.mark.parametrize("mode", ["both", "knn", "cross_attention", None])
def test_a_phrase_that_comes_along_is_heard(service, file, mode):
    assert service.text(file) != SENTENCE
    given = {} if mode is None else {"retrieval": mode}
    assert service.text(file, context=[NAME], **given) == SENTENCE
    assert service.text(file, context=[NAME], retrieval="none") != SENTENCE
    assert service.text(file) != SENTENCE, "it was for that request alone"


def test_a_prompt_that_lists_names_is_as_good_as_context(client, service, file):
    names = f"mira kapoor, {NAME}; quentin ashdown\ntamsin pryce"
    told = client.audio.transcriptions.create(model="mmrag", file=("a", file), prompt=names)
    assert told.text == SENTENCE
    listed = ["mira kapoor", NAME, "quentin ashdown", "tamsin pryce"]
    assert service.text(file, context=listed) == SENTENCE


def test_openais_client_hands_phrases_over_as_a_list(client, file):
    told = client.audio.transcriptions.create(
        model="mmrag", file=("a", file), extra_body={"context": [NAME, "mira kapoor"]}
    )
    assert told.text == SENTENCE


def test_a_prompt_in_prose_is_no_list_of_names(service, file):
    prose = f"somebody who wants to be called back and speaks of {NAME} in this recording"
    assert service.text(file, prompt=prose) != SENTENCE


def test_words_say_which_document_spoke_for_them(service, file, datastore, duration):
    name = datastore(NAME, "imogen varga")
    told = service.transcribe(file, datastore=name, include=["retrieval"]).json()
    assert told["text"] == SENTENCE and told["missing_shards"] == 0
    words = {word["word"]: word for word in told["words"]}
    for part in NAME.split():
        word = words[part]
        assert word["changed"] and word["probability"] > word["lm_probability"]
        assert word["source"]["document"] == NAME and part in word["source"]["text"]
    assert not words["please"]["changed"]
    times = [time for word in told["words"] for time in (word["start"], word["end"])]
    assert all(a <= b for a, b in pairwise(times)) and 0 <= times[0] <= times[-1]
    assert times[-1] <= duration(file)


def test_what_sounds_like_no_sentence_is_marked_as_unclear_and_a_sentence_is_not(
    service, plain, wave, write
):
    told = service.transcribe(plain, response_format="verbose_json").json()
    assert all(one["confidence"] > 0.7 and not one["unclear"] for one in told["segments"])
    backwards = write(wave(SEVERAL[0])[::-1].copy(), "WAV")
    strange = service.transcribe(
        backwards, response_format="verbose_json", include=["retrieval"]
    ).json()
    assert strange["text"] and strange["segments"]
    assert all(one["confidence"] < 0.7 and one["unclear"] for one in strange["segments"])
    assert all(word["unclear"] and word["confidence"] < 1 for word in strange["words"])


def test_evidence_is_only_given_to_who_asks(service, file, datastore):
    told = service.transcribe(file, datastore=datastore(NAME)).json()
    assert set(told) == {"text", "usage", "languages"}


def test_temperature_zero_says_the_same_every_time_and_one_may_not(service, plain, file):
    assert {service.text(plain, temperature=0) for _ in range(3)} == {SEVERAL[0]}
    assert len({service.text(file, temperature=1) for _ in range(5)}) > 1


def test_the_models_name_and_language_may_be_given(service, plain):
    assert service.text(plain, model="mmrag", language="en") == SEVERAL[0]
    assert service.text(plain, model="", language="EN") == SEVERAL[0]


def test_openais_client_raises_its_own_errors(client, file):
    ask = client.audio.transcriptions.create
    with pytest.raises(openai.NotFoundError, match="no model 'whisper-2'") as missing:
        ask(model="whisper-2", file=("a", file))
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="cannot be read as audio") as unreadable:
        ask(model="mmrag", file=("a", b"not audio at all"))
    assert (unreadable.value.code, unreadable.value.param) == ("unreadable_audio", "file")
    with pytest.raises(openai.UnprocessableEntityError, match="temperature"):
        ask(model="mmrag", file=("a", file), temperature=3)
    with pytest.raises(openai.NotFoundError, match="no datastore 'nowhere'"):
        ask(model="mmrag", file=("a", file), extra_body={"datastore": "nowhere"})


def test_a_stream_that_cannot_begin_is_refused_with_a_status(service, client, file, refused):
    for asked, status, code, param in [
        ({"datastore": "nowhere"}, 404, "datastore_not_found", "datastore"),
        ({"retrieval": "knn"}, 400, None, "retrieval"),
        ({"context": ["!"]}, 400, None, "context[]"),
    ]:
        refused(service.transcribe(file, stream="true", **asked), status, code, param)
    with pytest.raises(openai.NotFoundError):
        client.audio.transcriptions.create(
            model="mmrag", file=("a", file), stream=True, extra_body={"datastore": "nowhere"}
        )


@pytest.mark.parametrize(
    ("asked", "status", "code", "param"),
    [
        ({"model": "whisper-2"}, 404, "model_not_found", "model"),
        ({"language": "xx"}, 400, "unsupported_language", "language"),
        ({"temperature": "2"}, 422, "less_than_equal", "temperature"),
        ({"temperature": "nan"}, 422, "less_than_equal", "temperature"),
        ({"temperature": "warm"}, 422, "float_parsing", "temperature"),
        ({"response_format": "xml"}, 422, "literal_error", "response_format"),
        ({"stream": "perhaps"}, 422, "bool_parsing", "stream"),
        ({"retrieval": "magic"}, 422, "literal_error", "retrieval"),
        ({"retrieval": "knn"}, 400, None, "retrieval"),
        ({"datastore": "nowhere"}, 404, "datastore_not_found", "datastore"),
        ({"datastore": "../etc"}, 422, "string_pattern_mismatch", "datastore"),
        ({"context": ["..."]}, 400, None, "context[]"),
        ({"context": ["a" * 501]}, 400, None, "context[]"),
        ({"context": [f"name {n}" for n in range(501)]}, 400, None, "context[]"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_name(
    service, file, refused, asked, status, code, param
):
    refused(service.transcribe(file, **asked), status, code, param)


def test_a_datastore_and_phrases_are_listened_for_together(service, file, clip, datastore):
    both = {"datastore": datastore(NAME), "context": ["imogen varga"], "include": ["retrieval"]}
    for data, sentence, name in [
        (file, SENTENCE, NAME),
        (clip("is imogen varga free on friday"), "is imogen varga free on friday", "imogen varga"),
    ]:
        told = service.transcribe(data, **both).json()
        assert told["text"] == sentence
        documents = {word["source"]["document"] for word in told["words"] if word["changed"]}
        assert documents == {name}


@pytest.mark.parametrize("phrase", ["a\0b", "\x1b[2J", "日本語", "😀 smile", "123", "é" * 40, "­a"])
def test_no_phrase_is_too_strange_to_listen_for(service, file, phrase):
    response = service.transcribe(file, context=[phrase])
    assert response.status_code in (200, 400), response.text


def test_a_form_without_a_file_says_so(service, refused):
    path = "/v1/audio/transcriptions"
    unknown = service.request("POST", path, files={"other": ("a", b"1")})
    refused(unknown, 400, "unknown", "other")
    missing = service.request("POST", path, files={"model": (None, "mmrag")})
    assert "required" in refused(missing, 422, "missing", "file").lower()
    as_text = service.request("POST", path, files={"file": (None, "a text")})
    refused(as_text, 422, "value_error", "file")


def lying(data, size):
    """A WAV file whose header states another size than it has."""
    stated = struct.pack("<I", size)
    return data[:4] + stated + data[8:40] + stated + data[44:]


def test_audio_that_cannot_be_read_is_refused_with_the_reason(service, file, wave, write, refused):
    wav = write(wave(SENTENCE), "WAV")
    silence = np.zeros(100, np.float32)
    nothing = write(np.full(16_000, np.nan, np.float32), "WAV", subtype="FLOAT")
    for data, reason in [
        (b"", "empty"),
        (b"to whom it may concern", "cannot be read as audio"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "cannot be read as audio"),
        (file[: len(file) // 2], "breaks off after"),
        (wav[:44], "holds no samples"),
        (write(silence), "shorter than"),
        (nothing, "NaN or infinite"),
    ]:
        message = refused(service.transcribe(data), 400, "unreadable_audio", "file")
        assert reason in message and message.startswith("uploaded audio")


def test_what_browsers_phones_and_pipes_send_is_heard(service, wave, write):
    said = wave(SEVERAL[0])
    wav = write(said, "WAV")
    wide = np.interp(np.arange(3 * len(said)) / 3, np.arange(len(said)), said)
    webm = coded(wide, 48_000, "webm", "libopus", pipe=True)
    mp3 = write(said, "MP3")
    for data in (
        webm,
        coded(said, 16_000, "ipod", "aac"),
        coded(said, 16_000, "mp3", "libmp3lame", write_xing="0"),
        bytes(200_000) + mp3,
        lying(wav, 0),
        lying(wav, 2**31),
        lying(wav, 2**32 - 1),
    ):
        heard = service.transcribe(data, response_format="verbose_json").json()
        assert heard["text"] == SEVERAL[0]
        assert heard["duration"] == pytest.approx(len(said) / 16_000, abs=0.15)


def test_an_mp3_of_hours_is_refused_without_being_decoded_to_its_end(service, refused):
    minute = coded(np.zeros(60 * 8_000), 8_000, "mp3", "libmp3lame", bit_rate=8_000)
    started = time.monotonic()
    message = refused(service.transcribe(minute * 31), 413, "too_long", "file")
    assert "at most 1800 s" in message
    assert time.monotonic() - started < 30


def test_audio_that_breaks_off_in_the_middle_breaks_off_the_stream(service, long):
    *_, last = events(service.transcribe(long[: 3 * len(long) // 4], stream="true"))
    assert last["error"]["code"] == "unreadable_audio"


def test_a_small_file_that_unpacks_to_hours_is_refused_before_any_of_it_is(
    write, refused, monkeypatch
):
    """By an ingress in this process, where what is unpacked can be counted."""
    hours, minute = (write(np.zeros(n * 60 * 1000, np.float32), rate=1000) for n in (240, 1))
    asked, unpacked = client(made(upload_mb=2)), []
    read = soundfile.SoundFile.read

    def noting(self, *arguments, **named):
        unpacked.append(read(self, *arguments, **named))
        return unpacked[-1]

    monkeypatch.setattr(soundfile.SoundFile, "read", noting)
    answer = asked.post(TRANSCRIBE, files={"file": ("a.flac", hours)})
    message = refused(answer, 413, "too_long", "file")
    assert message.startswith("14400 s of audio, at most 1800 s")
    assert not unpacked
    assert asked.post(TRANSCRIBE, files={"file": ("a.flac", minute)}).status_code == 200
    assert sum(map(len, unpacked)) == 60 * 1000


def test_many_channels_at_a_high_rate_are_refused_at_once(service, write, refused):
    wide = write(np.zeros((20_000, 32), np.float32), "WAV", rate=384_000)
    message = refused(service.transcribe(wide), 400, "unreadable_audio", "file")
    assert "12288000 samples a second" in message


def test_a_flac_that_promises_hours_and_holds_a_second_is_refused(service, wave, write, refused):
    flac = bytearray(write(wave(SENTENCE)))
    flac[21] = flac[21] & 0xF0 | 0x0F  # the upper 4 of the 36 bits that count its samples
    refused(service.transcribe(bytes(flac)), 413, "too_long", "file")
    flac[21:26] = bytes([flac[21] & 0xF0, *(16_000 * 600).to_bytes(4, "big")])
    refused(service.transcribe(bytes(flac)), 400, "unreadable_audio", "file")
