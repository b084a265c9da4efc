"""Keys copied to this machine's own disk."""

import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from small_datastores import flip, place_of

from mmrag.retrieval.datastore import Datastore, create, publish, write_segment
from mmrag.retrieval.local import copy_keys
from mmrag.retrieval.segment import DatastoreError, Description, Segment
from mmrag.retrieval.stored import segment_file

ROWS = 50


def add(directory, *names):
    for name in names:
        seed = sum(name.encode())
        keys = np.random.default_rng(seed).standard_normal((ROWS, 8)).astype(np.float32)
        rows = np.arange(ROWS)
        documents = [(f"{name}-{row}", name) for row in rows]
        windows = np.zeros((ROWS, 2))
        write_segment(directory, name, Segment(keys, rows, windows, rows * 0, rows, documents))
    publish(directory, list(names))


@pytest.fixture
def share(tmp_path):
    """A datastore of three segments."""
    directory = tmp_path / "share"
    create(directory, Description(8, 2, "l2", "none", {}))
    add(directory, "one", "two", "three")
    return directory


def copies(local):
    return sorted(path.name for path in local.iterdir())


def test_only_the_segments_of_the_entries_are_copied_and_then_read(share, tmp_path):
    local, store = tmp_path / "local", Datastore.open(share)
    keys = store.keys(0, 150)
    store.localize(local, 60, 101)
    assert len(copies(local)) == 2
    for name in ("two", "three"):
        segment_file(share, name).unlink()  # still mapped by the first to open it
    np.testing.assert_array_equal(store.keys(0, 150), keys)
    for path in local.iterdir():
        assert np.load(path).tolist() in [keys[at : at + ROWS].tolist() for at in (50, 100)]


def test_a_copy_is_made_once_and_by_its_contents(share, tmp_path):
    local = tmp_path / "local"
    first = copy_keys(segment_file(share, "one"), local)
    times = first.stat().st_mtime_ns
    other = tmp_path / "other"
    create(other, Description(8, 2, "l2", "none", {}))
    add(other, "one")
    assert copy_keys(segment_file(other, "one"), local) == first
    assert first.stat().st_mtime_ns == times and copies(local) == [first.name]


def test_many_may_copy_at_once(share, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        two = segment_file(share, "two")
        made = set(pool.map(lambda _: copy_keys(two, tmp_path / "l"), "x" * 8))
    assert copies(tmp_path / "l") == [made.pop().name] and not made


def test_what_is_published_later_is_copied_when_asked_for(share, tmp_path):
    local, store = tmp_path / "local", Datastore.open(share)
    store.localize(local, 0, 150)
    add(share, "four")
    store.refresh()
    keys = store.keys(0, 200)
    store.localize(local, 0, 200)
    assert len(copies(local)) == 4
    np.testing.assert_array_equal(store.keys(0, 200), keys)


def test_damaged_keys_are_not_copied(share, tmp_path):
    file = segment_file(share, "two")
    flip(file, place_of(file, "keys"))
    store = Datastore.open(share)
    with pytest.raises(DatastoreError, match=r"two\.safetensors: its keys are not as they were"):
        store.localize(tmp_path / "local", 0, 150)
    assert len(copies(tmp_path / "local")) == 1, "what came before it"


def test_a_full_disk_leaves_no_half_copy_and_the_datastore_as_it_was(share, tmp_path, monkeypatch):
    local, store = tmp_path / "local", Datastore.open(share)
    keys = store.keys(0, 150)
    opened = Path.open

    def full(path, mode="r", *more, **named):
        stream = opened(path, mode, *more, **named)
        if path.parent == local:
            stream.write(b"half")
            stream.close()
            raise OSError(errno.ENOSPC, "No space left on device")
        return stream

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(OSError, match="No space left"):
            store.localize(local, 0, 150)
    assert copies(local) == []
    np.testing.assert_array_equal(store.keys(0, 150), keys)
