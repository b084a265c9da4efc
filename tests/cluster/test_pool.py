"""Small datastores in shared actors answer as each would in one process."""

import hashlib
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import ray
from small_datastores import DESCRIPTION, fill

from cluster.pool import KEY_BYTES, PooledRetriever, serve_pooled
from cluster.shards import NAMESPACE
from mmrag.retrieval.datastore import Datastore, create, delete
from mmrag.retrieval.index import save_index, saved_shards
from mmrag.retrieval.retrievers import LocalRetriever
from mmrag.retrieval.segment import DatastoreError

pytestmark = pytest.mark.ray

MEMORY = 10**9


def made(directory: Path, segments: int = 2) -> Path:
    create(directory, DESCRIPTION)
    fill(directory, segments)
    save_index(directory)
    return directory


def local(directory: Path) -> LocalRetriever:
    return LocalRetriever.load(saved_shards(directory), Datastore.open(directory))


def uid(directory: Path) -> str:
    return hashlib.sha256(str(directory).encode()).hexdigest()[:16]


def queries(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, DESCRIPTION.width)).astype(np.float32)


def assert_same(served: PooledRetriever, directory: Path) -> None:
    expected, asked = local(directory), queries(4)
    found, nearest = served.search(asked, 5), expected.search(asked, 5)
    np.testing.assert_array_equal(found.entries, nearest.entries)
    np.testing.assert_array_equal(found.distances, nearest.distances)
    assert found.missing_shards == 0
    entries = nearest.entries[nearest.entries >= 0]
    np.testing.assert_array_equal(served.windows(entries), expected.windows(entries))
    assert served.origins(entries) == expected.origins(entries)
    np.testing.assert_array_equal(
        served.passages(entries).tokens, expected.passages(entries).tokens
    )


@pytest.fixture
def serving(ray_cluster: str) -> Iterator[Callable[..., PooledRetriever]]:
    """`serving(directory, owner)`; the pools end with the test."""
    owners = set()

    def serve(directory, owner="pool-test", actors=1, memory=MEMORY, **options):
        owners.add(owner)
        given = (directory, uid(directory), owner, actors, 0.05, memory)
        return serve_pooled(*given, key="retriever.shard_cpus", **options)

    yield serve
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == NAMESPACE and actor["name"].rpartition("-pool-")[0] in owners:
            ray.kill(ray.get_actor(**actor))


def pools(owner="pool-test"):
    names = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True)]
    return [name for name in names if name.startswith(f"{owner}-pool-")]


def opened(served):
    return ray.get(served._replicas[0][0].opened.remote())


def until(happens, seconds=20):
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline, "it never happens"
        time.sleep(0.05)


def test_many_datastores_share_an_actor_and_answer_each_for_itself(serving, tmp_path):
    directories = [made(tmp_path / f"of-{n}", 1 + n % 3) for n in range(8)]
    served = [serving(directory) for directory in directories]
    for retriever, directory in zip(served, directories, strict=True):
        assert_same(retriever, directory)
        assert_same(pickle.loads(pickle.dumps(retriever)), directory)
    assert pools() == ["pool-test-pool-0"]
    assert opened(served[0])[-1] == uid(directories[-1])


def test_more_actors_divide_the_datastores_among_themselves(serving, tmp_path):
    directories = [made(tmp_path / f"of-{n}", 1) for n in range(12)]
    served = [serving(directory, "wide", actors=2) for directory in directories]
    assert sorted(pools("wide")) == ["wide-pool-0", "wide-pool-1"]
    shares = {one._replicas[0][0]: opened(one) for one in served}
    assert sorted(chain(*shares.values())) == sorted(map(uid, directories))
    for retriever, directory in zip(served, directories, strict=True):
        assert_same(retriever, directory)


def test_what_was_asked_for_longest_ago_makes_room_and_is_opened_again(serving, tmp_path):
    directories = [made(tmp_path / f"of-{n}") for n in range(4)]
    entries = local(directories[0]).entries
    room = 2 * entries * DESCRIPTION.width * KEY_BYTES
    served = [serving(directory, "tight", memory=room) for directory in directories]
    assert opened(served[0]) == [uid(one) for one in directories[2:]]
    assert_same(served[0], directories[0])
    assert opened(served[0]) == [uid(directories[3]), uid(directories[0])]


def test_the_one_asked_for_is_searched_however_large(serving, tmp_path):
    directory = made(tmp_path / "large")
    served = serving(directory, "small", memory=1)
    assert_same(served, directory)
    assert opened(served) == [uid(directory)]


def test_what_was_published_and_deleted_is_known_after_a_refresh(serving, tmp_path):
    directory = made(tmp_path / "growing", 1)
    served = serving(directory)
    fill(directory, 3, first=1)
    delete(directory, [0, 4])
    served.refresh()
    assert served.entries == local(directory).entries
    assert_same(served, directory)


def test_a_pool_that_dies_is_missing_and_then_opens_what_it_is_asked_for(serving, tmp_path):
    directory = made(tmp_path / "one")
    served = serving(directory)
    ray.kill(served._replicas[0][0], no_restart=False)
    until(lambda: served.search(queries(1), 1).missing_shards)
    until(lambda: served.ping(5) == 0)
    assert_same(served, directory)


def test_closing_a_datastore_leaves_the_others_and_the_pool(serving, tmp_path):
    directories = [made(tmp_path / name) for name in ("one", "two")]
    first, second = (serving(directory) for directory in directories)
    first.close()
    until(lambda: opened(second) == [uid(directories[1])])
    assert_same(second, directories[1])


def test_what_was_deleted_or_replaced_is_not_kept_open(serving, tmp_path):
    gone, replaced, third = (made(tmp_path / name) for name in ("gone", "replaced", "third"))
    for directory in (gone, replaced):
        serving(directory)
    shutil.rmtree(gone)
    shutil.rmtree(replaced)
    made(replaced, 1)
    given = ("f00d", "pool-test", 1, 0.05, MEMORY)
    served = serve_pooled(replaced, *given, key="retriever.shard_cpus")
    assert opened(served) == ["f00d"]
    assert_same(served, replaced)
    assert_same(serving(third), third)


def test_a_pool_that_nobody_asks_ends_for_good(serving, tmp_path):
    serving(made(tmp_path / "one"), "idle", idle_seconds=1)
    until(lambda: not pools("idle"))


def test_a_datastore_that_cannot_be_opened_is_named(serving, tmp_path):
    directory = made(tmp_path / "broken")
    serving(directory)
    (directory / "segments.json").write_text("{")
    other = made(tmp_path / "other")
    (other / "segments.json").write_text("{")
    with pytest.raises(DatastoreError, match=r"other/segments\.json is damaged"):
        serving(other)
    assert len(pools()) == 1, "the pool lives on"
