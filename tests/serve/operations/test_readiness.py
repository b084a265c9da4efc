"""Probes ask as often as they like, and the parts are asked once."""

import asyncio
from contextvars import ContextVar

import pytest
from ray.serve.exceptions import BackPressureError

from serve.operations import readiness
from serve.operations.readiness import Readiness


class Part:
    """A part of the service, or what is there in its place."""

    def __init__(self, raises=None, seconds=0.0):
        self.raises, self.seconds, self.asked = raises, seconds, 0

    async def alive(self):
        self.asked += 1
        await asyncio.sleep(self.seconds)
        if self.raises is not None:
            raise self.raises


def of(*parts):
    return Readiness(lambda: [part.alive() for part in parts])


def test_many_probes_at_once_are_one_question_to_each_part():
    parts = [Part(seconds=0.02), Part()]

    async def ask():
        ready = of(*parts)
        return [*await asyncio.gather(*(ready.ready() for _ in range(200))), await ready.ready()]

    assert all(asyncio.run(ask()))
    assert [part.asked for part in parts] == [1, 1]


def test_an_old_answer_is_not_given_again(monkeypatch):
    monkeypatch.setattr(readiness, "FRESH_SECONDS", 0.0)
    part = Part()

    async def ask():
        ready = of(part)
        first = await ready.ready()
        part.raises = RuntimeError("gone")
        return first, await ready.ready()

    assert asyncio.run(ask()) == (True, False)


def test_who_is_busy_is_there_and_who_fails_or_is_silent_is_not(monkeypatch):
    monkeypatch.setattr(readiness, "ANSWER_SECONDS", 0.05)
    busy = BackPressureError(num_queued_requests=9, max_queued_requests=9)
    for part, there in [
        (Part(busy), True),
        (Part(RuntimeError("gone")), False),
        (Part(seconds=5), False),
    ]:
        assert asyncio.run(of(Part(), part).ready()) is there


def test_a_probe_that_leaves_does_not_take_the_others_answer_with_it():
    part = Part(seconds=0.05)

    async def ask():
        ready = of(part)
        first, second = asyncio.create_task(ready.ready()), asyncio.create_task(ready.ready())
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        return await second

    assert asyncio.run(ask()) and part.asked == 1


def test_calls_that_are_cancelled_do_not_keep_the_service_from_being_ready_later(monkeypatch):
    """As Serve cancels those that it takes for a caller's who has left."""
    monkeypatch.setattr(readiness, "FRESH_SECONDS", 0.0)
    part = Part(asyncio.CancelledError())

    async def ask():
        ready = of(part)
        first = await ready.ready()
        part.raises = None
        return first, await ready.ready()

    assert asyncio.run(ask()) == (False, True)


def test_calls_are_made_for_nobody_in_particular():
    caller = ContextVar("caller", default="nobody")
    seen = []

    async def alive():
        seen.append(caller.get())

    async def ask():
        caller.set("somebody")
        return await Readiness(lambda: [alive()]).ready()

    assert asyncio.run(ask()) and seen == ["nobody"]
