"""Retrieved windows are encoded once and read by the rows that found them, as a whole reading of
every prefix from its start would have it."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import perturb

from mmrag.config import KNN, CrossAttention, Decode, LanguageModel, RetrievedAttention
from mmrag.decoding.boost import Boost
from mmrag.decoding.decode import Batch, Clip, decode
from mmrag.model.cross_attention import Adapter, Windows
from mmrag.model.lm import LM
from mmrag.model.vocabulary import EOS, Vocabulary
from mmrag.records import NO_ENTRY, Neighbours, Passages
from mmrag.retrieval import window_cache
from mmrag.retrieval.interpolation import Retrieval
from mmrag.retrieval.memory import (
    ATTRIBUTED_WINDOWS,
    AttentionSource,
    RetrievedMemory,
)
from mmrag.retrieval.weights import Weights
from mmrag.retrieval.window_cache import WindowCache

WIDTH, WINDOW, ENTRIES, SAID = 16, 5, 60, 6
SHAPE = LanguageModel(width=WIDTH, layers=2, heads=4, kv_heads=2, feed_forward=24, tied=False)
EVERY = {"last layer": 2, "every layer": 1}


class Pieces:
    """Pieces whose text plays no part."""

    unknown = None
    size = 9


VOCABULARY = Vocabulary(Pieces(), units=6)
FIRST, LAST = VOCABULARY.first_piece, VOCABULARY.first_unit - 1


def enlarged(build, seed, scale=0.2):
    """What `build` makes, with weights large enough for every one of them to matter."""
    torch.manual_seed(seed)
    return perturb(build(), scale).eval().requires_grad_(False)


def random_lm(seed=0):
    """A model of opinions strong enough to speak, weak enough to be talked out of them."""
    return enlarged(lambda: LM(SHAPE, VOCABULARY.size), seed)


def random_adapter(every=2, seed=1):
    """An adapter whose gates are open."""
    shape = CrossAttention(
        every=every,
        heads=2,
        head_width=8,
        window=WINDOW,
        encoder_layers=1,
        encoder_heads=2,
        encoder_feed_forward=24,
    )
    adapter = enlarged(lambda: Adapter(shape, SHAPE), seed)
    with torch.no_grad():
        for block in adapter.blocks:
            block.gate.weight.fill_(0.15)
    return adapter


class Counting(Adapter):
    """Remembers how many windows it was given to encode, and how often."""

    def __init__(self, every=2):
        original = random_adapter(every)
        super().__init__(original.config, SHAPE)
        self.load_state_dict(original.state_dict())
        self.eval().requires_grad_(False)
        self.calls = []

    def encode(self, embedded, keys, present):
        self.calls.append(len(embedded))
        return super().encode(embedded, keys, present)


class Store:
    """Utterances of SAID entries, each a document, searched by brute force.

    `listed` are the entries that are searched; `asked` the queries of each search.
    """

    def __init__(self, seed=0, listed=None):
        random = np.random.default_rng(seed)
        self.keys = random.standard_normal((ENTRIES, WIDTH)).astype(np.float16)
        self.tokens = random.integers(FIRST, LAST + 1, ENTRIES).astype(np.int32)
        self.utterances = np.arange(ENTRIES) // SAID
        self.hidden = np.ones(ENTRIES, bool)
        self.hidden[np.arange(ENTRIES) if listed is None else listed] = False
        self.asked, self.encoded = [], Counter()

    def search(self, queries, k, exclude_documents=None):
        self.asked.append(len(queries))
        distances = ((queries[:, None] - self.keys.astype(np.float32)) ** 2).sum(-1)
        distances[:, self.hidden] = np.inf
        if exclude_documents is not None:
            distances[self.utterances == np.array(exclude_documents)[:, None]] = np.inf
        entries = np.argsort(distances, axis=1, kind="stable")[:, :k]
        distances = np.take_along_axis(distances, entries, 1)
        return Neighbours(
            distances=distances.astype(np.float32),
            tokens=self.tokens[entries],
            entries=np.where(np.isfinite(distances), entries, NO_ENTRY),
            documents=self.utterances[entries].astype(np.int32),
        )

    def passages(self, entries):
        """Up to WINDOW entries of the same utterance, two before the one in question."""
        self.encoded.update(entries.tolist())
        tokens = np.zeros((len(entries), WINDOW), np.int32)
        keys = np.zeros((len(entries), WINDOW, WIDTH), np.float16)
        present = np.zeros((len(entries), WINDOW), bool)
        for row, entry in enumerate(entries):
            near = np.arange(entry - 2, entry - 2 + WINDOW)
            near = near[near // SAID == entry // SAID]
            tokens[row, : len(near)], keys[row, : len(near)] = self.tokens[near], self.keys[near]
            present[row, : len(near)] = True
        return Passages(tokens, keys, present)


class Silent(Store):
    """All of its shards are missing."""

    def search(self, queries, k, exclude_documents=None):
        self.asked.append(len(queries))
        return Neighbours.none(len(queries), k, missing_shards=3)


def read(**changes):
    return RetrievedAttention(**{"k": 3, "stride": 1, "whole": 8, **changes})


def reading_of(lm, adapter, store=None, entries=None, **changes):
    store = store or Store()
    entries = None if entries is None else np.array(entries, np.int64)
    return AttentionSource(WindowCache(adapter, lm, store), read(**changes), store, entries)


def clips(count, seed=0):
    random = np.random.default_rng(seed)
    return [
        random.integers(VOCABULARY.first_unit, VOCABULARY.size, length).tolist()
        for length in random.integers(1, 9, count)
    ]


def options(beams=1):
    return Decode(beams=beams, length_penalty=0.6, tokens_per_second=10, max_seconds=10)


def listen(lm, speech, attention_sources, beams=1, limits=9, **more):
    limits = [limits] * len(speech) if isinstance(limits, int) else limits
    return decode(
        lm, VOCABULARY, speech, limits, options(beams), attention_sources=attention_sources, **more
    )


def agree(one, other, atol=1e-4):
    """The same tokens for the same reasons, up to rounding."""
    assert [c.token for c in one.choices] == [c.token for c in other.choices]
    assert [c.lm_token for c in one.choices] == [c.lm_token for c in other.choices]
    for name in ("logp", "lm_logp"):
        mine, theirs = ([getattr(c, name) for c in h.choices] for h in (one, other))
        assert mine == pytest.approx(theirs, abs=atol)
    for mine, theirs in zip(one.choices, other.choices, strict=True):
        assert shares_of(mine.attended) == pytest.approx(shares_of(theirs.attended), abs=atol)
    assert one.stopped == other.stopped


def shares_of(read):
    """Entry -> its share; what is next to nothing may be shown or not."""
    return {entry: share for entry, share, _ in read if share > 1e-3}


def allowed_logp(logits):
    allowed = torch.from_numpy(VOCABULARY.transcript_ids())
    return logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)


def by_hand(lm, one, units, tokens, document=None):
    """Every prefix of a transcript read from its start, without a cache: at each step the
    log-probabilities with what was read, those without, and each entry's attention and distance.

    A window has been there `since` a step; the next search, after `stride` of them, ends it.
    """
    prompt = VOCABULARY.prompt(units)
    whole = one.entries is not None and len(one.entries) <= one.settings.whole
    shown = [[int(entry), 0, 999, math.inf] for entry in one.entries] if whole else []
    found_at = None
    for step in range(len(tokens)):
        ids = torch.tensor([[*prompt, *tokens[:step]]])
        plain = lm(ids)
        alone = allowed_logp(plain.logits[-1])
        if not whole and (found_at is None or step - found_at >= one.settings.stride):
            for window in shown:
                window[2] = min(window[2], step)
            found_at = None
            certain = one.settings.certain
            if certain is None or float(alone.max()) < math.log(certain):
                excluded = None if document is None else [document]
                query = plain.keys[:, -1].numpy()
                found = one.retriever.search(query, one.settings.k, excluded)
                nearest, gate = float(found.distances[0, 0]), one.settings.gate
                if math.isfinite(nearest) and (gate is None or nearest <= gate):
                    found_at = step
                    near = zip(found.entries[0].tolist(), found.distances[0], strict=True)
                    shown += [[e, step, 999, float(d)] for e, d in near if e != NO_ENTRY]
        logp, shares = alone, {}
        if shown:
            entries = np.array([entry for entry, *_ in shown])
            passages = one.cache.source.passages(entries)
            windows = Windows(
                tokens=torch.from_numpy(passages.tokens).long(),
                present=torch.from_numpy(passages.present),
                keys=torch.from_numpy(passages.keys).float(),
                index=torch.arange(len(shown))[None],
                since=torch.tensor([[since for _, since, *_ in shown]]),
                until=torch.tensor([[until for _, _, until, _ in shown]]),
            )
            start = torch.tensor([len(prompt) - 1])
            memory = one.cache.adapter.memory(windows, lm.embedding, start, step + 1)
            output = lm(ids, memory=memory)
            logp = allowed_logp(output.logits[-1])
            attention = output.attention.mean(0)[0, -1].unflatten(-1, (-1, WINDOW)).sum(-1)
            shares = {
                entry: (share, distance)
                for (entry, _, until, distance), share in zip(
                    shown, attention.tolist(), strict=True
                )
                if until > step and share > 0
            }
        yield logp, alone, shares


def check_by_hand(lm, one, units, heard, greedy, document=None):
    """A transcript is what reading its prefixes by hand gives; returns the steps that read."""
    tokens, read_at = [choice.token for choice in heard.choices], 0
    steps = by_hand(lm, one, units, tokens, document)
    for choice, (logp, alone, shares) in zip(heard.choices, steps, strict=True):
        if greedy:
            assert choice.token == int(logp.argmax())
        assert choice.logp == pytest.approx(float(logp[choice.token]), abs=1e-4)
        assert choice.lm_logp == pytest.approx(float(alone[choice.token]), abs=1e-4)
        assert choice.lm_token == int(alone.argmax())
        best = sorted(shares.items(), key=lambda item: -item[1][0])[:ATTRIBUTED_WINDOWS]
        assert len(choice.attended) == len(best)
        for (entry, share, distance), (expected, (wanted, far)) in zip(
            choice.attended, best, strict=True
        ):
            assert entry == expected
            assert share == pytest.approx(wanted, abs=1e-4)
            assert distance == pytest.approx(far, rel=1e-4)
        read_at += bool(best)
    return read_at


LISTS = [[3, 20, 41], [7], [0, 59, 12, 13, 30, 8, 9, 44], [55, 2, 31]]


@pytest.mark.parametrize("every", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("beams", [1, 3])
def test_a_list_is_read_whole_at_every_step_as_by_hand(every, beams):
    lm, adapter, speech = random_lm(), random_adapter(every), clips(4)
    store = Store()
    attention_sources = [reading_of(lm, adapter, store, entries) for entries in LISTS]
    together = listen(lm, speech, attention_sources, beams)
    assert not store.asked, "a short list is not searched"
    for units, one, heard in zip(speech, attention_sources, together, strict=True):
        assert one.whole
        assert check_by_hand(lm, one, units, heard, beams == 1) == len(heard.choices)
    plain = listen(lm, speech, None, beams)
    changed = [a.tokens != b.tokens for a, b in zip(plain, together, strict=True)]
    assert sum(changed) > 1, "otherwise this shows nothing"


SEARCHES = [
    (1, {}),
    (1, {"stride": 2, "k": 1}),
    (1, {"gate": 15.0, "stride": 2}),
    (1, {"certain": 0.25}),
    (3, {"stride": 3}),
    (3, {"certain": 0.3, "gate": 16.0, "stride": 3, "k": 2}),
]
"""Beams and settings."""


@pytest.mark.parametrize("every", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize(("beams", "settings"), SEARCHES, ids=str)
def test_what_a_search_brings_is_read_until_the_next_as_by_hand(every, beams, settings):
    lm, adapter, speech = random_lm(), random_adapter(every), clips(3)
    one, documents = reading_of(lm, adapter, **settings), [1, -1, 4]
    together = listen(lm, speech, [one] * 3, beams, exclude_documents=documents)
    read_at, steps = 0, 0
    for units, document, heard in zip(speech, documents, together, strict=True):
        read_at += check_by_hand(lm, one, units, heard, beams == 1, document)
        steps += len(heard.choices)
        named = {entry // SAID for choice in heard.choices for entry, *_ in choice.attended}
        assert document not in named
    assert 0 < read_at <= steps
    if {"gate", "certain"} & settings.keys():
        assert read_at < steps, "something was shut out"


@pytest.mark.parametrize("every", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("stride", [None, 1, 3])
def test_clips_that_read_together_are_decoded_as_if_alone(every, beams, stride):
    """`stride` None is for lists that are read whole."""
    lm, adapter, speech = random_lm(), random_adapter(every), clips(4)
    limits, cache = [3, 11, 6, 9], WindowCache(adapter, lm, Store())
    if stride is None:
        lists = [LISTS[0], LISTS[2], LISTS[0], LISTS[3]]
        attention_sources = [
            AttentionSource(cache, read(), cache.source, np.array(entries)) for entries in lists
        ]
    else:
        attention_sources = [
            AttentionSource(cache, read(stride=stride), cache.source) for _ in speech
        ]
    together = listen(lm, speech, attention_sources, beams, limits)
    assert len({len(one.choices) for one in together}) > 1, "rows leave the batch one by one"
    for units, limit, one, heard in zip(speech, limits, attention_sources, together, strict=True):
        [alone] = listen(lm, [units], [one], beams, [limit])
        agree(heard, alone)


@pytest.mark.parametrize("every", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("beams", [1, 3])
def test_rows_of_several_datastores_are_decoded_as_if_alone(every, beams):
    lm, adapter, speech = random_lm(), random_adapter(every), clips(6)
    limits, documents = [3, 11, 6, 9, 2, 8], [3, -1, 0, 2, 1, 0]
    first, second = Store(seed=0), Store(seed=7)
    searching = reading_of(lm, adapter, first, stride=2)
    attention_sources = [
        searching,
        reading_of(lm, adapter, second, stride=3, k=5),
        None,
        reading_of(lm, adapter, second, [4, 5, 30]),
        searching,
        reading_of(lm, adapter, Silent()),
    ]
    together = listen(lm, speech, attention_sources, beams, limits, exclude_documents=documents)
    for index, heard in enumerate(together):
        [alone] = listen(
            lm,
            [speech[index]],
            [attention_sources[index]],
            beams,
            [limits[index]],
            exclude_documents=[documents[index]],
        )
        agree(heard, alone)
    plain = listen(lm, speech, None, beams, limits)
    agree(together[2], plain[2])
    agree(together[5], plain[5])
    assert together[1].choices[0].attended and together[3].choices[0].attended


@pytest.mark.parametrize("beams", [1, 3])
def test_nobody_with_a_reading_is_nobody_who_reads(beams):
    lm, speech = random_lm(), clips(3)
    assert listen(lm, speech, [None] * 3, beams) == listen(lm, speech, None, beams)


NOTHING = {
    "gate shut": ({"gate": 1e-3}, Store, None),
    "shards missing": ({}, Silent, None),
    "certain": ({"certain": 1e-6}, Store, None),
    "an empty list": ({}, Store, []),
}


@pytest.mark.parametrize("every", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("nothing", NOTHING.values(), ids=NOTHING)
def test_what_is_not_read_leaves_the_plain_model(every, beams, nothing):
    settings, kind, entries = nothing
    lm, speech = random_lm(), clips(4)
    store = kind()
    one = reading_of(lm, random_adapter(every), store, entries, **settings)
    heard = listen(lm, speech, [one] * 4, beams)
    plain = listen(lm, speech, None, beams)
    assert {choice.attended for each in heard for choice in each.choices} == {()}
    for mine, theirs in zip(heard, plain, strict=True):
        agree(mine, theirs)
        if every == EVERY["last layer"]:
            assert mine == theirs, "bit for bit"
    assert not store.encoded


@pytest.mark.parametrize("every", EVERY.values(), ids=EVERY)
def test_an_untrained_adapter_reads_and_says_nothing(every):
    lm, adapter, speech = random_lm(), random_adapter(every), clips(4)
    for block in adapter.blocks:
        block.gate.weight.zero_()
    one = reading_of(lm, adapter, stride=2)
    heard, plain = listen(lm, speech, [one] * 4), listen(lm, speech, None)
    for mine, theirs in zip(heard, plain, strict=True):
        assert all(choice.attended for choice in mine.choices)
        bare = replace(mine, choices=tuple(replace(c, attended=()) for c in mine.choices))
        agree(bare, theirs)
        if every == EVERY["last layer"]:
            assert bare == theirs, "bit for bit"


@pytest.mark.parametrize(("stride", "searches"), [(1, 9), (2, 5), (3, 3), (4, 3), (20, 1)])
def test_the_stride_is_how_many_tokens_a_search_lasts(stride, searches):
    lm, store = random_lm(), Store()
    one = reading_of(lm, random_adapter(), store, stride=stride)
    # One that never stops: nine tokens in all.
    [units] = [u for u in clips(8) if len(listen(lm, [u], [one])[0].choices) == 9][:1]
    store.asked.clear()
    [heard] = listen(lm, [units], [one])
    assert store.asked == [1] * searches
    shown = [{entry for entry, *_ in choice.attended} for choice in heard.choices]
    for start in range(0, 9, stride):
        assert len(set(map(frozenset, shown[start : start + stride]))) == 1


def test_a_model_that_is_certain_asks_nothing_and_what_it_found_runs_out():
    lm, store = random_lm(), Store()
    one = reading_of(lm, random_adapter(), store, stride=2, certain=0.25)
    asked = 0
    for units in clips(6):
        store.asked.clear()
        [heard] = listen(lm, [units], [one])
        last = None
        for step, choice in enumerate(heard.choices):
            tokens = [c.token for c in heard.choices[:step]]
            alone = lm(torch.tensor([[*VOCABULARY.prompt(units), *tokens]])).logits[-1]
            sure = float(allowed_logp(alone).max()) >= math.log(0.25)
            if last is not None and step - last < 2:
                assert choice.attended
            elif sure:
                assert not choice.attended
                last = None
            else:
                assert choice.attended
                last, asked = step, asked + 1
        assert len(store.asked) <= len(heard.choices)
        asked -= len(store.asked)
    assert asked == 0


def test_a_search_that_finds_nothing_is_made_again_at_the_next_token():
    lm, store = random_lm(), Silent()
    one = reading_of(lm, random_adapter(), store, [0, 1, 2], stride=5, whole=2)
    [heard] = listen(lm, clips(1), [one])
    assert len(store.asked) == len(heard.choices)


def test_rows_that_share_a_reading_are_searched_together():
    lm, adapter = random_lm(), random_adapter()
    store, other = Store(), Store(seed=3)
    shared, apart = reading_of(lm, adapter, store), reading_of(lm, adapter, other)
    listen(lm, clips(4), [shared, apart, shared, shared], limits=1)
    assert (store.asked, other.asked) == ([3], [1])


def test_a_list_longer_than_the_limit_is_searched_and_nothing_but_it():
    lm, adapter, speech = random_lm(), random_adapter(), clips(3)
    listed = [3, 9, 17, 22, 40, 41]
    store = Store(listed=listed)
    longest = reading_of(lm, adapter, store, listed, whole=6)
    longer = reading_of(lm, adapter, store, listed, whole=5)
    assert (longest.whole, longer.whole) == (True, False)
    assert not reading_of(lm, adapter, store, whole=99).whole, "no list is a whole datastore"
    listen(lm, speech, [longest] * 3)
    assert not store.asked
    heard = listen(lm, speech, [longer] * 3)
    assert store.asked
    assert {e for one in heard for c in one.choices for e, *_ in c.attended} <= set(listed)
    for units, one in zip(speech, heard, strict=True):
        check_by_hand(lm, longer, units, one, greedy=True)


def test_shares_name_the_entry_most_attended_to_first():
    """An entry whose window is all that can be told from nothing gets all that is given."""
    lm, adapter, speech = random_lm(), random_adapter(), clips(3)
    store = Store()
    everything = [reading_of(lm, adapter, store, LISTS[2])] * 3
    for heard in listen(lm, speech, everything):
        for choice in heard.choices:
            shares = [share for _, share, _ in choice.attended]
            assert len(choice.attended) == ATTRIBUTED_WINDOWS
            assert shares == sorted(shares, reverse=True)
            assert 0 < sum(shares) < 1 + 1e-6
            assert {entry for entry, *_ in choice.attended} <= set(LISTS[2])
            assert all(math.isinf(distance) for *_, distance in choice.attended)
    # A query's own state as the key of one token makes that token's window the one it reads.
    [units] = clips(1)
    query = lm(torch.tensor([VOCABULARY.prompt(units)])).keys[0, -1]
    store.keys[20] = (4 * query).numpy()
    plain = Adapter(adapter.config, SHAPE).eval()
    [heard] = listen(lm, [units], [reading_of(lm, plain, store, [3, 20, 41])], limits=1)
    entry, share, _ = heard.choices[0].attended[0]
    assert entry == 20
    assert share > 0.4


def test_what_was_searched_knows_its_distance():
    lm, store = random_lm(), Store()
    one = reading_of(lm, random_adapter(), store, stride=1)
    [units] = clips(1)
    [heard] = listen(lm, [units], [one], limits=3)
    for step, choice in enumerate(heard.choices):
        ids = [*VOCABULARY.prompt(units), *heard.tokens[:step]]
        query = lm(torch.tensor([ids])).keys[0, -1].numpy()
        for entry, _, distance in choice.attended:
            wanted = ((query - store.keys[entry].astype(np.float32)) ** 2).sum()
            assert distance == pytest.approx(float(wanted), rel=1e-4)


def test_a_window_is_encoded_once_however_often_it_is_found():
    lm, adapter, store = random_lm(), Counting(), Store()
    one = reading_of(lm, adapter, store, stride=1)
    listen(lm, clips(4), [one] * 4)
    found = len(store.encoded)
    assert found > 3
    assert set(store.encoded.values()) == {1}
    assert sum(adapter.calls) == found
    listen(lm, clips(4), [one] * 4)
    assert sum(adapter.calls) == found, "another batch finds the same"


def test_a_list_is_encoded_at_once():
    lm, adapter, store = random_lm(), Counting(), Store()
    cache = WindowCache(adapter, lm, store)
    lists = [AttentionSource(cache, read(), store, np.array(own)) for own in LISTS]
    listen(lm, clips(4), lists)
    assert adapter.calls == [len({entry for own in LISTS for entry in own})]


@torch.no_grad()
def test_a_window_cache_hands_out_each_rows_windows_token_by_token():
    lm, adapter, store = random_lm(), random_adapter(1), Store()
    cache = WindowCache(adapter, lm, store)
    rows = [np.array([0, 20, 0]), np.array([59]), np.empty(0, np.int64), np.array([20, 5])]
    for _ in range(2):  # at first all of them are new, then none
        encoded, numbers = cache.gather(rows)
        counts = [store.passages(row).present.sum(1).tolist() for row in rows]
        assert encoded.shape == (2, 2, 4, 2, max(map(sum, counts)), 8)
        assert encoded.is_contiguous()
        for row, (own, lengths) in enumerate(zip(rows, counts, strict=True)):
            expected = [n for n, length in enumerate(lengths) for _ in range(length)]
            assert numbers[row].tolist() == expected + [-1] * (encoded.shape[4] - len(expected))
            start = 0
            for entry, length in zip(own, lengths, strict=True):
                alone, _ = WindowCache(adapter, lm, store).gather([np.array([entry])])
                own_tokens = encoded[:, :, row, :, start : start + length]
                torch.testing.assert_close(own_tokens, alone[:, :, 0])
                start += length


@given(
    lengths=st.lists(st.integers(0, 4), max_size=7),
    cuts=st.lists(st.integers(0, 7), min_size=1, max_size=3),
)
def test_windows_are_laid_side_by_side_as_one_after_the_other(lengths, cuts):
    """Rows of windows, some of them empty, of windows some of which are."""
    ends = sorted(min(cut, len(lengths)) for cut in cuts)
    counts = np.diff([0, *ends, len(lengths)])
    places = np.arange(len(lengths))[::-1] + 3
    at, numbers = window_cache._side_by_side(places, np.array(lengths, np.int64), counts, WINDOW)
    first = 0
    for row, count in enumerate(counts):
        own = range(first, first + count)
        expected = [places[n] * WINDOW + inside for n in own for inside in range(lengths[n])]
        windows = [n - first for n in own for _ in range(lengths[n])]
        assert at[row, : len(expected)].tolist() == expected
        assert numbers[row].tolist() == windows + [-1] * (len(numbers[row]) - len(windows))
        first += count


class Laying(RetrievedMemory):
    """Remembers the rows that it laid out, time by time."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.laid_out = []

    def _lay_out(self):
        self.laid_out.append(np.flatnonzero(self._stale).tolist())
        super()._lay_out()


