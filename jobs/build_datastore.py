"""A datastore: the language model reads a corpus, each token is an entry; shards are built."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random

import ray

from cluster.parts import parts, work_off
from cluster.stages import REJECTED, SpeakUnits, WriteEntries, write_rejections
from cluster.tracking import Run
from jobs import stage
from mmrag import artifact
from mmrag.artifact import Artifact, Draft
from mmrag.config import ConfigError, Experiment, Index, recipe
from mmrag.config import Datastore as DatastoreConfig
from mmrag.corpora import manifest
from mmrag.model.vocabulary import Vocabulary
from mmrag.records import Rejection, Utterance
from mmrag.retrieval import datastore
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.index import IndexShard, saved_shards, shard_directory, shard_ranges
from mmrag.retrieval.segment import Description
from mmrag.speech import tokenized
from mmrag.speech.tokenized import Tokenized
from mmrag.text import read_lines


def run(experiment: Experiment, force: bool = False) -> Artifact:
    """Make `datastores/<name>/` from text lines or tokenized speech."""
    settings = experiment.datastore
    lm = stage.load(experiment, "lm", "lm", "train")
    codebook = stage.load(experiment, "codebook", "codebook", "tokenize")
    lm.require("codebook", codebook)
    inputs = {"lm": lm, "codebook": codebook, "source": _source(experiment, codebook)}
    config = recipe({"seed": experiment.seed}, settings)

    def work(draft: Draft, tracked: Run) -> None:
        description = Description(
            width=experiment.lm.width,
            window=settings.window,
            metric=settings.metric,
            audio=settings.audio,
            identity={"lm": lm.fingerprint, "codebook": codebook.fingerprint},
        )
        datastore.create(draft.path, description)
        read = _read(inputs["source"], settings, experiment.seed)
        rejected: list[Rejection] = []
        source = _speakable(read, Vocabulary.load(lm.path), rejected)
        utterances = list(islice(source, settings.utterances))
        write_rejections(draft.path / REJECTED, rejected)
        if rejected and not utterances:
            first = rejected[0]
            raise ValueError(f"nothing of it can be used: {first.source}: {first.reason}")
        shares = parts(utterances, lambda _: 1, settings.part_utterances)
        segments = draft.path / "segments"
        todo = [part for part in shares if not (segments / part.name).exists()]
        stages = [(WriteEntries, {"lm": lm.path, "settings": settings, "directory": draft.path})]
        if settings.audio == "spoken":
            hubert = stage.load(experiment, "hubert", "hubert", "pretrain_hubert")
            codebook.require("hubert", hubert)
            speak = {"hubert": hubert.path, "codebook": codebook.path, "seed": experiment.seed}
            stages.insert(0, (SpeakUnits, speak))
        for _ in work_off(stages, todo, settings.workers, "reading"):
            pass
        known = Datastore.open(draft.path).segments
        datastore.publish(draft.path, [p.name for p in shares if p.name not in known])
        entries = _index(draft.path, settings.index, experiment.seed, settings.workers.num_cpus)
        draft.summary |= {
            "entries": entries,
            "utterances": len(utterances),
            "rejected": len(rejected),
            "shards": len(saved_shards(draft.path)),
        }

    directory = f"datastores/{settings.name}"
    held = artifact.parts("segments/*")
    return stage.make(
        experiment, directory, "datastore", config, inputs, work, holds=held, force=force
    )


def _source(experiment: Experiment, codebook: Artifact) -> Artifact:
    """What is read: the workspace's datastore split, other tokens, or a file of text lines."""
    settings = experiment.datastore
    if settings.source is None:
        made = stage.load(experiment, experiment.tokenize.name, "tokens", "tokenize")
    elif Path(settings.source).is_dir():
        made = artifact.load(settings.source, "tokens")
    else:
        text = artifact.outside(settings.source)
        if settings.audio == "paired":
            raise ConfigError(
                f"datastore.source {text.path} is text: datastore.audio must be none or spoken"
            )
        return text
    made.require("codebook", codebook)
    return made


def _read(source: Artifact, settings: DatastoreConfig, seed: int) -> Iterator[Tokenized]:
    """The source's utterances that have what their keys are made of."""
    if source.path.suffix == ".jsonl":
        for line in manifest.read(source.path):
            if isinstance(line, Rejection):
                raise ValueError(f"{line.source}: {line.reason}")
            yield Tokenized(line, None)
        return
    if source.kind == "outside":
        for number, line in read_lines(source.path):
            name = f"{source.path.name}:{number}"
            yield Tokenized(Utterance(id=name, text=line, document=name), None)
        return
    splits = [source.path / split for split in settings.splits]
    for split in [each for each in splits if each.exists()] or [source.path / "all"]:
        for one in tokenized.read(split):
            if settings.domain not in (None, one.utterance.domain) or not one.utterance.text:
                continue
            if settings.audio != "paired":
                yield one
            elif Random(f"{seed} {one.utterance.id}").random() >= settings.paired_share:
                yield Tokenized(one.utterance, None)
            elif one.units is not None:
                yield one


def _speakable(
    read: Iterable[Tokenized], vocabulary: Vocabulary, rejected: list[Rejection]
) -> Iterator[Tokenized]:
    """What the model can listen for, as it is spoken; the others join those `rejected`."""
    for one in read:
        text = one.utterance.text or ""
        if reason := vocabulary.refusal(text):
            rejected.append(Rejection(one.utterance.id, reason))
        else:
            yield replace(one, utterance=replace(one.utterance, text=vocabulary.spoken(text)))


def _index(directory: Path, settings: Index, seed: int, num_cpus: float) -> int:
    """Build the shards that are not there yet, in parallel; return the number of entries."""
    entries = Datastore.open(directory).entries
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
    stage.main(run, __doc__)
