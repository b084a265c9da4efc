"""The batch's step over all rows at once, against decoding one clip and one token at a time."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_ctc import random_letters
from plain_decoder import PhraseTree, decode_plainly
from random_entries import RandomEntries
from random_models import perturb
from torch.utils._python_dispatch import TorchDispatchMode

from mmrag.config import KNN, LanguageModel
from mmrag.decoding import candidates
from mmrag.decoding.boost import Boost
from mmrag.decoding.decode import Batch, Clip
from mmrag.decoding.hypotheses import NOTHING, Choice, History
from mmrag.model.lm import LM
from mmrag.model.vocabulary import EOS, Heard, Vocabulary
from mmrag.retrieval.interpolation import Retrieval

WRITTEN = (" a", " ab", " b a", "a", "B", "ba", ",", "bb-", "aab")


class Pieces:
    """Pieces whose text only matters to letters."""

    unknown = None
    size = len(WRITTEN)


class Words(Vocabulary):
    """The first three of its pieces begin a word."""

    @property
    def written(self):
        return [""] * self.first_piece + list(WRITTEN) + [""] * self.units

    def word_starts(self):
        starts = np.zeros(self.size, bool)
        starts[[EOS, FIRST, FIRST + 1, FIRST + 2]] = True
        return starts


VOCABULARY = Words(Pieces(), units=6)
FIRST, LAST = VOCABULARY.first_piece, VOCABULARY.first_unit - 1
STARTS = torch.from_numpy(VOCABULARY.word_starts())


@cache
def random_lm(layers=2):
    torch.manual_seed(0)
    shape = LanguageModel(width=16, layers=layers, heads=4, kv_heads=2, feed_forward=24, tied=False)
    return perturb(LM(shape, VOCABULARY.size), 0.2).eval().requires_grad_(False)


RETRIEVALS = [
    None,
    Retrieval(RandomEntries(FIRST, LAST, seed=1), KNN(k=3, weight=0.7, temperature=1.0)),
    Retrieval(
        RandomEntries(FIRST, LAST, seed=2), KNN(k=5, weight=0.4, temperature=2.0, query="text")
    ),
    Retrieval(RandomEntries(FIRST, LAST, seed=1), KNN(k=2, weight=1.0, temperature=1.0)),
]
PHRASES = [
    None,
    [[FIRST + 1, LAST, FIRST, LAST - 1], [FIRST, LAST]],
    [[FIRST], [FIRST + 2, FIRST], [FIRST, LAST]],
]

kinds = st.tuples(
    st.integers(0, 2),  # its speech
    st.integers(1, 5),  # beams
    st.sampled_from([0.0, 0.6, 1.0]),
    st.integers(1, 7),  # limit
    st.integers(0, len(RETRIEVALS) - 1),
    st.integers(0, len(PHRASES) - 1),
    st.integers(-1, 1),  # document excluded
    st.lists(st.sampled_from([FIRST, FIRST + 4, LAST]), max_size=4).map(tuple),  # beginning
    st.sampled_from([0.0, 0.3, 0.9]),  # weight of its letters
)


def clip_of(kind):
    speech, beams, penalty, limit, retrieval, phrases, document, beginning, spelt = kind
    units = [VOCABULARY.first_unit + n % 5 for n in range(speech, 4 * speech + 2)]
    boost = PHRASES[phrases] and Boost(PHRASES[phrases], 0.8, STARTS)
    heard = Heard(units, random_letters(24 + 9 * speech, seed=speech, sharp=3.0))
    return Clip(
        heard if speech else units,
        limit,
        beams,
        penalty,
        ctc_weight=spelt,
        retrieval=RETRIEVALS[retrieval],
        exclude_document=document,
        boost=boost,
        context=[LAST] * speech,
        beginning=() if retrieval == 3 else beginning,  # neighbours alone say no other token
    )


@cache
def plainly(kind):
    phrases = PHRASES[kind[5]] and PhraseTree(PHRASES[kind[5]], 0.8, STARTS)
    with torch.inference_mode():
        return decode_plainly(random_lm(), VOCABULARY, clip_of(kind), phrases)


def agree(one, other):
    for name in ("token", "lm_token", "entry"):
        mine, theirs = ([getattr(c, name) for c in h.choices] for h in (one, other))
        assert mine == theirs
    for name in ("logp", "lm_logp", "distance"):
        mine, theirs = ([getattr(c, name) for c in h.choices] for h in (one, other))
        assert mine == pytest.approx(theirs, abs=1e-4)
    assert one.stopped == other.stopped
    assert one.logp == pytest.approx(other.logp, abs=1e-3)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(kinds, st.integers(0, 6), st.none() | st.integers(1, 4), st.booleans()),
        min_size=1,
        max_size=6,
    )
)
def test_random_clips_that_come_and_go_get_what_plain_decoding_gives_them(plan):
    """Each comes at a step, is given up some steps later or not, and is read in parts or not."""
    batch, searches = Batch(random_lm(), VOCABULARY), {}
    for step in range(20):
        for number, (kind, arrival, stay, in_parts) in enumerate(plan):
            if arrival == step:
                prompt = batch.prompt([clip_of(kind)])
                while in_parts and prompt.left > 2:
                    prompt.read(2)
                [searches[number]] = batch.admit(prompt)
            elif stay is not None and arrival + stay == step:
                batch.leave(searches[number])
        batch.step()
    assert not batch.searches
    for number, (kind, _, stay, _) in enumerate(plan):
        search, expected = searches[number], plainly(kind)
        assert search.over or stay is not None
        if search.over:
            found = search.nbest(10)
            assert len(found) == len(expected)
            for one, other in zip(found, expected, strict=True):
                agree(one, other)


@settings(max_examples=25, deadline=None)
@given(kinds, st.integers(1, 7))
def test_the_beginning_of_a_transcript_leads_to_that_transcript(kind, count):
    """Greedy; for the same reasons, whatever is looked up, where a word is over."""
    kind = (kind[0], 1, *kind[2:-2], (), kind[-1])
    batch, free = Batch(random_lm(), VOCABULARY), plainly(kind)[0]
    count = max((n for n in range(count) if starts(free, n)), default=0)
    clip = replace(clip_of(kind), beginning=free.tokens[:count])
    [search] = batch.join([clip])
    while batch.searches:
        batch.step()
    agree(search.best(), free)


def starts(heard, place):
    """Whether what a transcript has at a place begins a word, or is its end."""
    tokens = [choice.token for choice in heard.choices]
    return place < len(tokens) and bool(STARTS[tokens[place]])


def test_a_beginning_that_nobody_would_choose_is_kept_all_the_same():
    unlikely = (FIRST, VOCABULARY.first_unit)  # a unit is no text
    for beams in (1, 3):
        clip = Clip([VOCABULARY.first_unit], 6, beams, beginning=unlikely, retrieval=RETRIEVALS[3])
        [search] = (batch := Batch(random_lm(), VOCABULARY)).join([clip])
        while batch.searches:
            batch.step()
        heard = search.best()
        assert tuple(heard.tokens[:2]) == unlikely and np.isfinite(heard.logp)
        assert starts(heard, 2), "a word is not gone on with"


def test_a_beginning_as_long_as_the_limit_leaves_room_for_one_token():
    clip = Clip([VOCABULARY.first_unit], 2, beginning=[FIRST] * 5)
    [search] = Batch(random_lm(), VOCABULARY).join([clip])
    assert search.over and len(search.best().choices) == 6


def test_the_n_best_are_those_that_stopped_by_their_score():
    kind = (2, 4, 0.6, 7, 0, 0, -1, (), 0.3)
    [search] = (batch := Batch(random_lm(), VOCABULARY)).join([clip_of(kind)])
    while batch.searches:
        batch.step()
    found = search.nbest(4)
    scores = [one.score(0.6) for one in found]
    assert len(found) > 1 and scores == sorted(scores, reverse=True)
    assert search.nbest(2) == found[:2] and search.best() == found[0]


class HostReads(TorchDispatchMode):
    """Counts the operations that make the host wait for a device."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = args[1] if name in ("index", "index_put_") else ()
        if name in self.WAITING or any(m is not None and m.dtype == torch.bool for m in masks):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("boosted", [False, True])
