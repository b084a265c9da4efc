"""Experiments on other speech than the corpus's sentences: recorded elsewhere, in another language,
passages, real sentences, people.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cluster import modes
from cluster.modes import NoRetrieval
from cluster.parts import parts, work_off
from cluster.recording import DegradeRecordings, RenderSpeech
from cluster.tracking import Run
from jobs import build_datastore, models, stage, tokenize, tune
from jobs.reproduce.lab import (
    ASSISTANT,
    EVERYDAY,
    OWN,
    Lab,
    Point,
    TunedDatastore,
    choose_boost,
    knn_point,
    tuned_datastore,
    ways,
)
from mmrag import artifact
from mmrag.artifact import Artifact, Draft
from mmrag.corpora import manifest, passages, spanish
from mmrag.corpora.voices import flite
from mmrag.records import Utterance

SPANISH = "spanish"
PART_UTTERANCES = 32
GROWN_UP = 16
"""Years."""
Each = TypeVar("Each")


def robustness(lab: Lab) -> tuple[str, int, list[Point]]:
    """Noise, a telephone, another synthesizer, and Spanish with a datastore in Spanish.

    The guard of `decode.agreement` throws away what retrieval brings about in Spanish: to a model
    that has heard English alone it is absurd. Where a datastore speaks another language than the
    model, the guard has to be off.
    """
    points = []
    for condition in lab.settings.conditions:
        if condition.startswith("flite") and not flite.installed():
            stage.console.print(f"  {condition}: left out, flite is not installed")
            continue
        if condition == SPANISH and lab.family != OWN:
            stage.console.print(f"  {condition}: left out, for a model of {lab.family}")
            continue
        if condition == SPANISH:
            made, store = _spanish(lab)
        else:
            made, store = _rerecorded(lab, condition), lab.multimodal
        at = {"setting": condition, "tokens": made.path}
        how = [Point("none", NoRetrieval()), *ways(store, "multimodal")[:2]]
        points += [replace(point, **at) for point in how]
    return ASSISTANT, lab.settings.sweep_utterances, points


def spoken_squad(lab: Lab) -> tuple[str, int, list[Point]]:
    """Sentences of Spoken-SQuAD's passages, read by voices that nobody trained on.

    The datastore has the other sentences of the same topics: as text, with recordings in training
    voices, or spoken from the text. Boosting favours the answers that stand in them, all of them
    or those that are spotted.
    """
    settings, corpus = lab.settings, lab.experiment.synthesize
    if settings.passages is None:
        return passages.DOMAIN, 0, []
    held_out = corpus.held_out_voices or corpus.voices
    size, seed = settings.sweep_utterances, lab.experiment.seed
    file = Path(settings.passages)
    planned = passages.plan(file, settings.topics, size, corpus.voices, held_out, seed)
    config = {"topics": settings.topics, "utterances": size, "seed": seed}
    config |= {"voices": corpus.voices, "held_out_voices": held_out}
    made = _tokenized(
        *(lab, passages.DOMAIN, config, planned, _speaking(lab)), artifact.outside(file)
    )
    names = {"text": "none", "multimodal": "paired", "spoken": "spoken"}
    stores = {
        name: _about(lab, made, f"{passages.DOMAIN}-{name}", audio, passages.DOMAIN)
        for name, audio in names.items()
    }
    points = [Point("none", NoRetrieval()), knn_point(stores.pop("text"), "text")]
    for name, store in stores.items():
        points += ways(store, name)
        points += lab.terms(store.artifact, name)
    answers = sorted({entity for one in planned["datastore"] for entity in one.entities})
    lists = {split: {one.id: answers for one in planned[split]} for split in ("dev", "test")}
    dev = lab.spoken("dev", passages.DOMAIN, size, made)[: lab.experiment.tune.utterances]
    boosted = modes.PhraseBoosting(choose_boost(lab, dev, lists["dev"]), lists["test"])
    points.append(Point("boost", boosted, phrases=len(answers), lists=lists["test"]))
    points += lab.spotting(lists["test"], len(answers))
    return passages.DOMAIN, size, [replace(point, tokens=made.path) for point in points]


def sentences(lab: Lab) -> tuple[str, int, list[Point]]:
    """Real sentences that nobody trained on, written or spoken, by domain, in voices that nobody
    trained on."""
    files = lab.experiment.synthesize.sentences
    domains = [Path(file).stem for file in files.files] if files else []
    points = [Point("none", NoRetrieval(), setting=each, domain=each) for each in domains]
    return EVERYDAY, lab.settings.utterances, points


def people(lab: Lab) -> tuple[str, int, list[Point]]:
    """Recordings of people whom nobody trained on: grown-ups and children apart, where the corpus
    knows their age. What was chosen by looking was chosen on those of dev."""
    points, most = [], 0
    for split in ("dev", "test"):
        groups: dict[tuple[str, str], set[str]] = {}
        for one in manifest.read(lab.corpus.path / f"{split}.jsonl"):
            if isinstance(one, Utterance) and recorded(one, split):
                groups.setdefault((one.domain, age_group(one.age)), set()).add(one.id)
        most += sum(map(len, groups.values()))
        points += [
            Point(
                "none",
                NoRetrieval(),
                setting=f"{of}/{split}, {group}",
                domain=of,
                split=split,
                only=frozenset(spread(sorted(ids), lab.settings.utterances)),
            )
            for (of, group), ids in sorted(groups.items())
        ]
    return EVERYDAY, most, points


def recorded(one: Utterance, split: str) -> bool:
    """Whether an utterance of a corpus is a recording of somebody, and no planned sentence."""
    return not one.id.startswith(f"{split}-")


def age_group(age: float | None) -> str:
    """Grown-ups and children, in words."""
    if age is None:
        return "of unknown age"
    return f"aged {GROWN_UP} and over" if age >= GROWN_UP else f"under {GROWN_UP}"


def spread(some: Sequence[Each], most: int) -> list[Each]:
    """At most so many, from all over: whoever made the first recordings made the next ones too."""
    return [some[n] for n in np.linspace(0, len(some) - 1, min(most, len(some))).astype(int)]


def _rerecorded(lab: Lab, condition: str) -> Artifact:
    """The test split under a condition, tokenized."""
    test = [
        one
        for one in manifest.read(lab.corpus.path / "test.jsonl")
        if isinstance(one, Utterance) and one.domain == ASSISTANT
    ][: lab.settings.sweep_utterances]
    seed = lab.experiment.seed
    recording = partial(DegradeRecordings, condition=condition, seed=seed)
    config = {"condition": condition, "utterances": len(test), "seed": seed}
    return _tokenized(lab, condition, config, {"test": test}, recording)


def _spanish(lab: Lab) -> tuple[Artifact, TunedDatastore]:
    """Spanish speech, tokenized; a datastore of it, and its settings."""
    size, mentions = lab.settings.sweep_utterances, lab.experiment.synthesize.mentions
    planned = spanish.plan(size, size, mentions, lab.experiment.seed)
    config = {"language": SPANISH, "utterances": size, "mentions": mentions}
    config["seed"] = lab.experiment.seed
    made = _tokenized(lab, SPANISH, config, planned, _speaking(lab))
    return made, _about(lab, made, SPANISH, "paired")


def _speaking(lab: Lab) -> Callable[..., Any]:
    return partial(RenderSpeech, kokoro=lab.experiment.synthesize.kokoro)


def _about(
    lab: Lab, made: Artifact, name: str, audio: str, domain: str = ASSISTANT
) -> TunedDatastore:
    """A datastore of other tokens than the corpus's, and its settings."""
    settings = lab.experiment.tokenize.model_copy(update={"name": made.path.name})
    evaluate = lab.experiment.evaluate.model_copy(update={"domain": domain})
    changes = {"tokenize": settings, "evaluate": evaluate}
    about = lab.about(name, audio).model_copy(update=changes)
    store = build_datastore.run(about, lab.force)
    return tuned_datastore(store, tune.run(about, lab.force).path)


