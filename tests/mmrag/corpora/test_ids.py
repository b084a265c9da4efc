"""A table of digests answers as a dictionary of the ids would."""

import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from mmrag.corpora.ids import Ids


@given(st.lists(st.text(st.characters(exclude_categories=()), max_size=3), max_size=60))
def test_an_id_is_known_by_where_it_stood_first(ids):
    seen, known = Ids(), {}
    for place, id in enumerate(ids):
        assert seen.first(id, place) == known.get(id)
        known.setdefault(id, place)
    assert len(seen) == len(known)


def test_many_ids_are_kept_apart_in_a_few_bytes_each():
    count = 50_000
    tracemalloc.start()
    seen = Ids()
    assert all(seen.first(f"utterance-{number}", number) is None for number in range(count))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all(seen.first(f"utterance-{n}") == n for n in range(0, count, 97))
    assert held / count < 50
