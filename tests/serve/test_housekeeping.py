"""Behind the answers: what is tidied, and how often."""

import asyncio
import threading
from pathlib import Path

import pytest

from serve import housekeeping
from serve.housekeeping import Housekeeping

PLACE = Path("/nowhere/contacts")


@pytest.fixture
def kept(monkeypatch):
    """Its housekeeping, and how often it merged; an index is always behind. `build` is what is done
    about that."""
    merged = []

    def compacted(directory):
        merged.append(directory)
        return "it is behind"

    def make(build):
        tidied = Housekeeping(0.02, "retriever.shard_cpus")
        monkeypatch.setattr(tidied, "apart", build)
        return tidied, merged

    monkeypatch.setattr(housekeeping, "_compacted", compacted)
    return make


async def settled(tidied):
    while tidied._tidying or tidied._building:
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(("error", "built"), [(ValueError("recall is 0.4"), 1), (OSError(28), 3)])
def test_an_index_that_cannot_be_built_is_tried_once_and_a_full_disk_again(kept, error, built):
    tried = []

    async def build(task, directory, given):
        tried.append(directory)
        raise error

    async def run():
        tidied, _ = kept(build)
        for _ in range(3):
            tidied.tidy(PLACE)
            await settled(tidied)

    asyncio.run(run())
    assert tried == [PLACE] * built


def test_segments_are_merged_while_an_index_is_built_and_it_is_built_once(kept):
    tried = []

    async def run():
        go_on = asyncio.Event()

        async def build(task, directory, given):
            tried.append(directory)
            await go_on.wait()

        tidied, merged = kept(build)
        for number in range(1, 4):
            tidied.tidy(PLACE)
            while tidied._tidying:
                await asyncio.sleep(0.01)
            assert merged == [PLACE] * number
        go_on.set()
        await settled(tidied)

    asyncio.run(run())
    assert tried == [PLACE]


def test_what_comes_while_segments_are_merged_is_merged_once_more(kept, monkeypatch):
    begun, go_on, merged = threading.Event(), threading.Event(), []

    def compacted(directory):
        merged.append(directory)
        begun.set()
        assert go_on.wait(10)

    async def run():
        tidied, _ = kept(None)
        monkeypatch.setattr(housekeeping, "_compacted", compacted)
        tidied.tidy(PLACE)
        await asyncio.to_thread(begun.wait, 10)
        for _ in range(5):
            tidied.tidy(PLACE)
        go_on.set()
        await settled(tidied)

    asyncio.run(run())
    assert merged == [PLACE] * 2
