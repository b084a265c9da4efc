"""Many callers, one language model: each gets what it would have got alone, whoever else comes,
goes or fails."""

import itertools
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from one_answer import Insistent, Silent
from random_models import perturb

from mmrag.config import KNN, CrossAttention, Decode, LanguageModel, RetrievedAttention
from mmrag.decoding.boost import Boost
from mmrag.decoding.decode import Clip, decode
from mmrag.decoding.engine import ClipTooLong, Engine, EngineClosed, Statistics, deal
from mmrag.model.cross_attention import Adapter
from mmrag.model.lm import LM
from mmrag.model.vocabulary import EOS, Vocabulary
from mmrag.records import Neighbours, Passages
from mmrag.retrieval.interpolation import Retrieval
from mmrag.retrieval.memory import AttentionSource
from mmrag.retrieval.window_cache import WindowCache

SHAPE = LanguageModel(width=16, layers=2, heads=4, kv_heads=2, feed_forward=24, tied=False)
PATIENCE = 60
"""Seconds after which something that a test waits for is not going to happen."""
FOREVER = 3000
"""Tokens of a transcript that nobody waits for."""


class Pieces:
    """Pieces whose text plays no part."""

    unknown = None
    size = 9


VOCABULARY = Vocabulary(Pieces(), units=6)
FIRST, LAST = VOCABULARY.first_piece, VOCABULARY.first_unit - 1


class Watched(LM):
    """Remembers the rows of each of its passes, and calls `seen` before it."""

    def __init__(self):
        super().__init__(SHAPE, VOCABULARY.size)
        self.rows = []
        self.seen = lambda rows: None

    def forward(self, ids, *more, **named):
        self.rows.append(len(ids))
        self.seen(len(ids))
        return super().forward(ids, *more, **named)


def random_lm(scale=0.3):
    """A model of strong opinions: weights large enough for every one of them to matter."""
    torch.manual_seed(0)
    lm = Watched()
    return perturb(lm, scale).eval().requires_grad_(False)


class Store:
    """Entries with random keys, searched by brute force."""

    def __init__(self, entries=40, seed=0):
        random = np.random.default_rng(seed)
        self.keys = random.standard_normal((entries, 16)).astype(np.float32)
        self.tokens = random.integers(FIRST, LAST + 1, entries).astype(np.int32)

    def search(self, queries, k, exclude_documents=None):
        distances = ((queries[:, None] - self.keys) ** 2).sum(-1)
        entries = np.argsort(distances, axis=1, kind="stable")[:, :k]
        return Neighbours(
            distances=np.take_along_axis(distances, entries, 1),
            tokens=self.tokens[entries],
            entries=entries,
            documents=np.zeros_like(entries),
        )

    def passages(self, entries):
        """Each entry is a window of its own."""
        tokens, keys = self.tokens[entries][:, None], self.keys[entries][:, None]
        return Passages(tokens, keys.astype(np.float16), np.ones((len(entries), 1), bool))


class Broken(RuntimeError):
    """What a retriever says that has broken."""


class Breaking(Insistent):
    """Answers so many searches, and then no more."""

    def __init__(self, answers):
        super().__init__(FIRST)
        self.answers = answers

    def search(self, queries, k, exclude_documents=None):
        self.answers -= 1
        if self.answers < 0:
            raise Broken("the shards are gone")
        return super().search(queries, k)


def knn(**changes):
    return KNN(**{"k": 2, "weight": 0.5, "temperature": 1.0, **changes})


def asking(retriever, **changes):
    return Retrieval(retriever, knn(**changes))


def clips(count, beams=1, limit=12, seed=0):
    """Every third asks a datastore with speech, every third with text."""
    random = np.random.default_rng(seed)
    retrievals = [None, asking(Store()), asking(Store(seed=1), query="text")]
    return [
        Clip(
            random.integers(VOCABULARY.first_unit, VOCABULARY.size, length).tolist(),
            limit - index % 5,
            beams=beams,
            length_penalty=0.6,
            retrieval=retrievals[index % 3],
        )
        for index, length in enumerate(random.integers(1, 9, count))
    ]


