"""An index that fell behind is built again, and nobody who searches meanwhile finds less."""

import json
import subprocess
import sys
import threading

import numpy as np
import pytest

from mmrag.config import Index
from mmrag.retrieval import index, sizing, snapshots
from mmrag.retrieval.compaction import compact
from mmrag.retrieval.datastore import Datastore, create, delete, publish, write_segment
from mmrag.retrieval.index import build_again, left_out, read_shard, save_index, saved_shards
from mmrag.retrieval.reindexing import TooManyShardsError, behind, catch_up, index_anew
from mmrag.retrieval.retrievers import LocalRetriever
from mmrag.retrieval.segment import Description, Segment

FLAT = Index(kind="flat", shards=1)
EVERY = Index(kind="ivfpq", shards=1, lists=8, code_bytes=4, probes=8, rerank=1000)
"""Reads so many keys that what its lists hold is found."""


def random_keys(rows, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, 8)).astype(np.float32)


def append(directory, name, keys):
    count = len(keys)
    write_segment(
        directory,
        name,
        Segment(
            keys=keys,
            tokens=100 + np.arange(count),
            windows=np.zeros((count, 2)),
            positions=np.zeros(count),
            utterances=np.arange(count),
            names=[(f"{name}-{row}", f"d{row % 5}") for row in range(count)],
        ),
    )
    publish(directory, [name])


def make(directory, keys):
    create(directory, Description(8, 2, "l2", "none", {"lm": "f00d"}))
    append(directory, "one", keys[:300])
    append(directory, "two", keys[300:])
    return Datastore.open(directory)


