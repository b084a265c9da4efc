import io
import socket
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from datasets import Audio, Dataset, DatasetDict, Features, Value

from mmrag.corpora import huggingface
from mmrag.corpora.splits import CorpusError
from mmrag.records import Rejection, Utterance
from mmrag.speech import audio

FEATURES = Features({"id": Value("string"), "audio": Audio(), "sentence": Value("string")})


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Whatever asks the network for an address fails."""

    def refuse(*asked: object, **how: object) -> None:
        raise AssertionError(f"network: {asked}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def clip(seconds: float, kind: str = "WAV") -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, np.zeros(round(seconds * 16_000)), 16_000, format=kind)
    return stream.getvalue()


def row(id: str, text: str | None, data: bytes | None, path: str | None = None) -> dict:
    return {"id": id, "audio": {"bytes": data, "path": path}, "sentence": text}


ROWS = [
    row("a", "call mary", clip(1.0), "a.wav"),
    row("b", "and john", clip(0.5, "FLAC")),
    row("b", "and john again", clip(0.25), "../../b.exe"),
    {"id": "c", "audio": None, "sentence": "never spoken"},
    row("d", None, None, "https://example.org/d.wav"),
    row("e", None, None, "outside.wav"),
]


def parquet(path: Path, rows: list[dict] = ROWS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=FEATURES.arrow_schema), path)


def check(found: list, directory: Path, unpacked: Path) -> None:
    """What comes of ROWS."""
    said = {one.id: one for one in found if isinstance(one, Utterance)}
    assert list(said) == ["a", "b", "b#2", "c", "e"]
    assert [one.text for one in said.values()] == [
        *("call mary", "and john", "and john again", "never spoken", None)
    ]
    lengths = {id: audio.duration(one.audio) for id, one in said.items() if one.audio}
    assert lengths == {"a": 1.0, "b": 0.5, "b#2": 0.25, "e": 2.0}
    assert said["c"].audio is None and said["e"].audio == directory / "outside.wav"
    assert all(said[id].audio.is_relative_to(unpacked) for id in ("a", "b", "b#2"))
    [rejected] = [one for one in found if isinstance(one, Rejection)]
    assert "row 4" in rejected.source
    assert rejected.reason == "its audio is no file here: https://example.org/d.wav"


@pytest.mark.parametrize("file", ["data/train-00000-of-00001.parquet", "train/0000.parquet"])
def test_audio_in_parquet_is_unpacked_into_files(tmp_path, file):
    directory, unpacked = tmp_path / "dataset", tmp_path / "sources"
    parquet(directory / file)
    (directory / "outside.wav").write_bytes(clip(2.0))
    corpus = huggingface.read(directory, unpacked)
    assert list(corpus.splits) == ["lm"]
    check(list(corpus.splits["lm"]), directory, unpacked)


def test_a_dataset_that_was_saved_to_disk_is_read_with_and_without_splits(tmp_path):
    table = Dataset(pa.Table.from_pylist(ROWS[:4], schema=FEATURES.arrow_schema))
    table.save_to_disk(tmp_path / "one")
    DatasetDict({"validation": table, "train": table}).save_to_disk(tmp_path / "splits")
    for name, splits in (("one", ["all"]), ("splits", ["lm", "dev"])):
        corpus = huggingface.read(tmp_path / name, tmp_path / "sources")
        assert list(corpus.splits) == splits
        for rows in map(list, corpus.splits.values()):
            assert [one.id for one in rows] == ["a", "b", "b#2", "c"]
            assert [audio.duration(one.audio) for one in rows if one.audio] == [1.0, 0.5, 0.25]


def test_a_plain_table_of_bytes_is_read_too(tmp_path):
    plain = [{"audio": clip(1.0), "text": "hello", "speaker_id": 7}]
    pq.write_table(pa.Table.from_pylist(plain), tmp_path / "mine.parquet")
    [said] = huggingface.read(tmp_path, tmp_path / "sources").splits["all"]
    assert (said.text, said.speaker, said.id) == ("hello", "7", "mine-00000000")
    assert audio.duration(said.audio) == 1.0


def test_a_dataset_is_unpacked_once(tmp_path, monkeypatch):
    directory, unpacked = tmp_path / "dataset", tmp_path / "sources"
    parquet(directory / "train.parquet")
    (directory / "outside.wav").write_bytes(clip(2.0))
    huggingface.read(directory, unpacked)
    monkeypatch.setattr(huggingface, "_open", None)
    check(list(huggingface.read(directory, unpacked).splits["lm"]), directory, unpacked)


def test_a_stopped_unpacking_goes_on_and_leaves_nothing_half(tmp_path, monkeypatch):
    directory, unpacked = tmp_path / "dataset", tmp_path / "sources"
    parquet(directory / "train.parquet")
    (directory / "outside.wav").write_bytes(clip(2.0))
    whole, stops = huggingface._audio, []

    def stop_at_the_second(value, directory, into, number):
        if number == 1 and not stops:
            stops.append(number)
            raise KeyboardInterrupt
        return whole(value, directory, into, number)

    monkeypatch.setattr(huggingface, "_audio", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        huggingface.read(directory, unpacked)
    [first] = unpacked.rglob("00000000.wav")
    before = first.stat().st_mtime_ns
    check(list(huggingface.read(directory, unpacked).splits["lm"]), directory, unpacked)
    [first] = unpacked.rglob("00000000.wav")
    assert first.stat().st_mtime_ns == before
    assert not list(unpacked.rglob("*.partial"))


def test_what_is_no_dataset_is_an_error(tmp_path):
    with pytest.raises(CorpusError, match=r"neither a dataset that was saved to disk"):
        huggingface.read(tmp_path, tmp_path / "sources")
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(CorpusError, match=str(tmp_path)):
        huggingface.read(tmp_path, tmp_path / "sources")


def test_a_table_without_audio_or_text_names_its_columns(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"label": 1, "score": 2}]), tmp_path / "test.parquet")
    with pytest.raises(CorpusError, match="neither audio nor text among its columns: label, score"):
        huggingface.read(tmp_path, tmp_path / "sources")


def test_without_datasets_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install mmrag\[corpora\]"):
        huggingface.read(tmp_path, tmp_path / "sources")
