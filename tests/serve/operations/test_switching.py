"""A request ends with the application that it began with, whatever comes in the meantime."""

import asyncio

from serve.operations.switching import Switch


def answering(name, answers, go_on):
    async def app(scope, receive, send):
        answers.append((name, "begins"))
        await go_on.wait()
        answers.append((name, "ends"))

    return app


def test_whoever_came_before_stays_with_the_old_one():
    answers = []

    async def run():
        go_on = asyncio.Event()
        switch = Switch("old", answering("old", answers, go_on))
        first = asyncio.create_task(switch({"type": "http"}, None, None))
        await asyncio.sleep(0)
        switch.to("new", answering("new", answers, go_on))
        second = asyncio.create_task(switch({"type": "websocket"}, None, None))
        await asyncio.sleep(0)
        both = switch.in_use
        go_on.set()
        await asyncio.gather(first, second)
        return both, switch.in_use

    assert asyncio.run(run()) == ({"old", "new"}, {"new"})
    assert answers == [("old", "begins"), ("new", "begins"), ("old", "ends"), ("new", "ends")]


def test_who_fails_or_leaves_is_not_counted_any_more():
    async def fails(scope, receive, send):
        raise RuntimeError

    async def run():
        switch = Switch("old", fails)
        await asyncio.gather(switch({"type": "http"}, None, None), return_exceptions=True)
        switch.to("new", fails)
        return switch.in_use

    assert asyncio.run(run()) == {"new"}