@torch.no_grad()
def test_only_rows_that_changed_are_laid_out_again():
    """Lists once when they come, and never for a step, a reordering, a neighbour's leaving."""
    lm, adapter, store = random_lm(), random_adapter(), Store()
    listed = [reading_of(lm, adapter, store, entries) for entries in LISTS[:3]]

    def step(rows):
        ids = torch.full((len(rows._readings), 1), FIRST)
        output = lm(ids)
        return rows.read(ids, torch.ones(len(ids), dtype=torch.long), None, output, None, None)

    pool = lm.pool(0, growing=True)
    rows = Laying(lm, listed, 9, pool)
    for _ in range(3):
        step(rows)
    assert rows.laid_out == [[0, 1, 2]]
    before, expected = rows._laid.encoded, step(rows)
    rows.select([0, 1, 2])
    assert rows._laid.encoded is before, "nothing to copy"
    rows.select([2, 0, 0])
    logits, attended = step(rows)
    torch.testing.assert_close(logits, expected[0][[2, 0, 0]])
    assert [shares_of(one) for one in attended.rows()] == [
        pytest.approx(shares_of(expected[1].row(row)), abs=1e-4) for row in (2, 0, 0)
    ]
    rows.select([1])  # the longest list has left: the others' padding leaves with it
    assert rows._laid.entries.shape[1] == len(LISTS[0])
    other = Laying(lm, [reading_of(lm, adapter, store, LISTS[3], k=1)], 9, pool)
    step(other)
    rows.join(other)
    logits, attended = step(rows)
    assert rows.laid_out == [[0, 1, 2]] and other.laid_out == [[0]]
    torch.testing.assert_close(logits[0], expected[0][0])
    assert {entry for entry, *_ in attended.row(1)} <= set(LISTS[3])
    mixed = Laying(lm, [listed[0], reading_of(lm, adapter, store, stride=2)], 9, pool)
    uniform = torch.zeros(2, VOCABULARY.size).log_softmax(-1)
    ids = torch.full((2, 1), FIRST)
    for _ in range(4):
        mixed.read(ids, torch.ones(2, dtype=torch.long), None, lm(ids), uniform, None)
    assert mixed.laid_out == [[0, 1], [1]], "the search lasts two tokens"


