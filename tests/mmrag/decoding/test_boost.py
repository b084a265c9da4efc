"""What a phrase earns piece by piece, and gives back when it is left."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmrag.decoding.boost import Boost
from mmrag.model.vocabulary import EOS

SIZE = 10
STARTS = torch.zeros(SIZE, dtype=torch.bool)
STARTS[[EOS, 3, 4, 5, 6]] = True
"""Tokens 3 to 6 start a word, 7 to 9 go on with one."""
WORDS = ([3], [4], [5, 7], [5, 8, 9], [6, 7], [6, 8])
"""No word is the beginning of another."""
WEIGHT = 0.5


def joined(lists):
    return [*itertools.chain.from_iterable(lists)]


phrases = st.lists(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(joined),
    max_size=6,
)
texts = st.lists(st.sampled_from([*WORDS, [7], [8], [EOS]]), max_size=9).map(joined)


def earned(phrases, tokens):
    """The slow twin: what `tokens` have earned so far, from lists of phrases alone."""
    total, run = 0, []
    for token in tokens:
        if begins(phrases, [*run, token]):
            run.append(token)
            continue
        total += kept(phrases, run, token)
        run = [token] if begins(phrases, [token]) else []
    return WEIGHT * (total + len(run))


def begins(phrases, run):
    return bool(STARTS[run[0]]) and any(phrase[: len(run)] == run for phrase in phrases)


def kept(phrases, run, following):
    """Length of the longest phrase that `run` starts with and that ends where a word does."""
    after = [*run, following]
    return max((len(p) for p in phrases if run[: len(p)] == p and STARTS[after[len(p)]]), default=0)


def total(phrases, tokens, weight=WEIGHT):
    """The sum of what each token earned when it was chosen."""
    boost = Boost(phrases, weight, STARTS)
    return sum(float(boost.bonus(tokens[:i])[token]) for i, token in enumerate(tokens))


@given(phrases, texts)
def test_the_bonus_of_every_next_token_is_what_it_adds_to_the_earnings(phrases, tokens):
    boost = Boost(phrases, WEIGHT, STARTS)
    for end in range(len(tokens) + 1):
        before = tokens[:end]
        bonus = boost.bonus(before)
        assert bonus.shape == (SIZE,) and bonus.dtype == torch.float32
        expected = [
            earned(phrases, [*before, token]) - earned(phrases, before) for token in range(SIZE)
        ]
        assert bonus.tolist() == expected


@given(phrases, texts)
def test_the_prefix_followed_is_the_one_not_yet_settled(phrases, tokens):
    node = Boost(phrases, WEIGHT, STARTS).follow(tokens)
    unsettled = tokens[len(tokens) - node.depth :]
    assert node.depth == 0 or begins(phrases, unsettled)
    going_on = {p[node.depth] for p in phrases if p[: node.depth] == unsettled and p != unsettled}
    assert set(node.children) == going_on


@given(phrases.filter(bool), st.data())
def test_a_whole_phrase_keeps_a_reward_for_each_of_its_pieces(phrases, data):
    phrase = data.draw(st.sampled_from(phrases))
    assert total(phrases, [*phrase, EOS]) == WEIGHT * len(phrase)


def test_an_unfinished_phrase_gives_all_of_it_back():
    assert total([[3, 4, 5, 7]], [3, 4, 5]) == 3 * WEIGHT
    assert total([[3, 4, 5, 7]], [3, 4, 5, 8]) == 0
    assert total([[3, 4, 5, 7]], [3, 4, EOS]) == 0


def test_a_phrase_within_a_longer_one_is_kept_when_the_longer_one_is_left():
    assert total([[3], [3, 4, 5, 7]], [3, 4, 5, 8]) == WEIGHT
    assert total([[3], [3, 4], [3, 4, 5, 7]], [3, 4, 5, EOS]) == 2 * WEIGHT


def test_a_phrase_that_goes_on_inside_its_last_word_is_not_kept():
    assert total([[3, 5, 7]], [3, 5, 7, EOS]) == 3 * WEIGHT
    assert total([[3, 5, 7]], [3, 5, 7, 9]) == 0
    assert total([[3], [3, 5, 7]], [3, 5, 7, 9]) == WEIGHT


def test_one_phrase_may_follow_the_other_at_once():
    assert total([[3, 4], [5, 7]], [3, 4, 5, 7, 3, 4, EOS]) == 6 * WEIGHT
    assert total([[3, 4], [5, 7]], [3, 5, 7, EOS]) == 2 * WEIGHT, "from a phrase that was left"


def test_without_phrases_nothing_is_earned():
    boost = Boost([], WEIGHT, STARTS)
    assert boost.bonus([3, 7, 4]).tolist() == [0] * SIZE
    assert boost.follow([3, 7, 4]) is boost.root


@given(phrases, texts, st.sampled_from([0.0, 0.25, 4.0]))
def test_the_weight_is_a_factor(phrases, tokens, weight):
    one, other = Boost(phrases, 1.0, STARTS), Boost(phrases, weight, STARTS)
    assert torch.equal(other.bonus(tokens), weight * one.bonus(tokens))


@pytest.mark.parametrize("tokens", [[3, 7, 8, EOS], [3, 7, EOS], [3, 7, 4]])
def test_a_word_that_begins_with_a_phrase_does_not_earn_the_phrase(tokens):
    """`mark` and `marketing` are phrases, `market` is said."""
    assert total([[3], [3, 7, 9]], tokens) == 0


def test_a_phrase_is_not_met_inside_a_word():
    assert total([[7]], [3, 7, EOS]) == 0
    assert total([[7, 8]], [3, 7, 8, EOS]) == 0
