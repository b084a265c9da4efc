import json

import pytest

from mmrag.artifact import ArtifactError
from mmrag.corpora import sources
from mmrag.corpora.splits import CorpusError

ROW = "61-70968-0000\ta harangue\t{rare}\t{rare}\n"


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "test-clean.biasing_100.tsv"
    path.write_text(ROW.format(rare=json.dumps(["harangue"])) + "broken\n")
    return path


def test_a_source_with_the_name_of_a_reader_is_read_by_it(table, tmp_path):
    assert sources.named(f"librispeech_biasing:{table}")
    found = sources.read(f"librispeech_biasing:{table}:{tmp_path}", tmp_path / "sources")
    said, rejected = found.splits["test"]
    assert [said, rejected] == list(found.splits["test"]), "it is read again"
    assert said.audio == tmp_path / "61" / "70968" / "61-70968-0000.flac"
    assert rejected.source == f"{table}:2"
    assert found.phrases == {"61-70968-0000": ["harangue"]}


def test_a_path_without_a_readers_name_is_none_of_ours(tmp_path, monkeypatch):
    assert not sources.named(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lhoste:cuts.jsonl").touch()
    assert not sources.named("lhoste:cuts.jsonl")


def test_a_reader_that_there_is_not_is_named_with_those_there_are():
    with pytest.raises(CorpusError, match="no reader 'lhoste', there are lhotse, huggingface"):
        sources.named("lhoste:cuts.jsonl")


def test_the_fingerprint_follows_the_files_that_were_named(table, tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()

    def fingerprint() -> str:
        named = f"librispeech_biasing:{tmp_path}/*.tsv:{tree}"
        return sources.read(named, tmp_path / "sources").artifact.fingerprint

    first = fingerprint()
    assert fingerprint() == first
    (tree / "61.flac").write_bytes(b"x")
    second = fingerprint()
    table.write_text(ROW.format(rare="[]"))
    assert len({first, second, fingerprint()}) == 3


@pytest.mark.parametrize("reader", ["lhotse", "huggingface", "slue_voxpopuli", "spoken_squad"])
def test_a_path_that_is_not_there_is_named(tmp_path, reader):
    with pytest.raises(ArtifactError, match=f"no such file or directory: {tmp_path}/gone"):
        sources.read(f"{reader}:{tmp_path}/gone", tmp_path / "sources")
    with pytest.raises(CorpusError, match="names no path"):
        sources.read(f"{reader}:", tmp_path / "sources")


def test_a_directory_of_audio_that_is_not_there_is_named(table, tmp_path):
    with pytest.raises(CorpusError, match=f"no directory of audio {tmp_path}/gone"):
        sources.read(f"librispeech_biasing:{table}:{tmp_path}/gone", tmp_path / "sources")
