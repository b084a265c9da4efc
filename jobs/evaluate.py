"""A split transcribed in each mode: word error rates, entity recall, retrieval recall, speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from cluster import modes
from cluster.modes import PhraseLists
from cluster.placement import Demand, require
from cluster.shards import SHARD_CPUS, serve_shards
from cluster.stages import TranscribedUtterance, transcribe_modes
from cluster.tracking import Run
from jobs import models, stage
from jobs.evaluation_tables import show, write
from jobs.models import Models
from mmrag import artifact
from mmrag.artifact import Artifact, Draft, nothing
from mmrag.config import (
    KNN,
    ConfigError,
    Experiment,
    RetrievalMode,
    RetrievedAttention,
    as_dict,
    recipe,
)
from mmrag.decoding.tune import tuned
from mmrag.records import Retriever
from mmrag.retrieval import phrases
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.index import saved_shards
from mmrag.score import (
    Comparison,
    EntityScore,
    ErrorRate,
    Recall,
    character_error_rate,
    compare,
    score_entities,
    word_error_rate,
)
from mmrag.speech.tokenized import Tokenized
from mmrag.storage import Location


@dataclass(frozen=True)
class EvaluationMode:
    """A way to transcribe: without retrieval, or with one datastore and its settings."""

    name: RetrievalMode
    datastore: str | None = None
    artifact: Artifact | None = None
    knn: KNN | None = None
    attention: RetrievedAttention | None = None

    @property
    def title(self) -> str:
        """For tables and plots."""
        return "no retrieval" if self.datastore is None else f"{self.spoken_name}: {self.datastore}"

    @property
    def spoken_name(self) -> str:
        """The mode without the underscore."""
        return self.name.replace("_", " ")


@dataclass(frozen=True)
class Result:
    """The transcripts of one way, scored."""

    way: EvaluationMode
    heard: list[TranscribedUtterance]
    words: ErrorRate
    characters: ErrorRate
    entities: EntityScore
    recall: Recall

    @property
    def row(self) -> dict[str, Any]:
        """The result as plain values; what does not apply is None."""
        return {
            "mode": self.way.name,
            "datastore": self.way.datastore,
            "entries": self.way.artifact.summary["entries"] if self.way.artifact else None,
            "knn": as_dict(self.way.knn) if self.way.knn else None,
            "attention": as_dict(self.way.attention) if self.way.attention else None,
            "utterances": len(self.heard),
            "wer": self.words.rate,
            "wer_low": self.words.low,
            "wer_high": self.words.high,
            "substitutions": self.words.substitutions,
            "deletions": self.words.deletions,
            "insertions": self.words.insertions,
            "words": self.words.reference,
            "cer": self.characters.rate,
            **self.entities.row,
            "recall_at_k": self.recall.rate,
            "seconds_of_audio": sum(one.seconds for one in self.heard),
            "decode_seconds": sum(one.decode_seconds for one in self.heard),
        }


def run(experiment: Experiment, force: bool = False) -> Artifact:
    """Make `evaluation/`: results as JSON, Markdown and a plot, and every transcript."""
    settings = experiment.evaluate
    heard_by = models.named(experiment)
    made = models.corpus(experiment, heard_by, force)
    ways = _ways(experiment, heard_by)
    inputs = {made.kind: made, heard_by.role: heard_by.made}
    inputs |= {f"datastore {way.datastore}": way.artifact for way in ways if way.artifact}
    if any(way.attention for way in ways):
        inputs["adapter"] = stage.load(experiment, "adapter", "adapter", "train")
        inputs["adapter"].require("lm", heard_by.made)
    config = recipe(
        {
            "evaluate": settings,
            "decode": experiment.decode,
            **heard_by.recipe,
            **{f"knn.{way.title}": way.knn for way in ways if way.knn},
            **{f"attention.{way.title}": way.attention for way in ways if way.attention},
        }
    )

    def work(draft: Draft, tracked: Run) -> None:
        spoken = models.select(made, settings.split, settings.domain)
        results = _transcribe(experiment, heard_by, made, ways, spoken)
        compared = _compare(results, settings.resamples, experiment.seed)
        write(draft.path, results, compared, settings.split, settings.domain)
        for result in results:
            way = result.way
            name = f"{way.name}.{way.datastore}" if way.datastore else way.name
            row = result.row
            tracked.log({f"{key}.{name}": row[key] for key in _METRICS})
        for file in sorted(draft.path.iterdir()):
            if not file.name.startswith("."):
                tracked.file(file)
        draft.summary["utterances"] = len(spoken)

    evaluated = stage.make(
        experiment,
        "evaluation",
        "evaluation",
        config,
        inputs,
        work,
        holds=nothing,
        force=force,
    )
    show(evaluated)
    return evaluated


_METRICS = (
    *("wer", "wer_low", "wer_high", "cer", "entity_recall", "entity_precision", "entity_f1"),
    *("entity_wer", "other_wer", "recall_at_k", "decode_seconds"),
)


def _ways(experiment: Experiment, heard_by: Models) -> list[EvaluationMode]:
    if not heard_by.own and (reading := {"cross_attention", "both"} & {*experiment.evaluate.modes}):
        raise ConfigError(
            f"evaluate.modes: {', '.join(sorted(reading))} needs an adapter, which belongs to "
            f"mmrag's own language model; with {experiment.models} there are none and knn"
        )
    ways = []
    for name in experiment.evaluate.modes:
        if name == "none":
            ways.append(EvaluationMode(name))
            continue
        for datastore in experiment.evaluate.datastores:
            made = stage.load(experiment, f"datastores/{datastore}", "datastore", "build_datastore")
            made.require(heard_by.role, heard_by.made)
            silent = Datastore.open(made.place).description.audio == "none"
            if name == "knn" or not silent:  # the adapter reads what was heard
                knn, read = _settings(experiment, made, name)
                ways.append(EvaluationMode(name, datastore, made, knn, read))
    if not ways:
        raise ConfigError(
            f"evaluate: nothing to do in modes {list(experiment.evaluate.modes)} with datastores "
            f"{list(experiment.evaluate.datastores)}; what nobody spoke is only used in mode knn"
        )
    return ways


def _settings(
    experiment: Experiment, datastore: Artifact, mode: RetrievalMode
) -> tuple[KNN | None, RetrievedAttention | None]:
    """What `jobs.tune` chose for this very datastore; where it has not, the experiment's own."""
    found = tuned(experiment.workspace, datastore.path)
    if mode == "knn":
        return (found.knn if found else experiment.knn), None
    read = (found and found.attention) or experiment.attention
    if mode == "cross_attention":
        return None, read
    return (found.both if found else experiment.knn), read


