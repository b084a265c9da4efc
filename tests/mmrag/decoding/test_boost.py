"""What a phrase earns piece by piece, and gives back when it is left."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_decoder import PhraseTree

from mmrag.decoding.boost import MOST_LIFT, START, Boost, BoostedRows
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


def bonus_after(boost, tokens):
    """What each next token would earn."""
    state = np.array([START])
    for token in tokens:
        state = boost.advance(state, np.array([token]))
    return boost.bonus(state)[0]


def total(phrases, tokens, weight=WEIGHT):
    """The sum of what each token earned when it was chosen."""
    boost = Boost(phrases, weight, STARTS)
    return sum(float(bonus_after(boost, tokens[:i])[token]) for i, token in enumerate(tokens))


@given(phrases, texts)
def test_the_bonus_of_every_next_token_is_what_it_adds_to_the_earnings(phrases, tokens):
    boost = Boost(phrases, WEIGHT, STARTS)
    for end in range(len(tokens) + 1):
        before = tokens[:end]
        bonus = bonus_after(boost, before)
        assert bonus.shape == (SIZE,) and bonus.dtype == torch.float32
        expected = [
            earned(phrases, [*before, token]) - earned(phrases, before) for token in range(SIZE)
        ]
        assert bonus.tolist() == expected


@given(phrases, texts)
def test_the_prefix_followed_is_the_one_not_yet_settled(phrases, tokens):
    node = PhraseTree(phrases, WEIGHT, STARTS).follow(tokens)
    unsettled = tokens[len(tokens) - node.depth :]
    assert node.depth == 0 or begins(phrases, unsettled)
    going_on = {p[node.depth] for p in phrases if p[: node.depth] == unsettled and p != unsettled}
    assert set(node.children) == going_on


any_phrases = st.lists(st.lists(st.integers(0, SIZE - 1), max_size=5), max_size=12)
"""Pieces in any order: inside words, one phrase the beginning of another, or empty."""


@given(any_phrases, st.lists(st.integers(0, SIZE - 1), max_size=12))
def test_states_in_arrays_earn_what_a_walk_through_the_tree_earns(phrases, tokens):
    tree, boost = PhraseTree(phrases, WEIGHT, STARTS), Boost(phrases, WEIGHT, STARTS)
    for end in range(len(tokens) + 1):
        assert torch.equal(bonus_after(boost, tokens[:end]), tree.bonus(tokens[:end]))


@given(
    st.lists(any_phrases, min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(-1, 2), st.integers(0, 3)), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
)
def test_rows_are_boosted_by_their_own_phrases_whatever_rows_stay_repeat_and_join(
    lists, arrivals, random
):
    """`arrivals`: which of the lists each row has, -1 for none, and when it comes."""
    boosts = [Boost(own, 0.5 + number, STARTS) for number, own in enumerate(lists)]
    trees = [PhraseTree(own, 0.5 + number, STARTS) for number, own in enumerate(lists)]
    rows, texts = BoostedRows([]), []
    for step in range(5):
        new = [(kind if kind < len(lists) else -1) for kind, when in arrivals if when == step]
        rows.join(BoostedRows([None if kind < 0 else boosts[kind] for kind in new]))
        texts += [(kind, []) for kind in new]
        logp = torch.randn(len(texts), SIZE)
        earned = [
            torch.zeros(SIZE) if kind < 0 else trees[kind].bonus(tokens) for kind, tokens in texts
        ]
        expected = torch.stack([logp[row] + own for row, own in enumerate(earned)] or [logp])
        bonus = rows.bonus(logp)
        got = logp if bonus is None else logp + bonus
        assert torch.equal(got, expected.reshape(logp.shape))
        kept = [random.randrange(len(texts)) for _ in range(random.randint(0, len(texts)))]
        chosen = np.array([random.randrange(SIZE) for _ in kept], np.int64)
        rows.select(np.array(kept, np.int64))
        rows.advance(chosen)
        texts = [
            (texts[row][0], [*texts[row][1], token])
            for row, token in zip(kept, chosen.tolist(), strict=True)
        ]


def test_a_step_does_as_much_for_many_phrases_as_for_few():
    """The tree's edges that a step looks at are those of the rows' own states."""
    random, starts = np.random.default_rng(0), torch.ones(500, dtype=torch.bool)
    written = []
    for count in (10, 20_000):
        phrases = [(7, *random.integers(0, 500, 3)) for _ in range(count)]
        boost = Boost(phrases, WEIGHT, starts)
        first = boost.advance(np.array([START]), np.array([phrases[0][0]]))
        second = boost.advance(first, np.array([phrases[0][1]]))
        third = boost.advance(second, np.array([phrases[0][2]]))
        written.append(int((boost.bonus(third)[0] == WEIGHT).sum()))
        assert boost.bonus(third)[0, phrases[0][3]] == WEIGHT
    assert written[0] <= 2 and written[1] <= 6


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
    assert bonus_after(boost, [3, 7, 4]).tolist() == [0] * SIZE


@given(phrases, texts, st.sampled_from([0.0, 0.25, 4.0]))
def test_the_weight_is_a_factor(phrases, tokens, weight):
    one, other = Boost(phrases, 1.0, STARTS), Boost(phrases, weight, STARTS)
    assert torch.equal(bonus_after(other, tokens), weight * bonus_after(one, tokens))


@pytest.mark.parametrize("tokens", [[3, 7, 8, EOS], [3, 7, EOS], [3, 7, 4]])
def test_a_word_that_begins_with_a_phrase_does_not_earn_the_phrase(tokens):
    """`mark` and `marketing` are phrases, `market` is said."""
    assert total([[3], [3, 7, 9]], tokens) == 0


def test_a_phrase_is_not_met_inside_a_word():
    assert total([[7]], [3, 7, EOS]) == 0
    assert total([[7, 8]], [3, 7, 8, EOS]) == 0


def weighed_earnings(weighed, tokens):
    """The slow twin with weights: what `tokens` have earned so far, of (phrase, weight) pairs."""
    total, run = 0.0, []

    def going(part):
        own = [w for phrase, w in weighed if w > 0 and phrase[: len(part)] == part]
        return max(own, default=0.0) if STARTS[part[0]] else 0.0

    def left(part, following):
        after, found = [*part, following], {}
        for phrase, w in weighed:
            if part[: len(phrase)] == phrase and STARTS[after[len(phrase)]] and w > 0:
                found[len(phrase)] = max(w, found.get(len(phrase), 0.0))
        return max(found) * found[max(found)] if found else 0.0

    for token in tokens:
        if going([*run, token]):
            run.append(token)
            continue
        total += left(run, token)
        run = [token] if going([token]) else []
    return WEIGHT * (total + sum(going(run[: end + 1]) for end in range(len(run))))


@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(joined),
            st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        ),
        max_size=6,
    ),
    texts,
)
def test_a_piece_earns_by_the_weight_of_the_heaviest_phrase_that_it_may_become(weighed, tokens):
    boost = Boost([p for p, _ in weighed], WEIGHT, STARTS, [w for _, w in weighed])
    for end in range(len(tokens) + 1):
        bonus = bonus_after(boost, tokens[:end])
        before = weighed_earnings(weighed, tokens[:end])
        expected = [weighed_earnings(weighed, [*tokens[:end], t]) - before for t in range(SIZE)]
        np.testing.assert_allclose(bonus.numpy(), expected, atol=1e-5)


@given(phrases, texts)
def test_phrases_that_all_weigh_one_earn_to_the_bit_what_unweighed_ones_do(phrases, tokens):
    even = Boost(phrases, WEIGHT, STARTS, [1.0] * len(phrases))
    plain = Boost(phrases, WEIGHT, STARTS)
    for end in range(len(tokens) + 1):
        assert torch.equal(bonus_after(even, tokens[:end]), bonus_after(plain, tokens[:end]))


def test_a_piece_along_a_phrase_is_no_less_likely_than_the_floor_and_no_other_is_touched():
    heavy, light = [5, 8, 9], [6, 7]
    boost = Boost([heavy, light], WEIGHT, STARTS, [2.0, 0.5], floor=-4.0)
    logp = torch.full((1, SIZE), -9.0)
    logp[0, 5], logp[0, 3] = -1.0, -torch.inf
    start = np.array([START])
    lifted = logp + boost.lifted(start, logp)
    assert lifted[0, 5] == -1.0 + 2 * WEIGHT, "likely enough: it earns what it ever did"
    assert lifted[0, 6] == -9.0 + 0.5 * 5.0, "a phrase of half a weight has half of it"
    assert lifted[0, 3] == -torch.inf and lifted[0, 4] == -9.0
    going_on = boost.advance(start, np.array([5]))
    lifted = logp + boost.lifted(going_on, logp)
    assert lifted[0, 8] == -4.0
    assert lifted[0, 7] == -9.0 - 2 * WEIGHT, "what is left gives back what it had earned"
    none = Boost([heavy, light], WEIGHT, STARTS, [2.0, 0.5])
    assert torch.equal(none.lifted(going_on, logp), none.bonus(going_on))


def test_what_is_next_to_impossible_is_lifted_only_so_far():
    boost = Boost([[5, 8]], WEIGHT, STARTS, floor=-4.0)
    logp = torch.full((1, SIZE), -1000.0)
    assert boost.lifted(np.array([START]), logp)[0, 5] == MOST_LIFT


def test_rows_are_lifted_each_by_its_own_phrases():
    with_floor, without = (Boost([[5, 8]], WEIGHT, STARTS, floor=floor) for floor in (-4.0, None))
    rows, logp = BoostedRows([with_floor, None, without]), torch.full((3, SIZE), -9.0)
    assert rows.bonus(logp)[:, 5].tolist() == [5.0, 0.0, WEIGHT]
