from random import Random

from hypothesis import given
from hypothesis import strategies as st

from mmrag.corpora.drawn import Drawn, Sentence

SENTENCES = st.lists(
    st.builds(
        Sentence,
        text=st.text(max_size=5),
        domain=st.sampled_from(["everyday", "assistant", "requests"]),
        entities=st.lists(st.text(max_size=3), max_size=2).map(tuple),
    ),
    max_size=12,
)


@given(st.lists(SENTENCES, max_size=4), st.integers())
def test_columns_are_read_and_shuffled_as_a_list_of_the_sentences_is(shares, seed):
    ours, drawn = [], Drawn()
    for number, share in enumerate(shares):
        ours += share
        drawn.extend(share)
        assert list(drawn) == ours and len(drawn) == len(ours)
        Random(f"{seed} {number}").shuffle(ours)
        drawn.shuffle(Random(f"{seed} {number}"))
        assert list(drawn) == ours
