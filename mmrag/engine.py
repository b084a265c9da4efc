"""A thread that decodes: clips that arrive join the batch between two steps and leave it when done.

The online decoder and anything else that has many callers and one language model. A step is never
run by a caller's thread, and a clip that makes a step fail is found out and fails alone. Knows
nothing of audio, HTTP or other processes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from mmrag.decode import Batch, Clip, Hypothesis, Search
from mmrag.lm import LM
from mmrag.transcribe import credible
from mmrag.vocabulary import Vocabulary

T = TypeVar("T")


class EngineClosed(RuntimeError):
    """The engine has been closed: nothing more will be decoded."""


@dataclass(frozen=True)
class Decoded:
    """A finished clip."""

    hypothesis: Hypothesis
    missing_shards: int
    """Index shards that did not answer at some step."""
    alone: bool
    """Whether it was made again without retrieval, because the language model found the first
    transcript too unlikely."""


@dataclass(frozen=True)
class Statistics:
    """What the engine has done since it started."""

    steps: int = 0
    rows: int = 0
    """Hypotheses extended, summed over the steps: over `steps`, the mean batch size."""
    tokens: int = 0
    """Chosen tokens of finished clips."""
    clips: int = 0
    retrieval_seconds: float = 0.0
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
    cancelled: bool = False
    alone: bool = False
    heard: int = 0

    def cancel(self) -> None:
        """Give up; the future never gets a result. After the end it changes nothing."""
        self.cancelled = True


class Engine:
    """Decodes clips together, at most `rows` hypotheses at a time; further clips wait in order."""

    def __init__(self, lm: LM, vocabulary: Vocabulary, rows: int, threads: int = 1) -> None:
        """`threads` are those that a step's matrix products may use."""
        self._lm = lm
        self._vocabulary = vocabulary
        self._room = rows
        self._threads = threads
        self._wake = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._work: deque[tuple[Callable[[], Any], Future]] = deque()
        self._closed = False
        self._batch = Batch(lm, vocabulary)
        self._jobs: dict[Search, Job] = {}
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

        With `agreement`, as in `Decode`, an incredible transcript is made again without retrieval.
        `hear` is called by the engine's thread with all tokens so far whenever there is a new one
        that will stay (one beam); it must not block.
        """
        job = Job(clip, agreement, hear)
        self._put(self._waiting, job)
        return job

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` in the engine's thread between two steps: other uses of the model."""
        future: Future[T] = Future()
        self._put(self._work, (function, future))
        return future

    @property
    def statistics(self) -> Statistics:
        """A snapshot."""
        return replace(
            self._statistics, waiting=len(self._waiting), decoding=len(self._batch.searches)
        )

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
        while True:
            with self._wake:
                while not (self._closed or self._waiting or self._work or self._jobs):
                    self._wake.wait()
                if self._closed:
                    break
                work = list(self._work)
                self._work.clear()
                joining = self._admit()
            for function, future in work:
                _settle(future, function)
            self._drop_cancelled()
            try:
                self._step(joining)
            except Exception:  # whose it is shows when each is decoded by itself
                self._decode_apart(joining)
        for job in (*self._jobs.values(), *self._waiting):
            job.future.set_exception(EngineClosed("the engine was closed"))
        for _, future in self._work:
            future.set_exception(EngineClosed("the engine was closed"))

    def _admit(self) -> list[Job]:
        """The first of those waiting, as many as there is room for; one always fits in alone."""
        joining: list[Job] = []
        room = self._room - sum(search.clip.beams for search in self._jobs)
        while self._waiting:
            if self._waiting[0].cancelled:
                self._waiting.popleft()
                continue
            beams = self._waiting[0].clip.beams
            if beams > room and (joining or self._jobs):
                break
            room -= beams
            joining.append(self._waiting.popleft())
        return joining

    def _drop_cancelled(self) -> None:
        for search in [search for search, job in self._jobs.items() if job.cancelled]:
            self._batch.leave(search)
            del self._jobs[search]

    def _step(self, joining: list[Job]) -> None:
        """One step for the batch and the first for those that join; tell what is new."""
        self._batch.step()
        searches = self._batch.join([job.clip for job in joining])
        self._jobs |= dict(zip(searches, joining, strict=True))
        self._count(steps=1, rows=self._batch.rows)
        for search, job in list(self._jobs.items()):
            if search.over:
                del self._jobs[search]
                self._finish(job, search)
            else:
                self._tell(job, search)

    def _finish(self, job: Job, search: Search) -> None:
        """Hand out a transcript, or hand it in again if nobody would believe it."""
        heard = search.best()
        helped = job.clip.retrieval is not None or job.clip.reading is not None
        if helped and job.agreement is not None and not credible(heard, job.agreement):
            job.clip = replace(job.clip, retrieval=None, reading=None)
            job.alone = True
            with self._wake:
                self._waiting.appendleft(job)
            return
        self._count(tokens=len(heard.choices), clips=1)
        job.future.set_result(Decoded(heard, search.missing_shards, job.alone))

    def _tell(self, job: Job, search: Search) -> None:
        if job.hear is None or job.clip.beams > 1 or job.alone:
            return
        tokens = search.live[0].tokens
        if len(tokens) > job.heard:
            job.heard = len(tokens)
            job.hear(tokens)

    def _decode_apart(self, joining: list[Job]) -> None:
        """After a failed step: start every clip again, each in a batch of its own."""
        jobs = list(dict.fromkeys((*self._jobs.values(), *joining)))
        self._jobs.clear()
        self._batch = Batch(self._lm, self._vocabulary)
        for job in jobs:
            if job.cancelled or job.future.done():
                continue
            try:
                alone = Batch(self._lm, self._vocabulary)
                [search] = alone.join([job.clip])
                while alone.searches and not job.cancelled:
                    self._tell(job, search)
                    alone.step()
                if not job.cancelled:
                    self._finish(job, search)
            except Exception as error:
                job.future.set_exception(error)

    def _count(self, **more: float) -> None:
        before = self._statistics
        self._statistics = replace(
            before,
            retrieval_seconds=self._batch.retrieval_seconds,
            **{name: getattr(before, name) + value for name, value in more.items()},
        )


def _settle(future: Future[T], function: Callable[[], T]) -> None:
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