@torch.no_grad()
def test_a_window_cache_that_is_full_starts_afresh(monkeypatch):
    monkeypatch.setattr(window_cache, "MAX_CACHED_WINDOWS", 4)
    lm, adapter = random_lm(), Counting(1)
    cache = WindowCache(adapter, lm, Store())
    asked = [[0, 20], [20, 41], [5], [0, 5, 59], [59, 20], [1, 2, 3, 4, 6, 7], [7], [8]]
    for entries in asked:
        got = cache.gather([np.array(entries)])
        wanted = WindowCache(random_adapter(1), lm, Store()).gather([np.array(entries)])
        torch.testing.assert_close(got, wanted)
    # [0, 5, 59] does not fit beside [0, 20, 41, 5]: all of it anew. Six at once are kept as they
    # are, until the next that is not among them.
    assert adapter.calls == [2, 1, 1, 3, 1, 6, 1]


@torch.no_grad()
def test_windows_that_no_shard_has_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(window_cache, "MAX_CACHED_WINDOWS", 8)

    class Emptied(Store):
        def passages(self, entries):
            found = super().passages(entries)
            return replace(found, present=np.zeros_like(found.present))

    cache = WindowCache(random_adapter(1), random_lm(), Emptied())
    for _ in range(40):
        cache.gather([np.array([1, 20, 41])])
    assert len(cache._encoded) <= 2 * 8