def lasting(limit, retriever=None):
    """A clip of exactly so many steps."""
    retrieval = asking(retriever or Insistent(FIRST), weight=1.0)
    return Clip([VOCABULARY.first_unit] * 3, limit, retrieval=retrieval)


def alone(lm, clip):
    """What `decode` makes of it."""
    settings = Decode(
        beams=clip.beams,
        length_penalty=clip.length_penalty,
        tokens_per_second=10,
        max_seconds=10,
    )
    attention_sources = None if clip.attention is None else [clip.attention]
    [heard] = decode(
        lm,
        VOCABULARY,
        [clip.speech],
        [clip.limit],
        settings,
        clip.retrieval,
        attention_sources=attention_sources,
    )
    return heard


def agree(one, other):
    """The same tokens for the same reasons, up to rounding."""
    for name in ("token", "lm_token", "entry"):
        mine, theirs = ([getattr(c, name) for c in h.choices] for h in (one, other))
        assert mine == theirs
    assert [c.logp for c in one.choices] == pytest.approx([c.logp for c in other.choices], abs=1e-4)
    assert one.stopped == other.stopped


@contextmanager
def running(lm=None, rows=4, **settings):
    engine = Engine(lm or random_lm(), VOCABULARY, rows, **settings)
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def held(engine):
    """Nothing is let in, and no step is made, until the end of the block."""
    entered, go_on = threading.Event(), threading.Event()
    engine.call(lambda: (entered.set(), go_on.wait(PATIENCE)))
    assert entered.wait(PATIENCE)
    try:
        yield
    finally:
        go_on.set()


def result(job):
    return job.future.result(PATIENCE)


class Ear:
    """Remembers what it is told; `reached` once it has heard `until` tokens."""

    def __init__(self, until=1):
        self.told = []
        self.until = until
        self.reached = threading.Event()

    def __call__(self, tokens):
        self.told.append(tokens)
        if len(tokens) >= self.until:
            self.reached.set()

    def check(self, heard):
        """It was told of every prefix, once, and of nothing else."""
        assert self.told == [heard.tokens[: n + 1] for n in range(len(heard.tokens))]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("rows", [1, 4, 64])
def test_a_clip_gets_what_decode_would_have_made_of_it(beams, rows):
    asked, lm = clips(9, beams), random_lm()
    with running(lm, rows) as engine:
        jobs = [engine.submit(clip) for clip in asked]
        for clip, job in zip(asked, jobs, strict=True):
            decoded = result(job)
            agree(decoded.hypothesis, alone(random_lm(), clip))
            assert (decoded.missing_shards, decoded.alone) == (0, False)


def test_many_threads_hand_in_clips_at_once():
    asked, ears = clips(32), [Ear() for _ in range(32)]
    together = threading.Barrier(8)
    with running(rows=5) as engine, ThreadPoolExecutor(9) as callers:

        def hand_in(first):
            together.wait(PATIENCE)
            jobs = [engine.submit(asked[n], hear=ears[n]) for n in range(first, 32, 8)]
            return [result(job).hypothesis for job in jobs]

        handed_in = [callers.submit(hand_in, first) for first in range(8)]
        while not all(future.done() for future in handed_in):
            now = engine.statistics
            assert 0 <= now.decoding <= 5 and 0 <= now.waiting <= 32
            time.sleep(0.001)  # a loop that never waits would keep the lock from the engine
        for first, future in enumerate(handed_in):
            for n, heard in zip(range(first, 32, 8), future.result(PATIENCE), strict=True):
                agree(heard, alone(random_lm(), asked[n]))
                ears[n].check(heard)


def test_those_that_wait_join_in_the_order_in_which_they_came():
    done = []
    with running(rows=2) as engine:
        with held(engine):
            jobs = [engine.submit(lasting(limit)) for limit in (9, 3, 5, 3, 1, 1)]
            for number, job in enumerate(jobs):
                job.future.add_done_callback(lambda _, number=number: done.append(number))
        for job in jobs:
            result(job)
    assert done == [1, 2, 0, 4, 3, 5], "by their steps: 1-9, 1-3, 4-8, 9-11, 10, 11"


