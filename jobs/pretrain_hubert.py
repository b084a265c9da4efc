"""The speech encoder: HuBERT pretrained by masked prediction, or published weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch

from cluster.measures import memory_name, peak_bytes
from cluster.placement import Demand, placing
from cluster.pretraining import fit
from cluster.progress import METRICS, MetricsWriter, following, held_training, last_record
from cluster.rejections import REJECTED, read_rejections, write_rejections
from cluster.stages import device
from cluster.tracking import Run
from jobs import stage, tokenize
from mmrag import shipped
from mmrag.artifact import Artifact, Draft, nothing
from mmrag.config import Experiment, recipe
from mmrag.corpora import augment
from mmrag.corpora.pronunciation import Pronunciation
from mmrag.model.precision import has_bf16
from mmrag.processes import Alone, Processes
from mmrag.records import Rejection, Utterance
from mmrag.speech import audio
from mmrag.speech.held_out import HeldOut
from mmrag.speech.hubert import HubertEncoder
from mmrag.speech.pretraining import STATE, pretrain
from mmrag.speech.targets import LetterSequences, Phones
from mmrag.speech.units import kmeans

ERRORS = ("phone_errors_", "letter_errors_")
"""What the names of error rates on held-out clips begin with."""
HELD_OUT_CLIPS = 60
"""Of each domain of the dev split, on which the phone error rate is measured."""


class Waves(Sequence):
    """Clips opened when they are asked for."""

    def __init__(self, spoken: Sequence[Utterance]) -> None:
        self._spoken = spoken

    def __len__(self) -> int:
        return len(self._spoken)

    def __getitem__(self, index: int) -> torch.Tensor:
        one = self._spoken[index]
        return audio.read(one.audio, audio.span_of(one))


def run(experiment: Experiment, force: bool = False) -> Artifact:
    """Make `hubert/` from `hubert.weights`, else by training on the first split of what
    `tokenize.source` names, the lm split of `corpus/` by default."""
    settings = experiment.hubert
    if settings.weights and settings.weights.startswith(shipped.PREFIX):
        return stage.adopt(experiment, "hubert", settings.weights, "hubert")
    if settings.weights:
        return _publish(experiment, force)
    corpus, _, _ = tokenize.opened(experiment)
    config = recipe({"seed": experiment.seed, "hubert": settings, "pretrain": experiment.pretrain})
    inputs = {"corpus": corpus}
    if base := experiment.pretrain.base:
        inputs["base"] = stage.part(base, "hubert")

    def work(draft: Draft, tracked: Run) -> None:
        steps = sum(each.steps for each in experiment.pretrain.rounds)

        def log(record: dict[str, Any]) -> None:
            step = record["step"]
            errors = any(name.startswith(ERRORS) for name in record)
            if step % settings.log_steps == 0 or step == steps or errors:
                tracked.log({name: record[name] for name in record if name != "step"}, step)
            if step % (steps // 8 or 1) == 0:
                stage.console.print(
                    f"  round {record['round']}  step {step}/{steps}  "
                    f"loss {record['loss']:.2f}  masked frames guessed {record['accuracy']:.0%}  "
                    f"{record['audio_seconds_per_second']:,.0f} s of audio a second  "
                    f"data {record['data_wait']:.0%}"
                )

        settings, after = experiment.pretrain, tracked.last_step("loss") or 0
        if settings.workers > 1:
            fit(partial(_pretrain, experiment, draft.path), settings, draft.path, log, after)
        else:
            _alone(experiment, draft.path, log, after)
        last = last_record(draft.path)
        draft.summary |= {"steps": steps, "masked_accuracy": round(last["accuracy"], 3)}
        draft.summary |= {
            name: round(rate, 3) for name, rate in last.items() if name.startswith(ERRORS)
        }
        listed = draft.path / REJECTED
        draft.summary["rejected"] = len(read_rejections(listed)) if listed.exists() else 0

    return stage.make(
        experiment,
        "hubert",
        "hubert",
        config,
        inputs,
        work,
        logs=(METRICS,),
        holds=partial(held_training, state=STATE),
        force=force,
    )


def _alone(
    experiment: Experiment, directory: Path, log: Callable[[dict[str, Any]], None], after: int
) -> None:
    """One process, which needs no Ray Train, nor the time that it takes to start."""
    settings = experiment.pretrain
    takes = {"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus}
    with placing(Demand("pretrain", 1, **takes)), following(directory, log, after):
        training = ray.remote(_pretrain).options(**takes)
        ray.get(training.remote(experiment, directory, Alone()))


def _pretrain(experiment: Experiment, directory: Path, processes: Processes) -> None:
    """What each process runs; the first one writes."""
    torch.set_num_threads(1)
    seconds, where = experiment.pretrain.batch_seconds, torch.device(device())
    _, splits, _ = tokenize.opened(experiment)
    rows = list(next(iter(splits.values())))
    spoken = _spoken(rows)
    phones, held_out = None, {}
    if any(round.target == "phones" for round in experiment.pretrain.rounds):
        say = Pronunciation()
        unaligned = {number: say(one) for number, one in enumerate(spoken) if not one.phones}
        phones = Phones([one.phones for one in spoken], unaligned)
        held_out = _held_out(_spoken(splits.get("dev", ())), say)
    settings, spelling = experiment.pretrain, None
    if settings.spelling_weight:
        spelling = LetterSequences([one.text for one in spoken], settings.alphabet)
    base = HubertEncoder.load(stage.part(settings.base, "hubert").path) if settings.base else None
    metrics: MetricsWriter | None = None

    def log(step: int, record: dict[str, float]) -> None:
        nonlocal metrics
        metrics = metrics or MetricsWriter(directory, step)
        speed = {"audio_seconds_per_second": seconds / record["seconds"]}
        memory = {memory_name(where): peak_bytes(where)}
        metrics.write({"step": step, **record, **speed, **memory})

    listed = directory / REJECTED

    def reject(*more: Rejection) -> None:
        """List them, beside those that were met before a run was stopped."""
        if processes.rank or not more:
            return
        known = set(read_rejections(listed)) if listed.exists() else set()
        write_rejections(listed, sorted({*known, *more}, key=lambda one: one.source))

    reject(*(one for one in rows if isinstance(one, Rejection)))
    encoder = pretrain(
        experiment.hubert,
        experiment.pretrain,
        Waves(spoken),
        experiment.seed,
        directory,
        kmeans,
        log,
        phones=phones,
        device=device(),
        threads=max(1, round(experiment.pretrain.num_cpus)) if device() == "cpu" else 1,
        names=[one.id for one in spoken],
        speakers=[one.speaker for one in spoken],
        domains=[one.domain for one in spoken],
        held_out=held_out,
        reject=lambda clip, reason: reject(Rejection(spoken[clip].id, reason)),
        recorder=augment.rough,
        processes=processes,
        timed=True,
        spelling=spelling,
        base=base,
        bf16=settings.precision == "bf16" or (settings.precision == "auto" and has_bf16(where)),
    )
    if processes.rank == 0:
        encoder.save(directory, getattr(torch, experiment.hubert.stored))


def _spoken(rows: tokenize.Rows) -> list[Utterance]:
    return [one for one in rows if isinstance(one, Utterance) and one.audio is not None]


def _held_out(dev: Sequence[Utterance], say: Pronunciation) -> dict[str, HeldOut]:
    """Some clips of each domain of the dev split."""
    domains: dict[str, list[Utterance]] = {}
    for one in dev:
        if len(domains.setdefault(one.domain, [])) < HELD_OUT_CLIPS:
            domains[one.domain].append(one)
    return {
        re.sub(r"[^\w-]", "_", domain) or "dev": HeldOut(
            Waves(clips),
            [list(filter(None, say(one))) for one in clips],
            [one.text or "" for one in clips],
        )
        for domain, clips in domains.items()
    }


def _publish(experiment: Experiment, force: bool) -> Artifact:
    weights, layer = experiment.hubert.weights, experiment.hubert.layer

    def work(draft: Draft, tracked: Run) -> None:
        encoder = HubertEncoder.from_published(weights, layer)
        encoder.save(draft.path)
        draft.summary["parameters"] = sum(p.numel() for p in encoder.parameters())

    config = {"weights": weights, "layer": layer}
    return stage.make(experiment, "hubert", "hubert", config, {}, work, holds=nothing, force=force)


if __name__ == "__main__":
    stage.main(run, __doc__)
