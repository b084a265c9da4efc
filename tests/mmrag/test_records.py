"""What flows between the stages keeps its shape, and shards merge to one answer."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrag.records import NO_ENTRY, Letters, Neighbours, Units, merge


def neighbours(distances: np.ndarray, entries: np.ndarray, missing_shards: int = 0) -> Neighbours:
    """Neighbours whose tokens and documents can be told from their entries."""
    return Neighbours(
        distances=distances.astype(np.float32),
        tokens=(entries * 7).astype(np.int32),
        entries=entries.astype(np.int64),
        documents=(entries * 3).astype(np.int32),
        missing_shards=missing_shards,
    )


def nearest(distances: np.ndarray, entries: np.ndarray, k: int) -> Neighbours:
    """Slow twin of a search: B queries' distances (B, N) to `entries` (N,), padded to k."""
    found = Neighbours.none(len(distances), k)
    for query, row in enumerate(distances):
        for column, (distance, entry) in enumerate(sorted(zip(row, entries, strict=True))[:k]):
            found.distances[query, column] = distance
            found.entries[query, column] = entry
            found.tokens[query, column] = entry * 7
            found.documents[query, column] = entry * 3
    return found


def assert_equal(one: Neighbours, other: Neighbours) -> None:
    for name in ("distances", "tokens", "entries", "documents"):
        ours, theirs = getattr(one, name), getattr(other, name)
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
        assert ours.dtype == theirs.dtype, name


@given(
    entries=st.integers(0, 12),
    queries=st.integers(1, 3),
    shards=st.integers(1, 4),
    k=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_merged_shards_equal_one_search_even_among_ties(entries, queries, shards, k, seed):
    rng = np.random.default_rng(seed)
    distances = rng.integers(4, size=(queries, entries)).astype(np.float32)
    owner, ids = rng.integers(shards, size=entries), rng.permutation(entries)
    parts = [
        nearest(distances[:, owner == shard], ids[owner == shard], k) for shard in range(shards)
    ]
    assert_equal(merge(parts, k), nearest(distances, ids, k))


def test_merging_counts_the_shards_that_did_not_answer():
    found = neighbours(np.array([[0.5, 2.0]]), np.array([[4, 1]]))
    merged = merge([found, Neighbours.none(1, 2, missing_shards=2)], 2)
    assert merged.missing_shards == 2
    assert_equal(merged, found)


def test_nothing_found_is_no_entry_at_infinity():
    none = Neighbours.none(2, 3, missing_shards=1)
    assert none.entries.shape == (2, 3) and (none.entries == NO_ENTRY).all()
    assert np.isposinf(none.distances).all() and none.missing_shards == 1
    assert (none.documents == -1).all() and (none.tokens == 0).all()


def test_top_keeps_the_nearest_columns():
    found = neighbours(np.array([[1.0, 2.0, 3.0]]), np.array([[5, 6, 7]]), missing_shards=1)
    expected = neighbours(np.array([[1.0, 2.0]]), np.array([[5, 6]]))
    assert_equal(found.top(2), expected)
    assert found.top(2).missing_shards == 1


def test_units_need_one_duration_an_id():
    assert len(Units(np.array([1, 2], np.int32), np.array([3, 1], np.int32))) == 2
    with pytest.raises(ValueError, match=r"\(2,\) ids, \(3,\) durations"):
        Units(np.zeros(2, np.int32), np.zeros(3, np.int32))
    with pytest.raises(ValueError, match="one duration an id"):
        Units(np.zeros((2, 2), np.int32), np.zeros((2, 2), np.int32))


@given(frames=st.integers(0, 9), letters=st.integers(0, 30), seed=st.integers(0, 2**32 - 1))
def test_letters_are_kept_to_a_twentieth_of_a_nat_down_to_the_least_likely(frames, letters, seed):
    random = np.random.default_rng(seed)
    logp = -random.uniform(0, 40, (frames, 1 + letters)).astype(np.float32)
    kept = Letters.of("x" * letters, logp)
    assert kept.costs.dtype == np.uint8 and len(kept) == frames
    assert kept.logp().dtype == np.float32 and kept.logp().shape == logp.shape
    np.testing.assert_allclose(kept.logp(), logp.clip(-25.5), atol=0.05 + 1e-5, rtol=0)


def test_certain_and_impossible_letters_are_kept_as_they_are_and_as_the_least_likely():
    kept = Letters.of("a", np.array([[0.0, -np.inf], [-1e9, 1e-7]], np.float32))
    np.testing.assert_array_equal(kept.costs, [[0, 255], [255, 0]])


def test_letters_need_a_column_each_and_one_for_the_blank():
    with pytest.raises(ValueError, match=r"2 letters has costs \(F, 3\), not \(5, 2\)"):
        Letters.of("ab", np.zeros((5, 2)))
    with pytest.raises(ValueError, match=r"2 letters has costs \(F, 3\), not \(3,\)"):
        Letters("ab", np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match="costs are uint8, not float64"):
        Letters("ab", np.zeros((5, 3)))


def test_letters_are_of_the_frames_that_the_units_last():
    ids, durations = np.array([1, 2], np.int32), np.array([3, 1], np.int32)
    assert Units(ids, durations).letters is None
    heard = Letters.of("ab", np.zeros((4, 3)))
    assert Units(ids, durations, heard).letters is heard
    with pytest.raises(ValueError, match=r"4 frames .* not in 3: costs \(3, 3\)"):
        Units(ids, durations, Letters.of("ab", np.zeros((3, 3))))
