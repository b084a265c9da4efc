"""A datastore: the language model reads a corpus, each token is an entry; shards are built.

Texts that cannot be read or spoken are left out, and named in `rejected.jsonl`.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random
from shutil import rmtree

import ray

from cluster.parts import Part, cut, in_order, work_off
from cluster.placement import Demand, placing
from cluster.rejections import PIECES, REJECTED, Unread, join_rejections, read_rejections
from cluster.stages import (
    SPOKEN_AUDIO,
    FindSegment,
    Speak,
    SpeakUnits,
    WriteEntries,
    WrittenSegment,
)
from cluster.tracking import Run
from jobs import models, stage
from jobs.models import Models
from mmrag import artifact
from mmrag.artifact import Artifact, Draft
from mmrag.config import ConfigError, Experiment, Index, recipe
from mmrag.config import Datastore as DatastoreConfig
from mmrag.corpora import manifest
from mmrag.corpora.voices import engines
from mmrag.model.contract import TextVocabulary
from mmrag.records import Rejection, Utterance
from mmrag.retrieval import datastore
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.held_out import NEAREST
from mmrag.retrieval.index import (
    IndexShard,
    chosen_index,
    saved_shards,
    shard_directory,
    shard_ranges,
)
from mmrag.retrieval.segment import DatastoreError, Description
from mmrag.retrieval.stored import ARRAYS
from mmrag.speech.tokenized import Tokenized
from mmrag.storage import Location, located
from mmrag.text import each_line

WORKERS = "datastore.workers"
NAMED = 5
"""Texts left out that are named on the terminal; all of them are in REJECTED."""


def run(experiment: Experiment, force: bool = False) -> Artifact:
    """Make `datastores/<name>/` from text lines or tokenized speech."""
    settings = experiment.datastore
    heard_by = models.named(experiment)
    inputs = {**heard_by.inputs, "source": _source(experiment, heard_by, force)}
    made = {
        "seed": experiment.seed,
        "format": datastore.FORMAT,
        "arrays": list(ARRAYS),
        **heard_by.recipe,
    }
    config = recipe(made, settings)

    def work(draft: Draft, tracked: Run) -> None:
        description = Description(
            width=heard_by.width,
            window=settings.window,
            metric=settings.metric,
            audio=settings.audio,
            identity={role: one.fingerprint for role, one in heard_by.inputs.items()},
        )
        datastore.create(draft.path, description)
        reading = Texts(inputs["source"], settings, experiment.seed, heard_by.vocabulary)
        if next(reading.rows(), None) is None:
            raise DatastoreError(_empty(inputs["source"], settings))
        write = {"models": heard_by.name, "language": heard_by.language, "settings": settings}
        stages = [(WriteEntries, {**write, "directory": draft.path})]
        if settings.audio == "spoken":
            stages.insert(0, _speaking(experiment, heard_by, draft.path))
        written: list[WrittenSegment] = []
        done = FindSegment(draft.path)
        for answer in work_off(stages, reading, settings.workers, "reading", WORKERS, done=done):
            if isinstance(answer, Unread):
                answer.keep(draft.path)
            else:
                written.append(answer)
        rmtree(draft.path / SPOKEN_AUDIO, ignore_errors=True)
        utterances = sum(one.utterances for one in written)
        pieces = sorted(draft.path.glob(PIECES))
        rejected = join_rejections(draft.path / REJECTED, pieces)
        tracked.file(draft.path / REJECTED)
        _report(inputs["source"], utterances, rejected, draft.path / REJECTED)
        known = set(Datastore.open(draft.path).segments)
        names = sorted((one.name for one in written), key=in_order)
        datastore.publish(draft.path, [name for name in names if name not in known])
        entries = _index(draft.path, settings.index, experiment.seed, settings.workers.num_cpus)
        shards = [chosen_index(shard) for shard in saved_shards(draft.path)]
        draft.summary |= {
            "entries": entries,
            "utterances": utterances,
            "shards": len(shards),
            "rejected": rejected,
        }
        recalls = [recall for _, recall in shards if recall is not None]
        for why, recall in dict.fromkeys(shards):
            found = "" if recall is None else f"; recall@{NEAREST} {recall:.3f}"
            stage.console.print(f"  index {why}{found}", markup=False)
        if recalls:
            draft.summary[f"recall_at_{NEAREST}"] = round(min(recalls), 4)

    directory = f"datastores/{settings.name}"
    held = artifact.parts("segments/*")
    return stage.make(
        experiment, directory, "datastore", config, inputs, work, holds=held, force=force
    )


def _speaking(experiment: Experiment, heard_by: Models, directory: Path) -> tuple[type, dict]:
    """The stage that has texts said by synthetic voices, as `heard_by` takes them."""
    settings = experiment.datastore
    engines.require(settings.voices, settings.kokoro, "datastore.kokoro")
    speak = {"seed": experiment.seed, "directory": directory, "settings": settings}
    if not heard_by.own:
        return Speak, {**speak, "window_seconds": heard_by.window_seconds}
    codebook = heard_by.inputs["codebook"]
    hubert = stage.load(experiment, "hubert", "hubert", "pretrain_hubert")
    codebook.require("hubert", hubert)
    return SpeakUnits, {"hubert": hubert.place, "codebook": codebook.place, **speak}


def _source(experiment: Experiment, heard_by: Models, force: bool) -> Artifact:
    """What is read: the workspace's datastore split, other tokens, or a file of text lines."""
    settings = experiment.datastore
    if settings.source is None:
        return models.corpus(experiment, heard_by, force)
    if located(settings.source).is_dir():
        made = artifact.load(settings.source, "tokens" if heard_by.own else "clips")
        if heard_by.own:
            made.require("codebook", heard_by.inputs["codebook"])
    else:
        text = artifact.outside(settings.source)
        if settings.audio == "paired":
            raise ConfigError(
                f"datastore.source {text.place} is text: datastore.audio must be none or spoken"
            )
        return text
    return made


