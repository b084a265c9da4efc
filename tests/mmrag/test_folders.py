"""What lies below a folder is found once, and what cannot be looked at is named."""

import os
from pathlib import Path

import pytest

from mmrag.folders import printable, walk
from mmrag.records import Rejection


def found(directory: Path) -> list[str]:
    return [path.relative_to(directory).as_posix() for path in walk(directory)]


def test_links_to_folders_are_followed_and_loops_end(tmp_path):
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    (here / "below").mkdir(parents=True)
    elsewhere.mkdir()
    (here / "below" / "a").touch()
    (elsewhere / "b").touch()
    (here / "other").symlink_to(elsewhere)
    (here / "again").symlink_to(here / "below")
    (here / "below" / "loop").symlink_to(here)
    (here / "itself").symlink_to("itself")
    assert found(here) == ["itself", "below/a", "other/b"]


def test_a_folder_that_cannot_be_listed_is_named_and_the_others_are(tmp_path, monkeypatch):
    for name in ("locked", "open"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").touch()
    listing = os.scandir

    def guarded(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert list(walk(tmp_path)) == [
        Rejection(str(tmp_path / "locked"), "the folder cannot be listed: Permission denied"),
        tmp_path / "open" / "a",
    ]


@pytest.mark.parametrize(
    ("name", "shown"),
    [("año.wav", "año.wav"), (os.fsdecode(b"caf\xe9"), "caf\\xe9"), ("\ud800", "\\ud800")],
)
def test_a_name_can_always_be_written_down(name, shown):
    assert printable(name) == shown
    assert printable(Path(name)).encode()
