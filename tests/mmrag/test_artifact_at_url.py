"""An artifact at a URL is whole or not there, and is read through one checked copy a machine."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from objects import empty, failing

from mmrag import artifact, cached, storage
from mmrag.artifact import Artifact, ArtifactError
from mmrag.storage import StorageError, Url

CONFIG = {"units": 100}


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch) -> Url:
    monkeypatch.setenv(cached.CACHE, str(tmp_path / "cache"))
    return empty("runs")


def make(place: Url | Path, text: str = "contents", config=CONFIG, **how) -> Artifact:
    with artifact.create(place, "thing", config, {}, **how) as draft:
        (draft.path / "deep").mkdir(exist_ok=True)
        (draft.path / "deep/data.txt").write_text(text)
        (draft.path / ".scratch").write_text("scratch")
        draft.summary["letters"] = len(text)
    return artifact.load(place, "thing")


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cached.CACHE, str(tmp_path / "another"))


def test_it_is_what_it_would_be_in_a_directory(runs, tmp_path, monkeypatch):
    there, here = make(runs / "a"), make(tmp_path / "a")
    assert there.place == runs / "a" and there.fingerprint == here.fingerprint
    assert there.summary == here.summary == {"letters": 8}
    assert runs.listing()[0].keys() == {"a/artifact.json", "a/deep/data.txt"}
    another_machine(tmp_path, monkeypatch)
    assert (there.path / "deep/data.txt").read_text() == "contents" and there.path.name == "a"


def test_who_made_it_has_the_copy_already(runs, monkeypatch):
    made = make(runs / "a")
    monkeypatch.setattr(cached, "download", None)
    assert (made.path / "deep/data.txt").exists()


def test_only_the_description_is_read_until_the_files_are_needed(runs, tmp_path, monkeypatch):
    make(runs / "a")
    another_machine(tmp_path, monkeypatch)
    monkeypatch.setattr(cached, "download", None)
    assert artifact.load(str(runs / "a"), "thing").summary == {"letters": 8}


def test_half_an_upload_is_no_artifact_and_goes_on_without_making_it_again(runs, monkeypatch):
    store = storage._filesystem(runs)
    with monkeypatch.context() as patch:
        patch.setattr(store, "put_file", _raise)
        with pytest.raises(StorageError):
            make(runs / "a")
    with pytest.raises(ArtifactError, match="not a finished thing"):
        artifact.load(runs / "a", "thing")
    assert artifact.finished(runs / "a", "thing", CONFIG, {}).summary == {"letters": 8}
    assert artifact.load(runs / "a", "thing").path.exists()


def _raise(*_: object) -> None:
    raise ConnectionError("reset")


def test_the_description_comes_last_and_goes_first(runs, monkeypatch):
    make(runs / "a")
    order, upload = [], artifact.upload

    def watched(directory: Path, names: list[str], url: Url) -> None:
        order.append((url / artifact.FILE).exists())
        upload(directory, names, url)

    monkeypatch.setattr(artifact, "upload", watched)
    make(runs / "a", "other", force=True)
    assert order == [False] and artifact.load(runs / "a", "thing").summary == {"letters": 5}


def test_what_another_one_had_is_gone(runs):
    with artifact.create(runs / "a", "thing", CONFIG, {}) as draft:
        (draft.path / "old.txt").write_text("old")
    make(runs / "a", force=True)
    assert (runs / "a").listing()[0].keys() == {"artifact.json", "deep/data.txt"}


def test_a_killed_stage_finds_its_draft_again(runs):
    with suppress(Killed), artifact.create(runs / "a", "thing", CONFIG, {}) as draft:
        (draft.path / "part.txt").write_text("half")
        raise Killed
    assert not (runs / "a").exists()
    assert artifact.resumable(runs / "a", "thing", CONFIG, {})
    with pytest.raises(ArtifactError, match="units was 100 and is now 7"):
        artifact.resumable(runs / "a", "thing", {"units": 7}, {})
    with artifact.create(runs / "a", "thing", CONFIG, {}) as draft:
        assert draft.resumed and (draft.path / "part.txt").read_text() == "half"
    assert not artifact.resumable(runs / "a", "thing", CONFIG, {})


def test_another_configuration_is_refused(runs):
    make(runs / "a")
    with pytest.raises(ArtifactError, match="memory://runs/a was made from something else"):
        artifact.finished(runs / "a", "thing", {"units": 7}, {})
    assert artifact.finished(runs / "b", "thing", CONFIG, {}) is None


@pytest.mark.parametrize("how", [{}, {"logs": ("log",)}, {"bulk": ("audio/",)}])
def test_a_copy_that_is_not_what_was_made_is_refused(runs, tmp_path, monkeypatch, how):
    with artifact.create(runs / "a", "thing", CONFIG, {}, **how) as draft:
        (draft.path / "data.txt").write_text("contents")
        (draft.path / "log.jsonl").write_text("log")
    made = artifact.load(runs / "a", "thing")
    another_machine(tmp_path, monkeypatch)
    assert made.path.exists()
    (runs / "a/data.txt").write_bytes(b"Contents")
    monkeypatch.setenv(cached.CACHE, str(tmp_path / "third"))
    with pytest.raises(ArtifactError, match="memory://runs/a is damaged"):
        _ = artifact.load(runs / "a", "thing").path


def test_what_was_uploaded_by_hand_is_an_artifact(runs, tmp_path):
    """Such as one whose description does not say yet what its fingerprint leaves out."""
    made = make(tmp_path / "lm", logs=("metrics.jsonl",))
    (made.path / "metrics.jsonl").write_text("whatever was measured\n")
    fields = json.loads((made.path / artifact.FILE).read_text())
    del fields["logs"]
    (made.path / artifact.FILE).write_text(json.dumps(fields))
    names = [one.relative_to(made.path).as_posix() for one in made.path.rglob("*.*")]
    storage.upload(made.path, names, runs / "lm")
    assert (artifact.load(runs / "lm", "thing").path / "metrics.jsonl").exists()


@pytest.mark.parametrize("fingerprint", ["../../../up", None, "0123456789ABCDEF", "0" * 15])
def test_a_description_names_no_other_place_in_the_cache(runs, fingerprint):
    make(runs / "a")
    fields = json.loads((runs / "a" / artifact.FILE).read_bytes())
    (runs / "a" / artifact.FILE).write_bytes(
        json.dumps({**fields, "fingerprint": fingerprint}).encode()
    )
    with pytest.raises(ArtifactError, match="has no fingerprint but"):
        artifact.load(runs / "a", "thing")


def test_it_is_adopted_there_and_from_there(runs, tmp_path):
    original = make(tmp_path / "a")
    there = artifact.adopt(original.path, runs / "b", "thing")
    back = artifact.adopt(there.place, tmp_path / "c", "thing")
    assert there.fingerprint == back.fingerprint == original.fingerprint
    make(runs / "d", "other")
    with pytest.raises(ArtifactError, match=r"memory://runs/d is thing \w+, not"):
        artifact.adopt(original.path, runs / "d", "thing")


def test_a_part_of_one_is_found_in_its_copy(runs, tmp_path, monkeypatch):
    made = make(runs / "a")
    another_machine(tmp_path, monkeypatch)
    assert artifact.local(f"{runs}/a/deep") == made.path / "deep"
    assert artifact.local(tmp_path) == tmp_path


def test_a_folder_that_is_no_artifact_is_copied_as_it_is(runs):
    (runs / "hubert-base/config.json").write_bytes(b"{}")
    assert (artifact.local(runs / "hubert-base") / "config.json").read_text() == "{}"
    (runs / "hubert-base/model.safetensors").write_bytes(b"more")
    assert len(list(artifact.local(runs / "hubert-base").iterdir())) == 2
    with pytest.raises(ArtifactError, match="no such directory"):
        artifact.local(runs / "nothing")


def test_a_users_own_files_are_known_by_what_they_hold_wherever_they_lie(runs, tmp_path):
    for root in (tmp_path / "corpus", runs / "corpus"):
        for name in ("a.txt", "b/c.txt"):
            if isinstance(root, Path):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(name.encode())
    for name in ("corpus", "corpus/a.txt"):
        there, here = artifact.outside(runs / name), artifact.outside(tmp_path / name)
        assert there.fingerprint == here.fingerprint and there.place == runs / name
    with pytest.raises(ArtifactError, match="no such file or directory: memory://runs/nothing"):
        artifact.outside(runs / "nothing")


def test_a_refused_description_is_told(runs, monkeypatch):
    make(runs / "a")
    failing(runs, monkeypatch, PermissionError("AccessDenied"), lambda call: True)
    with pytest.raises(
        PermissionError, match=r"access is refused: 'memory://runs/a/artifact\.json"
    ):
        artifact.load(runs / "a", "thing")


def test_a_copy_does_not_outlive_its_directory(runs, tmp_path, monkeypatch):
    made = make(runs / "a")
    shutil.rmtree(tmp_path / "cache")
    assert (made.path / "deep/data.txt").read_text() == "contents"