def test_no_step_extends_more_hypotheses_than_there_is_room_for():
    """A beam wider than that is decoded when nothing else is."""
    lm, passes = random_lm(scale=0.2), []
    asked = [
        replace(clip, beams=beams, retrieval=None)
        for clip, beams in zip(clips(8), [1, 2, 5, 1, 3, 4, 2, 1], strict=True)
    ]
    with running(lm, rows=3) as engine:
        lm.seen = lambda rows: passes.append((rows, engine.statistics.decoding))
        with held(engine):
            jobs = [engine.submit(clip) for clip in asked]
        heard = [result(job).hypothesis for job in jobs]
    assert all(rows <= 3 or decoding == 1 for rows, decoding in passes)
    assert max(rows for rows, _ in passes) == 5
    assert max(decoding for _, decoding in passes) > 1
    for clip, one in zip(asked, heard, strict=True):
        agree(one, alone(random_lm(scale=0.2), clip))


def test_a_clip_that_is_cancelled_while_it_waits_is_never_read():
    lm = random_lm()
    with running(lm, rows=1) as engine:
        with held(engine):
            jobs = [engine.submit(lasting(limit)) for limit in (2, FOREVER, FOREVER, 3)]
            jobs[1].cancel()
            jobs[2].future.cancel()  # as a wrapped future is by whoever awaits it
            assert engine.statistics.waiting == 2
        assert len(result(jobs[0]).hypothesis.tokens) == 2
        assert len(result(jobs[3]).hypothesis.tokens) == 3
        with pytest.raises(CancelledError):
            result(jobs[1])
    assert len(lm.rows) == 5


@pytest.mark.parametrize("how", ["the job", "its future"])
def test_a_clip_that_is_cancelled_makes_room_and_the_others_go_on(how):
    asked, ear = clips(4), Ear(until=3)
    with running(rows=2) as engine:
        with held(engine):
            endless = engine.submit(lasting(FOREVER), hear=ear)
            jobs = [engine.submit(clip) for clip in asked]
        assert ear.reached.wait(PATIENCE)
        endless.cancel() if how == "the job" else endless.future.cancel()
        for clip, job in zip(asked, jobs, strict=True):
            agree(result(job).hypothesis, alone(random_lm(), clip))
        engine.call(lambda: None).result(PATIENCE)
        assert engine.statistics.decoding == 0
        assert engine.statistics.clips == 4
    assert endless.future.cancelled() and len(ear.told) < FOREVER


def test_to_cancel_what_is_done_changes_nothing():
    with running() as engine:
        job = engine.submit(lasting(2))
        decoded = result(job)
        job.cancel()
        assert not job.cancelled and result(job) is decoded


def test_whoever_listens_hears_every_prefix_and_at_last_the_transcript():
    asked = [*clips(6), lasting(1), lasting(4)]
    ears = [Ear() for _ in asked]
    with running() as engine:
        jobs = [engine.submit(clip, hear=ear) for clip, ear in zip(asked, ears, strict=True)]
        heard = [result(job).hypothesis for job in jobs]
    assert {one.stopped for one in heard} == {True, False}, "some have an end, some a limit"
    for ear, one in zip(ears, heard, strict=True):
        ear.check(one)


def test_of_several_beams_is_heard_what_all_begin_with_and_at_last_the_transcript():
    asked = clips(6, beams=3)
    ears = [Ear() for _ in asked]
    with running() as engine:
        jobs = [engine.submit(clip, hear=ear) for clip, ear in zip(asked, ears, strict=True)]
        heard = [result(job).hypothesis.tokens for job in jobs]
    for ear, tokens in zip(ears, heard, strict=True):
        assert ear.told[-1] == tokens
        lengths = [len(told) for told in ear.told]
        assert lengths == sorted(set(lengths)), "never again, and never less"
        assert all(told == tokens[: len(told)] for told in ear.told), "nothing is taken back"
    assert any(len(ear.told) > 1 for ear in ears), "some is certain before the end"


