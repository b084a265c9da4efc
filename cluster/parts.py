"""Parts of a stage's input, worked off one at a time by a pool of Ray Data actors."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import ray.data
import torch
from ray.data import ActorPoolStrategy

from cluster.placement import Demand, placing
from cluster.progress import bar
from mmrag.config import Workers

Work = TypeVar("Work")


@dataclass(frozen=True)
class Part(Generic[Work]):
    """A named share of a stage's input."""

    name: str
    work: list[Work]


def parts(
    work: Iterable[Work], size: Callable[[Work], float], limit: float, name: str = "part"
) -> list[Part[Work]]:
    """Cut `work` into parts of at most `limit` (one alone may be larger), in order."""
    shares: list[list[Work]] = []
    filled = 0.0
    for one in work:
        if not shares or filled + size(one) > limit:
            shares.append([])
            filled = 0.0
        shares[-1].append(one)
        filled += size(one)
    return [Part(f"{name}-{number:05d}", share) for number, share in enumerate(shares)]


def work_off(
    stages: Sequence[tuple[type, dict[str, Any]]],
    todo: Sequence[Part],
    workers: Workers,
    title: str,
    key: str,
) -> Iterator[Any]:
    """Send parts through `stages`, (actor class, its arguments) each; yield every answer.

    A stage's `__call__` takes a part and returns what the next one takes. What it raises, or its
    `__init__`, is raised here as it was, with the worker's traceback as a note. Fewer workers than
    asked for do where they find no more room; PlacementError, naming `key`, the settings that
    `workers` are, where not one can be placed.
    """
    if not todo:
        return
    packed = [{"value": pickle.dumps(part)} for part in todo]
    dataset = ray.data.from_items(packed, override_num_blocks=len(todo))
    for stage, arguments in stages:
        dataset = dataset.map_batches(
            _Stage,
            fn_constructor_args=(stage, arguments, workers),
            batch_size=1,
            compute=ActorPoolStrategy(size=min(workers.count, len(todo))),
            num_cpus=workers.num_cpus,
            num_gpus=workers.num_gpus,
        )
    # Closing the rows stops the workers, also where a failure or the caller ends the loop.
    with (
        placing(Demand.of(key, workers, count=1)) as answered,
        bar(len(todo), title) as count,
        closing(iter(dataset.iter_rows())) as rows,
    ):
        for row in rows:
            answered()
            answer = pickle.loads(row["value"])
            if isinstance(answer, _Failure):
                raise answer.error
            count()
            yield answer


@dataclass(frozen=True)
class _Failure:
    """An exception on its way to the driver: Ray Data would make another of it."""

    error: Exception


class _Stage:
    """Adapts a part -> answer callable to Ray Data's batches, here of one row.

    Values are packed because Ray Data's rows are Arrow's; they pass between our own processes
    alone.
    """

    def __init__(self, stage: type, arguments: dict[str, Any], workers: Workers) -> None:
        torch.set_num_threads(max(1, round(workers.num_cpus)))
        self._build = partial(stage, **arguments)
        self._stage: Callable[[Any], Any] | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[bytes]]:
        return {"value": [pickle.dumps(self._answer(pickle.loads(v))) for v in batch["value"]]}

    def _answer(self, work: Any) -> Any:
        if isinstance(work, _Failure):
            return work
        try:
            self._stage = self._stage or self._build()
            return self._stage(work)
        except Exception as error:
            error.add_note(f"in a worker:\n{traceback.format_exc()}")
            return _Failure(error)
