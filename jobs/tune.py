"""How far to trust a datastore, by votes and by attention: chosen on dev and never on test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import ray

from cluster.modes import (
    CrossAttentionRetrieval,
    KNNRetrieval,
    Mode,
    NoRetrieval,
    open_locally,
    retrieval_mode,
)
from cluster.parts import parts
from cluster.placement import Demand, placing
from cluster.stages import device, seconds, transcribe_modes
from cluster.tracking import Run
from jobs import stage
from mmrag import artifact
from mmrag.artifact import Artifact, ArtifactError, Draft
from mmrag.config import KNN, Experiment, RetrievedAttention, Tune, as_dict, recipe
from mmrag.decoding.tune import (
    ATTENTION,
    BOTH,
    SETTINGS,
    Decoded,
    Scored,
    best,
    finalists,
    score_grid,
)
from mmrag.model import pretrained
from mmrag.retrieval.datastore import Datastore
from mmrag.score import word_error_rate
from mmrag.speech import tokenized
from mmrag.speech.tokenized import Tokenized

SPLIT = "dev"
Setting = TypeVar("Setting", KNN, RetrievedAttention)


def run(experiment: Experiment, force: bool = False) -> Artifact:
    """Make `tuned/<datastore>/`: `knn.json`; with an adapter `attention.json`, `both.json` too."""
    name = experiment.datastore.name
    store = stage.load(experiment, f"datastores/{name}", "datastore", "build_datastore")
    lm = stage.load(experiment, "lm", "lm", "train")
    store.require("lm", lm)
    made = heard_by(experiment, lm)
    domain = experiment.evaluate.domain
    config = recipe({"tune": experiment.tune, "decode": experiment.decode, "domain": domain})
    inputs = {"datastore": store, "lm": lm, "tokens": made}
    decoy = None
    if (named := experiment.tune.decoy) is not None:
        decoy = stage.load(experiment, f"datastores/{named}", "datastore", "build_datastore")
        decoy.require("lm", lm)
        inputs["decoy"] = decoy
    reads = ()
    if experiment.tune.attention and Datastore.open(store.path).description.audio != "none":
        inputs["adapter"] = stage.load(experiment, "adapter", "adapter", "train")
        inputs["adapter"].require("lm", lm)
        reads = experiment.tune.attention

    def work(draft: Draft, tracked: Run) -> None:
        spoken = select(made, SPLIT, domain)
        workers = experiment.evaluate.workers
        scoring = _score.options(num_cpus=workers.num_cpus, num_gpus=workers.num_gpus)
        with placing(Demand.of("evaluate.workers", workers, count=1)):
            scored = ray.get(scoring.remote(experiment, lm.path, store.path, spoken))
        bench = _Bench(experiment, store, decoy, spoken[: experiment.tune.utterances])

        last = finalists(scored, experiment.tune.finalists)
        decoded = bench.decode([one.knn for one in last], KNNRetrieval)
        knn = bench.choose(draft, SETTINGS, decoded, scored[0].distance_scale)
        draft.summary |= {"k": knn.settings.k, "weight": knn.settings.weight}
        draft.summary |= {"temperature": round(knn.settings.temperature, 3)}
        draft.summary |= {"dev_wer": round(knn.wer, 4)}
        if reads:
            ways = [_scaled(read, scored[0].distance_scale) for read in reads]
            read = bench.choose(
                draft,
                ATTENTION,
                bench.decode(ways, CrossAttentionRetrieval),
                scored[0].distance_scale,
            )
            weights = experiment.tune.both_weight or (knn.settings.weight,)
            beside = [knn.settings.model_copy(update={"weight": weight}) for weight in weights]

            def together(source: Path, settings: KNN) -> Mode:
                return retrieval_mode(source, settings, read.settings)

            both = bench.choose(
                draft, BOTH, bench.decode(beside, together), scored[0].distance_scale
            )
            draft.summary |= {"attention_dev_wer": round(read.wer, 4)}
            draft.summary |= {"both_dev_wer": round(both.wer, 4)}
        for file in (SETTINGS, ATTENTION, BOTH):
            if (draft.path / file).exists():
                tracked.file(draft.path / file)

    return stage.make(
        experiment,
        f"tuned/{name}",
        "tuned",
        config,
        inputs,
        work,
        holds=artifact.nothing,
        force=force,
    )


def _scaled(read: RetrievedAttention, distance_scale: float) -> RetrievedAttention:
    """A way to read whose gate is a distance, no longer a multiple of `distance_scale`."""
    gate = None if read.gate is None else distance_scale * read.gate
    return read.model_copy(update={"gate": gate})


class _Bench:
    """Decodes the dev split with one setting after the other, and with a decoy besides."""

    def __init__(
        self,
        experiment: Experiment,
        store: Artifact,
        decoy: Artifact | None,
        spoken: Sequence[Tokenized],
    ) -> None:
        self._experiment = experiment
        self._sources = {"right": store.path} | ({"decoy": decoy.path} if decoy else {})
        self._spoken = spoken
        self._plain = self._rates({"plain": NoRetrieval()})["plain"]

    def decode(
        self, settings: Sequence[Setting], mode: Callable[[Path, Setting], Mode]
    ) -> list[Decoded]:
        """The word error rates of each setting."""
        modes = {
            f"{role} {number}": mode(path, one)
            for number, one in enumerate(settings)
            for role, path in self._sources.items()
        }
        rates = self._rates(modes)
        return [
            Decoded(one, rates[f"right {number}"], rates.get(f"decoy {number}"))
            for number, one in enumerate(settings)
        ]

    def choose(
        self, draft: Draft, file: str, decoded: Sequence[Decoded], distance_scale: float
    ) -> Decoded:
        """Write what is best, and everything that it was compared with."""
        chosen = best(decoded, self._plain, self._experiment.tune.harm)
        rows = [
            {**as_dict(one.settings), "dev_wer": one.wer, "decoy_wer": one.decoy_wer}
            for one in decoded
        ]
        fields = {
            **as_dict(chosen.settings),
            "distance_scale": distance_scale,
            "plain_wer": self._plain,
        }
        artifact.write_json(draft.path / file, {**fields, "finalists": rows})
        return chosen

    def _rates(self, modes: Mapping[str, Mode]) -> dict[str, float]:
        experiment = self._experiment
        heard = transcribe_modes(
            experiment.workspace,
            experiment.decode,
            modes,
            self._spoken,
            experiment.evaluate.workers,
        )
        return {
            name: word_error_rate([h.reference for h in one], [h.text for h in one], 1).rate
            for name, one in heard.items()
        }


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
        for one in tokenized.read(made.path / split)
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


if __name__ == "__main__":
    stage.main(run, __doc__)
