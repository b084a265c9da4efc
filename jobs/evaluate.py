"""A split transcribed in each mode: word error rates, entity recall, retrieval recall, speed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np

from cluster import modes
from cluster.modes import PhraseLists
from cluster.placement import Demand, require
from cluster.shards import SHARD_CPUS, serve_shards
from cluster.stages import AskedFor, TranscribedUtterance, transcribe
from cluster.tracking import Run
from jobs import models, stage
from jobs.evaluation_tables import show, write
from jobs.models import Models
from jobs.transcripts import Transcripts
from mmrag import artifact
from mmrag.artifact import Artifact, Draft, nothing
from mmrag.config import (
    KNN,
    ConfigError,
    Experiment,
    RetrievalMode,
    RetrievedAttention,
    Spotting,
    as_dict,
    recipe,
)
from mmrag.decoding.tune import tuned
from mmrag.records import Retriever
from mmrag.retrieval import phrases, terms
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.index import saved_shards
from mmrag.score import (
    Comparison,
    EntityCounts,
    EntityScore,
    ErrorRate,
    Recall,
    character_counts,
    compare_counts,
    count_entities,
    entity_names,
    entity_score,
    error_rate,
    word_counts,
)
from mmrag.speech.tokenized import Tokenized
from mmrag.storage import Location


@dataclass(frozen=True)
class EvaluationMode:
    """A way to transcribe: without retrieval, with one datastore and its settings, or with what is
    spotted of it, or of each utterance's list."""

    name: RetrievalMode
    datastore: str | None = None
    artifact: Artifact | None = None
    knn: KNN | None = None
    attention: RetrievedAttention | None = None
    spotting: Spotting | None = None

    @property
    def title(self) -> str:
        """For tables and plots."""
        if self.name == "none":
            return "no retrieval"
        of = "its own list" if self.datastore is None else self.datastore
        return f"{self.spoken_name}: {of}"

    @property
    def spoken_name(self) -> str:
        """The mode without the underscore."""
        return self.name.replace("_", " ")


@dataclass(frozen=True)
class Result:
    """The transcripts of one way, scored."""

    way: EvaluationMode
    heard: Collection[TranscribedUtterance]
    """In the order of their utterances' names."""
    words: ErrorRate
    characters: ErrorRate
    entities: EntityScore
    recall: Recall
    seconds: float
    decode_seconds: float
    counts: np.ndarray
    """(N, 4), each utterance's word errors and words, as `mmrag.score.word_counts`."""
    speakers: dict[str, tuple[int, ErrorRate]]
    """How many utterances each speaker has, and the errors in them."""

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
            "seconds_of_audio": self.seconds,
            "decode_seconds": self.decode_seconds,
        }


def run(experiment: Experiment, force: bool = False) -> Artifact:
    """Make `evaluation/`: results as JSON, Markdown and a plot, and every transcript."""
    settings = experiment.evaluate
    heard_by = models.named(experiment)
    made = models.corpus(experiment, heard_by, force)
    ways = _ways(experiment, heard_by)
    inputs = {made.kind: made, heard_by.role: heard_by.made, **heard_by.beside}
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
            **{f"spotting.{way.title}": way.spotting for way in ways if way.spotting},
        }
    )

    def work(draft: Draft, tracked: Run) -> None:
        spoken = partial(models.selected, made, settings.split, settings.domain)
        next(spoken())  # says that there is none before anything is started
        heard = _transcribe(experiment, heard_by, made, ways, spoken, draft.path / RUNS)
        lists = _lists(experiment, made)
        results = [
            _score(way, heard[way.title], settings.resamples, experiment.seed, lists)
            for way in ways
        ]
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
        draft.summary["utterances"] = len(results[0].heard)

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


RUNS = ".transcripts"
"""Where transcripts are kept until all of them are there."""
LOT = 1000
"""Transcripts that are counted together."""
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
        if name == "spotting" and experiment.evaluate.lists:
            ways.append(EvaluationMode(name, spotting=experiment.spotting))
            continue
        for datastore in experiment.evaluate.datastores:
            made = stage.load(experiment, f"datastores/{datastore}", "datastore", "build_datastore")
            made.require(heard_by.role, heard_by.made)
            store = Datastore.open(made.place)
            if name == "spotting":
                if not terms.listed(store, heard_by.vocabulary):
                    raise ConfigError(
                        f"evaluate.modes: spotting has nothing to spot in {store}, which has "
                        "neither phrases nor unusual words"
                    )
                spotted = experiment.spotting
                ways.append(EvaluationMode(name, datastore, made, spotting=spotted))
            elif name == "knn" or store.description.audio != "none":  # what was heard is read
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
    spoken: Callable[[], Iterable[Tokenized]],
    directory: Path,
) -> dict[str, Transcripts]:
    """The transcripts of each way, kept below `directory`."""
    settings = experiment.evaluate
    lists = _lists(experiment, made)
    require(Demand.of("evaluate.workers", settings.workers, count=1), *_shards(experiment, ways))
    rmtree(directory, ignore_errors=True)  # of a run that was stopped
    heard = {way.title: Transcripts(directory / str(n)) for n, way in enumerate(ways)}
    with ExitStack() as serving:
        sources = _sources(experiment, ways, serving)
        for title, transcripts in transcribe(
            heard_by.name,
            experiment.decode,
            {way.title: _mode(way, lists, sources) for way in ways},
            AskedFor(tuple(heard), spoken, experiment.decode.batch_seconds),
            settings.workers,
            language=heard_by.language,
        ):
            heard[title].add(transcripts)
    return heard