class Reads:
    """A reading of a datastore's first windows."""

    def __init__(self):
        shape = CrossAttention(
            every=1,
            heads=2,
            head_width=8,
            window=1,
            encoder_layers=1,
            encoder_heads=2,
            encoder_feed_forward=24,
        )
        torch.manual_seed(1)
        adapter = Adapter(shape, SHAPE).eval().requires_grad_(False)
        for block in adapter.blocks:
            block.gate.weight.fill_(0.15)
        self.adapter = adapter

    def of(self, lm):
        store = Store()
        cache = WindowCache(self.adapter, lm, store)
        return AttentionSource(
            cache, RetrievedAttention(k=2, stride=1, whole=4), store, np.arange(3)
        )


@pytest.mark.parametrize("help_", ["retrieval", "attention"])
def test_an_incredible_transcript_is_made_again_without_retrieval(help_):
    lm, [clip, *_], ear = random_lm(), clips(1, limit=3), Ear()
    given = {"retrieval": asking(Insistent(EOS), weight=0.99)}  # there is nothing to hear
    if help_ == "attention":
        given = {"attention": Reads().of(lm)}
    helped = replace(clip, **given)
    with running(lm) as engine:
        others = [engine.submit(lasting(20)) for _ in range(3)]
        believed = result(engine.submit(helped, agreement=-50.0))
        again = result(engine.submit(helped, agreement=-1e-9, hear=ear))
        plain = result(engine.submit(clip, agreement=-1e-9))
        for job in others:
            result(job)
        assert engine.statistics.clips == 6
    agree(believed.hypothesis, alone(random_lm(), helped))
    agree(again.hypothesis, alone(random_lm(), clip))
    agree(plain.hypothesis, alone(random_lm(), clip))
    assert (believed.alone, again.alone, plain.alone) == (False, True, False)
    assert believed.hypothesis.tokens != again.hypothesis.tokens, "otherwise this shows nothing"
    first = [believed.hypothesis.tokens[: n + 1] for n in range(len(ear.told))]
    assert ear.told == first, "of the first transcript alone"


class Words(Vocabulary):
    """Every piece is a word."""

    def word_starts(self):
        starts = np.zeros(self.size, bool)
        starts[[EOS, *range(FIRST, LAST + 1)]] = True
        return starts


def test_whoever_listens_hears_a_beginning_and_what_follows_it():
    lm, ear, beginning = random_lm(), Ear(), [LAST, FIRST, FIRST]
    with running(lm) as engine:
        engine._batch._vocabulary = Words(Pieces(), units=6)
        clip = replace(lasting(6), beginning=beginning)
        heard = result(engine.submit(clip, hear=ear)).hypothesis
        assert engine.statistics.tokens == 3, "those that were chosen"
    assert heard.tokens == [*beginning, FIRST, FIRST, FIRST]
    assert ear.told == [heard.tokens[:n] for n in (4, 5, 6)]


def test_a_transcript_that_is_made_again_keeps_its_beginning():
    lm, beginning = random_lm(), [LAST, FIRST]
    clip = replace(clips(1)[0], beginning=beginning)
    helped = replace(clip, retrieval=asking(Insistent(EOS), weight=0.99))
    with running(lm) as engine:
        engine._batch._vocabulary = Words(Pieces(), units=6)
        first = result(engine.submit(helped))
        again = result(engine.submit(helped, agreement=-1e-9))
        plain = result(engine.submit(clip))
    assert first.hypothesis.tokens == beginning and again.alone
    assert again.hypothesis.tokens[:2] == beginning and len(again.hypothesis.tokens) > 2
    agree(again.hypothesis, plain.hypothesis)


def test_shards_missed_by_the_first_transcript_are_remembered_by_the_second():
    with running() as engine:
        jobs = [
            engine.submit(replace(clips(1)[0], retrieval=asking(Silent())), agreement)
            for agreement in (-50.0, -1e-9)
        ]
        decoded = [result(job) for job in jobs]
    assert [(one.alone, one.missing_shards) for one in decoded] == [(False, 3), (True, 3)]


