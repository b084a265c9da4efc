"""Which examples each step of a training reads, as a function of (seed, step) alone."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmrag.config import Format, Phase, Train
from mmrag.model.epochs import FORMS, KEPT, Chosen, Epoch, Kept, Lengths, lay_out
from mmrag.model.examples import Example
from mmrag.model.packed import Packed

LEAVE_OUT = "train.leave_out"
"""The key that passes over utterances."""


class TrainingError(ValueError):
    """What a run is asked for cannot be done; each of its workers finds that out alike."""


class TooLong(NamedTuple):
    """An example that no micro-batch can hold in these formats; `length` is of the longest."""

    index: int
    length: int
    forms: list[Format]


class Curriculum:
    """Which examples each step reads, as a function of (seed, step) alone.

    A phase passes over the data in epochs, each as `lay_out` has it. An example that is longer than
    a micro-batch is passed over (`too_long`), and so is one that is to be left out. A step takes
    the next `micro_batches` of them, whatever the number of workers; a resumed run asks for its
    step and reads on where it stopped.

    With a directory to keep them in, large epochs are laid out by one process for all, and a step
    in the middle is found without those before it.
    """

    def __init__(
        self,
        data: Sequence[Example],
        settings: Train,
        seed: int,
        directory: Path | None = None,
        kept: int = KEPT,
    ) -> None:
        """`kept` are the examples from which on an epoch is kept in `directory`.

        TrainingError if there is nothing to read, or no such utterance to leave out.
        """
        if not len(data):
            raise TrainingError("no examples to train on")
        self.settings = settings
        self.seed = seed
        self._lengths = _lengths(data)
        self._passed = _places(data, settings.leave_out)
        self._keep_from = kept
        self._kept = None if directory is None else Kept(directory / self._name())
        self._ends: dict[int, list[int]] = {}
        self._unsaved = 0
        self._checked: set[int] = set()
        self._latest: tuple[tuple[int, int], Epoch] | None = None

    def step(self, step: int) -> tuple[Phase, list[list[Chosen]]]:
        """The phase and the micro-batches of optimizer step `step`, counted from 0.

        Raises ValueError past the last step, TrainingError if no example fits a phase's mixture.
        """
        if not 0 <= step < self.settings.steps:
            raise ValueError(f"step {step} of {self.settings.steps}")
        ends = list(accumulate(phase.steps for phase in self.settings.phases))
        number, count = bisect_right(ends, step), self.settings.micro_batches
        first = ends[number] - self.settings.phases[number].steps
        return self.settings.phases[number], self._read(number, (step - first) * count, count)

    def too_long(self) -> list[TooLong]:
        """The examples that are passed over in some format of the phases, for their length."""
        longest: dict[int, TooLong] = {}
        for form in dict.fromkeys(form for phase in self.settings.phases for form in phase.mixture):
            usable, lengths = self._lengths.shown_as(FORMS.index(form))
            over = np.flatnonzero(usable & (lengths > self.settings.micro_batch_tokens))
            for index in np.setdiff1d(over, self._passed).tolist():
                _, length, forms = longest.get(index, TooLong(index, 0, []))
                length = max(length, int(lengths[index]))
                longest[index] = TooLong(index, length, [*forms, form])
        return [longest[index] for index in sorted(longest)]

    def _read(self, number: int, first: int, count: int) -> list[list[Chosen]]:
        """Micro-batches of a phase, counted from its beginning over all of its epochs."""
        found: list[list[Chosen]] = []
        while len(found) < count:
            epoch, begin = self._reach(number, first + len(found))
            place = first + len(found) - begin
            batches = self._epoch(number, epoch)
            stop = min(len(batches), place + count - len(found))
            found += [batches[each] for each in range(place, stop)]
        return found

    def _reach(self, number: int, batch: int) -> tuple[int, int]:
        """The epoch of a phase that a micro-batch is in, and the first micro-batch of that."""
        if number not in self._ends:
            self._ends[number] = self._kept.ends(number) if self._kept else []
        ends = self._ends[number]
        while not ends or ends[-1] <= batch:
            ends.append((ends or [0])[-1] + len(self._epoch(number, len(ends))))
            self._unsaved += len(self._lengths.texts)
            if self._kept and self._unsaved >= self._keep_from:
                self._kept.remember(number, ends)
                self._unsaved = 0
        epoch = bisect_right(ends, batch)
        return epoch, ends[epoch - 1] if epoch else 0

    def _epoch(self, number: int, epoch: int) -> Epoch:
        if self._latest is None or self._latest[0] != (number, epoch):
            self._latest = (number, epoch), self._found(number, epoch)
        return self._latest[1]

    def _found(self, number: int, epoch: int) -> Epoch:
        """An epoch of a phase: from the disk, or laid out, by one process while others wait."""
        kept = self._kept if len(self._lengths.texts) >= self._keep_from else None
        if kept and (found := kept.find(number, epoch)):
            return found
        with kept.alone() if kept else nullcontext():
            if kept and (found := kept.find(number, epoch)):
                return found
            made = self._laid_out(number, epoch)
            return kept.put(number, epoch, made) if kept else made

    def _laid_out(self, number: int, epoch: int) -> Epoch:
        phase = self.settings.phases[number]
        if number not in self._checked:
            self._check(phase)
            self._checked.add(number)
        random = np.random.default_rng([self.seed, number, epoch])
        budget = self.settings.micro_batch_tokens
        return lay_out(self._lengths, phase.mixture, budget, random, self._passed)

    def _check(self, phase: Phase) -> None:
        """TrainingError if no epoch of a phase would hold anything."""
        budget, shortest = self.settings.micro_batch_tokens, []
        for form in phase.mixture:
            usable, lengths = self._lengths.shown_as(FORMS.index(form))
            usable[self._passed] = False
            shortest += [int(lengths[usable].min())] if usable.any() else []
        if not shortest:
            raise TrainingError(f"phase {phase.name}: no example fits its mixture {phase.mixture}")
        if min(shortest) > budget:
            raise TrainingError(
                f"phase {phase.name}: no example fits in train.micro_batch_tokens {budget}, the "
                f"shortest has {min(shortest)}"
            )

    def _name(self) -> str:
        """What the epochs follow from, beside the data."""
        phases = [(phase.steps, list(phase.mixture.items())) for phase in self.settings.phases]
        budget, out = self.settings.micro_batch_tokens, self._passed.tolist()
        told = json.dumps([self.seed, phases, budget, out])
        return f"epochs-{hashlib.sha256(told.encode()).hexdigest()[:16]}"


def _lengths(data: Sequence[Example]) -> Lengths:
    if isinstance(data, Packed):
        return Lengths(data.texts, data.units)
    texts = np.array([len(example.text) for example in data])
    return Lengths(texts, np.array([len(example.units or ()) for example in data]))


def _places(data: Sequence[Example], names: Sequence[str]) -> np.ndarray:
    """Where utterances to be left out stand: (P,) int64; TrainingError for an unknown one."""
    if isinstance(data, Packed):
        found = {name: data.find(name) for name in names}
    else:
        at = [example.name for example in data] if names else []
        found = {name: np.array([i for i, one in enumerate(at) if one == name]) for name in names}
    if unknown := sorted(name for name, places in found.items() if not len(places)):
        raise TrainingError(f"{LEAVE_OUT}: no utterance {', '.join(unknown)} to train on")
    return np.unique(np.concatenate([np.zeros(0, np.int64), *found.values()]).astype(np.int64))