def _transcribe(
    experiment: Experiment,
    heard_by: Models,
    made: Artifact,
    ways: Sequence[EvaluationMode],
    spoken: Sequence[Tokenized],
) -> list[Result]:
    settings = experiment.evaluate
    lists = phrases.read_lists(made.path / phrases.LISTS) if settings.lists else None
    require(Demand.of("evaluate.workers", settings.workers, count=1), *_shards(experiment, ways))
    with ExitStack() as serving:
        sources = _sources(experiment, ways, serving)
        heard = transcribe_modes(
            heard_by.name,
            experiment.decode,
            {way.title: _mode(way, lists, sources) for way in ways},
            spoken,
            settings.workers,
            language=heard_by.language,
        )
    return [
        _score(way, heard[way.title], settings.resamples, experiment.seed, lists) for way in ways
    ]


def _shards(experiment: Experiment, ways: Sequence[EvaluationMode]) -> list[Demand]:
    """The shard actors that stand beside the workers."""
    settings = experiment.evaluate
    count = sum(len(saved_shards(artifact.local(place))) for place in _datastores(ways))
    if settings.retriever != "sharded" or not count:
        return []
    actors = count * settings.replicas
    each = settings.shard_cpus, settings.shard_gpus
    lower = f"{SHARD_CPUS}{', evaluate.shard_gpus' if each[1] else ''} or evaluate.replicas"
    return [Demand(SHARD_CPUS, actors, *each, lower=lower)]


def _datastores(ways: Sequence[EvaluationMode]) -> list[Location]:
    """Each datastore once, however many ways use it."""
    return list(dict.fromkeys(way.artifact.place for way in ways if way.artifact is not None))


def _sources(
    experiment: Experiment, ways: Sequence[EvaluationMode], serving: ExitStack
) -> dict[Location, Retriever | Location]:
    """What the ways search, by datastore: its shards' actors, which `serving` stops, or itself."""
    settings = experiment.evaluate
    sources: dict[Location, Retriever | Location] = {one: one for one in _datastores(ways)}
    if settings.retriever == "sharded":
        for place in sources:
            local = experiment.datastore.local
            served = serve_shards(
                place,
                settings.replicas,
                settings.shard_cpus,
                num_gpus=settings.shard_gpus,
                local=local,
            )
            serving.callback(served.close)
            sources[place] = served
    return sources


def _mode(
    way: EvaluationMode, lists: PhraseLists | None, sources: Mapping[Location, Retriever | Location]
) -> modes.Mode:
    """What a worker opens."""
    if way.artifact is None:
        return modes.NoRetrieval()
    if lists is not None:
        return modes.phrase_mode(way.artifact.place, way.knn, way.attention, lists)
    return modes.retrieval_mode(sources[way.artifact.place], way.knn, way.attention)


def _score(
    way: EvaluationMode,
    heard: list[TranscribedUtterance],
    resamples: int,
    seed: int,
    lists: PhraseLists | None = None,
) -> Result:
    """`lists`, where each utterance comes with its own phrases: what may be heard in vain."""
    candidates = None if lists is None else [lists[one.utterance] for one in heard]
    own = [one.entities for one in heard]
    references, texts = [one.reference for one in heard], [one.text for one in heard]
    score = {"resamples": resamples, "seed": seed}
    return Result(
        way=way,
        heard=heard,
        words=word_error_rate(references, texts, **score),
        characters=character_error_rate(references, texts, **score),
        entities=score_entities(references, texts, own, candidates, **score),
        recall=Recall(sum(one.recalled for one in heard), sum(one.queries for one in heard)),
    )


def _compare(results: Sequence[Result], resamples: int, seed: int) -> list[Comparison]:
    """Every pair of ways; each has heard the same utterances in the same order."""
    systems = {result.way.title: [one.text for one in result.heard] for result in results}
    return compare([one.reference for one in results[0].heard], systems, resamples, seed)


if __name__ == "__main__":
    stage.main(run, __doc__, other_models=True)
