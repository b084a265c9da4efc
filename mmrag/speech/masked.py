"""What HuBERT pretraining minimises: an encoder with a head that names masked frames (arXiv
2106.07447), beside what its CTC head spells and how far it moves away from a base."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrag.speech.hubert import HubertEncoder
from mmrag.speech.targets import align, evidence, loud

LOGIT_TEMPERATURE = 0.1
LEAST_SPREAD = 0.05
"""Of a base's features, as a share of their mean squared length."""


class Sums(NamedTuple):
    """What is added up over the crops of a step."""

    loss: Tensor
    """Of the frames, weighted, and of the letters."""
    count: Tensor
    """Weights of the frames."""
    correct: Tensor
    """Masked frames whose class was guessed."""
    masked: Tensor
    letter_loss: Tensor
    """CTC's, nats."""
    letters: Tensor


class MaskedPrediction(nn.Module):
    """The encoder with a head that guesses the class of frames it was not shown."""

    def __init__(
        self,
        encoder: HubertEncoder,
        classes: int,
        spelling_weight: float = 0,
        anchor_weight: float = 0,
        base: HubertEncoder | None = None,
    ) -> None:
        """`spelling_weight` is that of the encoder's CTC head in the loss, `anchor_weight` that of
        how far its features are from those of `base`."""
        super().__init__()
        self.encoder = encoder
        self.spelling_weight = spelling_weight
        self.anchor_weight = anchor_weight
        self._base = [base]  # no part of it: it is not trained
        self.mask_embedding = nn.Parameter(torch.rand(encoder.width))
        self.projection = nn.Linear(encoder.width, encoder.width)
        self.class_embeddings = nn.Parameter(torch.randn(classes, encoder.width))

    def forward(
        self,
        waves: Tensor,
        lengths: Tensor,
        targets: Tensor,
        mask: Tensor,
        seen_weight: float = 0.0,
        sequences: Sequence[Tensor | None] | None = None,
        bands: Tensor | None = None,
        warps: Tensor | None = None,
        letters: Sequence[Tensor | None] | None = None,
        aligns: bool = True,
        dropped: Collection[int] = (),
    ) -> Sums:
        """What some crops add to a step.

        `waves` (B, T) prepared and padded, `lengths` (B,) samples; `targets` (B, F) int64 and
        `mask` (B, F) bool, false in the padding. A masked frame counts 1, any other `seen_weight`
        (section 2.3). Logits are cosines over a temperature of 0.1. The targets of a clip with a
        sequence of classes (N,) are what the model itself thinks likeliest for each frame, given
        that it holds just that sequence; without any where it is too short for it, or nothing
        `aligns`. `bands` (B, M) are hidden from the encoder, and `warps` (B,) stretch what it
        hears. The CTC head is to spell the `letters` (N,) of the clips that have some. Layers that
        are `dropped` (0 = first) are passed over.
        """
        frames = torch.tensor([self.encoder.frames(length) for length in lengths.tolist()])
        inputs = self.encoder.project(waves, lengths, bands, warps)
        shown = torch.where(mask[..., None], self.mask_embedding, inputs)
        features, hidden = self.encoder.contextualize_twice(shown, frames, dropped)
        letter_loss, count = hidden.new_zeros(()), 0
        if letters and self.spelling_weight:
            letter_loss, count = self._spelled(features, frames, letters)
        inside = torch.arange(mask.shape[1], device=mask.device) < frames.to(mask.device)[:, None]
        away = hidden.new_zeros(())
        if self.anchor_weight:
            anchored = inside & torch.tensor(
                [sequence is None for sequence in sequences or [None] * len(frames)]
            )[:, None].to(mask.device)
            away = self._away(features, waves, lengths, anchored)
        for row, sequence in enumerate(sequences or ()):
            if sequence is not None and not aligns:
                inside[row] = False
            elif sequence is not None:
                with torch.no_grad():
                    guesses = self._logits(hidden[row, : frames[row]]).log_softmax(-1).cpu()
                encoder = self.encoder
                said = loud(waves[row, : lengths[row]].cpu(), encoder.field, encoder.hop)
                path = align(evidence(guesses, said), sequence)
                if path is None:
                    inside[row] = False
                else:
                    targets[row, : frames[row]] = path.to(targets.device)
        masked = mask & inside
        scored = inside if seen_weight else masked
        logits = self._logits(hidden[scored])
        weights = torch.where(mask[scored], 1.0, seen_weight)
        losses = F.cross_entropy(logits, targets[scored], reduction="none")
        correct = (logits.argmax(-1) == targets[scored]) & mask[scored]
        loss = (losses * weights).sum()
        loss = loss + self.spelling_weight * letter_loss + self.anchor_weight * away
        letters_said = torch.tensor(count, device=loss.device)
        return Sums(
            loss, weights.sum(), correct.sum(), masked.sum(), letter_loss.detach(), letters_said
        )

    def _spelled(
        self, features: Tensor, frames: Tensor, letters: Sequence[Tensor | None]
    ) -> tuple[Tensor, int]:
        """CTC's loss, nats, and the number of letters that it is a sum over. A clip too short for
        its letters counts as none."""
        rows = [row for row, each in enumerate(letters) if each is not None and len(each)]
        if not rows:
            return features.new_zeros(()), 0
        spelled = [letters[row] for row in rows]
        loss = F.ctc_loss(
            self.encoder.spell(features[rows], frames[rows]).transpose(0, 1),
            torch.cat(spelled).to(features.device),
            frames[rows],
            torch.tensor([len(each) for each in spelled]),
            reduction="sum",
            zero_infinity=True,
        )
        return loss, sum(map(len, spelled))

    def _away(self, features: Tensor, waves: Tensor, lengths: Tensor, anchored: Tensor) -> Tensor:
        """How far `features` (B, F, D) are from the base's of the same clips unmasked: squared
        distances over the base's variance, summed over the frames that are `anchored` (B, F)."""
        with torch.no_grad():
            [base] = self._base
            frames = torch.tensor([base.frames(length) for length in lengths.tolist()])
            theirs = base.contextualize(base.project(waves, lengths), frames, base.layer)[anchored]
        if not len(theirs):
            return features.new_zeros(())
        theirs = theirs.float()
        spread = theirs.var(0, correction=0).sum()
        # A few frames of silence are all alike: what they lie apart by is no measure.
        spread = spread.clamp(min=LEAST_SPREAD * theirs.square().sum(1).mean())
        return (features[anchored].float() - theirs).square().sum() / spread

    def _logits(self, hidden: Tensor) -> Tensor:
        guesses = F.normalize(self.projection(hidden), dim=-1)
        logits = guesses @ F.normalize(self.class_embeddings, dim=-1).T / LOGIT_TEMPERATURE
        return logits.float()

    @torch.inference_mode()
    def read(self, wave: Tensor) -> list[int]:
        """The classes of a clip (T,), runs collapsed and class 0 left out."""
        hidden = self.encoder.contextualize(
            self.encoder.project(self.encoder.prepare(wave)[None], torch.tensor([len(wave)])),
            torch.tensor([self.encoder.frames(len(wave))]),
        )
        best = self._logits(hidden[0]).argmax(-1).unique_consecutive()
        return best[best > 0].tolist()

    @torch.inference_mode()
    def spell(self, wave: Tensor) -> str:
        """What the CTC head spells of a clip (T,), letter by letter."""
        best = self.encoder.spell(self.encoder.features([wave])[0]).argmax(-1)
        numbers = best.unique_consecutive()
        return "".join(self.encoder.alphabet[number - 1] for number in numbers.tolist() if number)