@pytest.mark.parametrize("answers", [0, 3], ids=["at once", "later"])
@pytest.mark.parametrize("broken", [1, 2])
def test_a_retriever_that_breaks_fails_its_own_clips_alone(answers, broken):
    asked, ears = [*clips(5), lasting(9)], [Ear() for _ in range(6)]
    with running(rows=20) as engine:
        with held(engine):
            jobs = [engine.submit(clip, hear=ear) for clip, ear in zip(asked, ears, strict=True)]
            failing = [engine.submit(lasting(9, Breaking(answers))) for _ in range(broken)]
        for job in failing:
            with pytest.raises(Broken, match="gone"):
                result(job)
        for clip, job, ear in zip(asked, jobs, ears, strict=True):
            heard = result(job).hypothesis
            agree(heard, alone(random_lm(), clip))
            ear.check(heard)
        agree(result(engine.submit(asked[1])).hypothesis, alone(random_lm(), asked[1]))
        assert engine.statistics.clips == 7


def test_a_clip_that_cannot_even_be_read_disturbs_nobody():
    """Those in the batch go on where they are, rather than from their start."""
    lm, ear = random_lm(), Ear(until=3)
    with running(lm, rows=3) as engine:
        steady = engine.submit(lasting(40), hear=ear)
        assert ear.reached.wait(PATIENCE)
        with held(engine):
            bad = [engine.submit(Clip([VOCABULARY.size + 1], 5)) for _ in range(2)]
        for job in bad:
            with pytest.raises(IndexError):
                result(job)
        heard = result(steady).hypothesis
        assert engine.statistics.rows == 40
    ear.check(heard)


def test_clips_are_decoded_apart_while_the_engine_listens():
    """After a failure nobody shares a batch with those it may have come from, but calls are
    answered and clips can be given up."""
    lm, ear = random_lm(), Ear(until=6)
    done = []
    with running(lm, rows=3) as engine:
        with held(engine):
            endless = engine.submit(lasting(FOREVER), hear=ear)
            failing = engine.submit(lasting(9, Breaking(3)))
            other = engine.submit(lasting(7))
            later = engine.submit(lasting(2))
            for job in (failing, other, later):
                job.future.add_done_callback(done.append)
        assert ear.reached.wait(PATIENCE)
        now = engine.call(lambda: engine.statistics).result(PATIENCE)
        assert (now.waiting, now.decoding) == (3, 1)
        endless.cancel()
        with pytest.raises(Broken):
            result(failing)
        assert len(result(other).hypothesis.tokens) == 7
        assert len(result(later).hypothesis.tokens) == 2
    assert done == [job.future for job in (failing, other, later)], "as they had come"


def test_a_listener_that_raises_fails_its_own_clip_alone():
    asked, ears = clips(4), [Ear() for _ in range(4)]

    def at(length):
        def hear(tokens):
            if len(tokens) == length:
                raise Broken("nobody listens")

        return hear

    with running(rows=9) as engine:
        with held(engine):
            jobs = [engine.submit(clip, hear=ear) for clip, ear in zip(asked, ears, strict=True)]
            deaf = [engine.submit(lasting(5), hear=at(length)) for length in (1, 3, 5)]
        for job in deaf:
            with pytest.raises(Broken, match="listens"):
                result(job)
        for clip, job, ear in zip(asked, jobs, ears, strict=True):
            heard = result(job).hypothesis
            agree(heard, alone(random_lm(), clip))
            ear.check(heard)
        assert engine.statistics.rows == sum(len(result(j).hypothesis.choices) for j in jobs) + 9


def test_a_call_is_answered_between_two_steps():
    ear = Ear()
    with running(rows=1) as engine:
        endless = engine.submit(lasting(FOREVER), hear=ear)
        assert ear.reached.wait(PATIENCE)
        name = engine.call(lambda: threading.current_thread().name)
        assert name.result(PATIENCE) == "engine"
        assert not endless.future.done()

        def fail():
            raise Broken("of its own")

        with pytest.raises(Broken, match="own"):
            engine.call(fail).result(PATIENCE)
        with pytest.raises(SystemExit):
            engine.call(lambda: exec("raise SystemExit")).result(PATIENCE)
        with held(engine):
            given_up = engine.call(fail)
            assert given_up.cancel()
        assert engine.call(lambda: 5).result(PATIENCE) == 5, "the engine goes on"


