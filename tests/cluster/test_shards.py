"""A datastore served by actors answers as it would in one process, and without the dead ones."""

import time
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from cluster import shards
from cluster.shards import IndexShardActor, ShardedRetriever, serve_shards
from mmrag.config import Index
from mmrag.datastore import (
    Datastore,
    Description,
    Segment,
    create,
    publish,
    windows_of,
    write_segment,
)
from mmrag.index import IndexShard, LocalRetriever, saved_shards, shard_directory, shard_ranges
from mmrag.records import NO_ENTRY

pytestmark = pytest.mark.ray

ENTRIES, WIDTH, WINDOW = 90, 6, 4
RANGES = shard_ranges(ENTRIES, 2)


@pytest.fixture(scope="module")
def datastore(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 entries in two saved shards. Keys on a coarse grid, so that many distances are equal."""
    directory = tmp_path_factory.mktemp("datastore")
    random = np.random.default_rng(3)
    create(directory, Description(WIDTH, WINDOW, "l2", "none", identity={}))
    tokens = random.integers(1, 40, ENTRIES)
    segment = Segment(
        keys=random.integers(-1, 2, (ENTRIES, WIDTH)).astype(np.float32),
        tokens=tokens,
        windows=windows_of(tokens, WINDOW),
        positions=np.arange(ENTRIES) % 10,
        utterances=np.arange(ENTRIES) // 10,
        names=[(f"utterance-{number}", f"document-{number // 2}") for number in range(9)],
    )
    write_segment(directory, "part-0", segment)
    publish(directory, ["part-0"])
    opened = Datastore.open(directory)
    for number, span in enumerate(RANGES):
        shard = IndexShard.build(opened, *span, Index(kind="flat", shards=2), seed=1)
        shard.save(shard_directory(directory, number))
    return directory


@pytest.fixture(scope="module")
def local(datastore: Path) -> LocalRetriever:
    return LocalRetriever.load(saved_shards(datastore), Datastore.open(datastore))


def start(datastore: Path, number: int) -> ActorHandle:
    shard = saved_shards(datastore)[number]
    return IndexShardActor.options(num_cpus=0.1).remote(datastore, shard)


@pytest.fixture(scope="module")
def living(ray_cluster: str, datastore: Path) -> list[ActorHandle]:
    """An actor for each of the two shards."""
    return [start(datastore, 0), start(datastore, 1)]


@pytest.fixture(scope="module")
def dead(ray_cluster: str, datastore: Path) -> ActorHandle:
    """An actor of the first shard that was killed for good."""
    actor = start(datastore, 0)
    ray.kill(actor)
    assert_dies(actor)
    return actor


def assert_dies(actor: ActorHandle) -> None:
    """Wait for what `ray.kill` only asked for."""
    for _ in range(300):
        try:
            ray.get(actor.range.remote())
        except RayActorError:
            return
        time.sleep(0.1)
    pytest.fail("the actor lives on")


def queries(seed: int, count: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)


def assert_same(found, expected) -> None:
    for field in ("distances", "tokens", "entries", "documents"):
        ours, theirs = getattr(found, field), getattr(expected, field)
        assert ours.dtype == theirs.dtype, field
        assert np.array_equal(ours, theirs), field
    assert found.missing_shards == expected.missing_shards


@pytest.mark.parametrize("k", [1, 7, ENTRIES + 5])
def test_sharded_search_equals_local_search_bit_for_bit(living, local, k):
    sharded = ShardedRetriever([[one] for one in living], RANGES)
    for seed in range(3):
        asked = queries(seed)
        assert_same(sharded.search(asked, k), local.search(asked, k))
        excluded = np.array([0, 1, -1, 4, 2])
        assert_same(sharded.search(asked, k, excluded), local.search(asked, k, excluded))


def test_sharded_windows_equal_local_windows(living, local):
    sharded = ShardedRetriever([[one] for one in living], RANGES)
    entries = np.array([[0, 44, 45], [89, NO_ENTRY, 12]])
    assert np.array_equal(sharded.windows(entries), local.windows(entries))


def assert_same_passages(found, expected) -> None:
    for field in ("tokens", "keys", "present"):
        ours, theirs = getattr(found, field), getattr(expected, field)
        assert ours.dtype == theirs.dtype, field
        assert np.array_equal(ours, theirs), field


@pytest.mark.parametrize("entries", [[0, 44, 45, 89, 12, 45], [60, 61], []])
def test_sharded_passages_equal_those_of_the_datastore(living, datastore, entries):
    sharded = ShardedRetriever([[one] for one in living], RANGES)
    entries = np.array(entries, np.int64)
    assert_same_passages(sharded.passages(entries), Datastore.open(datastore).passages(entries))


def test_passages_reach_from_one_shard_into_the_next(living, datastore):
    """The window around a shard's last entry holds the next shard's first."""
    sharded = ShardedRetriever([[one] for one in living], RANGES)
    opened, last = Datastore.open(datastore), RANGES[0][1] - 1
    found = sharded.passages(np.array([last]))
    assert opened.utterances[last] == opened.utterances[last + 1]
    assert opened.tokens[last + 1] in found.tokens[0]
    assert_same_passages(found, opened.passages(np.array([last])))


def test_a_dead_replica_loses_nothing(living, dead, local):
    sharded = ShardedRetriever([[dead, living[0]], [living[1]]], RANGES)
    for seed in range(4):  # replicas take turns: the dead one is asked first in every other search
        asked = queries(seed)
        assert_same(sharded.search(asked, 8), local.search(asked, 8))
    entries = np.arange(ENTRIES)
    assert np.array_equal(sharded.windows(entries), local.windows(entries))
    for _ in range(2):
        assert_same_passages(sharded.passages(entries), local.passages(entries))


def test_a_dead_shard_is_counted_and_the_others_still_answer(living, dead, local):
    sharded = ShardedRetriever([[dead], [living[1]]], RANGES)
    found = sharded.search(queries(1), 8)
    assert found.missing_shards == 1
    alone = local.shards[1].search(queries(1), 8)
    assert np.array_equal(found.entries, alone.entries)
    assert np.array_equal(found.distances, alone.distances)
    windows = sharded.windows(np.array([3, 60]))
    assert not windows[0].any()
    assert np.array_equal(windows[1], local.windows(np.array([60]))[0])


def test_passages_of_a_dead_shard_are_empty_and_the_others_whole(living, dead, local):
    sharded = ShardedRetriever([[dead], [living[1]]], RANGES)
    found = sharded.passages(np.array([3, 60, 10, 70]))
    whole = local.passages(np.array([60, 70]))
    for field in ("tokens", "keys", "present"):
        assert not getattr(found, field)[[0, 2]].any(), field
        assert np.array_equal(getattr(found, field)[[1, 3]], getattr(whole, field)), field


def test_with_every_shard_dead_nothing_is_found_and_windows_and_passages_say_so(dead):
    sharded = ShardedRetriever([[dead]], RANGES[:1])
    found = sharded.search(queries(1), 3)
    assert found.missing_shards == 1
    assert (found.entries == NO_ENTRY).all() and np.isinf(found.distances).all()
    with pytest.raises(RuntimeError, match="no shard of the datastore answers"):
        sharded.windows(np.array([1]))
    with pytest.raises(RuntimeError, match="no shard of the datastore answers"):
        sharded.passages(np.array([1]))


def test_a_shard_that_takes_too_long_counts_as_missing(living, local, monkeypatch):
    @ray.remote(num_cpus=0.1)
    class Stuck:
        def search(self, queries, k, exclude_documents):
            time.sleep(120)

    monkeypatch.setattr(shards, "ANSWER_SECONDS", 3.0)
    stuck = Stuck.remote()
    found = ShardedRetriever([[stuck], [living[1]]], RANGES).search(queries(2), 4)
    ray.kill(stuck)
    assert found.missing_shards == 1
    assert np.array_equal(found.entries, local.shards[1].search(queries(2), 4).entries)


def test_a_mistake_in_the_question_is_an_error_and_no_missing_shard(living):
    sharded = ShardedRetriever([[one] for one in living], RANGES)
    with pytest.raises(ValueError, match="the keys have width 6"):
        sharded.search(np.zeros((2, WIDTH + 1), np.float32), 3)


def test_a_served_shard_whose_process_dies_comes_back(ray_cluster, datastore, local):
    served = serve_shards(datastore, replicas=1, num_cpus=0.1)
    actors = [replica for shard in served._replicas for replica in shard]
    assert_same(served.search(queries(5), 6), local.search(queries(5), 6))
    ray.kill(actors[0], no_restart=False)
    for _ in range(300):
        found = served.search(queries(5), 6)
        if not found.missing_shards:
            break
        time.sleep(0.1)
    assert_same(found, local.search(queries(5), 6))
    served.close()
    for actor in actors:
        assert_dies(actor)
