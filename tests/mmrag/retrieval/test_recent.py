import gc

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrag.records import Neighbours
from mmrag.retrieval.recent import RecentSearches, recent_of

K, WIDTH = 2, 3


def asked(numbers):
    """Queries by their numbers."""
    return np.stack([np.full(WIDTH, number, np.float32) for number in numbers])


def found(numbers, missing_shards=0):
    """Neighbours that name their query."""
    made = Neighbours.none(len(numbers), K, missing_shards)
    made.entries[:, 0] = made.tokens[:, 0] = made.distances[:, 0] = numbers
    return made


def documents(numbers, document=-1):
    return np.full(len(numbers), document)


class Retriever:
    """Nothing but itself."""


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=6), max_size=8))
def test_what_is_known_is_what_was_found_and_the_last_are_known(batches):
    recent, last = RecentSearches(8), []
    for numbers in batches:
        same, known = recent.find(asked(numbers), K, documents(numbers), "now")
        assert known.entries[:, 0].tolist() == [n for n, s in zip(numbers, same, strict=True) if s]
        assert known.distances[:, 0].tolist() == known.entries[:, 0].tolist()
        assert same.tolist() == [number in last for number in numbers]
        recent.keep(asked(numbers), K, documents(numbers), "now", found(numbers))
        last = [*last, *numbers][-8:]


def test_a_batch_larger_than_there_is_room_leaves_its_first():
    recent = RecentSearches(2)
    recent.keep(asked([1, 2, 3]), K, documents([1, 2, 3]), "now", found([1, 2, 3]))
    same, _ = recent.find(asked([1, 2, 3]), K, documents([1, 2, 3]), "now")
    assert same.tolist() == [True, True, False]


def test_another_datastore_document_count_or_bit_is_another_question():
    recent = RecentSearches(4)

    def is_known(query=1.0, k=K, document=7, snapshot="now"):
        recent.keep(asked([1.0]), K, documents([1.0], 7), "now", found([1]))
        return recent.find(asked([query]), k, documents([1], document), snapshot)[0].item()

    assert is_known()
    assert not is_known(query=np.nextafter(np.float32(1), np.float32(2)))
    assert not is_known(k=K + 1)
    assert not is_known(document=-1)
    assert not is_known(snapshot="later")
    recent.find(asked([1.0]), K, documents([1], 7), "later")
    assert not recent.find(asked([1.0]), K, documents([1], 7), "now")[0].any(), "forgotten for good"


def test_what_a_silent_shard_left_out_is_not_kept():
    recent = RecentSearches(4)
    recent.keep(asked([1]), K, documents([1]), "now", found([1], missing_shards=1))
    assert not recent.find(asked([1]), K, documents([1]), "now")[0].any()


def test_a_retriever_has_one_memory_that_ends_with_it():
    one, other = Retriever(), Retriever()
    assert recent_of(one, 4) is recent_of(one, 4) is recent_of(one, 2)
    assert recent_of(one, 4) is not recent_of(other, 4)
    assert recent_of(one, 9).size == 9
    from mmrag.retrieval.recent import _known

    before = len(_known)
    del one
    gc.collect()
    assert len(_known) == before - 1
