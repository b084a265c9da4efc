"""Parts of a stage's input, worked off one at a time by pools of Ray Data actors.

What is read from a corpus is cut into parts on the way, in a task beside the workers: neither that
task nor the process that runs the stage holds more of it than the parts that are under way.
"""

from __future__ import annotations

import asyncio
import pickle
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import ray.data
import torch
from ray.actor import ActorHandle
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from cluster.placement import Demand, placing
from cluster.progress import bar
from cluster.rejections import Unread
from mmrag.config import Workers
from mmrag.records import Rejection

# A pool is started before anybody knows how many parts there are.
warnings.filterwarnings("ignore", message="The minimum number of concurrent actors")

Work = TypeVar("Work")
AHEAD = 16
"""Parts that are read before any is worked off, and as many again for each worker."""
NOTED = 1000
"""Rejections of a corpus that travel together."""


@dataclass(frozen=True)
class Part(Generic[Work]):
    """A named share of a stage's input."""

    name: str
    work: list[Work]


def in_order(name: str) -> tuple[int, str]:
    """What names of parts are sorted by: beyond the hundred thousandth they are longer."""
    return len(name), name


Source = Callable[[], Iterable[Part | Unread]]
"""Reads a stage's input; called anew, it gives the very same parts again."""


@dataclass(frozen=True)
class Pool:
    """Workers of their own for one of a stage's operators."""

    workers: Workers
    key: str
    """The settings that they are."""
    at_once: int = 1
    """Parts that a worker may be at; with more than one it has to take turns by itself."""


Operator = tuple[type, dict[str, Any]] | tuple[type, dict[str, Any], Pool]
"""An actor class, its arguments, and its own pool where it does not work in the stage's."""


def parts(
    work: Iterable[Work], size: Callable[[Work], float], limit: float, name: str = "part"
) -> list[Part[Work]]:
    """Cut `work` into parts of at most `limit` (one alone may be larger), in order."""
    return list(cut(work, size, limit, name))


def cut(
    rows: Iterable[Work | Rejection],
    size: Callable[[Work], float],
    limit: float,
    name: str = "part",
) -> Iterator[Part[Work] | Unread]:
    """As `parts`, one after the other; what is rejected among `rows` is told on the way."""
    share: list[Work] = []
    unread: list[Rejection] = []
    filled, number, told = 0.0, 0, 0
    for row in rows:
        if isinstance(row, Rejection):
            unread.append(row)
            if len(unread) == NOTED:
                yield Unread(name, told, unread)
                told, unread = told + 1, []
            continue
        more = size(row)
        if share and filled + more > limit:
            yield Part(f"{name}-{number:05d}", share)
            share, filled, number = [], 0.0, number + 1
        share.append(row)
        filled += more
    if share:
        yield Part(f"{name}-{number:05d}", share)
    if unread:
        yield Unread(name, told, unread)


def work_off(
    stages: Sequence[Operator],
    todo: Sequence[Part] | Source,
    workers: Workers,
    title: str,
    key: str,
    *,
    done: Callable[[Part], Any] | None = None,
    ordered: bool = False,
) -> Iterator[Any]:
    """Send parts through `stages`, (actor class, its arguments) each; yield every answer.

    A stage's `__call__` takes a part and returns what the next one takes. What it raises, or its
    `__init__`, is raised here as it was, with the worker's traceback as a note. `todo` is a list
    of parts, or reads them: then that happens in a task on this machine, which is never far ahead
    of the answers, and an `Unread` of it is yielded as it is. A part that `done` has an answer for
    is not worked off. Answers come as they are ready, or `ordered` as the parts are. Fewer workers
    than asked for do where they find no more room; PlacementError, naming `key`, the settings that
    `workers` are, where not one can be placed.
    """
    if isinstance(todo, Sequence) and not todo:
        return
    pools = [
        (stage, arguments, *(own or [Pool(workers, key)])) for stage, arguments, *own in stages
    ]
    demands = [Demand.of(pool.key, pool.workers, count=1) for *_, pool in pools]
    with ExitStack() as open_:
        answered = open_.enter_context(placing(*dict.fromkeys(demands)))
        with _context(ordered):
            dataset, total, count_off = _read(todo, workers)
            for place, (stage, arguments, pool) in enumerate(pools):
                own, skip = pool.workers, done if place == 0 else None
                dataset = dataset.map_batches(
                    _Stage,
                    fn_constructor_args=(stage, arguments, own, skip),
                    batch_size=1,
                    compute=ActorPoolStrategy(
                        size=min(own.count, total or own.count),
                        max_concurrent_calls_per_actor=pool.at_once,
                        enable_true_multi_threading=pool.at_once > 1,
                    ),
                    num_cpus=own.num_cpus,
                    num_gpus=own.num_gpus,
                )
        count = open_.enter_context(bar(total, title))
        # Closing the rows stops the workers, also where a failure or the caller ends the loop.
        for row in open_.enter_context(closing(iter(dataset.iter_rows()))):
            answered()
            answer = pickle.loads(row["value"])
            count_off()
            if isinstance(answer, _Failure):
                raise answer.error
            if not isinstance(answer, Unread):
                count()
            yield answer.value if isinstance(answer, _Done) else answer


