"""HuBERT pretraining (arXiv 2106.07447): masked prediction of a frame's class.

Knows masks, targets and steps. What clusters features into targets is handed to it, and so is the
audio; it has never seen a unit or a file of speech."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from itertools import repeat
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmrag.ahead import ahead
from mmrag.artifact import sync
from mmrag.config import Hubert, Pretrain, PretrainRound
from mmrag.finite import non_finite
from mmrag.processes import Alone, Processes
from mmrag.speech.audio import SAMPLE_RATE
from mmrag.speech.crops import Batch, Recorder, Reject, Share, draw, drawing_chances, rejected
from mmrag.speech.held_out import HeldOut, letter_error_rate, phone_error_rate
from mmrag.speech.hubert import SPELLER, HubertEncoder, generator_at, seeded_at
from mmrag.speech.masked import MaskedPrediction, Sums
from mmrag.speech.targets import LetterSequences, Phones, Targets, mfcc

STATE = ".pretrain.pt"
"""What an unfinished pretraining goes on from."""
WARMUP_SHARE = 0.08
"""Share of a round's steps in which the learning rate rises."""
UNALIGNED_AFTER = 0.4
"""Share of a round's steps before which its own guesses align no clip."""
ALIGNED_BY_BASE = 0.1
"""The same where an encoder is trained further, which only has to learn the phones' names."""
CLIP = 1.0
"""Largest gradient norm."""
Cluster = Callable[[np.ndarray, int, int], np.ndarray]
"""Features (N, D), number of clusters K, seed -> centroids (K, D)."""


