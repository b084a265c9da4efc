"""Neighbours of every token of a split, found beforehand: what an adapter reads while it trains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cluster.parts import Part, cut, work_off
from cluster.stages import FindNeighbours, FindNeighboursOf
from cluster.tracking import Run
from jobs import models, stage
from mmrag import artifact
from mmrag.artifact import Artifact, Draft
from mmrag.config import ConfigError, Experiment
from mmrag.model.examples import speakable
from mmrag.model.vocabulary import Vocabulary
from mmrag.speech.tokenized import Tokenized

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
        search = {
            "lm": lm.place,
            "datastore": store.place,
            "k": experiment.attention.k,
            "directory": draft.path,
        }
        counts = work_off(
            [(FindNeighbours, search)],
            Spoken(made, contexts.split, lm),
            experiment.evaluate.workers,
            "search",
            "evaluate.workers",
            done=FindNeighboursOf(draft.path),
        )
        draft.summary["utterances"] = sum(counts)

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


@dataclass(frozen=True)
class Spoken:
    """Reads what a split of tokens says that a language model can write, and cuts it into parts."""

    made: Artifact
    split: str
    lm: Artifact

    def __call__(self) -> Iterator[Part[Tokenized]]:
        vocabulary = Vocabulary.load(self.lm.path)
        spoken = speakable(models.selected(self.made, self.split, None), vocabulary)
        yield from cut(spoken, lambda _: 1, PART_UTTERANCES)


if __name__ == "__main__":
    stage.main(run, __doc__, config="adapter.yaml")
