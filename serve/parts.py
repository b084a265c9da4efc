"""Work cut into parts, a few of them under way at a time, so that other callers' goes on."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Iterable, Iterator, Sequence
from typing import TypeVar

from mmrag.records import Utterance

PART_SENTENCES, PART_CHARACTERS = 16, 800
"""The most that is spoken, encoded and read at once: other callers' clips wait for it."""
PARTS_AHEAD = 2
"""Parts of a request that are on their way at a time: one is spoken while another is read."""
T = TypeVar("T")


def parts(groups: Sequence[Sequence[Utterance]]) -> Iterator[list[Utterance]]:
    """Groups put together, up to PART_SENTENCES and PART_CHARACTERS; one group is always a part."""
    part: list[Utterance] = []
    for group in groups:
        more = [*part, *group]
        characters = sum(len(one.text) for one in more)
        if part and (len(more) > PART_SENTENCES or characters > PART_CHARACTERS):
            yield part
            more = list(group)
        part = more
    if part:
        yield part


async def in_order(calls: Iterable[Awaitable[T]], at_once: int = PARTS_AHEAD) -> list[T]:
    """What the calls return, so many of them under way at a time; all are given up if one fails."""
    results: list[T] = []
    waiting: deque[asyncio.Future[T]] = deque()
    try:
        for call in calls:
            waiting.append(asyncio.ensure_future(_awaited(call)))
            if len(waiting) >= at_once:
                results.append(await waiting[0])
                waiting.popleft()
        while waiting:
            results.append(await waiting[0])
            waiting.popleft()
    finally:
        for one in waiting:
            one.cancel()
    return results


async def _awaited(call: Awaitable[T]) -> T:
    return await call
