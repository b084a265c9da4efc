"""A thread that decodes: clips that arrive join the batch between two steps and leave it when done.

The online decoder and anything else that has many callers and one language model. A step is never
run by a caller's thread, and a clip that makes a step fail is found out and fails alone. Clips are
let in as they came, as many as there is memory for; a long prompt is read a part at a time, beside
the steps of the others, and shorter ones may be read before it is done. The clips that read must
all read with one adapter. Knows nothing of audio, HTTP or other processes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch

from mmrag.decoding.decode import Batch, BeamSearch, Clip, Hypothesis, Prompt
from mmrag.decoding.guard import credible, loops, trust
from mmrag.model.lm import LM
from mmrag.model.vocabulary import Vocabulary
from mmrag.retrieval.searching import Searches

T = TypeVar("T")

PREFILL_TOKENS = 256
"""Of prompts, read beside a step."""
IDLE = 8
"""So many times as much is read where no row waits for it."""


class EngineClosed(RuntimeError):
    """The engine has been closed: nothing more will be decoded."""


class ClipTooLong(ValueError):
    """A clip may need more memory than the engine has for all of them."""


@dataclass(frozen=True)
class Decoded:
    """A finished clip."""

    hypothesis: Hypothesis
    missing_shards: int
    """Index shards that did not answer at some step."""
    alone: bool
    """Whether it was made again without retrieval, because the language model found the first
    transcript too unlikely, or without the phrases that made it loop."""


@dataclass(frozen=True)
class Statistics:
    """What the engine has done since it started."""

    steps: int = 0
    rows: int = 0
    """Hypotheses extended, summed over the steps: over `steps`, the mean batch size."""
    tokens: int = 0
    """Chosen tokens of finished clips."""
    clips: int = 0
    """Finished clips: those that got a transcript."""
    retrieval_seconds: float = 0.0
    questions: Searches = field(default_factory=Searches)
    """What was to be looked up, and what became of it."""
    waiting: int = 0
    """Clips that have not joined the batch, now."""
    decoding: int = 0
    """Clips in the batch, now."""


@dataclass(eq=False)
class Job:
    """A clip that was handed in. `cancel` gives it up, and its place in the batch with it."""

    clip: Clip
    agreement: float | None
    hear: Callable[[list[int]], None] | None
    future: Future[Decoded] = field(default_factory=Future)
    alone: bool = False
    """As in `Decoded`."""
    apart: bool = False
    """Whether it shares no batch, because a step failed that it had a part in."""
    missing_shards: int = 0
    heard: int = 0
    """Tokens that `hear` was told."""
    doubted: list[Hypothesis] = field(default_factory=list)
    """Transcripts that were not believed, and made again with the same help."""
    size: tuple[int, int] | None = None
    """Tokens of its prompt and beginning, and pages that it may need; None until it is to be let
    in."""
    prompt: Prompt | None = None
    """Its prompt while it is read a part at a time."""
    begun: int | None = None
    """When it was let into the batch, nanoseconds since the epoch; None while it waits."""

    @property
    def listens(self) -> bool:
        """Whether `hear` is told of what is made now."""
        again = self.alone or self.doubted
        return self.hear is not None and not again

    @property
    def cancelled(self) -> bool:
        """Whether it, or its future, was given up before the end."""
        return self.future.cancelled()

    def cancel(self) -> None:
        """Give up; the future never gets a result. After the end it changes nothing."""
        self.future.cancel()


class Engine:
    """Decodes clips together, at most `rows` hypotheses at a time; further clips wait in order."""

    def __init__(
        self,
        lm: LM,
        vocabulary: Vocabulary,
        rows: int,
        threads: int = 1,
        cache_tokens: int | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> None:
        """`threads` are those that a step's matrix products may use.

        `cache_tokens` is the memory of all clips together, where the model keeps its own in pages:
        a clip is let in when what it may need at most is free. None for as much as they need. Of
        prompts, `prefill_tokens` are read at most beside a step.
        """
        self._lm = lm
        self._vocabulary = vocabulary
        self._pool = None if cache_tokens is None else lm.pool(cache_tokens)
        self._pages = 0 if self._pool is None else self._pool.pages
        self._prefill_tokens = prefill_tokens
        self._room = rows
        self._threads = threads
        self._wake = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._work: deque[tuple[Callable[[], Any], Future]] = deque()
        self._closed = False
        self._batch = Batch(lm, vocabulary, self._pool)
        self._jobs: dict[Job, BeamSearch | None] = {}
        """Those that were let in, in order; None until they have joined the batch."""
        self._statistics = Statistics()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        clip: Clip,
        agreement: float | None = None,
        hear: Callable[[list[int]], None] | None = None,
    ) -> Job:
        """Hand in a clip; `job.future` will hold what it says, or the error that decoding raised.

        With `agreement`, as in `Decode`, an incredible transcript is made again without retrieval,
        one that loops also without the phrases that are boosted, and then at the temperatures of
        `Clip.fallback`; if none is credible, the least incredible of these is it.
        `hear` is called by the engine's thread with all tokens that will stay whenever there is a
        new one: with several beams, when all of them begin with it; not while a transcript is made
        again. It must not block; where it raises, the clip fails. Raises EngineClosed after
        `close`.
        """
        job = Job(clip, agreement, hear)
        self._put(self._waiting, job)
        return job

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` in the engine's thread between two steps: other uses of the model.

        Raises EngineClosed after `close`.
        """
        future: Future[T] = Future()
        self._put(self._work, (function, future))
        return future

    @property
    def statistics(self) -> Statistics:
        """A snapshot."""
        with self._wake:
            waiting = sum(not job.cancelled for job in self._waiting)
            return replace(self._statistics, waiting=waiting, decoding=len(self._jobs))

    def close(self) -> None:
        """Stop after the step that runs; what is unfinished gets EngineClosed."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _put(self, queue: deque, what: Any) -> None:
        with self._wake:
            if self._closed:
                raise EngineClosed("the engine is closed")
            queue.append(what)
            self._wake.notify()

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            while True:
                with self._wake:
                    while not (self._closed or self._waiting or self._work or self._jobs):
                        self._wake.wait()
                    if self._closed:
                        break
                    work = list(self._work)
                    self._work.clear()
                for function, future in work:
                    _settle(future, function)
                self._drop_cancelled()
                self._admit()
                self._step()
        finally:  # whatever ended it, nobody waits for ever
            self._give_up()

    def _give_up(self) -> None:
        with self._wake:
            self._closed = True
            futures = [job.future for job in (*self._jobs, *self._waiting)]
            futures += [future for _, future in self._work]
            for queue in (self._jobs, self._waiting, self._work):
                queue.clear()
        for future in futures:
            _fail(future, EngineClosed("the engine was closed"))

    def _drop_cancelled(self) -> None:
        for job in [job for job in self._jobs if job.cancelled]:
            self._leave(job)

    def _leave(self, job: Job) -> None:
        search = self._jobs.pop(job)
        self._drop_prompt(job)
        if search is not None:
            self._batch.leave(search)

    def _drop_prompt(self, job: Job) -> None:
        if job.prompt is not None:
            job.prompt.release()
            job.prompt = None

    def _admit(self) -> None:
        """Let in the first of those waiting, as many as there is room for; one always fits.

        Nobody overtakes one that has to wait for room: what runs has a limit, and leaves room.
        """
        with self._wake:
            while self._waiting:
                job = self._waiting[0]
                error = None if job.cancelled else self._measure(job)
                if not (job.cancelled or error) and self._jobs and not self._fits(job):
                    break
                self._waiting.popleft()
                if error:
                    _fail(job.future, error)
                elif not job.cancelled:
                    self._jobs[job] = None
                    job.begun = job.begun or time.time_ns()

    def _measure(self, job: Job) -> Exception | None:
        """Find out how large a clip is; the error if it cannot be told, or will never fit."""
        if job.size is None:
            try:
                job.size = self._size(job.clip)
            except Exception as error:
                return error
        if self._pool is not None and job.size[1] > self._pages:
            return ClipTooLong(
                f"a prompt of {job.size[0]} tokens, {job.clip.beams} beams and at most "
                f"{job.clip.longest} tokens each need {job.size[1]} pages of the "
                f"{self._pages} that there are"
            )
        return None

    def _size(self, clip: Clip) -> tuple[int, int]:
        """Tokens of a clip's prompt and beginning, and pages that it needs at worst."""
        prompts = [self._vocabulary.prompt(clip.speech, clip.context)]
        if clip.queries_with_text:
            prompts.append(self._vocabulary.prompt(None))
        pages = 0
        if self._pool is not None:
            for prompt in prompts:
                pages += self._pool.pages_for(len(prompt) + clip.longest)
                # Another beam shares full pages alone, and is copied before one that ends is gone.
                pages += (clip.beams - 1) * (self._pool.pages_for(clip.longest) + 2)
        return len(prompts[0]) + len(clip.beginning), pages

    def _fits(self, job: Job) -> bool:
        """Whether there is room for a clip beside those that were let in."""
        if job.apart or any(other.apart for other in self._jobs):
            return False
        rows = sum(other.clip.beams for other in (job, *self._jobs))
        pages = sum(other.size[1] for other in (job, *self._jobs))
        return rows <= self._room and (self._pool is None or pages <= self._pages)

    def _step(self) -> None:
        """One step for the batch, and the first for those whose prompts are read; tell what is
        new."""
        rows = self._batch.rows
        try:
            self._batch.step()
        except Exception as error:  # whose it is shows when each is decoded by itself
            self._decode_apart(error)
            return
        rows += self._read()
        self._count(steps=int(rows > 0), rows=rows)
        for job, search in list(self._jobs.items()):
            if search is None:
                continue
            try:
                if search.over:
                    self._finish(job, search)
                elif job.listens:
                    self._tell(job, search.tokens)
            except Exception as error:  # of `hear`
                self._leave(job)
                _fail(job.future, error)

    def _read(self) -> int:
        """Read prompts of those that were let in, as `deal` says; how many joined the batch."""
        unread = [job for job, search in self._jobs.items() if search is None]
        if not unread:
            return 0
        left = [job.size[0] if job.prompt is None else job.prompt.left for job in unread]
        budget = self._prefill_tokens * (1 if self._batch.rows else IDLE)
        part, others = deal(left, budget)
        whole = [unread[number] for number in others]
        longest = max(left[number] for number in (0, *others))
        together = longest * (1 + len(whole)) <= budget and unread[0].prompt is None
        if part == left[0] and together:
            return self._join([unread[0], *whole])
        return self._read_part(unread[0], part) + self._join(whole)

    def _read_part(self, job: Job, tokens: int) -> int:
        """Read so many tokens of a prompt; 1 if the clip has joined the batch with the last."""
        try:
            if job.prompt is None:
                job.prompt = self._batch.prompt([job.clip])
            if tokens < job.prompt.left:
                job.prompt.read(tokens)
                return 0
            [search] = self._batch.admit(job.prompt)
        except Exception as error:
            self._leave(job)
            _fail(job.future, error)
            return 0
        self._jobs[job], job.prompt = search, None
        return 1

    def _join(self, jobs: list[Job]) -> int:
        """Let clips join the batch; how many did. It is as it was when one that fails has left."""
        try:
            searches = self._batch.join([job.clip for job in jobs])
        except Exception as error:
            if len(jobs) > 1:
                return sum(self._join([job]) for job in jobs)
            self._leave(jobs[0])
            _fail(jobs[0].future, error)
            return 0
        self._jobs.update(zip(jobs, searches, strict=True))
        return len(jobs)

    def _decode_apart(self, error: Exception) -> None:
        """After a failed step: start every clip again, each in a batch of its own."""
        seconds, questions = self._batch.retrieval_seconds, self._batch.questions
        self._batch.release()
        for job in self._jobs:
            self._drop_prompt(job)
        self._batch = Batch(self._lm, self._vocabulary, self._pool)
        self._batch.retrieval_seconds, self._batch.questions_before = seconds, questions
        failed = [job for job, search in self._jobs.items() if search is not None]
        if len(failed) == 1:
            del self._jobs[failed[0]]
            _fail(failed[0].future, error)
        for job in failed:
            job.apart = True
        with self._wake:
            self._waiting.extendleft(reversed(self._jobs))
            self._jobs.clear()

    def _finish(self, job: Job, search: BeamSearch) -> None:
        """Hand out a transcript, or hand it in again if nobody would believe it."""
        heard = search.best()
        job.missing_shards = max(job.missing_shards, search.missing_shards)
        begun = len(job.clip.beginning)
        if job.agreement is not None and not credible(heard, job.agreement, begun):
            if again := self._again(job, heard):
                job.clip, job.size = again, None
                with self._wake:
                    del self._jobs[job]
                    self._waiting.appendleft(job)
                return
            heard = max([*job.doubted, heard], key=partial(trust, begun=begun))
        if job.listens:
            self._tell(job, heard.tokens)
        del self._jobs[job]
        self._count(tokens=len(heard.choices) - begun, clips=1)
        with suppress(InvalidStateError):  # cancelled just now
            job.future.set_result(Decoded(heard, job.missing_shards, job.alone))

    def _again(self, job: Job, heard: Hypothesis) -> Clip | None:
        """How to make a transcript that nobody would believe again; None if nothing is left."""
        clip = job.clip
        if clip.retrieval is not None or clip.attention is not None:
            job.alone = True
            return replace(clip, retrieval=None, attention=None, context=())
        if clip.boost is not None and loops(heard.tokens):
            job.alone = True
            return replace(clip, boost=None)
        if clip.fallback:
            job.doubted.append(heard)
            warmer, *rest = clip.fallback
            return replace(clip, beams=1, temperature=warmer, fallback=tuple(rest))
        return None

    def _tell(self, job: Job, tokens: list[int]) -> None:
        if len(tokens) > job.heard:
            job.heard = len(tokens)
            job.hear(tokens)

    def _count(self, **more: float) -> None:
        before = self._statistics
        self._statistics = replace(
            before,
            retrieval_seconds=self._batch.retrieval_seconds,
            questions=self._batch.questions,
            **{name: getattr(before, name) + value for name, value in more.items()},
        )


def deal(left: Sequence[int], budget: int) -> tuple[int, list[int]]:
    """How many tokens of the first prompt to read in a step, and which others to read whole.

    `left` are the tokens to read of each, in the order in which they came. The first gets at least
    half of the budget, however many come after it; shorter ones go past it as long as all of them,
    padded to one length, fit in the rest.
    """
    share = min(left[0], budget if len(left) == 1 else max(1, budget // 2))
    whole, padded = [], 0
    for number in sorted(range(1, len(left)), key=left.__getitem__):
        if (len(whole) + 1) * left[number] > budget - share:
            break
        whole.append(number)
        padded = len(whole) * left[number]
    return min(left[0], max(1, budget - padded)), sorted(whole)


def _settle(future: Future[T], function: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except BaseException as error:  # as an executor does: the engine outlives it
        future.set_exception(error)
    else:
        future.set_result(result)


def _fail(future: Future, error: Exception) -> None:
    with suppress(InvalidStateError):  # cancelled just now
        future.set_exception(error)
