"""Training the language model: what each step reads, one step, and a plain loop around it.

The loop here is one process without Ray or DeepSpeed. The distributed loop calls the same
`Curriculum`, `collate` and `train_step`, and makes the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmrag.config import Format, Phase, Train
from mmrag.finite import Guard, Lost
from mmrag.model.cross_attention import Windows
from mmrag.model.loss import IGNORE, Batch, Objective, combine
from mmrag.model.precision import has_bf16
from mmrag.model.vocabulary import PAD, Vocabulary
from mmrag.records import Rejection
from mmrag.speech.tokenized import Tokenized

LEAVE_OUT = "train.leave_out"
"""The key that passes over utterances."""


class TrainingError(ValueError):
    """What a run is asked for cannot be done; each of its workers finds that out alike."""


class Example(NamedTuple):
    """An utterance as ids: `text` pieces, and `units` or None; `name` is the utterance's id."""

    text: list[int]
    units: list[int] | None
    name: str = ""


class Chosen(NamedTuple):
    """An example's index and the format that this step shows it in."""

    index: int
    form: Format


class TooLong(NamedTuple):
    """An example that no micro-batch can hold in these formats; `length` is of the longest."""

    index: int
    length: int
    forms: list[Format]


Show = Callable[[Sequence[int], np.random.Generator], Windows]
"""Examples by their index -> the windows that they are shown with."""


@dataclass(frozen=True)
class StepLog:
    """What a step measured: losses in nats a token."""

    step: int
    phase: str
    loss: float
    ctc_loss: float
    gradient_norm: float
    learning_rate: float
    tokens: int
    """Read in this step by all workers, padding included."""


def speakable(tokenized: Iterable[Tokenized], vocabulary: Vocabulary) -> Iterator[Tokenized]:
    """The utterances without text, and those whose text the vocabulary can write."""
    for one in tokenized:
        if not one.utterance.text or not vocabulary.unspeakable(one.utterance.text):
            yield one


def unspeakable(tokenized: Iterable[Tokenized], vocabulary: Vocabulary) -> Iterator[Rejection]:
    """The others, and why."""
    for one in tokenized:
        text = one.utterance.text
        if text and vocabulary.unspeakable(text):
            yield Rejection(one.utterance.id, vocabulary.refusal(text))


def examples(tokenized: Sequence[Tokenized], vocabulary: Vocabulary) -> list[Example]:
    """Utterances as ids; one without text is speech alone (its text is empty)."""
    return [
        Example(
            text=vocabulary.encode(one.utterance.text or ""),
            units=None if one.units is None else vocabulary.encode_units(one.units),
            name=one.utterance.id,
        )
        for one in tokenized
    ]