def test_what_is_unfinished_when_the_engine_closes_gets_an_error():
    ear, entered, go_on = Ear(), threading.Event(), threading.Event()
    with running(rows=1) as engine:
        decoding = engine.submit(lasting(FOREVER), hear=ear)
        assert ear.reached.wait(PATIENCE)
        # While this runs, everything else is queued behind it.
        running_call = engine.call(lambda: (entered.set(), go_on.wait(PATIENCE)))
        assert entered.wait(PATIENCE)
        waiting = engine.submit(lasting(2))
        given_up = engine.submit(lasting(2))
        given_up.future.cancel()
        called = engine.call(lambda: None)
        closing = threading.Thread(target=engine.close)
        closing.start()
        while not refuses(engine):
            time.sleep(0.001)
        go_on.set()
        closing.join(PATIENCE)
        assert not closing.is_alive()
        assert running_call.done()
        for future in (decoding.future, waiting.future, called):
            with pytest.raises(EngineClosed):
                future.result(PATIENCE)
        assert given_up.cancelled
        for hand_in in (lambda: engine.submit(lasting(1)), lambda: engine.call(lambda: None)):
            with pytest.raises(EngineClosed):
                hand_in()
        assert (engine.statistics.waiting, engine.statistics.decoding) == (0, 0)
        engine.close()


def refuses(engine):
    try:
        engine.call(lambda: None)
    except EngineClosed:
        return True
    return False


def test_the_engine_closes_while_clips_are_decoded_apart():
    ear = Ear(until=6)
    with running() as engine:
        with held(engine):
            jobs = [engine.submit(lasting(FOREVER), hear=ear)]
            jobs.append(engine.submit(lasting(FOREVER, Breaking(3))))
        assert ear.reached.wait(PATIENCE)
        engine.close()
        for job in jobs:
            with pytest.raises(EngineClosed):
                result(job)


def test_statistics_add_up():
    lm, ear = random_lm(), Ear(until=2)
    asked = [*clips(4), lasting(6)]
    asked = [replace(clip, retrieval=clip.retrieval and asking(Store())) for clip in asked]
    with running(lm, rows=3) as engine:
        assert engine.statistics == Statistics()
        with held(engine):
            jobs = [engine.submit(clip) for clip in asked]
            assert (engine.statistics.waiting, engine.statistics.decoding) == (5, 0)
        heard = [result(job).hypothesis for job in jobs]
        done = engine.statistics
        assert done.tokens == sum(len(one.choices) for one in heard)
        assert done.rows == sum(lm.rows) == done.tokens, "a greedy clip is a row a token"
        assert done.clips == 5
        assert max(len(one.choices) for one in heard) <= done.steps < done.tokens
        assert done.steps <= len(lm.rows)
        assert done.retrieval_seconds > 0

        endless = [engine.submit(lasting(FOREVER), hear=ear) for _ in range(4)]
        assert ear.reached.wait(PATIENCE)
        with held(engine):
            assert (engine.statistics.waiting, engine.statistics.decoding) == (1, 3)
        for job in endless:
            job.cancel()


def test_a_failure_takes_no_time_back():
    with running() as engine:
        result(engine.submit(lasting(30)))
        before = engine.statistics
        with held(engine):
            failing = engine.submit(lasting(9, Breaking(2)))
            other = engine.submit(lasting(3))
        with pytest.raises(Broken):
            result(failing)
        result(other)
        after = engine.statistics
    assert after.retrieval_seconds > before.retrieval_seconds
    assert after.steps > before.steps
    assert (before.clips, after.clips) == (1, 2)


def long_clip(tokens, limit=5):
    """A clip of a long prompt."""
    return Clip([VOCABULARY.first_unit + n % 6 for n in range(tokens)], limit)


