"""Against a server of S3's own protocol: corpora, models and artifacts at `s3://`."""

import json

import pytest
import requests
import torch
from s3 import serving
from tones import encoded, tone

from mmrag import artifact, cached, shipped, storage
from mmrag.artifact import ArtifactError
from mmrag.corpora import manifest
from mmrag.recogniser import outline
from mmrag.speech import audio
from mmrag.speech.audio import AudioError
from mmrag.storage import StorageError

KINDS = ("hubert", "codebook", "lm")


@pytest.fixture(scope="module")
def bucket():
    with serving("bucket") as served:
        yield served


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(cached.CACHE, str(tmp_path / "cache"))


def test_an_object_has_the_ways_of_a_file(bucket):
    made = bucket / "ways/a b+c.txt"
    assert not made.exists() and not made.parent.is_dir()
    made.write_bytes(b"content")
    assert made.is_file() and made.parent.is_dir() and made.read_bytes() == b"content"
    with made.open() as stream:
        assert (stream.seek(3), stream.read()) == (3, b"tent")
    assert made.parent.listing() == ({"a b+c.txt": 7}, [])
    made.unlink()
    made.unlink(missing_ok=True)
    assert not made.exists()


def test_a_name_that_climbs_is_told_and_never_followed(bucket, tmp_path):
    client = storage._filesystem(bucket)
    client.pipe_file("bucket/climbing/x/../../../up.wav", b"content")
    assert (bucket / "climbing").listing() == ({}, ["x/../../../up.wav"])
    with pytest.raises(StorageError, match="could be no file here"):
        cached.copy(bucket / "climbing", "climbing", lambda directory: None)


def test_a_corpus_is_heard_and_what_is_missing_is_told_of_the_one_recording(bucket, tmp_path):
    sound = encoded(tone(2.0), format="FLAC")
    (bucket / "corpus/audio/a.flac").write_bytes(sound)
    (bucket / "others/b.flac").write_bytes(sound)
    (tmp_path / "a.flac").write_bytes(sound)
    rows = [
        {"audio_filepath": "audio/a.flac", "text": "one"},
        {"audio_filepath": f"{bucket}/others/b.flac", "text": "two", "offset": 0.5},
        {"audio_filepath": "audio/missing.flac", "text": "three"},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (bucket / "corpus/dev.jsonl").write_bytes(lines.encode())
    one, two, missing = manifest.read(f"{bucket}/corpus/dev.jsonl")
    here = audio.read(tmp_path / "a.flac")
    assert torch.equal(audio.read(one.audio, audio.span_of(one)), here)
    assert torch.equal(audio.read(two.audio, audio.span_of(two)), here[8000:])
    with pytest.raises(AudioError, match=r"missing\.flac: no such object"):
        audio.read(missing.audio)
    assert audio.find(bucket / "corpus")[0] == [one.audio]


def test_models_at_a_url_are_the_models_that_were_put_there(bucket, tmp_path, monkeypatch):
    for kind in KINDS:
        artifact.adopt(shipped.find(shipped.TINY) / kind, bucket / "models/tiny" / kind, kind)
    there, here = outline(f"{bucket}/models/tiny"), outline(shipped.TINY)
    assert there.fingerprints == {kind: here.fingerprints[kind] for kind in KINDS}
    (bucket / "models/tiny/codebook/centroids.npy").write_bytes(b"something else")
    monkeypatch.setenv(cached.CACHE, str(tmp_path / "another"))
    with pytest.raises(ArtifactError, match="models/tiny/codebook is damaged"):
        _ = artifact.load(bucket / "models/tiny/codebook", "codebook").path


def test_a_large_file_comes_back_as_it_went(bucket, tmp_path, monkeypatch):
    """In several parts, and as more than one block."""
    content = torch.arange(3_000_000, dtype=torch.int32).numpy().tobytes()
    with artifact.create(bucket / "runs/large", "thing", {}, {}) as draft:
        (draft.path / "data.bin").write_bytes(content)
    monkeypatch.setenv(cached.CACHE, str(tmp_path / "another"))
    made = artifact.load(bucket / "runs/large", "thing")
    assert (made.path / "data.bin").read_bytes() == content
    with (bucket / "runs/large/data.bin").open() as stream:
        assert stream.read() == content


def test_credentials_that_are_not_accepted_are_no_fault_of_an_object(bucket, monkeypatch):
    (bucket / "a.wav").write_bytes(encoded(tone(2.0)))
    store = storage._filesystem(bucket)
    address = store.s3.meta.endpoint_url
    requests.post(f"{address}/moto-api/reset-auth", data=b"0", timeout=10)
    try:
        with pytest.raises(StorageError, match="the credentials are not accepted") as refused:
            audio.read(bucket / "a.wav")
    finally:
        requests.post(f"{address}/moto-api/reset-auth", data=b"999999999", timeout=10)
    assert "secret" not in str(refused.value)