class Curriculum:
    """Which examples each step reads, as a function of (seed, step) alone.

    A phase passes over the data in epochs. An epoch draws a format for every example, sorts by
    length, cuts micro-batches of `micro_batch_tokens` (padding included) and shuffles them. An
    example that is longer by itself is passed over (`too_long`), and so is one that is to be left
    out; neither changes which others are read together. A step takes the next `micro_batches` of
    them, whatever the number of workers; a resumed run asks for its step and reads on where it
    stopped.
    """

    def __init__(self, data: Sequence[Example], settings: Train, seed: int) -> None:
        """TrainingError if there is nothing to read, or no such utterance to leave out."""
        if not data:
            raise TrainingError("no examples to train on")
        passed = set(settings.leave_out)
        if unknown := sorted(passed - {example.name for example in data}):
            raise TrainingError(f"train.leave_out: no utterance {', '.join(unknown)} to train on")
        self.settings = settings
        self.seed = seed
        self._text = np.array([len(example.text) for example in data])
        self._units = np.array([len(example.units or ()) for example in data])
        self._wanted = np.array([example.name not in passed for example in data])
        self._next = 0
        self._stream = self._batches()

    def step(self, step: int) -> tuple[Phase, list[list[Chosen]]]:
        """The phase and the micro-batches of optimizer step `step`, counted from 0.

        Raises ValueError past the last step, TrainingError if no example fits a phase's mixture.
        """
        if not 0 <= step < self.settings.steps:
            raise ValueError(f"step {step} of {self.settings.steps}")
        if step != self._next:
            self._stream = self._batches()
            for _ in range(step * self.settings.micro_batches):
                next(self._stream)
        self._next = step + 1
        ends = np.cumsum([phase.steps for phase in self.settings.phases])
        phase = self.settings.phases[int(np.searchsorted(ends, step, side="right"))]
        return phase, [next(self._stream) for _ in range(self.settings.micro_batches)]

    def too_long(self) -> list[TooLong]:
        """The examples that are passed over in some format of the phases, for their length."""
        longest: dict[int, TooLong] = {}
        for form in dict.fromkeys(form for phase in self.settings.phases for form in phase.mixture):
            usable, lengths = self._shown_as(np.full(len(self._text), form))
            over = usable & self._wanted & (lengths > self.settings.micro_batch_tokens)
            for index in np.flatnonzero(over).tolist():
                _, length, forms = longest.get(index, TooLong(index, 0, []))
                length = max(length, int(lengths[index]))
                longest[index] = TooLong(index, length, [*forms, form])
        return [longest[index] for index in sorted(longest)]

    def _shown_as(self, forms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each example in its format (N,): whether it has the data, and its length."""
        usable = np.where(forms == "speech", True, self._text > 0)
        usable &= np.where(forms == "text", True, self._units > 0)
        lengths = 4 + np.where(forms == "speech", 0, self._text)
        return usable, lengths + np.where(forms == "text", 0, self._units)

    def _check(self, phase: Phase) -> None:
        """TrainingError if no epoch of a phase would hold anything."""
        budget, shortest = self.settings.micro_batch_tokens, []
        for form in phase.mixture:
            usable, lengths = self._shown_as(np.full(len(self._text), form))
            shortest += lengths[usable & self._wanted].tolist()
        if not shortest:
            raise TrainingError(f"phase {phase.name}: no example fits its mixture {phase.mixture}")
        if min(shortest) > budget:
            raise TrainingError(
                f"phase {phase.name}: no example fits in train.micro_batch_tokens {budget}, the "
                f"shortest has {min(shortest)}"
            )

    def _batches(self) -> Iterator[list[Chosen]]:
        for number, phase in enumerate(self.settings.phases):
            self._check(phase)
            left = phase.steps * self.settings.micro_batches
            epoch = 0
            while left:
                batches = self._epoch(number, phase, epoch)
                yield from batches[:left]
                left -= min(left, len(batches))
                epoch += 1

    def _epoch(self, number: int, phase: Phase, epoch: int) -> list[list[Chosen]]:
        random = np.random.default_rng([self.seed, number, epoch])
        forms = np.array(list(phase.mixture))
        weights = np.array(list(phase.mixture.values()))
        drawn = random.choice(forms, size=len(self._text), p=weights / weights.sum())
        usable, lengths = self._shown_as(drawn)
        # Jitter, so that an example does not meet the same companions in every epoch.
        order = np.argsort(lengths * random.uniform(0.95, 1.05, len(lengths)), kind="stable")
        batches: list[list[Chosen]] = []
        longest = 0
        for index in order[usable[order]].tolist():
            longest = max(longest, int(lengths[index]))
            if not batches or longest * (len(batches[-1]) + 1) > self.settings.micro_batch_tokens:
                batches.append([])
                longest = int(lengths[index])
            batches[-1].append(Chosen(index, str(drawn[index])))
        read = self._wanted & (lengths <= self.settings.micro_batch_tokens)
        shuffled = [batches[i] for i in random.permutation(len(batches))]
        kept = [[one for one in batch if read[one.index]] for batch in shuffled]
        return [batch for batch in kept if batch]


def collate(
    data: Sequence[Example],
    chosen: Sequence[Chosen],
    vocabulary: Vocabulary,
    unit_dropout: float,
    seed: Sequence[int],
    contexts: Show | None = None,
) -> Batch:
    """Chosen examples as padded tensors.

    A transcription sequence (speech first) is trained on its text alone; every other format on
    all of its tokens. `contexts` adds the windows that an adapter is shown.
    """
    random = np.random.default_rng(list(seed))
    rows: list[tuple[list[int], int, range, list[int]]] = []
    for index, form in chosen:
        text, units = data[index].text, data[index].units or []
        if form == "speech_first":
            kept = random.random(len(units)) >= unit_dropout
            units = [unit for unit, keep in zip(units, kept, strict=True) if keep]
        ids = vocabulary.sequence(form, text, units)
        transcribes = form == "speech_first"
        speech = range(2, 2 + len(units)) if transcribes else range(0)
        letters = vocabulary.spelling(text) if transcribes else []
        rows.append((ids, 2 + len(units) if transcribes else 0, speech, letters))

    width = max(len(ids) for ids, *_ in rows)
    longest = max(1, *(len(letters) for *_, letters in rows))
    batch = Batch(
        ids=torch.full((len(rows), width), PAD),
        targets=torch.full((len(rows), width), IGNORE),
        speech=torch.tensor([(speech.start, speech.stop) for _, _, speech, _ in rows]),
        letters=torch.zeros((len(rows), longest), dtype=torch.long),
        letter_counts=torch.tensor([len(letters) for *_, letters in rows]),
        windows=contexts and contexts([index for index, _ in chosen], random),
    )
    for row, (ids, first_target, _, letters) in enumerate(rows):
        batch.ids[row, : len(ids)] = torch.tensor(ids)
        batch.targets[row, first_target : len(ids) - 1] = torch.tensor(ids[first_target + 1 :])
        batch.letters[row, : len(letters)] = torch.tensor(letters) + 1
    return batch


def train_step(
    forward: Callable[[Batch], Tensor],
    backward: Callable[[Tensor], None],
    batches: Sequence[Batch],
    counts: Tensor,
    ctc_weight: float,
) -> Tensor:
    """Forward and backward over this worker's micro-batches of one step.

    `counts` (2,) are the targets of the whole step, over all workers. Returns the summed losses of
    each micro-batch (M, 2), detached.
    """
    losses = []
    for batch in batches:
        sums = forward(batch)
        backward(combine(sums, counts, (1.0, ctc_weight)))
        losses.append(sums.detach().cpu())
    return torch.stack(losses)


def lost(
    step: int,
    micro_batches: Sequence[Sequence[Chosen]],
    data: Sequence[Example],
    losses: Tensor,
) -> Lost:
    """A step (counted from 0) that is not taken, since its loss or its gradient is no number.

    It names the utterances of the micro-batches whose `losses` (M, 2) are not; where all of them
    are, the gradient is not, and it names those of the whole step.
    """
    wrong = [n for n in range(len(micro_batches)) if not losses[n].isfinite().all()]
    numbers = wrong or range(len(micro_batches))
    read = [data[one.index].name or f"#{one.index}" for n in numbers for one in micro_batches[n]]
    which = ", ".join(str(n + 1) for n in numbers)
    where = f"step {step + 1}, micro-batch {which} of {len(micro_batches)}"
    what = "the loss is not finite" if wrong else "the gradient is not finite"
    return Lost(step, what, where, tuple(dict.fromkeys(read)))


def learning_rate(step: int, settings: Train) -> float:
    """Linear warm-up, then a cosine to a tenth of the peak."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    left = max(1, settings.steps - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps) / left)
    return settings.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


def adamw(module: torch.nn.Module, settings: Train) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices alone."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    # Under ZeRO-3 a parameter is an empty stub here and keeps its shape in `ds_shape`.
    matrices = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) > 1]
    vectors = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95))


