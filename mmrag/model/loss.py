"""What training minimises: summed losses with their counts, divided once over the whole step.

A mean of means would weigh a short micro-batch like a long one, and make the loss depend on how
many workers share the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmrag.config import Train
from mmrag.model.cross_attention import Adapter, Windows
from mmrag.model.layers import Linear
from mmrag.model.lm import LM

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """A micro-batch. All tensors are padded on the right.

    `ids` (B, T) tokens; `targets` (B, T) the next token where it counts, else IGNORE; `speech`
    (B, 2) start and end of the units that CTC reads, equal where there are none; `letters` (B, S)
    CTC's targets (index in the alphabet + 1; 0 is the blank) and `letter_counts` (B,). `windows`
    are what an adapter reads.
    """

    ids: Tensor
    targets: Tensor
    speech: Tensor
    letters: Tensor
    letter_counts: Tensor
    windows: Windows | None = None

    def counts(self) -> Tensor:
        """(2,) float32: targets of the language model and of CTC."""
        spoken = self.speech[:, 1] > self.speech[:, 0]
        counted = (self.targets != IGNORE).sum(), (self.letter_counts * spoken).sum()
        return torch.stack(counted).float()

    def to(self, device: torch.device) -> Batch:
        moved = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return Batch(**moved)


class Objective(nn.Module):
    """The language model with the losses it is trained by.

    Beside the next token, the states over the units of a transcription sequence learn to spell
    the text by themselves (CTC, as in hybrid CTC/attention training, arXiv 1609.06773), letter by
    letter: a small model finds the alignment of speech and text much sooner, and of few letters
    sooner than of many word pieces. The CTC head is not exported.

    With an adapter, the language model is frozen, and the adapter learns to read a batch's windows.
    """

    def __init__(
        self, lm: LM, letters: int, ctc_weight: float, adapter: Adapter | None = None
    ) -> None:
        """`letters` is the size of the alphabet that CTC spells in."""
        super().__init__()
        self.lm = lm.requires_grad_(adapter is None)
        self.adapter = adapter
        self.ctc_weight = ctc_weight
        self.ctc = Linear(lm.config.width, letters + 1) if ctc_weight else None

    def trained_by(self, settings: Train) -> Objective:
        """The same objective, which spends memory and time as `settings` say."""
        self.lm.checkpointed = settings.activation_checkpointing
        self.lm.loss_chunk = settings.loss_chunk
        if settings.compiled:
            for block in self.lm.blocks:
                block.compile(dynamic=True)
        return self

    def forward(self, batch: Batch) -> Tensor:
        """(2,) float32: summed next-token loss and summed CTC loss, in nats."""
        at = batch.targets != IGNORE
        memory = None
        if self.adapter is not None:
            time, start = int(at.sum(1).max()), batch.speech[:, 1]
            memory = self.adapter.memory(batch.windows, self.lm.embedding, start, time)
        output = self.lm(batch.ids, at=at, memory=memory, targets=batch.targets[at])
        token_loss = output.loss
        if self.ctc is None:
            return torch.stack((token_loss, torch.zeros_like(token_loss)))
        return torch.stack((token_loss, self._ctc_loss(output.hidden, batch)))

    def _ctc_loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        start, end = batch.speech.unbind(1)
        steps = max(int((end - start).max()), 1)
        offsets = torch.arange(steps, device=hidden.device)
        positions = (start[:, None] + offsets).clamp(max=hidden.shape[1] - 1)
        states = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[2]))
        log_probs = self.ctc(states).float().log_softmax(-1)
        losses = functional.ctc_loss(
            log_probs.transpose(0, 1),
            batch.letters,
            end - start,
            batch.letter_counts,
            reduction="none",
            zero_infinity=True,
        )
        return (losses * (end > start)).sum()


def combine(sums: Tensor, counts: Tensor, weights: Sequence[float]) -> Tensor:
    """One scalar: each summed loss over its count in the whole step, weighted and added."""
    scale = torch.tensor(weights, device=sums.device) / counts.to(sums.device).clamp(min=1)
    return (sums * scale).sum()