@pytest.mark.parametrize("prefill_tokens", [1, 7, 64])
def test_prompts_read_a_part_at_a_time_are_read_as_if_whole(prefill_tokens):
    asked = [*clips(6, beams=2), long_clip(90), long_clip(33), *clips(3)]
    lm = random_lm()
    asked.append(replace(long_clip(41), attention=Reads().of(lm)))
    with running(lm, rows=12, prefill_tokens=prefill_tokens) as engine:
        with held(engine):
            jobs = [engine.submit(clip) for clip in asked]
        for clip, job in zip(asked, jobs, strict=True):
            agree(result(job).hypothesis, alone(random_lm() if not clip.attention else lm, clip))


def test_a_long_prompt_is_read_beside_steps_and_shorter_ones_pass_it():
    lm, done, ear = random_lm(), [], Ear(until=2)
    sizes = []
    with running(lm, rows=8, prefill_tokens=16) as engine:
        steady = engine.submit(lasting(FOREVER), hear=ear)
        assert ear.reached.wait(PATIENCE)
        forward = LM.forward
        lm.forward = lambda ids, *more, **named: (
            sizes.append(ids.shape),
            forward(lm, ids, *more, **named),
        )[1]
        with held(engine):
            jobs = [engine.submit(long_clip(400, 1)), engine.submit(long_clip(3, 1))]
            for number, job in enumerate(jobs):
                job.future.add_done_callback(lambda _, number=number: done.append(number))
        for job in jobs:
            result(job)
        steady.cancel()
    assert done == [1, 0]
    assert max(rows * time for rows, time in sizes) <= 16
    parts = [place for place, (_, time) in enumerate(sizes) if time > 1]
    assert all(later - earlier <= 3 for earlier, later in itertools.pairwise(parts))
    assert sum(time == 1 for _, time in sizes) >= 400 // 16, "the others went on meanwhile"