class Round:
    """What one round of pretraining changes, and what it needs to be taken up again."""

    def __init__(
        self,
        encoder: HubertEncoder,
        plan: PretrainRound,
        number: int,
        seed: int,
        seen_weight: float,
        classes: int,
        threads: int = 1,
        processes: Processes | None = None,
        spelling_weight: float = 0,
        anchor_weight: float = 0,
        base: HubertEncoder | None = None,
        bf16: bool = False,
        layer_drop: float = 0,
    ) -> None:
        """The encoder as the round before left it is this round's teacher and starting point.
        Matrix products are computed in `bf16`, or as the weights are kept. `threads` share the
        crops of a step, or of this process's share of it. `layer_drop` is the share of the steps
        that a layer is left out of."""
        self.plan = plan
        self.number = number
        self.seed = seed
        self.seen_weight = seen_weight
        self.threads = threads
        self._bf16 = bf16
        self._layer_drop = layer_drop
        self._pool = ThreadPoolExecutor(threads)
        self._processes = processes or Alone()
        self.step = 0
        self.centroids: Tensor | None = None
        self.teacher = deepcopy(encoder) if plan.target == "hubert" else None
        with seeded_at(seed, number):
            weights = spelling_weight, anchor_weight
            self.model = MaskedPrediction(encoder, classes, *weights, base).to(encoder.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, fused=True
        )

    def describe(self, wave: Tensor) -> Tensor:
        """The features (F, D) of a clip that targets are clusters of."""
        if self.teacher:
            return self.teacher.features([wave])[0]
        return mfcc(wave, self.model.encoder.field, self.model.encoder.hop)

    def cluster(
        self,
        waves: Sequence[Tensor],
        seconds: float,
        cluster: Cluster,
        left_out: Collection[int] = (),
        reject: Reject | None = None,
    ) -> None:
        """Make the centroids from `seconds` of audio, of clips in random order.

        The first process does; ValueError in the others if it cannot.
        """
        processes, device = self._processes, self.model.encoder.device
        shape = torch.zeros(2, device=device)
        try:
            if processes.rank == 0:
                self.centroids = self._clustered(waves, seconds, cluster, left_out, reject)
                shape = torch.tensor(self.centroids.shape, dtype=torch.float32, device=device)
        finally:
            processes.add([shape])  # of none where the first one failed: nobody waits for it
        if not shape.any():
            raise ValueError("the first worker could not make the targets")
        shared = torch.zeros(*shape.int().tolist(), device=device)
        if processes.rank == 0:
            shared.copy_(self.centroids)
        processes.add([shared])
        self.centroids = shared.cpu()

    def _clustered(
        self,
        waves: Sequence[Tensor],
        seconds: float,
        cluster: Cluster,
        left_out: Collection[int],
        reject: Reject | None,
    ) -> Tensor:
        order = torch.randperm(len(waves), generator=generator_at(self.seed, self.number))
        features, missing = [], seconds * SAMPLE_RATE
        for clip in order.tolist():
            if clip in left_out:
                continue
            try:
                wave = waves[clip]
                features.append(self.describe(wave).cpu().numpy())
            except ValueError as error:
                rejected(reject, clip, error)
                continue
            missing -= len(wave)
            if missing <= 0:
                break
        centroids = cluster(np.concatenate(features), self.plan.classes, self.seed)
        return torch.from_numpy(centroids)

    def train_step(
        self,
        batch: Batch,
        learning_rate: float,
        named: Callable[[int], str] = str,
        aligns: bool = True,
    ) -> dict[str, float]:
        """One step: its mean loss, its accuracy on the masked frames, and CTC's nats a letter where
        something is spelled; `aligns` as in `MaskedPrediction`.

        Raises NonFiniteLoss, with the clips `named`, before it is taken on a loss or a gradient
        that is no number.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        shares = batch.shares(self.model.encoder.frames, self.threads)
        of_all = repeat(aligns), repeat(self._dropped())
        one_by_one = len(shares) <= 1
        worked = list((map if one_by_one else self._pool.map)(self._gradients, shares, *of_all))
        sums, losses, gradients = self._added(worked)
        loss, count, correct, masked, letter_loss, letters = Sums(*sums)
        count = count.clamp(min=1)
        loss = loss / count
        for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
            parameter.grad = None if gradient is None else gradient / count
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        for what, value in (("loss", loss), ("gradient", norm)):
            if not value.isfinite():
                where = f"round {self.number + 1}, step {self.step + 1}"
                read = [named(clip) for clip in dict.fromkeys(batch.suspects(losses))]
                raise non_finite(f"the {what} is not finite", where, read, "pretrain.leave_out")
        self.optimizer.step()
        self.step += 1
        accuracy = correct.item() / max(1, int(masked))
        told = {"loss": loss.item(), "accuracy": accuracy, "gradient_norm": norm.item()}
        return told | ({"letter_loss": (letter_loss / letters).item()} if letters else {})

    def _dropped(self) -> list[int]:
        """The transformer's layers that this step leaves out, the same ones for all its crops."""
        layers = len(self.model.encoder.model.encoder.transformer.layers)
        draws = torch.rand(layers, generator=generator_at(self.seed, self.number, self.step, 1))
        return (draws < self._layer_drop).nonzero().flatten().tolist()

    def _added(
        self, worked: Sequence[tuple[Tensor, tuple[Tensor | None, ...]]]
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Over all that was worked, in all processes: `Sums`, in order, (6,), the
        summed loss of each process (P,), and the gradients; None for weights without any."""
        parameters, processes = list(self.model.parameters()), self._processes
        none = torch.zeros(len(Sums._fields), device=self.model.encoder.device)
        sums = sum((each for each, _ in worked), none)
        gradients: list[Tensor | None] = [None] * len(parameters)
        if worked:
            of_shares = zip(*(each for _, each in worked), strict=True)
            found = [[one for one in each if one is not None] for each in of_shares]
            gradients = [sum(each) if each else None for each in found]
        losses = torch.zeros(processes.count, device=sums.device)
        losses[processes.rank] = sums[0]
        if processes.count > 1:
            there = torch.tensor([float(one is not None) for one in gradients], device=sums.device)
            whole = [
                torch.zeros_like(parameter) if one is None else one
                for parameter, one in zip(parameters, gradients, strict=True)
            ]
            processes.add([sums, losses, there, *whole])
            anywhere = zip(whole, there.tolist(), strict=True)
            gradients = [one if somewhere else None for one, somewhere in anywhere]
        return sums, losses, gradients

    def _gradients(
        self, share: Sequence[Batch], aligns: bool, dropped: Collection[int]
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """`Sums` of some of a step's crops, in order, (6,), and the gradients of their summed
        loss."""
        device = self.model.encoder.device
        sums = []
        for group in share:
            targets, mask = group.targets.to(device), group.mask.to(device)
            disguise = (
                each if each is None else each.to(device) for each in (group.bands, group.warps)
            )
            told = (group.waves, group.lengths, targets, mask, self.seen_weight, group.sequences)
            with torch.autocast(device.type, torch.bfloat16, enabled=self._bf16):
                added = self.model(*told, *disguise, group.letters, aligns, dropped)
            sums.append(torch.stack([one.float() for one in added]))
        total = torch.stack(sums).sum(0)
        parameters = list(self.model.parameters())
        gradients = torch.autograd.grad(total[0], parameters, allow_unused=True)
        return total.detach(), gradients

    def save(self, path: Path) -> None:
        """Replace `path` by this state, whole or not at all; the first process does."""
        if self._processes.rank:
            return
        state = {
            "number": self.number,
            "step": self.step,
            "centroids": self.centroids,
            "teacher": self.teacher.state_dict() if self.teacher else None,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        aside = path.with_suffix(".aside")
        torch.save(state, aside)
        sync(aside)
        aside.replace(path)
        sync(path.parent)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what `save` wrote for this round, with whatever number of processes.

        RuntimeError if another process has read an older state: its file system is behind.
        """
        everyone = torch.tensor([float(state["step"])], device=self.model.encoder.device)
        self._processes.add([everyone])
        if everyone.item() != state["step"] * self._processes.count:
            raise RuntimeError(f"the workers do not all find the same state in {STATE}")
        self.step = state["step"]
        self.centroids = state["centroids"]
        if self.teacher:
            self.teacher.load_state_dict(state["teacher"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def pretrain(
    config: Hubert,
    settings: Pretrain,
    waves: Sequence[Tensor],
    seed: int,
    directory: Path | str,
    cluster: Cluster,
    log: Callable[[int, dict[str, float]], None],
    *,
    phones: Phones | None = None,
    device: torch.device | str = "cpu",
    threads: int = 1,
    names: Sequence[str] | None = None,
    speakers: Sequence[str] | None = None,
    domains: Sequence[str] | None = None,
    held_out: Mapping[str, HeldOut] | None = None,
    reject: Reject | None = None,
    recorder: Recorder | None = None,
    processes: Processes | None = None,
    timed: bool = False,
    spelling: LetterSequences | None = None,
    base: HubertEncoder | None = None,
    bf16: bool = False,
) -> HubertEncoder:
    """An encoder of shape `config`, pretrained on `waves`: (T_i,) each, at 16 kHz.

    Each round's targets are clusters of features (MFCCs, then the features of the encoder so far)
    or `phones`; it goes on training the same encoder on them, under a new head. A step depends on
    the weights and on (seed, round, step) alone, so a run that finds its own unfinished state in
    `directory/.pretrain.pt` ends with the weights it would have had without the interruption.
    `log(step, {round, loss, accuracy, gradient_norm, learning_rate})` is called after each step;
    steps count from 1 through all rounds. With `timed` the record also has `seconds`, the step's,
    and `data_wait`, the share of it that its crops were waited for.

    Each of several `processes` calls this alike; they share the crops of each step, which are the
    same ones for any number of them, and `batch_seconds` are those of all together. Each has the
    whole encoder and takes the same step, with gradients divided by everyone's count; the first
    alone logs and saves, and any number of them goes on with what it saved.

    `threads` share the crops of a step: on two cores that is quicker than torch's own, which wait
    for each other at every product. `names` are the clips' ids, `speakers` who says each, by whom
    they are balanced, `domains` what they are weighed by. In rounds whose targets are phones, the
    phone error rate on `held_out` clips, by name, stands in the record of each checkpoint's step
    as `phone_errors_<name>`. `recorder` makes crops sound otherwise (`settings.rough`). A clip that
    cannot be read is told to `reject`, if there is one, and left out. `bf16` is for matrix products
    alone. `base` is trained further in place of random weights, and then averaged with what came of
    it (`settings.base_share`). With `spelling` the encoder has a CTC head, which spells whole clips
    from the first step on; `letter_errors_<name>` is its error rate. Raises ValueError if there is
    no audio, or a crop holds no frame, NonFiniteLoss before a step is taken on a loss that is no
    number.
    """
    if not len(waves):
        raise ValueError("there is no audio to pretrain on")
    chances = drawing_chances(settings, speakers, domains)
    names = names or [str(number) for number in range(len(waves))]
    if unknown := sorted(set(settings.leave_out) - set(names)):
        raise ValueError(f"pretrain.leave_out: no utterance {', '.join(unknown)} to pretrain on")
    left_out = {number for number, name in enumerate(names) if name in settings.leave_out}
    if len(left_out) == len(waves):
        raise ValueError("pretrain.leave_out leaves no audio to pretrain on")

    def leave(clip: int, reason: str) -> None:
        if reject is None:
            raise ValueError(f"{names[clip]}: {reason}")
        reject(clip, reason)
        left_out.add(clip)
        if len(left_out) == len(waves):
            raise ValueError(f"no clip can be used; {names[clip]}: {reason}")

    processes = processes or Alone()
    share = Share(processes.rank, processes.count, {}) if processes.count > 1 else None
    if settings.anchor_weight and base is None:
        raise ValueError("pretrain.anchor_weight: there is no base to stay near")
    encoder = _started(config, seed, spelling, base).to(device)
    base = base and base.to(device).eval().requires_grad_(False)
    phones = phones and phones.framed(encoder.field, encoder.hop)
    if phones is None and any(plan.target == "phones" for plan in settings.rounds):
        raise ValueError("a round's target is phones, and the corpus has no alignment")
    if phones and not any(phones.sequence(clip) is None for clip in range(len(waves))):
        raise ValueError("of no clip it is known when its phones are said")
    if not encoder.frames(round(settings.crop_seconds * SAMPLE_RATE)):
        raise ValueError(f"crop_seconds {settings.crop_seconds} is shorter than one frame")
    if settings.rough and recorder is None:
        raise ValueError("pretrain.rough: nobody records anything anew")
    for name in ("band_masks", "band_warp"):
        if getattr(settings, name) and not encoder.bands:
            raise ValueError(f"pretrain.{name}: an encoder without log-mel bands (hubert.front)")
    path = Path(directory) / STATE
    saved = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}
    past = 0
    for number, plan in enumerate(settings.rounds):
        if number >= saved.get("number", 0):
            clustered = plan.target != "phones"
            classes = plan.classes if clustered else phones.classes
            current = Round(
                *(encoder, plan, number, seed),
                seen_weight=settings.seen_weight,
                classes=classes,
                threads=threads,
                processes=processes,
                spelling_weight=settings.spelling_weight,
                anchor_weight=settings.anchor_weight,
                base=base,
                bf16=bf16,
                layer_drop=settings.layer_drop,
            )
            aligned_after = (ALIGNED_BY_BASE if base else UNALIGNED_AFTER) * plan.steps
            if number == saved.get("number"):
                current.restore(saved)
            elif clustered:
                current.cluster(waves, settings.sample_seconds, cluster, left_out, leave)
            targets = phones
            if clustered:
                targets = Targets(waves, current.describe, current.centroids)

            def drawn(
                step: int,
                number: int = number,
                targets: Any = targets,
                aligned_after: float = aligned_after,
            ) -> Batch:
                generator = generator_at(seed, number, step)
                unaligned = spelling is not None or step >= aligned_after
                return draw(
                    *(encoder, waves, targets, settings, generator, left_out, leave, unaligned),
                    chances=chances,
                    record=recorder,
                    share=share,
                    spelling=spelling,
                )

            last = number + 1 == len(settings.rounds)
            if last and current.step == plan.steps:  # it was stopped before it could end
                average(encoder, base, settings.base_share)
            reading = ahead(drawn, range(current.step, plan.steps))
            while current.step < plan.steps:
                began = monotonic()
                batch = next(reading)
                waited = monotonic() - began
                rate = settings.learning_rate * schedule(current.step, plan.steps)
                aligns = current.step >= aligned_after
                metrics = current.train_step(batch, rate, names.__getitem__, aligns)
                if timed:
                    seconds = monotonic() - began
                    metrics |= {"seconds": seconds, "data_wait": waited / seconds}
                if current.step % settings.checkpoint_steps == 0 or current.step == plan.steps:
                    current.save(path)
                    if last and current.step == plan.steps:
                        average(encoder, base, settings.base_share)
                    if not clustered:
                        for name, clips in (held_out or {}).items():
                            rate_of = phone_error_rate(current.model, clips, phones, processes)
                            metrics[f"phone_errors_{name}"] = rate_of
                            if spelling is not None:
                                rate_of = letter_error_rate(current.model, clips, processes)
                                metrics[f"letter_errors_{name}"] = rate_of
                if processes.rank == 0:
                    log(
                        past + current.step,
                        {"round": number + 1, **metrics, "learning_rate": rate},
                    )
        past += plan.steps
    return encoder


def _started(
    config: Hubert, seed: int, spelling: LetterSequences | None, base: HubertEncoder | None
) -> HubertEncoder:
    """The encoder that is trained: random weights, or those of `base`, but for a head that it lacks
    or that spells in another alphabet. Raises ValueError for a base of another shape."""
    encoder = HubertEncoder.create(config, seed, spelling.alphabet if spelling else None)
    if base is None:
        return encoder
    fixed = ("architecture", "layer", "normalize", "mel", "stack", "convolved")
    for name in fixed:
        own, theirs = getattr(encoder, name), getattr(base, name)
        if json.dumps(own) != json.dumps(theirs):  # a tuple is a list in a file
            raise ValueError(f"pretrain.base: {name} {theirs}, and hubert is {own}")
    encoder.model.load_state_dict(base.model.state_dict())
    if spelling and base.alphabet == spelling.alphabet:
        encoder.speller.load_state_dict(base.speller.state_dict())
    return encoder


@torch.no_grad()
def average(encoder: HubertEncoder, base: HubertEncoder | None, share: float) -> None:
    """Make `share` of the weights of `encoder` those of `base`; of a head that the base has not, or
    that spells in another alphabet, none."""
    if base is None or not share:
        return
    theirs = base.state_dict()
    spells_alike = encoder.alphabet == base.alphabet
    for name, own in encoder.state_dict().items():
        if own.is_floating_point() and (spells_alike or not name.startswith(SPELLER)):
            own.lerp_(theirs[name].to(own), share)


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate at `step` (0 = first): a linear rise, then a linear fall."""
    warmup = math.ceil(steps * WARMUP_SHARE)
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
