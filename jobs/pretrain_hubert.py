"""The speech encoder: HuBERT pretrained by masked prediction, or published weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch

from cluster.placement import Demand, placing
from cluster.progress import METRICS, MetricsWriter, following, held_training, last_record
from cluster.stages import device
from cluster.tracking import Run
from jobs import stage
from mmrag import shipped
from mmrag.artifact import Artifact, Draft, nothing
from mmrag.config import Experiment, recipe
from mmrag.corpora import manifest
from mmrag.records import Utterance
from mmrag.speech import audio
from mmrag.speech.hubert import HubertEncoder
from mmrag.speech.pretraining import STATE, Phones, pretrain
from mmrag.speech.units import kmeans


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
    """Make `hubert/` from `hubert.weights`, else by training on the lm split of `corpus/`."""
    settings = experiment.hubert
    if settings.weights and settings.weights.startswith(shipped.PREFIX):
        return stage.adopt(experiment, "hubert", settings.weights, "hubert")
    if settings.weights:
        return _publish(experiment, force)
    corpus = stage.load(experiment, "corpus", "corpus", "synthesize")
    config = recipe({"seed": experiment.seed, "hubert": settings, "pretrain": experiment.pretrain})

    def work(draft: Draft, tracked: Run) -> None:
        steps = sum(each.steps for each in experiment.pretrain.rounds)

        def log(record: dict[str, Any]) -> None:
            tracked.log({k: record[k] for k in ("loss", "accuracy")}, record["step"])
            if record["step"] % (steps // 8 or 1) == 0:
                stage.console.print(
                    f"  round {record['round']}  step {record['step']}/{steps}  "
                    f"loss {record['loss']:.2f}  masked frames guessed {record['accuracy']:.0%}"
                )

        takes = {"num_cpus": experiment.pretrain.num_cpus, "num_gpus": experiment.pretrain.num_gpus}
        with placing(Demand("pretrain", 1, **takes)), following(draft.path, log):
            training = _pretrain.options(**takes)
            ray.get(training.remote(experiment, corpus.path / "lm.jsonl", draft.path))
        accuracy = last_record(draft.path)["accuracy"]
        draft.summary |= {"steps": steps, "masked_accuracy": round(accuracy, 3)}

    return stage.make(
        experiment,
        "hubert",
        "hubert",
        config,
        {"corpus": corpus},
        work,
        logs=(METRICS,),
        holds=partial(held_training, state=STATE),
        force=force,
    )


@ray.remote
def _pretrain(experiment: Experiment, corpus: Path, directory: Path) -> None:
    torch.set_num_threads(max(1, round(experiment.pretrain.num_cpus)))
    spoken = [one for one in manifest.read(corpus) if isinstance(one, Utterance)]
    aligned = [one.phones for one in spoken]
    metrics: MetricsWriter | None = None

    def log(step: int, record: dict[str, float]) -> None:
        nonlocal metrics
        metrics = metrics or MetricsWriter(directory, step)
        metrics.write({"step": step, **record})

    encoder = pretrain(
        experiment.hubert,
        experiment.pretrain,
        Waves(spoken),
        experiment.seed,
        directory,
        kmeans,
        log,
        phones=Phones(aligned) if all(aligned) else None,
        device=device(),
        names=[one.id for one in spoken],
    )
    encoder.save(directory)


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
