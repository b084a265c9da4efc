"""kNN weight, temperature and k for a datastore, chosen on the dev split and never on test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ray

from cluster.modes import Retrieving, open_locally
from cluster.stages import device, parts, seconds, transcribe_modes
from cluster.tracking import Run
from jobs import stage
from mmrag import artifact, pretrained, tokens
from mmrag.artifact import Artifact, ArtifactError, Draft
from mmrag.config import Experiment, Tune, as_dict
from mmrag.datastore import Datastore
from mmrag.score import word_error_rate
from mmrag.tokens import Tokenized
from mmrag.tune import SETTINGS, Scored, finalists, score_grid

SPLIT = "dev"


def run(experiment: Experiment, force: bool = False) -> Artifact:
    """Make `tuned/<datastore>/knn.json`."""
    name = experiment.datastore.name
    store = stage.load(experiment, f"datastores/{name}", "datastore", "build_datastore")
    lm = stage.load(experiment, "lm", "lm", "train")
    store.require("lm", lm)
    made = heard_by(experiment, lm)
    domain = experiment.evaluate.domain
    config = {"tune": as_dict(experiment.tune), "decode": as_dict(experiment.decode)}
    config["domain"] = domain

    def work(draft: Draft, tracked: Run) -> None:
        spoken = select(made, SPLIT, domain)
        workers = experiment.evaluate.workers
        scoring = _score.options(num_cpus=workers.num_cpus, num_gpus=workers.num_gpus)
        scored = ray.get(scoring.remote(experiment, lm.path, store.path, spoken))
        decoded = finalists(scored, experiment.tune.finalists)
        rates = _decode(experiment, store.path, spoken[: experiment.tune.utterances], decoded)
        best = min(range(len(decoded)), key=lambda index: rates[index])
        chosen = decoded[best].knn
        rows = [
            {**as_dict(one.knn), "dev_loss": one.loss, "dev_wer": rate}
            for one, rate in zip(decoded, rates, strict=True)
        ]
        artifact.write_json(draft.path / SETTINGS, {**as_dict(chosen), "finalists": rows})
        draft.summary |= {
            "k": chosen.k,
            "weight": chosen.weight,
            "temperature": round(chosen.temperature, 3),
            "dev_wer": round(rates[best], 4),
        }
        tracked.file(draft.path / SETTINGS)

    inputs = {"datastore": store, "lm": lm, "tokens": made}
    return stage.make(experiment, f"tuned/{name}", "tuned", config, inputs, work, force=force)


def heard_by(experiment: Experiment, lm: Artifact) -> Artifact:
    """The tokens; ArtifactError if their units are not of the codebook that `lm` knows."""
    made = stage.load(experiment, experiment.tokenize.name, "tokens", "tokenize")
    codebook = stage.load(experiment, "codebook", "codebook", "tokenize")
    for one in (made, lm):
        one.require("codebook", codebook)
    return made


def select(made: Artifact, split: str, domain: str | None) -> list[Tokenized]:
    """A split's spoken utterances with a transcript; of one domain, if one is named.

    ArtifactError if there are none.
    """
    spoken = [
        one
        for one in tokens.read(made.path / split)
        if one.units is not None and one.utterance.text and domain in (None, one.utterance.domain)
    ]
    if not spoken:
        which = f" of domain {domain}" if domain else ""
        raise ArtifactError(f"{made.path / split} has no spoken utterance{which}")
    return spoken


@ray.remote
def _score(
    experiment: Experiment, lm_path: Path, store: Path, spoken: list[Tokenized]
) -> list[Scored]:
    lm, vocabulary = pretrained.load(lm_path, device())
    shares = parts(spoken, seconds, experiment.decode.batch_seconds)
    batches = [part.work for part in shares]
    return score_grid(lm, vocabulary, batches, open_locally(store), _grid(experiment, store))


def _grid(experiment: Experiment, store: Path) -> Tune:
    """The grid; what was keyed with speech is asked with speech alone."""
    if Datastore.open(store).description.audio == "none":
        return experiment.tune
    return experiment.tune.model_copy(update={"query": ("speech",)})


def _decode(
    experiment: Experiment, store: Path, spoken: list[Tokenized], settings: Sequence[Scored]
) -> list[float]:
    """The word error rate of each setting."""
    modes = {str(number): Retrieving(store, one.knn) for number, one in enumerate(settings)}
    workers = experiment.evaluate.workers
    heard = transcribe_modes(experiment.workspace, experiment.decode, modes, spoken, workers)
    return [
        word_error_rate([h.reference for h in one], [h.text for h in one], resamples=1).rate
        for one in heard.values()
    ]


if __name__ == "__main__":
    stage.main(run, __doc__)
