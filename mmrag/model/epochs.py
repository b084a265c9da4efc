"""One pass over the data as arrays: which examples are read together, in which order and format.

Ten million examples are laid out in seconds, and a pass that was laid out can be kept on disk:
every process of a run maps it there, and whoever resumes finds it. What is kept is derived: it may
be deleted at any time, and is laid out again where it is missed.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args
from uuid import uuid4

import numpy as np

from mmrag import durable
from mmrag.arrays import mapped
from mmrag.config import Format

FORMS: tuple[Format, ...] = get_args(Format)
"""The formats, each with its number."""
KEPT = 1 << 19
"""Examples from which on a pass is kept on disk; fewer are laid out in less than a second."""
RECENT = 3
"""Passes that are kept: a run goes on from its last checkpoint, or the one before."""
JITTER = 0.05
"""Share by which a length is taken for more or less than it is."""
_AT_A_TIME = 1 << 16


class Chosen(NamedTuple):
    """An example's index and the format that this step shows it in."""

    index: int
    form: Format


class Lengths(NamedTuple):
    """Of each example (N,): its word pieces and its units."""

    texts: np.ndarray
    units: np.ndarray

    def shown_as(self, forms: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        """For each example in its format, an index into FORMS: whether it has the data (N,) bool,
        and its length (N,) int32."""
        speech, text = (np.equal(forms, FORMS.index(name)) for name in ("speech", "text"))
        usable = (speech | (self.texts > 0)) & (text | (self.units > 0))
        lengths = np.where(speech, 0, self.texts).astype(np.int32)
        lengths += np.where(text, 0, self.units).astype(np.int32)
        lengths += 4
        return usable, lengths


@dataclass(frozen=True, eq=False)
class Epoch(Sequence[list[Chosen]]):
    """The micro-batches of one pass, in the order in which they are read."""

    starts: np.ndarray
    """(B + 1,) int64: where each micro-batch begins, and where the last one ends."""
    indices: np.ndarray
    """(M,) uint32: the examples, micro-batch by micro-batch."""
    forms: np.ndarray
    """(M,) uint8: the format of each, an index into FORMS."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> list[Chosen]:
        if not 0 <= number < len(self):
            raise IndexError(f"micro-batch {number} of {len(self)}")
        here = slice(*self.starts[number : number + 2].tolist())
        pairs = zip(self.indices[here].tolist(), self.forms[here].tolist(), strict=True)
        return [Chosen(index, FORMS[form]) for index, form in pairs]


def lay_out(
    lengths: Lengths,
    mixture: Mapping[Format, float],
    budget: int,
    random: np.random.Generator,
    passed: np.ndarray | None = None,
) -> Epoch:
    """Draw a format for every example, sort by length, cut micro-batches of at most `budget` tokens
    (padding included), shuffle them.

    An example that is longer by itself is passed over, as are those at the places `passed` (P,);
    neither changes which others are read together.
    """
    weights = np.array(list(mixture.values()))
    count = len(lengths.texts)
    drawn = random.choice(len(mixture), size=count, p=weights / weights.sum())
    forms = np.array([FORMS.index(form) for form in mixture], np.uint8)[drawn]
    del drawn
    usable, sizes = lengths.shown_as(forms)
    # Jitter, so that an example does not meet the same companions in every epoch.
    near = random.uniform(1 - JITTER, 1 + JITTER, count)
    near *= sizes
    order = np.flatnonzero(usable)
    order = order[np.argsort(near[order], kind="stable")]
    del near, usable
    sizes = sizes[order]
    starts = _cut(sizes, budget)
    kept = sizes <= budget
    if passed is not None:
        kept &= ~np.isin(order, passed)
    return _shuffled(order, kept, starts, forms, random.permutation(len(starts)))


def _cut(sizes: np.ndarray, budget: int) -> np.ndarray:
    """Where micro-batches begin (B,) int64: each grows while its longest times its count fits."""
    starts, longest, count, place = [], 0, 0, 0
    for first in range(0, len(sizes), _AT_A_TIME):
        for size in sizes[first : first + _AT_A_TIME].tolist():
            if size > longest:
                longest = size
            count += 1
            if longest * count > budget or not place:
                starts.append(place)
                longest, count = size, 1
            place += 1
    return np.array(starts, np.int64)


def _shuffled(
    order: np.ndarray, kept: np.ndarray, starts: np.ndarray, forms: np.ndarray, turns: np.ndarray
) -> Epoch:
    """Micro-batches (their `starts` in `order`) in their `turns`, without what is not `kept`."""
    before = np.concatenate([[0], np.cumsum(kept)])
    first, last = before[starts], before[np.append(starts, len(order))[1:]]
    turns = turns[last[turns] > first[turns]]
    counts = last[turns] - first[turns]
    ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    places = np.repeat(first[turns] - ends[:-1], counts)
    places += np.arange(len(places))
    indices = order[kept][places].astype(np.uint32)
    return Epoch(ends, indices, forms[indices])


class Kept:
    """The passes of one run that are on disk, and how many micro-batches each so far has had.

    Several processes may read and write here at once: what one lays out the others wait for.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def ends(self, phase: int) -> list[int]:
        """The micro-batches of a phase until the end of each of its first passes."""
        try:
            return json.loads((self.directory / f"phase-{phase}.json").read_text())
        except FileNotFoundError:
            return []

    def remember(self, phase: int, ends: Sequence[int]) -> None:
        """Write them down, unless more are."""
        with self.alone():
            if len(self.ends(phase)) < len(ends):
                durable.write_text(self.directory / f"phase-{phase}.json", json.dumps(list(ends)))

    def find(self, phase: int, number: int) -> Epoch | None:
        """The pass `number` of a phase, mapped; None if it is not here."""
        place = self._place(phase, number)
        try:
            return Epoch(*(mapped(place / f"{name}.npy") for name in Epoch.__annotations__))
        except FileNotFoundError:
            return None

    def put(self, phase: int, number: int, epoch: Epoch) -> Epoch:
        """Keep a pass, and of the others those just before it; the same, mapped."""
        place = self._place(phase, number)
        aside = place.with_name(f".{place.name}.{uuid4().hex}")
        aside.mkdir()
        for name in Epoch.__annotations__:
            np.save(aside / f"{name}.npy", getattr(epoch, name))
        try:
            durable.rename(aside, place)
        except OSError:  # another process was first
            if not place.exists():
                raise
            shutil.rmtree(aside)
        recent = {self._place(phase, each) for each in range(number - RECENT + 1, number + 1)}
        for old in set(self.directory.glob("phase-*-epoch-*")) - recent:
            shutil.rmtree(old, ignore_errors=True)
        return self.find(phase, number) or epoch

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other process is in such a block."""
        with (self.directory / "lock").open("a") as stream:
            with suppress(OSError):  # a filesystem without locks: twice the work, the same files
                fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def _place(self, phase: int, number: int) -> Path:
        return self.directory / f"phase-{phase:03d}-epoch-{number:06d}"