def _lists(experiment: Experiment, made: Artifact) -> PhraseLists | None:
    """The phrases that come with each utterance, where they are used."""
    return phrases.read_lists(made.path / phrases.LISTS) if experiment.evaluate.lists else None


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
    """Each datastore that is searched once, however many ways search it."""
    searched = [way.artifact for way in ways if way.artifact and way.spotting is None]
    return list(dict.fromkeys(one.place for one in searched))


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
    if way.spotting is not None and way.artifact is not None:
        return modes.DatastoreSpotting(way.artifact.place, way.spotting)
    if way.spotting is not None:
        return modes.PhraseSpotting(way.spotting, lists)
    if way.artifact is None:
        return modes.NoRetrieval()
    if lists is not None:
        return modes.phrase_mode(way.artifact.place, way.knn, way.attention, lists)
    return modes.retrieval_mode(sources[way.artifact.place], way.knn, way.attention)


def _score(
    way: EvaluationMode,
    heard: Collection[TranscribedUtterance],
    resamples: int,
    seed: int,
    lists: PhraseLists | None = None,
) -> Result:
    """`heard` is gone through lot by lot, and counts alone are kept: 64 bytes an utterance.

    `lists`, where each utterance comes with its own phrases: what may be heard in vain.
    """
    everyone = entity_names(one.entities for one in heard) if lists is None else frozenset()
    lots = [_count(lot, everyone, lists) for lot in _lots(heard)]
    counts, characters = (
        np.concatenate([getattr(lot, name) for lot in lots]) for name in ("words", "characters")
    )
    score = {"resamples": resamples, "seed": seed}
    return Result(
        way=way,
        heard=heard,
        words=error_rate(counts, **score),
        characters=error_rate(characters, **score),
        entities=entity_score([lot.entities for lot in lots], **score),
        recall=Recall(sum(lot.recalled for lot in lots), sum(lot.queries for lot in lots)),
        seconds=sum(lot.seconds for lot in lots),
        decode_seconds=sum(lot.decode_seconds for lot in lots),
        counts=counts,
        speakers=_by_speaker(lots),
    )


@dataclass(frozen=True)
class _Lot:
    """Some transcripts, counted."""

    words: np.ndarray
    characters: np.ndarray
    entities: EntityCounts
    recalled: int
    queries: int
    seconds: float
    decode_seconds: float
    speakers: dict[str, np.ndarray]
    """(5,) of each: utterances, and the sum of their `words`."""


def _lots(heard: Iterable[TranscribedUtterance]) -> Iterator[list[TranscribedUtterance]]:
    rest = iter(heard)
    while lot := list(islice(rest, LOT)):
        yield lot


def _count(
    lot: Sequence[TranscribedUtterance], everyone: frozenset[str], lists: PhraseLists | None
) -> _Lot:
    candidates = everyone if lists is None else [lists[one.utterance] for one in lot]
    own = [one.entities for one in lot]
    references, texts = [one.reference for one in lot], [one.text for one in lot]
    words = word_counts(references, texts).astype(np.int32)
    counted = count_entities(references, texts, own, candidates)
    speakers: dict[str, np.ndarray] = {}
    for one, row in zip(lot, words, strict=True):
        speakers.setdefault(one.speaker, np.zeros(5, np.int64))[:] += [1, *row]
    return _Lot(
        words,
        character_counts(references, texts).astype(np.int32),
        replace(counted, words=counted.words.astype(np.int32)),
        recalled=sum(one.recalled for one in lot),
        queries=sum(one.queries for one in lot),
        seconds=sum(one.seconds for one in lot),
        decode_seconds=sum(one.decode_seconds for one in lot),
        speakers=speakers,
    )


def _by_speaker(lots: Sequence[_Lot]) -> dict[str, tuple[int, ErrorRate]]:
    sums: dict[str, np.ndarray] = {}
    for name, own in chain.from_iterable(lot.speakers.items() for lot in lots):
        sums[name] = sums.get(name, 0) + own
    return {
        name: (int(sums[name][0]), error_rate(sums[name][None, 1:], resamples=1, seed=0))
        for name in sorted(sums)
    }


def _compare(results: Sequence[Result], resamples: int, seed: int) -> list[Comparison]:
    """Every pair of ways; each has heard the same utterances in the same order."""
    counts = {result.way.title: result.counts for result in results}
    return compare_counts(counts, resamples, seed)


if __name__ == "__main__":
    stage.main(run, __doc__, other_models=True)
