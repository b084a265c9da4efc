"""Neighbours of every token of a split, found beforehand: what an adapter reads while it trains."""

from __future__ import annotations

from cluster.parts import parts, work_off
from cluster.stages import FindNeighbours
from cluster.tracking import Run
from jobs import models, stage
from mmrag import artifact
from mmrag.artifact import Artifact, Draft
from mmrag.config import ConfigError, Experiment
from mmrag.model.train import speakable
from mmrag.model.vocabulary import Vocabulary

PART_UTTERANCES = 100


def run(experiment: Experiment, force: bool = False) -> Artifact:
    """Make `neighbours/<datastore>/` of the adapter's split."""
    if experiment.adapter is None:
        raise ConfigError("the experiment has no section `adapter`")
    contexts, name = experiment.adapter.contexts, experiment.datastore.name
    heard_by = models.adaptable(experiment)
    lm = heard_by.made
    store = stage.load(experiment, f"datastores/{name}", "datastore", "build_datastore")
    store.require("lm", lm)
    made = models.corpus(experiment, heard_by)

    def work(draft: Draft, tracked: Run) -> None:
        vocabulary = Vocabulary.load(lm.path)
        spoken = list(speakable(models.select(made, contexts.split, None), vocabulary))
        shares = parts(spoken, lambda _: 1, PART_UTTERANCES)
        todo = [part for part in shares if not (draft.path / f"{part.name}.npz").exists()]
        search = {
            "lm": lm.place,
            "datastore": store.place,
            "k": experiment.attention.k,
            "directory": draft.path,
        }
        workers, key = experiment.evaluate.workers, "evaluate.workers"
        for _ in work_off([(FindNeighbours, search)], todo, workers, "search", key):
            pass
        draft.summary["utterances"] = len(spoken)

    config = {"split": contexts.split, "k": experiment.attention.k}
    inputs = {"lm": lm, "datastore": store, "tokens": made}
    return stage.make(
        experiment,
        f"neighbours/{name}",
        "neighbours",
        config,
        inputs,
        work,
        holds=artifact.parts("part-*.npz"),
        force=force,
    )


if __name__ == "__main__":
    stage.main(run, __doc__, config="adapter.yaml")
