"""A small Whisper, trained from nothing on the workspace's corpus: for a world without downloads.

What it writes is transformers' own format, and a model by the name `whisper:<workspace>/whisper`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch

from cluster.placement import Demand, placing
from cluster.progress import METRICS, MetricsWriter, following, held_training, last_record
from cluster.rejections import REJECTED, write_rejections
from cluster.stages import device
from cluster.tracking import Run
from jobs import stage
from mmrag.artifact import Artifact, Draft
from mmrag.config import ConfigError, Experiment, recipe
from mmrag.corpora import manifest
from mmrag.model.whisper_training import STATE, Clip, create, extractor, train
from mmrag.records import Rejection, Utterance
from mmrag.speech import audio
from mmrag.speech.targets import Phones
from mmrag.storage import Location


def run(experiment: Experiment, force: bool = False) -> Artifact:
    """Make `whisper/`, a checkpoint's directory."""
    settings = experiment.whisper
    if settings is None:
        raise ConfigError("the experiment has no section `whisper`")
    corpus = stage.load(experiment, "corpus", "corpus", "synthesize")
    config = recipe({"seed": experiment.seed, "whisper": settings})

    def work(draft: Draft, tracked: Run) -> None:
        def log(record: dict[str, Any]) -> None:
            step = record["step"]
            tracked.log({key: value for key, value in record.items() if key != "step"}, step)
            if step % settings.log_steps == 0 or step == settings.steps:
                told = "  ".join(f"{key} {record[key]:.3f}" for key in record if key != "step")
                stage.console.print(f"  step {step}/{settings.steps}  {told}")

        takes = {"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus}
        logged = tracked.last_step("loss") or 0
        with placing(Demand("whisper", 1, **takes)), following(draft.path, log, logged):
            training = _train.options(**takes)
            clips, rejected = ray.get(training.remote(experiment, corpus.place, draft.path))
        draft.summary |= {
            "steps": settings.steps,
            "clips": clips,
            "rejected": rejected,
            "final_loss": round(last_record(draft.path)["loss"], 4),
        }

    return stage.make(
        experiment,
        "whisper",
        "whisper",
        config,
        {"corpus": corpus},
        work,
        logs=(METRICS,),
        holds=partial(held_training, state=STATE),
        force=force,
    )


@ray.remote
def _train(experiment: Experiment, corpus: Location, directory: Path) -> tuple[int, int]:
    """Train in `directory`; how many clips were learned from, and how many left out."""
    settings = experiment.whisper
    torch.set_num_threads(max(1, round(settings.num_cpus)))
    lines = list(manifest.read(corpus / f"{settings.split}.jsonl"))
    rejected = [line for line in lines if isinstance(line, Rejection)]
    known = [line for line in lines if isinstance(line, Utterance)]
    if missing := set(settings.leave_out) - {one.id for one in known}:
        raise ConfigError(
            f"whisper.leave_out: {settings.split} has no utterance {', '.join(sorted(missing))}"
        )
    told = [one for one in known if one.audio and one.text and one.id not in settings.leave_out]
    rejected += [Rejection(one.id, "no recording") for one in known if one.audio is None]
    rejected += [Rejection(one.id, "no transcript") for one in known if one.audio and not one.text]
    if not (directory / "config.json").exists():
        create(directory, settings.shape, (one.text for one in told), experiment.seed)
    clips = _open(told, directory, rejected)
    if not clips:
        raise ValueError(f"{corpus}: nothing of {settings.split} can be learned from")
    write_rejections(directory / REJECTED, rejected)
    metrics: MetricsWriter | None = None

    def log(step: int, record: dict[str, float]) -> None:
        nonlocal metrics
        metrics = metrics or MetricsWriter(directory, step)
        metrics.write({"step": step, **record})

    train(directory, clips, settings, experiment.seed, log, device())
    return len(clips), len(rejected)


def _open(told: Sequence[Utterance], directory: Path, rejected: list[Rejection]) -> list[Clip]:
    """What is said in `told`, as the checkpoint hears it; `rejected` gets what it cannot hear."""
    features, clips = extractor(directory), []
    phones = Phones([one.phones for one in told])
    for number, one in enumerate(told):
        try:
            heard = features(audio.read(one.audio, audio.span_of(one)))
        except ValueError as error:
            rejected.append(Rejection(one.id, str(error)))
        else:
            clips.append(Clip(one.id, heard, one.text, phones[number] if one.phones else None))
    return clips


if __name__ == "__main__":
    stage.main(run, __doc__, config="whisper_tiny.yaml")