@pytest.mark.parametrize("every", EVERY.values(), ids=EVERY)
def test_a_window_cache_that_starts_afresh_amid_a_clip_changes_nothing(every, monkeypatch):
    lm, adapter, speech = random_lm(), random_adapter(every), clips(4)
    roomy = listen(lm, speech, [reading_of(lm, adapter, stride=2)] * 4, 3)
    monkeypatch.setattr(window_cache, "MAX_CACHED_WINDOWS", 7)
    tight = Store()
    cramped = listen(lm, speech, [reading_of(lm, adapter, tight, stride=2)] * 4, 3)
    assert max(tight.encoded.values()) > 1, "otherwise it never was full"
    for one, other in zip(roomy, cramped, strict=True):
        agree(one, other)


def test_clips_that_read_with_two_adapters_cannot_be_decoded_together():
    lm = random_lm()
    two = [reading_of(lm, random_adapter(seed=seed), entries=[1]) for seed in (1, 2)]
    with pytest.raises(ValueError, match="2 adapters, not one"):
        listen(lm, clips(2), two)


class Words(Vocabulary):
    """Every piece is a word."""

    def word_starts(self):
        starts = np.zeros(self.size, bool)
        starts[[EOS, *range(FIRST, LAST + 1)]] = True
        return starts


