"""Recordings in a bucket become units as those in a directory do, by models in a bucket."""

from dataclasses import replace

import pytest
from objects import empty, failing
from tones import encoded, tone

from cluster.parts import Part
from cluster.rejections import read_rejections
from cluster.tokenizing import EncodeUnits
from mmrag import artifact, shipped
from mmrag.records import Utterance
from mmrag.speech import tokenized
from mmrag.storage import StorageError, Url


@pytest.fixture
def bucket() -> Url:
    return empty("bucket")


@pytest.fixture
def part(bucket, tmp_path) -> Part[Utterance]:
    said = []
    for number in range(3):
        content = encoded(tone(1.0 + number), format="FLAC")
        (bucket / f"{number}.flac").write_bytes(content)
        (tmp_path / f"{number}.flac").write_bytes(content)
        said.append(Utterance(str(number), "a word", bucket / f"{number}.flac"))
    return Part("part-00000", said)


def encoder(models, experiment, directory) -> EncodeUnits:
    directory.mkdir()
    return EncodeUnits(models / "hubert", models / "codebook", experiment.tokenize, directory)


def read(directory) -> list[tuple[str, bytes]]:
    found = tokenized.read(directory)
    return [(one.utterance.id, one.units.ids.tobytes()) for one in found]


def test_they_are_the_units_of_the_same_files(bucket, part, experiment, tmp_path):
    for kind in ("hubert", "codebook"):
        artifact.adopt(shipped.find(shipped.TINY) / kind, bucket / "tiny" / kind, kind)
    encoder(bucket / "tiny", experiment, tmp_path / "there")(part)
    local = [replace(one, audio=tmp_path / one.audio.name) for one in part.work]
    here = encoder(shipped.find(shipped.TINY), experiment, tmp_path / "here")
    here(replace(part, work=local))
    assert read(tmp_path / "there") == read(tmp_path / "here")
    assert len(read(tmp_path / "here")) == 3


def test_what_is_missing_is_listed_and_an_outage_stops_the_part(
    bucket, part, experiment, tmp_path, monkeypatch
):
    encode = encoder(shipped.find(shipped.TINY), experiment, tmp_path / "units")
    (bucket / "1.flac").unlink()
    encode(part)
    [rejected] = read_rejections(tmp_path / "units/.part-00000.rejected.jsonl")
    assert (rejected.source, rejected.reason) == (
        "memory://bucket/1.flac",
        "memory://bucket/1.flac: no such object",
    )
    assert [name for name, _ in read(tmp_path / "units")] == ["0", "2"]
    failing(bucket, monkeypatch, ConnectionError("reset"), lambda call: True)
    with pytest.raises(StorageError, match="does not answer"):
        encode(Part("part-00001", part.work))
    assert not (tmp_path / "units/part-00001.parquet").exists()