def _tokenized(
    lab: Lab,
    name: str,
    config: Mapping[str, Any],
    splits: Mapping[str, Sequence[Any]],
    recording: Callable[..., Any],
    source: Artifact | None = None,
) -> Artifact:
    """Recordings of `splits` and their units; `recording`, given the `directory`, is the stage.

    What they are made of is the corpus, or `source`.
    """
    experiment = lab.experiment

    def work(draft: Draft, tracked: Run) -> None:
        record = (recording, {"directory": draft.path})
        for split, planned in splits.items():
            shares = parts(planned, lambda _: 1, PART_UTTERANCES, name=split)
            rows = [draft.path / f".{part.name}.jsonl" for part in shares]
            todo = [part for part, row in zip(shares, rows, strict=True) if not row.exists()]
            workers, key = experiment.synthesize.workers, "synthesize.workers"
            for _ in work_off([record], todo, workers, f"{name} {split}", key):
                pass
            (draft.path / f"{split}.jsonl").write_text(
                "".join(row.read_text(encoding="utf-8") for row in rows), encoding="utf-8"
            )
            draft.summary[f"{split}_utterances"] = len(planned)

    directory, inputs = f"conditions/{name}", {"corpus": source or lab.corpus}
    made = stage.make(
        experiment,
        directory,
        "corpus",
        config,
        inputs,
        work,
        bulk=("audio/",),
        holds=artifact.parts(".*.jsonl"),
        force=lab.force,
    )
    codebook = str(experiment.workspace / "codebook")
    changes = {"source": str(made.path), "name": f"tokens-{name}", "codebook": codebook}
    settings = experiment.tokenize.model_copy(update=changes)
    about = experiment.model_copy(update={"tokenize": settings})
    if lab.family == OWN:
        return tokenize.run(about, lab.force)
    return models.corpus(about, lab.heard_by, lab.force)


TASKS = (robustness, spoken_squad, sentences, people)