@pytest.mark.parametrize("every", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("counts", [(2, 0, 5), (1, 3, 2), (4, 4, 4)])
def test_the_beginning_of_a_transcript_is_read_beside_its_list_as_if_chosen(every, counts):
    lm, adapter = random_lm(), random_adapter(every)
    words = Words(Pieces(), units=6)
    one = reading_of(lm, adapter, entries=np.arange(6), whole=6)
    sources, speech = [one, None, one], clips(3)
    free = listen(lm, speech, sources)
    begun = [heard.tokens[:n] for heard, n in zip(free, counts, strict=True)]
    given = {"attention_sources": sources, "beginnings": begun}
    again = decode(lm, words, speech, [9] * 3, options(), **given)
    for heard, other in zip(again, free, strict=True):
        agree(heard, other)
    assert any(choice.attended for heard in again for choice in heard.choices[:1])


def test_windows_wider_than_the_adapter_reads_are_refused_by_both_widths():
    lm, shape = random_lm(), random_adapter().config.model_copy(update={"window": WINDOW - 1})
    one = reading_of(lm, Adapter(shape, SHAPE).eval(), entries=[20])
    with pytest.raises(ValueError, match=f"windows of {WINDOW} tokens .* reads {WINDOW - 1}"):
        listen(lm, clips(1), [one])


@pytest.mark.parametrize("every", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("beams", [1, 3])
def test_neighbours_vote_beside_what_is_read(every, beams):
    """kNN-LM mixes with what the model says after reading; the evidence of the model alone stays
    that of the model alone."""
    lm, store, speech = random_lm(), Store(), clips(4)
    one = reading_of(lm, random_adapter(every), store, LISTS[0])
    knn = KNN(k=2, weight=0.4, temperature=3.0)
    for units, heard in zip(
        speech,
        listen(lm, speech, [one] * 4, beams, retrieval=Retrieval(store, knn)),
        strict=True,
    ):
        tokens = [choice.token for choice in heard.choices]
        steps = by_hand(lm, one, units, tokens)
        for step, (choice, (logp, alone, _)) in enumerate(zip(heard.choices, steps, strict=True)):
            ids = torch.tensor([[*VOCABULARY.prompt(units), *tokens[:step]]])
            found = store.search(lm(ids).keys[:, -1].numpy(), 2)
            votes = np.exp(-(found.distances[0] - found.distances[0].min()) / 3.0)
            share = votes[found.tokens[0] == choice.token].sum() / votes.sum()
            mixed = 0.4 * share + 0.6 * math.exp(logp[choice.token])
            assert choice.logp == pytest.approx(math.log(mixed), abs=1e-3)
            assert choice.lm_logp == pytest.approx(float(alone[choice.token]), abs=1e-4)


def test_what_is_read_can_end_a_transcript_and_start_one():
    """The end token is chosen from what was read like any other."""
    lm, adapter, speech = random_lm(), random_adapter(), clips(12)
    attention_sources = [reading_of(lm, adapter, entries=LISTS[n % 4]) for n in range(12)]
    heard = [listen(lm, [u], [one])[0] for u, one in zip(speech, attention_sources, strict=True)]
    plain = listen(lm, speech, None)
    lengths = [(len(a.choices), len(b.choices)) for a, b in zip(heard, plain, strict=True)]
    assert any(mine != theirs for mine, theirs in lengths)
    firsts = [(a.choices[0].token, b.choices[0].token) for a, b in zip(heard, plain, strict=True)]
    assert any(mine != theirs for mine, theirs in firsts)
    assert any(one.stopped for one in heard)
    assert EOS not in {token for one in heard for token in one.tokens}


def staggered(lm, clips, arrivals, departures=None):
    """The searches of clips that join at the step `arrivals` names, and leave at that of
    `departures` (clip -> step) unless they are done."""
    batch, searches = Batch(lm, VOCABULARY), {}
    for step in itertools.count():
        for index in [index for index, when in (departures or {}).items() if when == step]:
            batch.leave(searches[index])
        batch.step()
        joining = [index for index, arrival in enumerate(arrivals) if arrival == step]
        searches |= zip(joining, batch.join([clips[index] for index in joining]), strict=True)
        if step >= max(arrivals) and not batch.searches:
            return [searches[index] for index in range(len(clips))]


def kinds(lm, adapter, beams=1):
    """Clips that read whole lists and what is searched, ask neighbours, favour phrases, stand
    after a context; and one that does nothing of all that."""
    first, second = Store(seed=0), Store(seed=7)
    cache = WindowCache(adapter, lm, first)
    searching = AttentionSource(cache, read(stride=2), first)
    whole = AttentionSource(cache, read(), first, np.array(LISTS[0]))
    other = reading_of(lm, adapter, second, stride=3, k=5, gate=16.0)
    starts = torch.ones(VOCABULARY.size, dtype=torch.bool)
    boost = Boost([[FIRST, LAST, FIRST + 1]], 1.0, starts)
    by_speech = Retrieval(first, KNN(k=3, weight=0.5, temperature=2.0))
    by_text = Retrieval(second, KNN(k=4, weight=0.5, temperature=2.0, query="text"))
    own = [
        {"attention": searching, "exclude_document": 1},
        {"attention": whole, "retrieval": by_speech},
        {},
        {"attention": other, "retrieval": by_text, "context": [FIRST, LAST, FIRST]},
        {"attention": searching, "boost": boost},
        {"retrieval": by_text},
        {"attention": reading_of(lm, adapter, Silent())},
    ]
    limits = [7, 11, 9, 10, 5, 8, 6]
    return [
        Clip(units, limit, beams=beams, length_penalty=0.6, **has)
        for units, limit, has in zip(clips(len(own), seed=2), limits, own, strict=True)
    ]


def same(one, other):
    """Two searches that found the same."""
    agree(one.best(), other.best())
    assert [c.entry for c in one.best().choices] == [c.entry for c in other.best().choices]
    assert one.missing_shards == other.missing_shards


@pytest.mark.parametrize("every", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("arrivals", [[0, 1, 1, 2, 4, 5, 5], [5, 4, 0, 3, 1, 0, 2]], ids=str)
def test_a_clip_that_joins_a_batch_that_reads_is_decoded_as_if_alone(every, beams, arrivals):
    lm = random_lm()
    asked = kinds(lm, random_adapter(every), beams)
    together = staggered(lm, asked, arrivals)
    for clip, search in zip(asked, together, strict=True):
        [alone] = staggered(lm, [clip], [0])
        same(search, alone)
    assert [search.missing_shards for search in together] == [0] * 6 + [3]
    plain = [staggered(lm, [replace(clip, attention=None)], [0])[0].best() for clip in asked]
    heard = [search.best() for search in together]
    changed = [a.tokens != b.tokens for a, b in zip(heard, plain, strict=True)]
    assert sum(changed) > 1, "otherwise this shows nothing"


@pytest.mark.parametrize("every", EVERY.values(), ids=EVERY)
def test_a_clip_that_leaves_a_batch_that_reads_changes_nothing_for_the_others(every):
    lm = random_lm()
    asked, arrivals = kinds(lm, random_adapter(every), beams=2), [0, 0, 1, 1, 2, 0, 2]
    undisturbed = staggered(lm, asked, arrivals)
    for leaver in range(len(asked)):
        disturbed = staggered(lm, asked, arrivals, {leaver: 3})
        for index in set(range(len(asked))) - {leaver}:
            same(disturbed[index], undisturbed[index])


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(sorted(EVERY.values())),
    st.lists(
        st.tuples(
            st.integers(0, 6),  # which of the kinds
            st.integers(1, 3),  # its beams
            st.integers(0, 6),  # when it joins
            st.none() | st.integers(1, 5),  # how long it stays
        ),
        min_size=1,
        max_size=5,
    ),
)
def test_whoever_comes_and_goes_a_clip_reads_as_if_alone(every, plan):
    lm, adapter = random_lm(), random_adapter(every)
    made = kinds(lm, adapter)
    asked = [replace(made[kind], beams=beams) for kind, beams, *_ in plan]
    arrivals = [arrival for *_, arrival, _ in plan]
    departures = {
        index: arrival + stay for index, (*_, arrival, stay) in enumerate(plan) if stay is not None
    }
    for clip, search in zip(asked, staggered(lm, asked, arrivals, departures), strict=True):
        if search.over:
            [alone] = staggered(lm, [clip], [0])
            same(search, alone)


def test_a_clip_that_reads_with_another_adapter_is_refused_and_the_batch_goes_on():
    lm = random_lm()
    mine, theirs = (kinds(lm, random_adapter(seed=seed)) for seed in (1, 2))
    batch = Batch(lm, VOCABULARY)
    staying = batch.join(mine[:4])
    batch.step()
    with pytest.raises(ValueError, match="2 adapters, not one"):
        batch.join(theirs[1:2])
    assert batch.searches == staying
    staying += batch.join(mine[4:])
    while batch.searches:
        batch.step()
    for clip, search in zip(mine, staying, strict=True):
        [alone] = staggered(lm, [clip], [0])
        same(search, alone)


def test_a_windows_weight_multiplies_its_place_in_attention():
    adapter, store = random_adapter(), Store()
    cache = WindowCache(adapter, random_lm(), store)
    encoded, windows = cache.gather([np.array([3, 15, 27], np.int64)])
    x, key = torch.randn(2, 1, 1, WIDTH, generator=torch.Generator().manual_seed(0))
    block, memory, visible = adapter.blocks[0], encoded[0].transpose(0, 1), (windows >= 0)[:, None]
    plain, shares = block(x, key, memory, visible)
    even, same = block(x, key, memory, visible, torch.zeros(windows.shape))
    assert torch.equal(plain, even) and torch.equal(shares, same)
    lean = torch.where(windows == 1, math.log(2), 0.0)
    _, doubled = block(x, key, memory, visible, lean)
    assert doubled[0, 0][windows[0] == 1].sum() > shares[0, 0][windows[0] == 1].sum()
    gone = torch.where(windows == 1, -torch.inf, 0.0)
    without, rest = block(x, key, memory, visible & (windows != 1)[:, None])
    silent, left = block(x, key, memory, visible, gone)
    torch.testing.assert_close(silent, without)
    torch.testing.assert_close(left, rest)


@settings(max_examples=20, deadline=None)
@given(
    st.permutations(range(4)), st.lists(st.sampled_from([0.25, 1.0, 2.0]), min_size=3, max_size=3)
)
def test_rows_keep_the_weights_of_their_windows_as_they_come_and_go(order, weights):
    lm, adapter, store = random_lm(), random_adapter(), Store()
    entries = np.array([3, 15, 27], np.int64)
    rules = RetrievedAttention(k=3, stride=1, whole=10)
    lean = Weights(entries, np.log(np.array(weights, np.float32)))
    cache = WindowCache(adapter, lm, store)
    sources = [
        AttentionSource(cache, rules, store, entries[:2], lean),
        AttentionSource(cache, rules, store, entries, None),
        AttentionSource(cache, rules, store, entries, lean),
        AttentionSource(cache, rules, store, entries[:1], None),
    ]

    def laid(chosen):
        rows = RetrievedMemory(lm, [sources[n] for n in chosen], 16, None)
        rows._lay_out()
        return rows._laid

    together = laid(range(4)).select(torch.tensor(order), 99, 99)
    for row, number in enumerate(order):
        alone = laid([number])
        found = together.lean[row, : alone.lean.shape[1]]
        torch.testing.assert_close(found, alone.lean[0])


@torch.no_grad()
@pytest.mark.parametrize("every", EVERY.values(), ids=EVERY)
def test_rows_that_read_the_same_list_have_it_once_in_memory(every):
    lm, adapter, store = random_lm(), random_adapter(every), Store()
    cache, pool = WindowCache(adapter, lm, store), lm.pool(0, growing=True)
    listed = [AttentionSource(cache, read(), store, np.array(own)) for own in LISTS[:2]]

    def reading(chosen):
        return RetrievedMemory(lm, [listed[n] for n in chosen], 9, pool)

    def step(rows):
        ids = torch.full((len(rows._readings), 1), FIRST)
        return rows.read(ids, torch.ones(len(ids), dtype=torch.long), None, lm(ids), None, None)

    def held(rows):
        return rows._laid.encoded.untyped_storage().nbytes()

    def agrees(rows, chosen, number):
        for logits, n in zip(step(rows)[0], chosen, strict=True):
            torch.testing.assert_close(logits, expected[n][number], rtol=1e-4, atol=1e-4)

    alone = [reading([n]) for n in (0, 1)]
    expected = [[step(one)[0][0] for _ in range(3)] for one in alone]
    rows, other, second = reading([0, 0]), reading([0]), reading([1])
    agrees(rows, [0, 0], 0), agrees(other, [0], 0), agrees(second, [1], 0), agrees(second, [1], 1)
    once = held(other)
    rows.join(other)
    rows.select([2, 0, 1, 1])
    assert held(rows) == once
    agrees(rows, [0, 0, 0, 0], 1)
    rows.join(second)
    assert held(rows) > 4 * once
    agrees(rows, [0, 0, 0, 0, 1], 2)