def nearest(datastore, queries, k):
    """The slow twin: the distances (B, k) and entries (B, k) of what is not deleted."""
    keys = datastore.keys(0, datastore.entries)
    far = ((queries[:, None] - keys[None]) ** 2).sum(-1)
    far[:, datastore.deleted] = np.inf
    order = np.argsort(far, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(far, order, axis=1), order


def assert_finds(retriever, queries, expected):
    found = retriever.search(queries, expected[1].shape[1])
    np.testing.assert_array_equal(found.entries, expected[1])
    np.testing.assert_allclose(found.distances, expected[0], rtol=1e-5)


@pytest.fixture
def coded(tmp_path):
    """A datastore of 600 entries with an IVF-PQ index."""
    datastore = make(tmp_path, random_keys(600))
    build_again(tmp_path, EVERY)
    return datastore


def opened(directory):
    return LocalRetriever.load(saved_shards(directory), Datastore.open(directory))


def held(retriever):
    """Entries in the lists of a retriever's only shard."""
    parts = (retriever.shards[0]._index._saved, retriever.shards[0]._index._fresh)
    lists = [part.index.invlists for part in parts if part is not None]
    return sum(one.list_size(number) for one in lists for number in range(one.nlist))


def test_an_index_is_behind_once_a_quarter_of_it_is_deleted(coded):
    delete(coded.directory, range(0, 150))
    assert behind(coded.directory) is None and catch_up(coded.directory) is None
    delete(coded.directory, [150])
    assert behind(coded.directory) == "151 of the 600 entries that it holds are deleted"
    before = saved_shards(coded.directory)
    rebuilt = catch_up(coded.directory)
    assert rebuilt.why.startswith("151 of the 600") and saved_shards(coded.directory) != before
    assert behind(coded.directory) is None
    again, queries = opened(coded.directory), random_keys(5, seed=1)
    assert held(again) == 449, "what was deleted is in no list any more"
    assert_finds(again, queries, nearest(again.datastore, queries, 9))
    assert read_shard(saved_shards(coded.directory)[0])["asked"] == EVERY.model_dump()


def test_an_index_is_behind_once_a_quarter_was_added_to_it(coded):
    append(coded.directory, "three", random_keys(150, seed=3))
    assert behind(coded.directory) is None
    append(coded.directory, "four", random_keys(1, seed=4))
    assert behind(coded.directory) == "151 entries were added to the 600 that were indexed"
    catch_up(coded.directory)
    assert behind(coded.directory) is None
    [shard] = opened(coded.directory).shards
    assert (shard.start, shard.stop) == (0, 751) and shard._index._fresh is None


def test_a_datastore_that_grew_from_nothing_gets_the_index_of_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(sizing, "FLAT_ENTRIES", 500)
    make(tmp_path, random_keys(400))
    save_index(tmp_path)
    assert behind(tmp_path) is None
    append(tmp_path, "more", random_keys(200, seed=5))
    why = "the last shard has 600 entries, for which auto does not choose flat"
    assert behind(tmp_path) == why
    [shard] = catch_up(tmp_path).shards
    assert shard.settings.kind == "ivfsq" and shard.why.startswith("ivfsq: 600 keys")
    assert behind(tmp_path) is None


def test_flat_as_somebody_wanted_it_stays_flat(tmp_path, monkeypatch):
    monkeypatch.setattr(sizing, "FLAT_ENTRIES", 100)
    make(tmp_path, random_keys(400))
    build_again(tmp_path, FLAT)
    append(tmp_path, "more", random_keys(400, seed=5))
    delete(tmp_path, range(300))
    assert behind(tmp_path) is None


def test_what_is_searched_added_and_deleted_while_it_is_built_is_right(coded, monkeypatch):
    directory, queries = coded.directory, random_keys(4, seed=1)
    delete(directory, range(200))
    compact(directory, everything=True)
    in_use = opened(directory)
    building, go_on = threading.Event(), threading.Event()
    write = index.write_json

    def stopped(path, fields):
        if path.name == "index.json":
            building.set()
            assert go_on.wait(30)
        write(path, fields)

    monkeypatch.setattr(index, "write_json", stopped)
    thread = threading.Thread(target=catch_up, args=[directory])
    thread.start()
    assert building.wait(30)
    append(directory, "meanwhile", random_keys(30, seed=6))
    delete(directory, [250, 610])
    compact(directory, everything=True)
    old = opened(directory)
    in_use.refresh()
    expected = nearest(old.datastore, queries, 9)
    assert not {*range(200), 250, 610} & set(expected[1].ravel().tolist())
    assert_finds(in_use, queries, expected)
    assert_finds(old, queries, expected)
    go_on.set()
    thread.join(30)
    new = opened(directory)
    assert held(new) == 600 - 200 + 29
    for one in (in_use, old, new):
        one.refresh()
        assert_finds(one, queries, expected)


KILLED = """
import os, sys
from mmrag.retrieval import index, reindexing
write = index.write_json
def killed(path, fields):
    if path.name == "index.json":
        os.kill(os.getpid(), 9)
    write(path, fields)
index.write_json = killed
reindexing.catch_up(sys.argv[1])
"""


def test_killed_in_the_middle_it_leaves_the_old_index_and_is_built_the_next_time(coded):
    directory, queries = coded.directory, random_keys(4, seed=1)
    before = saved_shards(directory)
    delete(directory, range(200))
    ended = subprocess.run([sys.executable, "-c", KILLED, str(directory)], timeout=60, check=False)
    assert ended.returncode == -9
    assert saved_shards(directory) == before and behind(directory)
    left = {one.name for one in directory.glob("index-*")}
    assert len(left) == 2, "half an index, which nothing names"
    expected = nearest(Datastore.open(directory), queries, 9)
    assert_finds(opened(directory), queries, expected)
    assert catch_up(directory) and saved_shards(directory) != before
    assert len(list(directory.glob("index-*"))) == 2, "and the next one removes it"
    assert_finds(opened(directory), queries, expected)


def test_what_a_snapshot_brings_back_is_found_although_the_index_left_it_out(coded):
    directory, queries = coded.directory, random_keys(4, seed=1)
    snapshots.create(directory, "before")
    delete(directory, range(300))
    compact(directory, everything=True)
    catch_up(directory)
    assert len(left_out(saved_shards(directory)[0])) == 300
    snapshots.rollback(directory, "before")
    again = opened(directory)
    assert len(again.datastore.deleted) == 0
    assert_finds(again, queries, nearest(again.datastore, queries, 9))
    assert behind(directory) == "300 entries that it leaves out are there again"
    catch_up(directory)
    assert held(opened(directory)) == 600 and behind(directory) is None


def test_an_index_that_cannot_be_built_again_leaves_the_one_that_there_is(coded):
    directory, queries = coded.directory, random_keys(3, seed=1)
    place = saved_shards(directory)[0] / "shard.json"
    saved = json.loads(place.read_text())
    saved["asked"] |= {"probes": 1, "rerank": 1, "min_recall": 1.0}
    place.write_text(json.dumps(saved))
    delete(directory, range(200))
    with pytest.raises(ValueError, match="min_recall"):
        catch_up(directory)
    assert saved_shards(directory)[0] == place.parent
    expected = nearest(Datastore.open(directory), queries, 5)
    assert_finds(opened(directory), queries, expected)


def test_deleted_entries_that_lie_together_leave_enough_to_train_on(coded):
    """Every key that k-means sees is one that is searched for."""
    delete(coded.directory, range(300))
    compact(coded.directory, everything=True)
    catch_up(coded.directory)
    [shard] = opened(coded.directory).shards
    lists = shard._index._saved.index
    centroids = lists.quantizer.reconstruct_n(0, lists.nlist)
    assert np.linalg.norm(centroids, axis=1).min() > 0.1, "no list is of erased keys"


def test_more_shards_than_entries_are_refused_and_the_index_stays(tmp_path):
    make(tmp_path, random_keys(301))
    build_again(tmp_path, FLAT)
    before = saved_shards(tmp_path)
    with pytest.raises(TooManyShardsError, match="shards: 302 for 301 entries"):
        index_anew(tmp_path, FLAT.model_copy(update={"shards": 302}))
    assert saved_shards(tmp_path) == before
    assert len(index_anew(tmp_path, FLAT.model_copy(update={"shards": 301}))) == 301


def test_a_datastore_without_entries_is_one_shard(tmp_path):
    create(tmp_path, Description(8, 2, "l2", "none", {"lm": "f00d"}))
    assert len(index_anew(tmp_path, FLAT)) == 1
    with pytest.raises(TooManyShardsError, match="shards: 2 for 0 entries"):
        index_anew(tmp_path, FLAT.model_copy(update={"shards": 2}))
