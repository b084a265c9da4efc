"""How far to trust a datastore, by votes and by attention: chosen on dev and never on test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import ray

from cluster.clips import hear
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
from jobs import models, stage
from jobs.models import Models
from mmrag import artifact
from mmrag.artifact import Artifact, Draft
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
from mmrag.recogniser import load_decoder
from mmrag.retrieval.datastore import Datastore
from mmrag.score import word_error_rate
from mmrag.speech.tokenized import Tokenized
from mmrag.storage import Location

SPLIT = "dev"
Setting = TypeVar("Setting", KNN, RetrievedAttention)


def run(experiment: Experiment, force: bool = False) -> Artifact:
    """Make `tuned/<datastore>/`: `knn.json`; with an adapter `attention.json`, `both.json` too."""
    name = experiment.datastore.name
    store = stage.load(experiment, f"datastores/{name}", "datastore", "build_datastore")
    heard_by = models.named(experiment)
    store.require(heard_by.role, heard_by.made)
    made = models.corpus(experiment, heard_by, force)
    domain = experiment.evaluate.domain
    decode = experiment.decode
    config = recipe(
        {"tune": experiment.tune, "decode": decode, "domain": domain, **heard_by.recipe}
    )
    inputs = {"datastore": store, heard_by.role: heard_by.made, made.kind: made}
    inputs |= heard_by.beside
    decoy = None
    if (named := experiment.tune.decoy) is not None:
        decoy = stage.load(experiment, f"datastores/{named}", "datastore", "build_datastore")
        decoy.require(heard_by.role, heard_by.made)
        inputs["decoy"] = decoy
    reads = ()
    heard = Datastore.open(store.place).description.audio != "none"
    if experiment.tune.attention and heard and heard_by.own:
        inputs["adapter"] = stage.load(experiment, "adapter", "adapter", "train")
        inputs["adapter"].require("lm", heard_by.made)
        reads = experiment.tune.attention

    def work(draft: Draft, tracked: Run) -> None:
        spoken = models.select(made, SPLIT, domain)
        workers = experiment.evaluate.workers
        scoring = _score.options(num_cpus=workers.num_cpus, num_gpus=workers.num_gpus)
        with placing(Demand.of("evaluate.workers", workers, count=1)):
            scored = ray.get(scoring.remote(experiment, heard_by.name, store.place, spoken))
        first = spoken[: experiment.tune.utterances]
        bench = _Bench(experiment, heard_by, store, decoy, first)

        scale = scored[0].distance_scale
        last = finalists(scored, experiment.tune.finalists)
        candidates = {SETTINGS: [(one.knn, KNNRetrieval) for one in last]}
        if reads:
            ways = [_scaled(read, scale) for read in reads]
            candidates[ATTENTION] = [(way, CrossAttentionRetrieval) for way in ways]
        decoded = bench.decode(candidates)
        knn = bench.choose(draft, SETTINGS, decoded[SETTINGS], scale)
        draft.summary |= {"k": knn.settings.k, "weight": knn.settings.weight}
        draft.summary |= {"temperature": round(knn.settings.temperature, 3)}
        draft.summary |= {"dev_wer": round(knn.wer, 4)}
        if reads:
            read = bench.choose(draft, ATTENTION, decoded[ATTENTION], scale)
            weights = experiment.tune.both_weight or (knn.settings.weight,)
            beside = [knn.settings.model_copy(update={"weight": weight}) for weight in weights]

            def together(source: Location, settings: KNN) -> Mode:
                return retrieval_mode(source, settings, read.settings)

            decoded |= bench.decode({BOTH: [(one, together) for one in beside]})
            both = bench.choose(draft, BOTH, decoded[BOTH], scale)
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
    """Decodes the dev split with many settings at once, each with a decoy besides."""

    def __init__(
        self,
        experiment: Experiment,
        heard_by: Models,
        store: Artifact,
        decoy: Artifact | None,
        spoken: Sequence[Tokenized],
    ) -> None:
        self._experiment = experiment
        self._heard_by = heard_by
        self._sources = {"right": store.place} | ({"decoy": decoy.place} if decoy else {})
        self._spoken = spoken
        self._plain: float | None = None
        """The word error rate without retrieval, once it is known."""

    def decode(
        self,
        candidates: Mapping[str, Sequence[tuple[Setting, Callable[[Location, Setting], Mode]]]],
    ) -> dict[str, list[Decoded]]:
        """The word error rates of each setting, all of them decoded by the same workers.

        `candidates` are settings with the mode that they are of, under the file they are for.
        """
        modes = {
            f"{file} {role} {number}": mode(place, one)
            for file, settings in candidates.items()
            for number, (one, mode) in enumerate(settings)
            for role, place in self._sources.items()
        }
        if self._plain is None:
            modes["plain"] = NoRetrieval()
        rates = self._rates(modes)
        self._plain = rates.get("plain", self._plain)
        return {
            file: [
                Decoded(one, rates[f"{file} right {number}"], rates.get(f"{file} decoy {number}"))
                for number, (one, _) in enumerate(settings)
            ]
            for file, settings in candidates.items()
        }

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
            self._heard_by.name,
            experiment.decode,
            modes,
            self._spoken,
            experiment.evaluate.workers,
            language=self._heard_by.language,
        )
        return {
            name: word_error_rate([h.reference for h in one], [h.text for h in one], 1).rate
            for name, one in heard.items()
        }


@ray.remote
def _score(
    experiment: Experiment, heard_by: str, store: Location, spoken: list[Tokenized]
) -> list[Scored]:
    loaded = load_decoder(heard_by, device(), experiment.language)
    shares = parts(spoken, seconds, experiment.decode.batch_seconds)
    batches = (hear(loaded, part.work) for part in shares)
    grid = _grid(experiment, store)
    return score_grid(loaded.lm, loaded.vocabulary, batches, open_locally(store), grid)


def _grid(experiment: Experiment, store: Location) -> Tune:
    """The grid; what was keyed with speech is asked with speech alone."""
    if Datastore.open(store).description.audio == "none":
        return experiment.tune
    return experiment.tune.model_copy(update={"query": ("speech",)})


if __name__ == "__main__":
    stage.main(run, __doc__, other_models=True)
