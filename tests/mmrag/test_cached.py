import fcntl
import os
from pathlib import Path

import fsspec
import pytest

from mmrag import cached
from mmrag.storage import StorageError, Url

MEMORY = fsspec.filesystem("memory")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    MEMORY.store.clear()
    MEMORY.pseudo_dirs[:] = [""]
    monkeypatch.setenv(cached.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(cached, "_in_use", {})
    return tmp_path / "cache"


def folder(name: str, size: int = 1000) -> Url:
    made = Url(f"memory://bucket/{name}")
    (made / "a.bin").write_bytes(bytes(size))
    (made / "b/c.txt").write_bytes(b"c")
    return made


def let_go(monkeypatch) -> None:
    """As if the process that used the copies had ended."""
    for lock in cached._in_use.values():
        lock.close()
    monkeypatch.setattr(cached, "_in_use", {})


def anything(directory: Path) -> None:
    pass


def test_a_copy_has_the_folders_files_and_its_name(cache):
    copy = cached.copy(folder("lm"), "lm-1", anything)
    assert copy.name == "lm" and copy.is_relative_to(cache)
    assert (copy / "a.bin").read_bytes() == bytes(1000) and (copy / "b/c.txt").read_text() == "c"


def test_it_is_fetched_once(monkeypatch):
    made = folder("lm")
    copy = cached.copy(made, "lm-1", anything)
    monkeypatch.setattr(cached, "download", None)
    assert cached.copy(made, "lm-1", anything) == copy


@pytest.mark.timeout(20)
def test_two_processes_use_one_copy(monkeypatch):
    made = folder("lm")
    copy = cached.copy(made, "lm-1", anything)
    elsewhere = cached._in_use.copy()  # that process goes on holding it
    monkeypatch.setattr(cached, "_in_use", {})
    monkeypatch.setattr(cached, "download", None)
    assert cached.copy(made, "lm-1", anything) == copy and elsewhere.keys() == {copy.parent}


def test_what_the_check_refuses_is_not_kept(cache):
    def refuse(directory: Path) -> None:
        assert (directory / "a.bin").exists()
        raise ValueError("not what it should be")

    for _ in range(2):
        with pytest.raises(ValueError, match="not what it should be"):
            cached.copy(folder("lm"), "lm-1", refuse)
    assert sorted(one.name for one in (cache / "copies").iterdir()) == [
        ".lm-1.lock",
        ".lm-1.making",
    ]


def test_a_fetch_that_broke_off_leaves_nothing_to_be_taken_for_a_copy(monkeypatch):
    made, whole = folder("lm"), cached.download

    def half(source: Url, names: list[str], directory: Path) -> None:
        whole(source, names[:1], directory)
        raise StorageError("the storage does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(cached, "download", half)
        with pytest.raises(StorageError):
            cached.copy(made, "lm-1", anything)
    assert (cached.copy(made, "lm-1", anything) / "b/c.txt").exists()


def test_scratch_is_not_fetched():
    made = folder("lm")
    (made / ".scratch/a").write_bytes(b"a")
    assert not (cached.copy(made, "lm-1", anything) / ".scratch").exists()


def test_a_name_that_climbs_is_not_fetched(tmp_path):
    made = folder("lm")
    MEMORY.store["/bucket/lm/../../up"] = MEMORY.store["/bucket/lm/a.bin"]
    with pytest.raises(StorageError, match="could be no file here"):
        cached.copy(made, "lm-1", anything)


def test_room_is_made_by_what_nobody_has_used_for_longest(monkeypatch):
    monkeypatch.setenv(cached.LIMIT, "2.5e-6")
    old, older, new = (folder(name) for name in ("old", "older", "new"))
    places = [cached.copy(one, one.name, anything) for one in (old, older)]
    os.utime(cached._lock_file(places[1].parent), (0, 0))
    let_go(monkeypatch)
    assert cached.copy(new, "new", anything).exists()
    assert places[0].exists() and not places[1].exists()


def test_what_a_process_uses_is_never_removed(monkeypatch):
    monkeypatch.setenv(cached.LIMIT, "1.5e-6")
    used = cached.copy(folder("used"), "used", anything)
    with pytest.raises(StorageError, match=r"has room for 0\.0 GB: set MMRAG_CACHE"):
        cached.copy(folder("new"), "new", anything)
    let_go(monkeypatch)
    with cached._lock_file(used.parent).open() as elsewhere:  # another process's
        fcntl.flock(elsewhere, fcntl.LOCK_SH)
        with pytest.raises(StorageError):
            cached.copy(folder("new"), "new", anything)
    assert used.exists()
    assert cached.copy(folder("new"), "new", anything).exists() and not used.exists()


def test_what_was_made_here_becomes_the_copy(tmp_path, monkeypatch):
    made = tmp_path / "drafts/lm"
    made.mkdir(parents=True)
    (made / "a.bin").write_bytes(b"made here")
    cached.adopt(made, "lm-1")
    monkeypatch.setattr(cached, "download", None)
    assert (cached.copy(folder("lm"), "lm-1", anything) / "a.bin").read_bytes() == b"made here"
    assert not made.exists()


def test_what_goes_to_a_url_is_always_made_at_the_same_place(cache, tmp_path, monkeypatch):
    place = cached.draft_place(Url("s3://bucket/runs/lm"))
    assert place == cached.draft_place(Url("s3://bucket/runs/lm/"))
    assert place.name == "lm" and place.is_relative_to(cache)
    assert cached.draft_place(Url("s3://bucket/others/lm")) != place
    monkeypatch.setenv(cached.DRAFTS, str(tmp_path / "shared"))
    assert cached.draft_place(Url("s3://bucket/runs/lm")).is_relative_to(tmp_path / "shared")
