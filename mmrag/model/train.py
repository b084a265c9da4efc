"""Training the language model: what each step reads, one step, and a plain loop around it.

The loop here is one process without Ray or DeepSpeed. The distributed loop calls the same
`Curriculum`, `collate` and `train_step`, and makes the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
import torch
from torch import Tensor

from mmrag.config import Phase, Train
from mmrag.finite import Guard, Lost
from mmrag.model.cross_attention import Windows
from mmrag.model.curriculum import LEAVE_OUT, Curriculum
from mmrag.model.epochs import Chosen
from mmrag.model.examples import Example
from mmrag.model.loss import IGNORE, Batch, Objective, combine
from mmrag.model.precision import has_bf16
from mmrag.model.vocabulary import PAD, Vocabulary

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
        example = data[index]
        text, units = example.text, example.units or []
        if form == "speech_first":
            units = list(compress(units, (random.random(len(units)) >= unit_dropout).tolist()))
        ids = vocabulary.sequence(form, text, units)
        transcribes = form == "speech_first"
        speech = range(2, 2 + len(units)) if transcribes else range(0)
        letters = (example.letters or []) if transcribes else []
        if transcribes and example.letters is None:
            letters = vocabulary.spelling(text)
        rows.append((ids, 2 + len(units) if transcribes else 0, speech, letters))

    width = max(len(ids) for ids, *_ in rows)
    longest = max(1, *(len(letters) for *_, letters in rows))
    table, targets = np.full((len(rows), width), PAD), np.full((len(rows), width), IGNORE)
    spelt = np.zeros((len(rows), longest), np.int64)
    for row, (ids, first_target, _, letters) in enumerate(rows):
        table[row, : len(ids)] = ids
        targets[row, first_target : len(ids) - 1] = table[row, first_target + 1 : len(ids)]
        spelt[row, : len(letters)] = letters
        spelt[row, : len(letters)] += 1
    return Batch(
        ids=torch.from_numpy(table),
        targets=torch.from_numpy(targets),
        speech=torch.tensor([(speech.start, speech.stop) for _, _, speech, _ in rows]),
        letters=torch.from_numpy(spelt),
        letter_counts=torch.tensor([len(letters) for *_, letters in rows]),
        windows=contexts and contexts([index for index, _ in chosen], random),
    )


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
