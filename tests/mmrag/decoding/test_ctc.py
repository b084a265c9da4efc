"""What is said begins with these letters: by all alignments, the plain recursion, and fast."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_ctc import alignments, prefix, random_letters

from mmrag.decoding.ctc import Frames, Prefixes, longer

CPU = torch.device("cpu")
texts = st.text(" ab", max_size=5)


def written(frames, clips, spelt):
    """A prefix for each of `spelt`, of the clip at its place in `clips`, a letter at a time; and
    the log-probabilities that what is said begins with it."""
    prefixes = Prefixes.empty(frames, torch.tensor(clips))
    for place in range(max(map(len, spelt))):
        on = torch.tensor([n for n, text in enumerate(spelt) if len(text) > place])
        letters = torch.tensor(
            [" ab".index(text[place]) + 1 for text in spelt if len(text) > place]
        )
        before, prefixes = prefixes, prefixes.put(on, prefixes.then(on, letters))
        assert prefixes.logp[on].tolist() == pytest.approx(before.logp_then(on, letters).tolist())
    return prefixes, prefixes.logp


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 5), st.integers(0, 100), texts)
def test_a_prefix_is_the_sum_over_all_alignments(count, seed, text):
    heard = random_letters(count, seed=seed)
    assert prefix(heard, text) == pytest.approx(alignments(heard, text))
    prefixes, logp = written(Frames.of([heard], CPU), [0], [text])
    assert (logp.item(), prefixes.logp_whole().item()) == pytest.approx(alignments(heard, text))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 3), texts), min_size=1, max_size=6),
)
def test_prefixes_of_several_clips_together_are_what_each_is_alone(clips, asked):
    """However much shorter than the longest clip a clip is."""
    heard = [random_letters(count, seed=seed) for count, seed in clips]
    which = [number % len(clips) for number, _ in asked]
    prefixes, logp = written(Frames.of(heard, CPU), which, [text for _, text in asked])
    whole = prefixes.logp_whole()
    for n, (_, text) in enumerate(asked):
        assert (logp[n].item(), whole[n].item()) == pytest.approx(prefix(heard[which[n]], text))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(0, 100), texts)
def test_what_is_said_goes_on_with_some_letter_or_ends(count, seed, text):
    heard = random_letters(count, seed=seed)
    prefixes, before = written(Frames.of([heard], CPU), [0], [text])
    each = prefixes.logp_of_each(torch.tensor([[0]]))[0, 0, 1:]
    assert each.tolist() == pytest.approx(
        [prefixes.logp_then(torch.tensor([0]), torch.tensor([n])).item() for n in (1, 2, 3)]
    )
    after = torch.cat((each, prefixes.logp_whole())).logsumexp(0)
    assert after.item() == pytest.approx(before.item())


def test_clips_that_join_and_leave_are_what_they_were():
    heard = [random_letters(count, seed=count) for count in (4, 9, 6)]
    spelt = ["ab", "b", "a b"]
    parts = [
        written(Frames.of([one], CPU), [0], [text]) for one, text in zip(heard, spelt, strict=True)
    ]
    frames = parts[0][0].frames.join(parts[1][0].frames).join(parts[2][0].frames)
    states = torch.cat([longer(one.states, frames.size) for one, _ in parts])
    last, logp = (torch.cat([getattr(one, name) for one, _ in parts]) for name in ("last", "logp"))
    together = Prefixes(frames, torch.arange(3), last, logp, states)
    few = frames.select(torch.tensor([2, 0]), 6)
    few = Prefixes(few, torch.tensor([1, 0]), last[[0, 2]], logp[[0, 2]],
                   states[[0, 2], :, : few.size + 1])  # fmt: skip
    every = torch.arange(3)
    for letter in (1, 2, 3):
        found = together.logp_then(every, torch.full((3,), letter))
        alone = [
            one.logp_then(torch.tensor([0]), torch.tensor([letter])).item() for one, _ in parts
        ]
        assert found.tolist() == pytest.approx(alone)
        found = few.logp_then(every[:2], torch.full((2,), letter))
        assert found.tolist() == pytest.approx([alone[0], alone[2]])
        assert few.then(every[:2], torch.full((2,), letter)).logp_whole().tolist() == pytest.approx(
            together.then(every, torch.full((3,), letter)).logp_whole()[[0, 2]].tolist()
        )


def test_half_a_minute_stays_finite_to_its_end():
    heard = random_letters(1500, sharp=12.0)
    assert heard.costs.max() == 255
    likeliest = [label for label, _ in itertools.groupby(heard.costs.argmin(1)) if label]
    text = "".join(" ab"[label - 1] for label in likeliest)
    assert len(text) > 700
    prefixes, logp = written(Frames.of([heard], CPU), [0], [text])
    assert (logp.item(), prefixes.logp_whole().item()) == pytest.approx(
        prefix(heard, text), abs=1e-6
    )
    assert np.isfinite(logp.item())


def test_an_end_that_is_far_less_likely_than_all_that_may_follow_is_impossible():
    """By e^-700 and more, where a letter that is heard and not written costs some e^-20."""
    heard = random_letters(1500, sharp=12.0)
    text = "ab a" * 100
    prefixes, logp = written(Frames.of([heard], CPU), [0], [text])
    begins, is_ = prefix(heard, text)
    assert logp.item() == pytest.approx(begins, abs=1e-6)
    assert is_ < begins - 1000
    assert prefixes.logp_whole().item() == -np.inf
