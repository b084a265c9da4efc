"""A recording at a URL is heard as the same file is, and says what is wrong with it alone."""

import json

import numpy as np
import pytest
import torch
from objects import empty, failing
from tones import encoded, tone

from mmrag import storage
from mmrag.corpora import manifest
from mmrag.records import Rejection, Utterance
from mmrag.speech import audio
from mmrag.speech.audio import AudioError, Span
from mmrag.storage import StorageError, Url


@pytest.fixture(autouse=True)
def bucket(monkeypatch) -> Url:
    monkeypatch.setattr(storage, "BLOCK_BYTES", 2**14)
    return empty("corpus")


FORMATS = [{"format": "WAV"}, {"format": "FLAC"}, {"format": "MP3"}, {"format": "OGG"}]


@pytest.mark.parametrize("how", FORMATS, ids=lambda how: how["format"])
def test_a_recording_at_a_url_is_the_recording_in_a_file(bucket, tmp_path, how):
    content = encoded(tone(3.0, rate=22_050, channels=2), 22_050, **how)
    (bucket / "a.audio").write_bytes(content)
    (tmp_path / "a.audio").write_bytes(content)
    for span in (Span(), Span(1.0, 0.5)):
        there, here = (audio.read(at / "a.audio", span) for at in (bucket, tmp_path))
        assert torch.equal(there, here)
    assert audio.duration(bucket / "a.audio") == audio.duration(tmp_path / "a.audio")


def test_of_a_long_recording_only_what_is_wanted_is_fetched(bucket, monkeypatch):
    content = encoded(tone(200.0))
    (bucket / "long.wav").write_bytes(content)
    store, asked = storage._filesystem(bucket), []
    whole = type(store).cat_file

    def cat_file(path: str, start: int, end: int) -> bytes:
        asked.append(end - start)
        return whole(store, path, start, end)

    monkeypatch.setattr(store, "cat_file", cat_file)
    audio.read(bucket / "long.wav", Span(150.0, 0.5))
    assert sum(asked) < 0.3 * len(content)


def test_what_is_missing_refused_or_empty_is_an_error_of_the_recording(bucket, monkeypatch):
    with pytest.raises(AudioError, match=r"memory://corpus/a\.wav: no such object"):
        audio.read(bucket / "a.wav")
    (bucket / "a.wav").write_bytes(b"")
    with pytest.raises(AudioError, match="the file is empty"):
        audio.read(bucket / "a.wav")
    (bucket / "a.wav").write_bytes(encoded(tone(3.0)))
    failing(bucket, monkeypatch, PermissionError("AccessDenied"), lambda call: True)
    with pytest.raises(AudioError, match="access is refused"):
        audio.read(bucket / "a.wav")


@pytest.mark.parametrize("how", FORMATS, ids=lambda how: how["format"])
@pytest.mark.parametrize("answers", [0, 1, 2])
def test_a_storage_that_goes_away_is_no_fault_of_the_recording(bucket, monkeypatch, how, answers):
    noise = np.random.default_rng(0).standard_normal((160_000, 1)).astype(np.float32) / 9
    (bucket / "a.audio").write_bytes(encoded(noise, **how))
    error = ConnectionError("reset by peer")
    failing(bucket, monkeypatch, error, lambda call: call >= answers)
    with pytest.raises(StorageError, match="does not answer: ConnectionError: reset by peer"):
        audio.read(bucket / "a.audio")


def test_audio_below_a_url_is_found_and_a_name_that_climbs_is_rejected(bucket):
    for name in ("b.wav", "a/c.FLAC", "a/notes.txt", "a/.hidden.wav"):
        (bucket / name).write_bytes(b"content")
    store = storage._filesystem(bucket).store
    store["/corpus/x/../../y.wav"] = store["/corpus/b.wav"]
    found, rejected = audio.find(bucket)
    assert found == [bucket / "a/c.FLAC", bucket / "b.wav"]
    assert rejected == [
        Rejection("memory://corpus/'x/../../y.wav'", "its name could not be a file's: rename it")
    ]
    with pytest.raises(AudioError, match="no such directory"):
        audio.find(bucket / "nothing")
    (bucket / "texts/a.txt").write_bytes(b"content")
    with pytest.raises(AudioError, match="holds no audio file"):
        audio.find(bucket / "texts")


def test_a_manifest_at_a_url_names_what_lies_beside_it_or_at_another_url(bucket):
    rows = [
        {"audio_filepath": "audio/a.wav", "text": "one"},
        {"audio_filepath": "memory://elsewhere/b.wav", "text": "two", "offset": 1.5},
        {"text": "three"},
        {"audio_filepath": "/etc/passwd", "text": "four"},
        {"audio_filepath": "file:///etc/passwd", "text": "five"},
        {"audio_filepath": "../others/a.wav", "text": "six"},
    ]
    (bucket / "dev.jsonl").write_bytes("\n".join(map(json.dumps, rows)).encode())
    read = list(manifest.read(bucket / "dev.jsonl"))
    heard = [one for one in read if isinstance(one, Utterance)]
    assert [one.audio for one in heard] == [
        bucket / "audio/a.wav",
        Url("memory://elsewhere/b.wav"),
        None,
    ]
    assert [one.id for one in heard] == ["audio/a", "memory://elsewhere/b@1.5", "line-3"]
    assert [one.source for one in read if isinstance(one, Rejection)] == [
        f"memory://corpus/dev.jsonl:{number}" for number in (4, 5, 6)
    ]


def test_a_signature_is_no_part_of_an_utterances_name(tmp_path):
    row = {"audio_filepath": "https://host/a/b.wav?X-Amz-Signature=abc", "text": "one"}
    (tmp_path / "dev.jsonl").write_text(json.dumps(row))
    [read] = manifest.read(tmp_path / "dev.jsonl")
    assert (read.id, read.document) == ("https://host/a/b",) * 2
    assert str(read.audio) == "https://host/a/b.wav" and "abc" in read.audio.text


def test_a_local_manifest_may_name_urls_and_is_written_so(bucket, tmp_path):
    said = [Utterance("a", "one", bucket / "a.wav"), Utterance("b", "two", tmp_path / "b.wav")]
    manifest.write(tmp_path / "dev.jsonl", said)
    assert [one.audio for one in manifest.read(tmp_path / "dev.jsonl")] == [
        one.audio for one in said
    ]


def test_a_manifest_that_breaks_off_is_no_shorter_manifest(bucket, monkeypatch):
    lines = "".join(json.dumps({"text": f"sentence {n}"}) + "\n" for n in range(2000))
    (bucket / "dev.jsonl").write_bytes(lines.encode())
    failing(bucket, monkeypatch, ConnectionError("reset"), lambda call: call == 2)
    with pytest.raises(StorageError, match=r"dev\.jsonl: the storage does not answer"):
        list(manifest.read(bucket / "dev.jsonl"))