def precision(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; `auto` is bf16 where the hardware has it, else float32.

    A processor without bf16 instructions emulates them, tens of times slower than float32.
    """
    if wanted == "auto":
        wanted = "bf16" if has_bf16(device) else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[wanted]


def train(
    objective: Objective,
    data: Sequence[Example],
    vocabulary: Vocabulary,
    settings: Train,
    seed: int,
    log: Callable[[StepLog], None] = lambda _: None,
    contexts: Show | None = None,
    skipped: Callable[[Lost], None] = lambda _: None,
) -> None:
    """Train `objective` in this process, on the device where its weights are.

    `contexts` says what an adapter is shown. A step is not taken on a loss or a gradient that is
    no number: `skipped` is told of it, and the third in a row raises NonFiniteLoss.
    """
    device = objective.lm.embedding.weight.device
    dtype = precision(settings.precision, device)
    curriculum = Curriculum(data, settings, seed)
    optimizer = adamw(objective, settings)
    guard = Guard(LEAVE_OUT)
    objective.trained_by(settings).train()
    for step in range(settings.steps):
        phase, micro_batches = curriculum.step(step)
        batches = [
            collate(data, chosen, vocabulary, settings.unit_dropout, (seed, step, number), contexts)
            for number, chosen in enumerate(micro_batches)
        ]
        counts = torch.stack([batch.counts() for batch in batches]).sum(0)
        rate = learning_rate(step, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            losses = train_step(
                lambda batch: objective(batch.to(device)),
                lambda loss: loss.backward(),
                batches,
                counts,
                settings.ctc_weight,
            )
        norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), settings.clip)
        if not losses.isfinite().all() or not norm.isfinite():
            found = lost(step, micro_batches, data, losses)
            skipped(found)
            guard.skip(found)
            continue
        guard.taken()
        optimizer.step()
        tokens = sum(batch.ids.numel() for batch in batches)
        log(step_log(step, phase, losses.sum(0), counts, float(norm), rate, tokens))


def step_log(
    step: int,
    phase: Phase,
    sums: Tensor,
    counts: Tensor,
    norm: float,
    rate: float,
    tokens: int,
) -> StepLog:
    """Sums over counts as a record."""
    loss, ctc_loss = (sums / counts.clamp(min=1)).tolist()
    return StepLog(step, phase.name, loss, ctc_loss, norm, rate, tokens)
