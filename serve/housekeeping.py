"""What is done to datastores behind the answers: segments merged, entries erased, and an index that
fell behind built again.

Merging is done in a thread. Building an index takes minutes and all that a processor has, so it is
done in a process of its own somewhere in the cluster, on one core and after whatever else is there
to do. The directory is locked for neither, and who searches goes on with what he has.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from cluster.placement import Demand, require
from mmrag.retrieval.compaction import compact
from mmrag.retrieval.reindexing import behind, catch_up
from mmrag.retrieval.segment import DatastoreError

NICE = 10
"""How far the process that builds an index stands back."""
APART = ("compact", "index")
"""Tasks of `retrieval.upkeep` that may build an index."""
log = logging.getLogger("ray.serve")


class Housekeeping:
    """Of one replica of the retriever; several do each other no harm, and wait for each other."""

    def __init__(self, num_cpus: float, key: str) -> None:
        """`num_cpus` reserves a process that builds an index; `key` is the setting of it."""
        self._demand = Demand(key, 1, num_cpus, lower=key)
        self._thread = ThreadPoolExecutor(1, "tidy")
        self._tidying: dict[Path, asyncio.Task] = {}
        self._again: set[Path] = set()
        self._building: dict[Path, asyncio.Task] = {}
        self._given_up: set[Path] = set()
        """Whose index could not be built: it would fail at every addition again."""

    def tidy(self, directory: Path) -> None:
        """Merge small segments, erase what was deleted and have an index that fell behind built
        again, all behind the answer."""
        if directory in self._tidying:
            self._again.add(directory)
            return
        self._tidying[directory] = asyncio.create_task(self._tidied(directory))

    async def apart(
        self, task: Callable[..., Any], directory: Path, given: Mapping[str, Any]
    ) -> Any:
        """What a task does in a process of its own; it goes on if nobody waits for it any more.

        Raises what the task raises, and PlacementError where there is no room for it.
        """
        await asyncio.to_thread(require, self._demand)
        started = _work.options(num_cpus=self._demand.num_cpus).remote(task, directory, dict(given))
        try:
            return await asyncio.shield(asyncio.wrap_future(started.future()))
        except RayTaskError as error:
            raise error.cause from None

    async def _tidied(self, directory: Path) -> None:
        loop = asyncio.get_running_loop()
        try:
            why, more = None, True
            while more:
                self._again.discard(directory)
                why = await loop.run_in_executor(self._thread, _compacted, directory)
                more = directory in self._again
        finally:
            del self._tidying[directory]
        if why and directory not in self._building and directory not in self._given_up:
            self._building[directory] = asyncio.create_task(self._caught_up(directory))

    async def _caught_up(self, directory: Path) -> None:
        try:
            why = await self.apart(_catch_up, directory, {})
            if why is not None:
                log.info("%s is indexed anew: %s", directory.name, why)
        except (DatastoreError, OSError, RayError) as error:
            log.warning("%s is not indexed anew: %s", directory.name, error)
        except ValueError as error:
            self._given_up.add(directory)
            log.error("%s cannot be indexed anew, and stays as it is: %s", directory.name, error)
        finally:
            del self._building[directory]


@ray.remote(max_calls=1, max_retries=0)
def _work(task: Callable[..., Any], directory: Path, given: Mapping[str, Any]) -> Any:
    """Do a task in this process, which ends with it."""
    os.nice(NICE)
    return task(directory, **given)


def _catch_up(directory: Path) -> str | None:
    """Why the index was built again, if it was."""
    done = catch_up(directory)
    return done and done.why


def _compacted(directory: Path) -> str | None:
    """Why the index should be built again, once segments are merged."""
    try:
        compact(directory)
        return behind(directory)
    except (DatastoreError, OSError, ValueError) as error:  # deleted meanwhile, or a full disk
        log.warning("%s is not compacted: %s", directory.name, error)
        return None
