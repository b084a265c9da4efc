"""A datastore served by actors answers as it would in one process, and without the dead ones."""

import math
import os
import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from signal import SIGKILL

import numpy as np
import pytest
import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError

from cluster import shards
from cluster.channel import Channel
from cluster.shards import (
    ANSWER_SECONDS,
    NAMESPACE,
    IndexShardActor,
    ShardedRetriever,
    serve_shards,
)
from mmrag.config import Index
from mmrag.records import NO_ENTRY
from mmrag.retrieval.datastore import Datastore, create, delete, publish, write_segment
from mmrag.retrieval.index import (
    IndexShard,
    build_again,
    save_index,
    saved_shards,
    shard_directory,
    shard_ranges,
)
from mmrag.retrieval.retrievers import LocalRetriever
from mmrag.retrieval.segment import DatastoreError, Description, Segment, windows_of

pytestmark = pytest.mark.ray

ENTRIES, WIDTH, WINDOW = 90, 6, 4
RANGES = shard_ranges(ENTRIES, 2)
DESCRIPTION = Description(WIDTH, WINDOW, "l2", "none", identity={})


@pytest.fixture(scope="module")
def datastore(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 entries in two saved shards. Keys on a coarse grid, so that many distances are equal."""
    return make(tmp_path_factory.mktemp("datastore"))


@pytest.fixture
def growing(ray_cluster: str, tmp_path: Path) -> Path:
    """The same, for one test alone, which may add to it."""
    return make(tmp_path)


def make(directory: Path) -> Path:
    create(directory, DESCRIPTION)
    append(directory, "part-0", ENTRIES, seed=3)
    opened = Datastore.open(directory)
    for number, span in enumerate(RANGES):
        shard = IndexShard.build(opened, *span, Index(kind="flat", shards=2), seed=1)
        shard.save(shard_directory(directory, number))
    return directory


def append(directory: Path, name: str, entries: int, seed: int) -> None:
    """Publish so many entries, ten an utterance, two utterances a document."""
    random = np.random.default_rng(seed)
    tokens = random.integers(1, 40, entries)
    segment = Segment(
        keys=random.integers(-1, 2, (entries, WIDTH)).astype(np.float32),
        tokens=tokens,
        windows=windows_of(tokens, WINDOW),
        positions=np.arange(entries) % 10,
        utterances=np.arange(entries) // 10,
        names=[(f"{name}-{n}", f"{name}-document-{n // 2}") for n in range(-(-entries // 10))],
    )
    write_segment(directory, name, segment)
    publish(directory, [name])


@pytest.fixture(scope="module")
def local(datastore: Path) -> LocalRetriever:
    return LocalRetriever.load(saved_shards(datastore), Datastore.open(datastore))


def start(datastore: Path, number: int) -> ActorHandle:
    shard = saved_shards(datastore)[number]
    return IndexShardActor.options(num_cpus=0.1).remote(datastore, shard)


@pytest.fixture(scope="module")
def room(ray_cluster: str) -> Iterator[None]:
    """Every CPU is free again at the end: an actor that is left over keeps other tests waiting."""
    yield
    until(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"])


@pytest.fixture(scope="module")
def living(room: None, datastore: Path) -> Iterator[list[ActorHandle]]:
    """An actor for each of the two shards."""
    actors = [start(datastore, 0), start(datastore, 1)]
    yield actors
    for actor in actors:
        ray.kill(actor)


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
    sharded = ShardedRetriever([[one] for one in living], RANGES, DESCRIPTION)
    for seed in range(3):
        asked = queries(seed)
        assert_same(sharded.search(asked, k), local.search(asked, k))
        excluded = np.array([0, 1, -1, 4, 2])
        assert_same(sharded.search(asked, k, excluded), local.search(asked, k, excluded))


def test_sharded_windows_equal_local_windows(living, local):
    sharded = ShardedRetriever([[one] for one in living], RANGES, DESCRIPTION)
    entries = np.array([[0, 44, 45], [89, NO_ENTRY, 12]])
    assert np.array_equal(sharded.windows(entries), local.windows(entries))


def assert_same_passages(found, expected) -> None:
    for field in ("tokens", "keys", "present"):
        ours, theirs = getattr(found, field), getattr(expected, field)
        assert ours.dtype == theirs.dtype, field
        assert np.array_equal(ours, theirs), field


@pytest.mark.parametrize("entries", [[0, 44, 45, 89, 12, 45], [60, 61], []])
def test_sharded_origins_equal_those_of_the_datastore(living, datastore, entries):
    sharded = ShardedRetriever([[one] for one in living], RANGES, DESCRIPTION)
    entries = np.array(entries, np.int64)
    assert sharded.origins(entries) == Datastore.open(datastore).origins(entries)


@pytest.mark.parametrize("entries", [[0, 44, 45, 89, 12, 45], [60, 61], []])
def test_sharded_passages_equal_those_of_the_datastore(living, datastore, entries):
    sharded = ShardedRetriever([[one] for one in living], RANGES, DESCRIPTION)
    entries = np.array(entries, np.int64)
    assert_same_passages(sharded.passages(entries), Datastore.open(datastore).passages(entries))


def test_passages_reach_from_one_shard_into_the_next(living, datastore):
    """The window around a shard's last entry holds the next shard's first."""
    sharded = ShardedRetriever([[one] for one in living], RANGES, DESCRIPTION)
    opened, last = Datastore.open(datastore), RANGES[0][1] - 1
    found = sharded.passages(np.array([last]))
    assert opened.utterances[last] == opened.utterances[last + 1]
    assert opened.tokens[last + 1] in found.tokens[0]
    assert_same_passages(found, opened.passages(np.array([last])))


def test_a_dead_replica_loses_nothing(living, dead, local, monkeypatch):
    monkeypatch.setattr(shards, "REST_SECONDS", 0)
    sharded = ShardedRetriever([[dead, living[0]], [living[1]]], RANGES, DESCRIPTION)
    for seed in range(4):  # replicas take turns: the dead one is asked first in every other search
        asked = queries(seed)
        assert_same(sharded.search(asked, 8), local.search(asked, 8))
    entries = np.arange(ENTRIES)
    assert np.array_equal(sharded.windows(entries), local.windows(entries))
    for _ in range(2):
        assert_same_passages(sharded.passages(entries), local.passages(entries))


def test_a_dead_shard_is_counted_and_the_others_still_answer(living, dead, local):
    sharded = ShardedRetriever([[dead], [living[1]]], RANGES, DESCRIPTION)
    found = sharded.search(queries(1), 8)
    assert found.missing_shards == 1
    alone = local.shards[1].search(queries(1), 8)
    assert np.array_equal(found.entries, alone.entries)
    assert np.array_equal(found.distances, alone.distances)
    windows = sharded.windows(np.array([3, 60]))
    assert not windows[0].any()
    assert np.array_equal(windows[1], local.windows(np.array([60]))[0])
    named = sharded.origins(np.array([60, 3, 61]))
    assert named == [local.origins(np.array([60]))[0], ("", ""), local.origins(np.array([61]))[0]]


def test_about_what_living_shards_hold_no_dead_one_is_asked(living, dead, local, monkeypatch):
    sharded, entries = (
        ShardedRetriever([[dead], [living[1]]], RANGES, DESCRIPTION),
        np.array([60, 89]),
    )
    ask, asked = sharded._ask, []

    def noting(method, arguments):
        asked.append(set(arguments))
        return ask(method, arguments)

    monkeypatch.setattr(sharded, "_ask", noting)
    assert np.array_equal(sharded.windows(entries), local.windows(entries))
    assert_same_passages(sharded.passages(entries), local.passages(entries))
    assert sharded.origins(entries) == local.origins(entries)
    assert asked == [{1}, {1}, {1}]


def test_passages_of_a_dead_shard_are_empty_and_the_others_whole(living, dead, local):
    sharded = ShardedRetriever([[dead], [living[1]]], RANGES, DESCRIPTION)
    found = sharded.passages(np.array([3, 60, 10, 70]))
    whole = local.passages(np.array([60, 70]))
    for field in ("tokens", "keys", "present"):
        assert not getattr(found, field)[[0, 2]].any(), field
        assert np.array_equal(getattr(found, field)[[1, 3]], getattr(whole, field)), field


def test_with_every_shard_dead_nothing_is_found_and_nothing_known_of_what_was(dead):
    sharded = ShardedRetriever([[dead]], RANGES[:1], DESCRIPTION)
    found = sharded.search(queries(1), 3)
    assert found.missing_shards == 1
    assert (found.entries == NO_ENTRY).all() and np.isinf(found.distances).all()
    assert sharded.windows(np.array([[1, 2]])).tolist() == [[[0] * WINDOW] * 2]
    passages = sharded.passages(np.array([1]))
    assert passages.keys.shape == (1, WINDOW, WIDTH)
    assert not any(values.any() for values in vars(passages).values())
    assert sharded.origins(np.array([1])) == [("", "")]
    assert sharded.ping(3) == 1


def test_a_shard_that_takes_too_long_counts_as_missing_and_is_left_alone(
    living, local, monkeypatch
):
    @ray.remote(num_cpus=0.1)
    class Stuck:
        def address(self):
            return None

        def search(self, queries, k, exclude_documents):
            time.sleep(120)

    stuck = Stuck.remote()
    ray.get(stuck.address.remote())
    sharded = ShardedRetriever([[stuck], [living[1]]], RANGES, DESCRIPTION, answer_seconds=1)
    call, asked = sharded._call, []

    def noting(place, *arguments):
        asked.append(place)
        return call(place, *arguments)

    monkeypatch.setattr(sharded, "_call", noting)
    found = sharded.search(queries(2), 4)
    assert asked == [(0, 0), (1, 0)]
    assert found.missing_shards == 1
    assert np.array_equal(found.entries, local.shards[1].search(queries(2), 4).entries)

    monkeypatch.setattr(shards, "REST_SECONDS", 600)
    assert_same(sharded.search(queries(2), 4), found)
    assert asked[2:] == [(1, 0)], "the other was asked just now"
    monkeypatch.setattr(shards, "REST_SECONDS", 0)
    assert_same(sharded.search(queries(2), 4), found)
    assert asked[3:] == [(0, 0), (1, 0)]
    ray.kill(stuck)


def test_a_replica_that_failed_is_asked_again_once_it_answers_a_ping(living, local, monkeypatch):
    sharded = ShardedRetriever([[one] for one in living], RANGES, DESCRIPTION)

    def late(_):
        raise GetTimeoutError

    with monkeypatch.context() as patch:
        patch.setattr(sharded, "_call", lambda *_: late)
        assert sharded.search(queries(2), 4).missing_shards == 2
    assert sharded.search(queries(2), 4).missing_shards == 2
    assert sharded.ping(20) == 0
    assert_same(sharded.search(queries(2), 4), local.search(queries(2), 4))


def test_a_mistake_in_the_question_is_an_error_and_no_missing_shard(living):
    sharded = ShardedRetriever([[one] for one in living], RANGES, DESCRIPTION)
    with pytest.raises(ValueError, match="the keys have width 6"):
        sharded.search(np.zeros((2, WIDTH + 1), np.float32), 3)


def pid_of(actor: ActorHandle) -> int:
    return ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))


def until(happens: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline, "it never happens"
        time.sleep(0.05)


def replicas_of(served: ShardedRetriever) -> list[ActorHandle]:
    return [replica for shard in served._replicas for replica in shard]


@pytest.fixture
def serving(room: None) -> Iterator[Callable[..., ShardedRetriever]]:
    """`serve_shards`, whose actors end with the test."""
    started: list[ShardedRetriever] = []

    def serve(datastore: Path, replicas: int = 1, **options) -> ShardedRetriever:
        started.append(serve_shards(datastore, replicas, num_cpus=0.1, **options))
        return started[-1]

    yield serve
    for served in started:
        served.close()


@pytest.mark.parametrize("signal", [None, SIGKILL])
def test_a_shard_whose_process_dies_is_missing_at_once_and_comes_back(
    serving, datastore, local, signal
):
    served = serving(datastore)
    asked, entries = queries(5), np.array([3, 60])
    assert_same(served.search(asked, 6), local.search(asked, 6))
    first, _ = replicas_of(served)
    if signal is None:
        ray.kill(first, no_restart=False)
    else:
        os.kill(pid_of(first), signal)
    began = time.monotonic()
    until(lambda: served.search(asked, 6).missing_shards)
    assert served.origins(entries)[1] == local.origins(entries)[1]
    assert time.monotonic() - began < ANSWER_SECONDS / 3
    until(lambda: not served.ping(5))
    assert_same(served.search(asked, 6), local.search(asked, 6))
    assert served.origins(entries) == local.origins(entries)
    served.close()
    for actor in replicas_of(served):
        assert_dies(actor)


def test_shards_copy_their_keys_behind_their_answers(serving, datastore, local, tmp_path):
    served = serving(datastore, local=tmp_path / "copies")
    asked = queries(5)
    assert_same(served.search(asked, 6), local.search(asked, 6))
    segments = Datastore.open(datastore).segments
    until(lambda: len(list((tmp_path / "copies").glob("[!.]*.npy"))) == len(segments))
    assert_same(served.search(asked, 6), local.search(asked, 6))


def test_shards_that_cannot_copy_their_keys_answer_all_the_same(
    serving, datastore, local, tmp_path
):
    (tmp_path / "file").touch()
    served = serving(datastore, local=tmp_path / "file" / "copies")
    asked = queries(5)
    assert_same(served.search(asked, 6), local.search(asked, 6))
    served.refresh()
    assert not served.ping(5)


def test_a_datastore_without_a_saved_index_is_not_served(ray_cluster, tmp_path):
    create(tmp_path, DESCRIPTION)
    with pytest.raises(DatastoreError, match=f"no index of {tmp_path}"):
        serve_shards(tmp_path, replicas=1, num_cpus=0.1)


def test_an_actor_that_cannot_load_its_shard_says_why(room, growing):
    (saved_shards(growing)[1] / "shard.json").unlink()
    with pytest.raises(RayActorError, match="holds no index shard"):
        serve_shards(growing, replicas=1, num_cpus=0.1, owner="damaged")


def test_an_empty_datastore_is_served_and_grows(serving, tmp_path):
    create(tmp_path, DESCRIPTION)
    save_index(tmp_path)
    served = serving(tmp_path)
    assert served.entries == 0
    found = served.search(queries(1), 3)
    assert (found.entries == NO_ENTRY).all() and found.missing_shards == 0
    append(tmp_path, "first", 10, seed=4)
    served.refresh()
    assert served.entries == 10
    whole = LocalRetriever.load(saved_shards(tmp_path), Datastore.open(tmp_path))
    assert_same(served.search(queries(1), 12), whole.search(queries(1), 12))


def test_what_is_published_and_deleted_is_served_after_a_refresh_by_every_replica(serving, growing):
    served = serving(growing, replicas=2)
    before = LocalRetriever.load(saved_shards(growing), Datastore.open(growing))
    append(growing, "later", 15, seed=8)
    delete(growing, [2, 60, 95])
    assert_same(served.search(queries(1), 120), before.search(queries(1), 120))
    served.refresh()
    assert served.entries == ENTRIES + 15
    before.refresh()
    after = LocalRetriever.load(saved_shards(growing), Datastore.open(growing))
    entries = np.array([104, 0, 90])
    for _ in range(2):  # replicas take turns
        found = served.search(queries(1), 120)
        assert_same(found, after.search(queries(1), 120))
        assert_same(found, before.search(queries(1), 120))
        assert np.array_equal(served.windows(entries), after.windows(entries))
        assert_same_passages(served.passages(entries), after.passages(entries))
        assert served.origins(entries) == after.origins(entries)
    assert sorted(found.entries[0, :102]) == sorted({*range(105)} - {2, 60, 95})


def test_an_actor_that_starts_again_has_taken_in_what_was_published_since(serving, growing):
    served = serving(growing)
    append(growing, "later", 15, seed=8)
    ended = [pid_of(actor) for actor in replicas_of(served)]
    for actor in replicas_of(served):
        ray.kill(actor, no_restart=False)
    until(lambda: not any(map(lives, ended)))
    after = LocalRetriever.load(saved_shards(growing), Datastore.open(growing))
    until(lambda: not served.ping(5))
    assert_same(served.search(queries(1), 120), after.search(queries(1), 120))
    assert ray.get([actor.range.remote() for actor in replicas_of(served)]) == [(0, 45), (45, 105)]


def test_what_another_process_took_in_is_known_to_a_retriever_that_was_sent_before(
    serving, growing
):
    served = serving(growing, replicas=2)
    sent = pickle.loads(pickle.dumps(served))
    append(growing, "later", 15, seed=8)
    fresh = served._replicas[1][0]
    assert ray.get(fresh.refresh.remote()) == (45, 105)
    entries = np.array([104, 3])
    for _ in range(2):  # also by the replica that has not taken it in yet
        assert sent.origins(entries)[0] == ("later-document-0", "later-1")
        assert sent.windows(entries).any(1).all()
    assert sent.entries == ENTRIES
    sent.refresh()
    assert sent.entries == ENTRIES + 15


def test_an_owners_actors_are_shared_and_outlive_the_process_that_started_them(
    serving, datastore, local
):
    started = ray.get(serve_elsewhere.remote(datastore, "shared"))
    served = serving(datastore, owner="shared")
    assert [pid_of(actor) for actor in replicas_of(served)] == started
    assert_same(served.search(queries(5), 6), local.search(queries(5), 6))
    again = serving(datastore, owner="shared")
    assert [pid_of(actor) for actor in replicas_of(again)] == started
    named = ray.util.list_named_actors(all_namespaces=True)
    for number in range(2):
        assert {"name": f"shared-index-{number}-0", "namespace": NAMESPACE} in named
    apart = serving(datastore, owner="other")
    assert not {pid_of(actor) for actor in replicas_of(apart)} & {*started}


@ray.remote(num_cpus=0.1, max_calls=1)
def serve_elsewhere(datastore: Path, owner: str) -> list[int]:
    """Serve in a process that ends afterwards; the actors' process ids."""
    return [pid_of(one) for one in replicas_of(serve_shards(datastore, 1, 0.1, owner=owner))]


def test_shared_actors_that_were_killed_for_good_are_made_again(serving, datastore, local):
    first = serving(datastore, owner="killed")
    for actor in replicas_of(first):
        ray.kill(actor)
    again = serving(datastore, owner="killed")
    assert_same(again.search(queries(5), 6), local.search(queries(5), 6))
    assert first.ping(5) == 2, "a retriever keeps the actors it was made with"


def test_actors_that_nobody_asks_end_for_good_and_those_asked_live_on(serving, datastore):
    idle = serving(datastore, owner="idle", idle_seconds=1)
    kept = serving(datastore, owner="kept", idle_seconds=2)
    alive = [pid_of(actor) for actor in replicas_of(kept)]
    deadline = time.monotonic() + 2.5
    while time.monotonic() < deadline:
        assert kept.ping(5) == 0
        time.sleep(0.2)
    assert [pid_of(actor) for actor in replicas_of(kept)] == alive

    def names() -> set[str]:
        return {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}

    until(lambda: not kept.ping(5) and not {"idle-index-0-0", "idle-index-1-0"} & names())
    assert {"kept-index-0-0", "kept-index-1-0"} <= names()
    for actor in replicas_of(idle):
        with pytest.raises(ActorDiedError):
            ray.get(actor.range.remote(), timeout=10)


def lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_actor_of_an_index_that_another_took_the_place_of_goes_on_taking_in(serving, growing):
    served = serving(growing)
    build_again(growing, Index(kind="flat", shards=3))
    for actor in replicas_of(served):
        ray.kill(actor, no_restart=False)
    until(lambda: served.search(queries(1), 1).missing_shards)
    until(lambda: not served.ping(5))
    append(growing, "later", 15, seed=8)
    served.refresh()
    again = serving(growing)
    assert len(replicas_of(again)) == 3
    assert_same(served.search(queries(4), 120), again.search(queries(4), 120))


def test_an_index_that_was_built_again_in_other_shards_has_actors_of_its_own(serving, growing):
    """Under the same owner, too: shards of both would hold entries twice."""
    served = serving(growing, owner="rebuilt")
    before = served.search(queries(4), 120)
    build_again(growing, Index(kind="flat", shards=3))
    again = serving(growing, owner="rebuilt")
    assert [len(replicas_of(one)) for one in (served, again)] == [2, 3]
    append(growing, "later", 15, seed=8)
    for one in (served, again):
        assert_same(one.search(queries(4), 90), before.top(90))
        one.refresh()
    after = LocalRetriever.load(saved_shards(growing), Datastore.open(growing))
    for one in (served, again):
        assert_same(one.search(queries(4), 120), after.search(queries(4), 120))


@pytest.fixture(scope="module")
def only_read(room: None, datastore: Path) -> Iterator[ShardedRetriever]:
    """Two actors that every test finds as they were started."""
    served = serve_shards(datastore, 1, num_cpus=0.1)
    yield served
    served.close()


@pytest.fixture
def another(only_read: ShardedRetriever) -> Iterator[ShardedRetriever]:
    """A retriever of theirs for one test, whose channels are its own too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "channel_to", Channel)
        yield pickle.loads(pickle.dumps(only_read))


def reached_directly(served: ShardedRetriever) -> ShardedRetriever:
    """The same, once every actor is asked over a connection."""

    def all_connected() -> bool:
        served.search(queries(0), 1)
        return all(channel._free for shard in served._channels for channel in shard)

    until(all_connected)
    return served


def reached_through_ray(served: ShardedRetriever) -> ShardedRetriever:
    """The same, with no connection to be had."""
    for channel in (channel for shard in served._channels for channel in shard):
        channel._blocked = math.inf
        channel._free.clear()
    return served


WAYS = pytest.mark.parametrize("reached", [reached_directly, reached_through_ray])


def test_what_is_searched_goes_past_ray_once_the_way_is_known(another, local):
    served = reached_directly(another)
    served._remote = None
    asked = queries(5)
    for excluded in (None, np.array([0, 1, -1, 4, 2])):
        assert_same(served.search(asked, 6, excluded), local.search(asked, 6, excluded))


@WAYS
def test_searches_of_many_threads_are_not_mistaken_for_each_other(another, local, reached):
    served = reached(another)
    asked = [queries(seed) for seed in range(40)]
    with ThreadPoolExecutor(8) as threads:
        for found, own in zip(
            threads.map(lambda q: served.search(q, 6), asked), asked, strict=True
        ):
            assert_same(found, local.search(own, 6))


@WAYS
def test_a_mistake_is_the_same_error_either_way(another, reached):
    served = reached(another)
    for _ in range(2):
        with pytest.raises(ValueError, match="the keys have width 6"):
            served.search(np.zeros((2, WIDTH + 1), np.float32), 3)
        with pytest.raises(ValueError, match="1 exclusions for 2 queries"):
            served.search(queries(0, 2), 3, [4])
        with pytest.raises(TypeError):
            served.search(queries(0, 2), 2.5)


def hold_searches(actor: ActorHandle, begun: Path) -> None:
    """The actor's searches take a minute from now on; one that has begun leaves its process id."""

    def hold(self, begun: Path) -> None:
        def held(*_):
            begun.write_text(str(os.getpid()))
            time.sleep(60)

        self._shard.search = held

    ray.get(actor.__ray_call__.remote(hold, begun))


@WAYS
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_shard_that_is_killed_amid_a_search(
    serving, datastore, local, tmp_path, reached, replicas
):
    """Another replica answers in its place; without one it is counted, and the others answer."""
    served = reached(serving(datastore, replicas))
    turn, asked, begun = next(served._turn), queries(5), tmp_path / "begun"
    hold_searches(served._replicas[0][(turn + 1) % replicas], begun)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(served.search, asked, 6)
        until(lambda: begun.exists() and begun.read_text())
        os.kill(int(begun.read_text()), SIGKILL)
        found = answer.result(ANSWER_SECONDS / 2)
    if replicas == 2:
        assert_same(found, local.search(asked, 6))
    else:
        assert found.missing_shards == 1
        assert np.array_equal(found.entries, local.shards[1].search(asked, 6).entries)
    until(lambda: not served.ping(5))
    until(lambda: not served.search(asked, 6).missing_shards)
    assert_same(served.search(asked, 6), local.search(asked, 6))


@WAYS
def test_when_every_replica_of_every_shard_is_killed_searches_say_so_until_they_are_back(
    serving, datastore, local, reached
):
    """Ray starts them again, sooner or later; the second time it is told not to."""
    served, asked = reached(serving(datastore, replicas=2)), queries(5)
    expected = local.search(asked, 6)
    alone = [one.search(asked, 6).entries for one in local.shards]

    def whole() -> bool:
        found = served.search(asked, 6)
        if found.missing_shards == 2:
            assert (found.entries == NO_ENTRY).all()
        elif found.missing_shards == 1:
            assert any(np.array_equal(found.entries, one) for one in alone)
        else:
            assert_same(found, expected)
        return not found.missing_shards

    ended = [pid_of(actor) for actor in replicas_of(served)]
    for process in ended:
        os.kill(process, SIGKILL)
    until(lambda: not any(map(lives, ended)))
    until(whole)
    until(lambda: not served.ping(5))
    for _ in range(2):
        assert_same(served.search(asked, 6), expected)
    for actor in replicas_of(served):
        ray.kill(actor, no_restart=True)
    until(lambda: served.ping(5) == 2)
    began = time.monotonic()
    found = served.search(asked, 6)
    assert time.monotonic() - began < ANSWER_SECONDS
    assert found.missing_shards == 2 and (found.entries == NO_ENTRY).all()