def _context(ordered: bool) -> Any:
    """Ray Data's settings for parts: each is a block, and so a worker's task, of its own."""
    context = DataContext.get_current().copy()
    context.target_max_block_size = 1
    context.execution_options.preserve_order = ordered
    return DataContext.current(context)


def _read(
    todo: Sequence[Part] | Source, workers: Workers
) -> tuple[Dataset, int | None, Callable[[], Any]]:
    """The parts as rows; how many they are, where that is known; what to call for each answer."""
    if isinstance(todo, Sequence):
        packed = [{"value": pickle.dumps(part)} for part in todo]
        dataset = ray.data.from_items(packed, override_num_blocks=len(todo))
        return dataset, len(todo), lambda: None
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    window = _Window.options(label_selector=here).remote()
    reading = _Parts(todo, window, AHEAD * (1 + workers.count))
    # No CPU is reserved: reading goes on all the time, and takes little.
    dataset = ray.data.read_datasource(
        reading, override_num_blocks=1, num_cpus=0, label_selector=here
    )
    return dataset, None, window.count.remote


@ray.remote(num_cpus=0)
class _Window:
    """How many answers there have been, for whoever must not read too far ahead of them."""

    def __init__(self) -> None:
        self._answered = 0
        self._grown = asyncio.Condition()

    async def count(self) -> None:
        """One more."""
        async with self._grown:
            self._answered += 1
            self._grown.notify_all()

    async def wait(self, answered: int) -> int:
        """Return once there have been so many answers: how many there are."""
        async with self._grown:
            await self._grown.wait_for(lambda: self._answered >= answered)
            return self._answered


class _Parts(Datasource):
    """What a source reads, in one task, a block a part, at most `ahead` of the answers."""

    def __init__(self, source: Source, window: ActorHandle, ahead: int) -> None:
        super().__init__()
        self._source = source
        self._window = window
        self._ahead = ahead

    def estimate_inmemory_data_size(self) -> int | None:
        """Nobody knows."""
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """The one task."""
        metadata = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
        return [ReadTask(partial(_blocks, self._source, self._window, self._ahead), metadata)]


def _blocks(source: Source, window: ActorHandle, ahead: int) -> Iterator[pa.Table]:
    """A table of one packed row for each part."""
    answered = 0
    for number, one in enumerate(_guarded(source)):
        yield pa.table({"value": pa.array([pickle.dumps(one)], pa.binary())})
        following = number + 2  # parts that are read with the next one
        if following > answered + ahead:
            answered = ray.get(window.wait.remote(following - ahead))


def _guarded(source: Source) -> Iterator[Part | Unread | _Failure]:
    """What the source gives; what it raises at last."""
    try:
        yield from source()
    except Exception as error:
        error.add_note(f"while reading:\n{traceback.format_exc()}")
        yield _Failure(error)


@dataclass(frozen=True)
class _Failure:
    """An exception on its way to the driver: Ray Data would make another of it."""

    error: Exception


@dataclass(frozen=True)
class _Done:
    """The answer for a part that need not be worked off, on its way to the driver."""

    value: Any


class _Stage:
    """Adapts a part -> answer callable to Ray Data's batches, here of one row.

    Values are packed because Ray Data's rows are Arrow's; they pass between our own processes
    alone.
    """

    def __init__(
        self,
        stage: type,
        arguments: dict[str, Any],
        workers: Workers,
        done: Callable[[Part], Any] | None = None,
    ) -> None:
        torch.set_num_threads(max(1, round(workers.num_cpus)))
        self._build = partial(stage, **arguments)
        self._stage: Callable[[Any], Any] | None = None
        self._building = threading.Lock()
        self._done = done

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[bytes]]:
        return {"value": [pickle.dumps(self._answer(pickle.loads(v))) for v in batch["value"]]}

    def _answer(self, work: Any) -> Any:
        if isinstance(work, _Failure | _Done | Unread):
            return work
        try:
            if self._done is not None and (answer := self._done(work)) is not None:
                return _Done(answer)
            with self._building:
                self._stage = self._stage or self._build()
            return self._stage(work)
        except Exception as error:
            error.add_note(f"in a worker:\n{traceback.format_exc()}")
            return _Failure(error)
