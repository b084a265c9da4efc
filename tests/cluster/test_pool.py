"""Small datastores in shared actors answer as each would in one process."""

import hashlib
import math
import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import ray
from small_datastores import DESCRIPTION, fill
from small_datastores import segment as small_segment

from cluster.pool import KEY_BYTES, PooledRetriever, serve_pooled
from cluster.shards import NAMESPACE, serve_shards
from mmrag.config import Index
from mmrag.retrieval.datastore import Datastore, create, delete, publish, write_segment
from mmrag.retrieval.index import build_again, save_index, saved_shards
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


def hold(pool, opened: Path) -> None:
    """Whatever the pool is asked about waits until `opened` is there, and is noted in order."""

    def noting(self, opened):
        retriever, self.order = self._retriever, []

        def held(uid, directory):
            self.order.append(uid)
            while not opened.exists():
                time.sleep(0.01)
            return retriever(uid, directory)

        self._retriever = held

    ray.get(pool.__ray_call__.remote(noting, opened))


@pytest.mark.parametrize("directly", [True, False])
def test_a_datastore_that_is_searched_all_the_time_keeps_another_waiting_for_one_search(
    serving, tmp_path, directly
):
    """Of its own: in all for the one that is going on, and one of each that waits."""
    flooded, quiet, third = (made(tmp_path / name, 1) for name in ("flooded", "quiet", "third"))
    served = {one: serving(one, "fair") for one in (flooded, quiet, third)}
    pool, channel = served[quiet]._replicas[0][0], served[quiet]._channels[0][0]
    until(lambda: served[quiet].search(queries(1), 1).missing_shards == 0 and channel._free)
    if not directly:
        channel._free.clear()
        channel._blocked = math.inf
    hold(pool, tmp_path / "open")
    asked = [*[flooded] * 20, quiet, third, quiet]
    with ThreadPoolExecutor(len(asked)) as threads:
        answers = []
        for number, directory in enumerate(asked):
            answers.append(threads.submit(served[directory].search, queries(1), 1))
            until(lambda n=number: sum(ray.get(pool.waiting.remote()).values()) == n)
        (tmp_path / "open").touch()
        assert all(answer.result(20).missing_shards == 0 for answer in answers)
    order = ray.get(pool.__ray_call__.remote(lambda self: self.order))
    names = {uid(one): one.name for one in (flooded, quiet, third)}
    first = [names[one] for one in order[:6]]
    assert first == ["flooded", "flooded", "quiet", "third", "flooded", "quiet"]
    assert len(order) == len(asked)


def pooled(root: Path, count: int, entries: int) -> list[Path]:
    """So many datastores of so many entries, whose tokens differ from all others'."""
    directories = [root / f"of-{number}" for number in range(count)]
    for number, directory in enumerate(directories):
        create(directory, DESCRIPTION)
        write_segment(directory, "all", small_segment(number, utterances=entries // 5, length=5))
        publish(directory, ["all"])
        save_index(directory)
    return directories


def assert_finds_its_own(served: PooledRetriever, directory: Path) -> None:
    """Each key's nearest entry is its own, of this datastore and no other."""
    store = Datastore.open(directory)
    entries = np.array([0, store.entries // 2, store.entries - 1])
    keys = np.concatenate([store.keys(entry, entry + 1) for entry in entries])
    found = served.search(keys, 1)
    assert found.missing_shards == 0
    assert found.entries[:, 0].tolist() == entries.tolist()
    assert found.tokens[:, 0].tolist() == store.tokens[entries].tolist()
    assert not found.distances.any()


def test_many_datastores_are_searched_in_the_memory_of_a_few(serving, tmp_path):
    directories = pooled(tmp_path, 50, entries=20)
    room = 10 * 20 * DESCRIPTION.width * KEY_BYTES
    served = [serving(one, "many", memory=room) for one in directories]
    assert opened(served[0]) == [uid(one) for one in directories[-10:]]
    for turn in range(2):
        for number in np.random.default_rng(turn).permutation(50):
            assert_finds_its_own(served[number], directories[number])
            assert len(opened(served[number])) == 10


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_small_datastores_beside_a_large_one(serving, tmp_path):
    """All of them are right while two of them are searched without a pause, the large one among
    those; the pool holds a hundred open, in their memory."""
    large = tmp_path / "large"
    large_entries = fill_large(large)
    directories = pooled(tmp_path, 1000, entries=200)
    room = 100 * 200 * DESCRIPTION.width * KEY_BYTES
    apart = serve_shards(large, 1, 0.05)
    served = [serving(one, "thousand", memory=room) for one in directories]
    pool = served[0]._replicas[0][0]
    assert len(opened(served[0])) == 100
    over = threading.Event()

    def search_on(retriever):
        searches = 0
        while not over.is_set():
            assert retriever.search(queries(32), 5).missing_shards == 0
            searches += 1
        return searches

    with ThreadPoolExecutor(3) as threads:
        busy = [threads.submit(search_on, one) for one in (apart, served[7], served[7])]
        try:
            before = private_bytes(pool)
            for turn in range(2):
                for number in np.random.default_rng(turn).permutation(1000):
                    assert_finds_its_own(served[number], directories[number])
                assert len(opened(served[0])) <= 100
                assert uid(directories[7]) in opened(served[0]), "it is asked for all the time"
            grown = private_bytes(pool) - before
        finally:
            over.set()
        assert all(one.result(60) for one in busy)
    assert apart.entries == large_entries
    apart.close()
    assert grown < 100e6, "what is closed is given back"


def fill_large(directory: Path) -> int:
    """A million entries in two shards, exactly searched; a minute's building."""
    create(directory, DESCRIPTION)
    for number in range(10):
        part = small_segment(number, utterances=10_000, length=10)
        write_segment(directory, f"part-{number}", part)
    publish(directory, [f"part-{number}" for number in range(10)])
    build_again(directory, Index(kind="flat", shards=2))
    return Datastore.open(directory).entries


def private_bytes(pool) -> int:
    def read(_):
        pages = [int(value) for value in Path("/proc/self/statm").read_text().split()]
        return (pages[1] - pages[2]) * os.sysconf("SC_PAGE_SIZE")

    return ray.get(pool.__ray_call__.remote(read))