@given(st.lists(st.integers(1, 600), min_size=1, max_size=9), st.integers(1, 300))
def test_the_first_prompt_gets_half_a_step_and_shorter_ones_the_rest(left, budget):
    part, whole = deal(left, budget)
    padded = len(whole) * max((left[number] for number in whole), default=0)
    assert part + padded <= budget
    assert part >= min(left[0], max(1, budget // 2))
    assert 0 not in whole
    passed = {left[number] for number in whole}
    waiting = [left[number] for number in range(1, len(left)) if number not in whole]
    assert max(passed, default=0) <= min(waiting, default=600)
    if waiting and part < left[0]:
        assert part + padded == budget, "nothing is left over"


class Paged(Watched):
    """Remembers the pool that its rows' pages are of."""

    def pool(self, tokens, growing=False):
        made = super().pool(tokens, growing)
        if not growing:
            self.pages = made
        return made


def paged_lm():
    torch.manual_seed(0)
    return perturb(Paged(), 0.3).eval().requires_grad_(False)


def test_what_became_of_the_questions_is_counted_though_rows_leave():
    with running() as engine:
        for limit in (3, 5):
            result(engine.submit(lasting(limit)))
        found = engine.statistics.questions
    assert found.asked == found.searched == 3 + 5


def test_clips_are_let_in_as_memory_allows_and_in_their_order():
    lm, done, most = paged_lm(), [], []
    with running(lm, rows=50, cache_tokens=256) as engine:  # 16 pages
        lm.seen = lambda rows: most.append(engine.statistics.decoding)
        with held(engine):
            jobs = [
                engine.submit(lasting(limit))
                for limit in (54, 54, 210, 20, 24)  # 4, 4, 14, 2, 2 pages
            ]
            for number, job in enumerate(jobs):
                job.future.add_done_callback(lambda _, number=number: done.append(number))
        for job in jobs:
            result(job)
    assert done == [0, 1, 3, 4, 2], "the large one is not overtaken before it is let in"
    assert max(most) == 2


def test_a_clip_that_never_fits_is_refused_and_one_that_just_fits_is_not():
    with running(paged_lm(), cache_tokens=256) as engine:
        refused = engine.submit(lasting(400))
        wide = engine.submit(replace(lasting(20), beams=9))
        fits = engine.submit(lasting(240))
        for job in (refused, wide):
            with pytest.raises(ClipTooLong, match="16 that there are"):
                result(job)
        assert len(result(fits).hypothesis.tokens) == 240


@pytest.mark.parametrize("when", ["decoding", "its prompt is read"])
def test_a_clip_that_is_cancelled_gives_its_memory_back_at_once(when):
    lm, ear = paged_lm(), Ear(until=2)
    clip = lasting(FOREVER) if when == "decoding" else long_clip(5000)
    with running(lm, prefill_tokens=1, cache_tokens=2 * FOREVER) as engine:
        job = engine.submit(clip, hear=ear)
        if when == "decoding":
            assert ear.reached.wait(PATIENCE)
        else:
            while len(lm.rows) < 3:
                time.sleep(0.001)
        job.cancel()
        engine.call(lambda: None).result(PATIENCE)
        engine.call(lambda: None).result(PATIENCE)
        assert lm.pages.free == lm.pages.pages


def test_an_incredible_transcript_is_made_again_at_higher_temperatures():
    torch.manual_seed(0)
    clip = replace(clips(1)[0], fallback=(0.5, 1.0), beams=2)
    with running() as engine:
        believed = result(engine.submit(clip, agreement=-50.0)).hypothesis
        agree(believed, alone(random_lm(), clip))
        before = engine.statistics.rows
        doubted = result(engine.submit(clip, agreement=-1e-9))
        assert engine.statistics.rows > before + 2 * len(believed.choices)
        assert not doubted.alone
    mean = [
        sum(c.lm_logp for c in one.choices) / len(one.choices)
        for one in (believed, doubted.hypothesis)
    ]
    assert mean[1] >= mean[0] - 1e-4, "the least incredible of the three"


def favouring(piece: int, weight: float) -> Boost:
    """One token is a phrase, and a word."""
    starts = torch.zeros(VOCABULARY.size, dtype=torch.bool)
    starts[[EOS, *range(FIRST, LAST + 1)]] = True
    return Boost([[piece]], weight, starts)


def test_a_transcript_that_phrases_make_loop_is_made_again_without_them():
    clip = clips(1)[0]
    looping = replace(clip, boost=favouring(LAST, 50.0))
    with running() as engine:
        trusted = result(engine.submit(looping))
        again = result(engine.submit(looping, agreement=-50.0))
    assert set(trusted.hypothesis.tokens) == {LAST} and not trusted.alone
    assert again.alone
    agree(again.hypothesis, alone(random_lm(), clip))


def test_phrases_stay_where_the_model_finds_what_retrieval_made_absurd():
    """The names that they are there for are unlikely to it, too."""
    clip = replace(clips(1)[0], limit=3, boost=favouring(LAST, 2.0))
    helped = replace(clip, retrieval=asking(Insistent(EOS), weight=0.99))
    with running() as engine:
        kept = result(engine.submit(clip, agreement=-1e-9))
        again = result(engine.submit(helped, agreement=-1e-9))
        plain = result(engine.submit(replace(clip, boost=None)))
    assert again.alone and not kept.alone
    agree(again.hypothesis, kept.hypothesis)
    assert kept.hypothesis.tokens != plain.hypothesis.tokens, "otherwise this shows nothing"


def test_an_unlikely_beginning_is_not_held_against_what_follows():
    lm, beginning = random_lm(), [LAST, FIRST, LAST, FIRST, FIRST]
    clip = replace(clips(1)[0], beginning=beginning, retrieval=asking(Store(), weight=0.1))
    with running(lm) as engine:
        engine._batch._vocabulary = Words(Pieces(), units=6)
        heard = result(engine.submit(clip)).hypothesis
        given, chosen = (
            sum(one.lm_logp for one in part) / len(part)
            for part in (heard.choices[:5], heard.choices[5:])
        )
        assert given < chosen, "otherwise this shows nothing"
        between = (given + 3 * chosen) / 4
        assert not result(engine.submit(clip, agreement=between)).alone
        assert result(engine.submit(clip, agreement=chosen + 1e-3)).alone