@pytest.mark.parametrize("spelt", [0.0, 0.3])
def test_a_step_waits_once_for_what_was_chosen_however_many_rows_and_layers_there_are(
    spelt, beams, boosted, monkeypatch
):
    """What the model itself waits for is not counted."""
    downloads, download = [], candidates.download
    monkeypatch.setattr(
        candidates, "download", lambda *all_: downloads.append(len(all_)) or download(*all_)
    )
    reads = HostReads()
    for count, layers in ((1, 1), (12, 3)):
        lm = random_lm(layers)
        batch = Batch(lm, VOCABULARY)
        batch.join(
            [clip_of((n % 3, beams, 0.6, 30, 0, int(boosted), -1, (), spelt)) for n in range(count)]
        )
        batch.step()
        with torch.inference_mode():
            output = batch._rows.read()
        with monkeypatch.context() as patched:
            patched.setattr(batch._rows, "read", lambda output=output: output)
            downloads.clear()
            with reads:
                batch.step()
        assert len(downloads) == 1
    assert reads.seen == []
    with torch.inference_mode(), reads:
        torch.ones(2)[torch.ones(2, dtype=torch.bool)]
    assert reads.seen == ["index"], "otherwise this shows nothing"


def test_a_history_forgets_what_nobody_follows_and_nothing_else():
    random, history = np.random.default_rng(0), History(room=8)
    texts, newest = [()] * 3, np.full(3, NOTHING)
    for _ in range(60):
        rows = random.integers(0, 3, 3)
        tokens = random.integers(0, 100, 3)
        windows = [((int(token), 0.5, 1.0),) for token in tokens]
        newest = history.append(
            newest[rows],
            windows,
            token=tokens,
            logp=-tokens,
            lm_logp=-2 * tokens,
            lm_token=tokens + 1,
            entry=tokens + 2,
            distance=tokens + 3,
        )
        texts = [(*texts[row], int(token)) for row, token in zip(rows, tokens, strict=True)]
        newest = history.tidy(newest)
    assert len(history) < 2 * 3 * 60
    for number, text in zip(newest, texts, strict=True):
        heard = history.hypothesis(number, -1.0, False)
        assert heard.choices == tuple(
            Choice(t, -t, -2 * t, t + 1, t + 2, t + 3, ((t, 0.5, 1.0),)) for t in text
        )
        assert history.tokens(number, text[:20]) == list(text)
    history.tidy(np.empty(0, np.int64))
    many = np.full(100, NOTHING)
    history.append(many, token=0, logp=0, lm_logp=0, lm_token=0, entry=0, distance=0)
    history.tidy(np.empty(0, np.int64))
    assert len(history) == 0
