"""A datastore goes back to what it was, and no id is given twice."""

import numpy as np
import pytest
from small_datastores import DESCRIPTION, fill, segment

from mmrag.config import Index
from mmrag.retrieval import snapshots
from mmrag.retrieval.compaction import compact
from mmrag.retrieval.datastore import Datastore, create, delete, publish, write_segment
from mmrag.retrieval.index import IndexShard
from mmrag.retrieval.segment import DatastoreError
from mmrag.retrieval.snapshots import Snapshot
from mmrag.retrieval.verify import verify


@pytest.fixture
def directory(tmp_path):
    create(tmp_path, DESCRIPTION)
    fill(tmp_path, 3)
    delete(tmp_path, [2])
    return tmp_path


def living(directory):
    store = Datastore.open(directory)
    entries = np.setdiff1d(np.arange(store.entries), store.deleted)
    told = zip(store.tokens[entries].tolist(), store.origins(entries), strict=True)
    return dict(zip(entries.tolist(), told, strict=True))


@pytest.mark.parametrize("merged", [False, True])
def test_it_goes_back_whatever_was_added_deleted_and_merged_since(directory, merged):
    was = living(directory)
    assert snapshots.create(directory, "monday") == Snapshot("monday", entries=18, deleted=1)
    fill(directory, 2, first=3)
    delete(directory, [0, 1, 17, 20])
    if merged:
        compact(directory, everything=True)
        assert len(Datastore.open(directory).segments) == 2, "what came later stays apart"
    assert living(directory) != was
    snapshots.rollback(directory, "monday")
    assert living(directory) == was
    assert list(verify(directory)) == []
    fill(directory, 1, first=7)
    after = living(directory)
    assert min(after.keys() - was.keys()) == 30, "ids of what came between are not given again"
    compact(directory, everything=True)
    assert living(directory) == after and list(verify(directory)) == []


def test_what_a_snapshot_names_stays_until_it_is_dropped(directory):
    snapshots.create(directory, "monday")
    delete(directory, np.arange(18))
    compact(directory, everything=True)
    content = b"".join(file.read_bytes() for file in directory.rglob("*.safetensors"))
    assert b"utterance-1-1" in content
    snapshots.drop(directory, "monday")
    compact(directory)
    content = b"".join(file.read_bytes() for file in directory.rglob("*.safetensors"))
    assert b"utterance-1-1" not in content
    assert len(list((directory / "segments").iterdir())) == 1
    assert len(list(directory.glob("deleted-*.npy"))) == 1


def test_what_a_snapshot_names_is_neither_replaced_nor_published_again(directory):
    was = living(directory)
    snapshots.create(directory, "monday")
    compact(directory, everything=True)
    with pytest.raises(DatastoreError, match=r"segment s-0 of .* is published already"):
        write_segment(directory, "s-0", segment(9))
    with pytest.raises(DatastoreError, match=r"segment s-0 of .* is published already"):
        publish(directory, ["s-0"])
    snapshots.rollback(directory, "monday")
    assert living(directory) == was and list(verify(directory)) == []


def test_snapshots_are_listed_and_named_strictly(directory):
    assert snapshots.every(directory) == []
    snapshots.create(directory, "b")
    delete(directory, [5])
    snapshots.create(directory, "a-2")
    assert snapshots.every(directory) == [Snapshot("a-2", 18, 2), Snapshot("b", 18, 1)]
    with pytest.raises(DatastoreError, match="has a snapshot b already"):
        snapshots.create(directory, "b")
    for name in ("", "../b", "B", "a b", "x" * 65):
        with pytest.raises(ValueError, match="snapshot name"):
            snapshots.create(directory, name)
    for change in (snapshots.rollback, snapshots.drop):
        with pytest.raises(DatastoreError, match="has no snapshot gone"):
            change(directory, "gone")
    snapshots.drop(directory, "b")
    assert [one.name for one in snapshots.every(directory)] == ["a-2"]


@pytest.mark.parametrize("kind", ["flat", "ivfsq", "ivfpq"])
def test_an_open_index_finds_again_what_is_there_again(directory, kind):
    fill(directory, 60, first=3)
    codes = {"code_bytes": 2} if kind == "ivfpq" else {"scalar_bits": 8}
    settings = Index(kind=kind, shards=1, lists=4, probes=4, rerank=64, **codes)
    store = Datastore.open(directory)
    queries = store.keys_of(np.array([8, 40, 100]))
    built = IndexShard.build(store, 0, store.entries, settings, seed=0)
    wanted = built.search(queries, 3).entries
    assert wanted[:, 0].tolist() == [8, 40, 100]
    snapshots.create(directory, "full")
    delete(directory, [8, 40])
    compact(directory, everything=True)
    emptied = IndexShard.build(Datastore.open(directory), 0, store.entries, settings, seed=0)
    for shard in (built, emptied):
        shard.datastore.refresh()
        shard.refresh(last=True)
        assert not {8, 40} & set(shard.search(queries, 3).entries.ravel().tolist())
    emptied.delete([100])
    snapshots.rollback(directory, "full")
    for shard in (built, emptied):
        shard.datastore.refresh()
        shard.refresh(last=True)
    np.testing.assert_array_equal(built.search(queries, 3).entries, wanted)
    found = emptied.search(queries, 3).entries
    assert found[:2, 0].tolist() == [8, 40] and 100 not in found, "hidden here alone"
