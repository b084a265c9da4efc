"""What retrievers of this process offer beside a search: what follows, how far, what changed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrag.config import Index
from mmrag.records import NO_ENTRY
from mmrag.retrieval import datastore as stored
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.retrievers import SECOND, JoinedRetriever, LocalRetriever, SubsetRetriever
from mmrag.retrieval.segment import Description, Segment

WIDTH = 4
FLAT = Index(kind="flat", shards=3)


def segment(name, lengths, seed=0):
    """Utterances of these lengths, two to a document."""
    random = np.random.default_rng(seed)
    count = sum(lengths)
    return Segment(
        keys=random.standard_normal((count, WIDTH)).astype(np.float32),
        tokens=random.integers(1, 50, count).astype(np.int32),
        windows=np.zeros((count, 2), np.int32),
        positions=np.concatenate([np.arange(length) for length in lengths]),
        utterances=np.repeat(np.arange(len(lengths)), lengths),
        names=[(f"{name}-{n}", f"{name}-{n // 2}") for n in range(len(lengths))],
    )


def description(metric="l2"):
    return Description(WIDTH, 2, metric, "none", {})


STORE = Datastore.of(description(), [segment("a", [3, 1, 4]), segment("b", [2, 5], seed=1)])
ENDS = [2, 3, 7, 9, 14]
"""Each utterance's last entry."""


def followed(entries, retriever):
    behind, tokens = retriever.following(np.array(entries)[None])
    assert tokens[behind == NO_ENTRY].tolist() == [0] * int((behind == NO_ENTRY).sum())
    return behind[0].tolist(), tokens[0].tolist()


def test_an_entry_is_followed_to_the_end_of_its_utterance():
    behind, tokens = followed([NO_ENTRY, *range(15)], LocalRetriever.build(STORE, FLAT, 0))
    wanted = [NO_ENTRY if e in ENDS else e + 1 for e in range(15)]
    assert behind == [NO_ENTRY, *wanted]
    assert tokens == [0, *(0 if e == NO_ENTRY else STORE.tokens[e] for e in wanted)]


def test_what_was_deleted_is_not_followed(tmp_path):
    stored.create(tmp_path, description())
    stored.write_segment(tmp_path, "a", segment("a", [5, 5]))
    stored.publish(tmp_path, ["a"])
    retriever = LocalRetriever.build(Datastore.open(tmp_path), FLAT, 0)
    before = retriever.snapshot
    stored.delete(tmp_path, [1, 7])
    assert followed([0, 6], retriever)[0] == [1, 7] and retriever.snapshot == before
    retriever.refresh()
    assert followed([0, 1, 6, 7], retriever)[0] == [NO_ENTRY, 2, NO_ENTRY, 8]
    assert retriever.snapshot != before
    assert followed([0, 1], SubsetRetriever(retriever.datastore, np.arange(5)))[0] == [NO_ENTRY, 2]


def test_what_is_published_makes_another_snapshot(tmp_path):
    stored.create(tmp_path, description())
    stored.write_segment(tmp_path, "a", segment("a", [5]))
    stored.publish(tmp_path, ["a"])
    retriever = LocalRetriever.build(Datastore.open(tmp_path), FLAT, 0)
    seen = {retriever.snapshot}
    for shard in retriever.shards:
        shard.delete([0])
    seen.add(retriever.snapshot)
    stored.write_segment(tmp_path, "b", segment("b", [5]))
    stored.publish(tmp_path, ["b"])
    retriever.refresh()
    seen.add(retriever.snapshot)
    assert len(seen) == 3


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(0, 14)), st.lists(st.integers(-1, 14), min_size=1, max_size=6))
def test_a_subset_is_followed_where_it_has_what_comes_next(kept, entries):
    whole, _ = followed(entries, LocalRetriever.build(STORE, FLAT, 0))
    behind, _ = followed(entries, SubsetRetriever(STORE, np.array(sorted(kept), np.int64)))
    assert behind == [one if one in kept else NO_ENTRY for one in whole]


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_distances_are_those_of_a_search(metric):
    store = Datastore.of(description(metric), [segment("a", [6, 6])])
    queries = np.random.default_rng(3).standard_normal((3, WIDTH)).astype(np.float32)
    for retriever in (
        LocalRetriever.build(store, FLAT, 0),
        SubsetRetriever(store, np.arange(12)),
        JoinedRetriever(SubsetRetriever(store, np.arange(6)), SubsetRetriever(store, np.arange(9))),
    ):
        found = retriever.search(queries, 5)
        np.testing.assert_array_equal(retriever.apart(queries, found.entries), found.distances)
    nothing = np.full((3, 2), NO_ENTRY)
    assert np.isinf(retriever.apart(queries, nothing)).all()


def test_of_two_datastores_each_is_followed_by_itself():
    first, second = LocalRetriever.build(STORE, FLAT, 0), SubsetRetriever(STORE, np.arange(3))
    entries = [0, 2, SECOND, SECOND + 1, SECOND + 2, NO_ENTRY]
    behind, _ = followed(entries, JoinedRetriever(first, second))
    assert behind == [1, NO_ENTRY, SECOND + 1, SECOND + 2, NO_ENTRY, NO_ENTRY]
    assert JoinedRetriever(first, second).snapshot is not None


def test_a_datastore_of_another_process_is_not_followed_and_has_no_snapshot():
    class Remote:
        """Searches alone."""

    joined = JoinedRetriever(Remote(), SubsetRetriever(STORE, np.arange(3)))
    assert joined.snapshot is None
    assert followed([0, SECOND], joined)[0] == [NO_ENTRY, SECOND + 1]
    distances = joined.apart(np.zeros((1, WIDTH), np.float32), np.array([[0, SECOND]]))
    assert np.isfinite(distances).tolist() == [[False, True]]