@dataclass(frozen=True)
class Texts:
    """Reads a source, as far as it is wanted, and cuts it into parts."""

    source: Artifact
    settings: DatastoreConfig
    seed: int
    vocabulary: TextVocabulary

    def rows(self) -> Iterator[Tokenized | Rejection]:
        """The utterances, and what the model cannot listen for."""
        read = _read(self.source, self.settings, self.seed, self.vocabulary)
        return islice(read, self.settings.utterances)

    def __call__(self) -> Iterator[Part[Tokenized] | Unread]:
        yield from cut(self.rows(), lambda _: 1, self.settings.part_utterances)


def _read(
    source: Artifact, settings: DatastoreConfig, seed: int, vocabulary: TextVocabulary
) -> Iterator[Tokenized | Rejection]:
    """The source's utterances as they are spoken, and what the model cannot listen for."""
    for one in _given(source, settings, seed):
        text = one.utterance.text or ""
        if reason := vocabulary.refusal(text):
            yield Rejection(one.utterance.id, reason)
        else:
            yield replace(one, utterance=replace(one.utterance, text=vocabulary.spoken(text)))


def _given(source: Artifact, settings: DatastoreConfig, seed: int) -> Iterator[Tokenized]:
    if source.kind == artifact.OUTSIDE:
        for said in _outside(source.place):
            if settings.domain in (None, said.domain):
                yield Tokenized(said, None)
        return
    for split in _splits(source, settings):
        for one in models.read(source, split):
            if settings.domain not in (None, one.utterance.domain) or not one.utterance.text:
                continue
            if settings.audio != "paired":
                yield one
            elif Random(f"{seed} {one.utterance.id}").random() >= settings.paired_share:
                yield Tokenized(one.utterance, None)
            elif models.spoken(one):
                yield one


def _splits(source: Artifact, settings: DatastoreConfig) -> Sequence[str]:
    """The splits that are read; ConfigError for one that is not there."""
    known = models.splits(source)
    if "all" in known:
        return ["all"]
    if missing := [each for each in settings.splits if each not in known]:
        raise ConfigError(
            f"datastore.splits: {source.place} has no {', '.join(missing)}; it has "
            f"{', '.join(known)}"
        )
    return settings.splits


def _outside(path: Location) -> Iterator[Utterance]:
    """A file's utterances: a manifest's, which starts with a brace, or a text's lines."""
    with path.open("rb") as stream:
        lines = (line.removeprefix(codecs.BOM_UTF8).strip() for line in stream)
        start = next(filter(None, lines), b"")[:1]
    if path.suffix == ".json" and start == b"[":
        raise ConfigError(
            f"datastore.source {path} is one JSON array: it takes lines of text, or a manifest of "
            "one JSON object a line"
        )
    if path.suffix != ".jsonl" and start != b"{":
        for number, line in each_line(path):
            name = f"{path.name}:{number}"
            yield Utterance(id=name, text=line, document=name)
        return
    for line in manifest.read(path):
        if isinstance(line, Rejection):
            raise ValueError(f"{line.source}: {line.reason}")
        yield line


def _report(source: Artifact, used: int, rejected: int, listed: Path) -> None:
    """Name what was left out; ValueError if that is everything."""
    named = [f"{one.source}: {one.reason}" for one in read_rejections(listed, NAMED)]
    if more := rejected - len(named):
        named.append(f"and {more} more")
    if not used:
        raise ValueError(f"nothing of {source.place} can be used: {'; '.join(named)}")
    for line in named:
        stage.console.print(f"  left out: {line}", markup=False)


def _empty(source: Artifact, settings: DatastoreConfig) -> str:
    """What is said of a source that has nothing to build a datastore of."""
    if source.kind == artifact.OUTSIDE:
        domain = "" if settings.domain is None else f" of domain {settings.domain}"
        return f"{source.place}: holds no text{domain} to build a datastore of"
    wanted = f"splits {', '.join(settings.splits)}, audio {settings.audio}"
    if settings.domain is not None:
        wanted += f", domain {settings.domain}"
    return f"{source.place}: has no utterance to build a datastore of ({wanted})"


def _index(directory: Path, settings: Index, seed: int, num_cpus: float) -> int:
    """Build the shards that are not there yet, in parallel; return the number of entries."""
    entries = Datastore.open(directory).entries
    with placing(Demand(WORKERS, 1, num_cpus)):
        building = [
            _build_shard.options(num_cpus=num_cpus).remote(directory, number, span, settings, seed)
            for number, span in enumerate(shard_ranges(entries, settings.shards))
            if not shard_directory(directory, number).exists()
        ]
        ray.get(building)
    return entries


@ray.remote
def _build_shard(
    directory: Path, number: int, span: tuple[int, int], settings: Index, seed: int
) -> None:
    shard = IndexShard.build(Datastore.open(directory), *span, settings, seed)
    shard.save(shard_directory(directory, number))


if __name__ == "__main__":
    stage.main(run, __doc__, other_models=True)
