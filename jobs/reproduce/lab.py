"""What the experiments share: one model, its corpus, its datastores and how they are tuned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cluster.modes import (
    DatastoreSpotting,
    Mode,
    PhraseBoosting,
    PhraseLists,
    PhraseSpotting,
    phrase_mode,
    retrieval_mode,
)
from cluster.stages import (
    TranscribedUtterance,
    transcribe_modes,
)
from jobs import build_datastore, models, stage, synthesize, tokenize, tune
from mmrag import shipped
from mmrag.artifact import Artifact
from mmrag.config import KNN, ConfigError, Experiment, RetrievedAttention
from mmrag.decoding.tune import BOTH, chosen, chosen_attention, distance_scale
from mmrag.score import word_error_rate
from mmrag.speech.tokenized import Tokenized

EVERYDAY, ASSISTANT = "everyday", "assistant"
DECOY_UTTERANCES = 1600


@dataclass(frozen=True)
class Point:
    """One row of the results, before it is measured: how to transcribe what."""

    mode: str
    how: Mode
    datastore: str | None = None
    phrases: int | None = None
    entries: int | None = None
    setting: str | None = None
    """What a sweep varies, in words."""
    domain: str | None = None
    """Whose utterances these are, where they are not the task's."""
    split: str = "test"
    """Whose split's utterances these are."""
    only: frozenset[str] | None = None
    """Utterances of the domain, by id, where it is not all of them."""
    tokens: Path | None = None
    """The recordings' tokens, or clips, where they are not the split's own."""
    lists: PhraseLists | None = None
    """The phrases that come with each utterance: what may be heard in vain."""

    @property
    def name(self) -> str:
        """Unique within a task."""
        told = (self.mode, self.datastore, self.phrases, self.entries, self.setting)
        return " ".join(str(each) for each in told if each is not None)


@dataclass(frozen=True)
class TunedDatastore:
    """A datastore and how far the dev split says to trust it, by votes, by attention, and by votes
    beside attention; the latter two are None where there is nothing heard to attend to."""

    artifact: Artifact
    knn: KNN
    attention: RetrievedAttention | None
    both: KNN | None
    distance_scale: float
    """The distance of which gates and temperatures were tried in multiples."""


OWN, WHISPER = "mmrag", "whisper"
"""Families of models that are compared."""


class Lab:
    """One model, its corpus, and the datastores that tasks share."""

    def __init__(self, experiment: Experiment, force: bool) -> None:
        if experiment.reproduce is None:
            raise ConfigError("the experiment has no section `reproduce`")
        self.family = OWN if experiment.models is None else WHISPER
        self.prefix = "" if self.family == OWN else f"{WHISPER}-"
        """Before the names of what another model makes in the same workspace."""
        decoy, named = experiment.tune.decoy or "wrong", experiment.tune
        if named.decoy is not None:
            named = named.model_copy(update={"decoy": f"{self.prefix}{decoy}"})
        self.experiment = experiment.model_copy(update={"tune": named})
        self.settings = experiment.reproduce
        self.force = force
        self.corpus = synthesize.run(experiment, force)
        if self.family == OWN:
            tokenize.run(experiment, force)
        self.heard_by = models.named(experiment)
        self.tokens = models.corpus(experiment, self.heard_by, force)
        self.inputs = {self.heard_by.role: self.heard_by.made, self.tokens.kind: self.tokens}
        self.inputs |= self.heard_by.beside
        self.attention: RetrievedAttention | None = None
        """How the adapter reads a list of phrases; None for a model that has none."""
        adapter = self.adapter() if self.family == OWN else None
        if adapter is not None:
            self.inputs["adapter"] = adapter
            self.attention = experiment.attention
        elif self.family == OWN:  # nothing reads, and no way to read is tried
            tune_without = self.experiment.tune.model_copy(update={"attention": ()})
            self.experiment = self.experiment.model_copy(update={"tune": tune_without})
        about = {"splits": ("lm",), "domain": EVERYDAY, "utterances": DECOY_UTTERANCES}
        self.decoy = self.datastore(decoy, "paired", **about)
        """Everyday sentences, which say nothing about anybody's name; tuning opens them too."""

    def adapter(self) -> Artifact | None:
        """The adapter of our own language model, if it has one."""
        base, place = self.experiment.train.base, self.experiment.workspace / "adapter"
        shipped_one = base is not None and (shipped.find(base) / "adapter").exists()
        if not (place.exists() or shipped_one):
            stage.console.print("  no adapter: cross-attention is left out")
            return None
        adapter = stage.load(self.experiment, "adapter", "adapter", "train")
        adapter.require("lm", self.heard_by.made)
        return adapter

    def phrases(
        self, store: Artifact, knn: KNN | None, read: RetrievedAttention | None, lists: PhraseLists
    ) -> Mode:
        """Each utterance's own phrases of a datastore of them, searched, read or both."""
        return phrase_mode(store.path, knn, read, lists, self.settings.mentions)

    @cached_property
    def spells(self) -> bool:
        """Whether clips come with the letters that phrases are spotted in."""
        first = self.spoken("dev", ASSISTANT, 1) if self.family == OWN else []
        return any(one.units is not None and one.units.letters is not None for one in first)

    def spotting(self, lists: PhraseLists, count: int, setting: str | None = None) -> list[Point]:
        """Each utterance's own phrases, of which there are `count`, spotted as they come; nothing
        where nobody spells."""
        how = PhraseSpotting(self.experiment.spotting, lists)
        point = Point("spotting", how, None, count, setting=setting, lists=lists)
        return [point] if self.spells else []

    def terms(self, made: Artifact, name: str) -> list[Point]:
        """The phrases and terms of a datastore spotted; nothing where nobody spells."""
        how = DatastoreSpotting(made.path, self.experiment.spotting)
        point = Point("spotting", how, name, entries=made.summary["entries"])
        return [point] if self.spells else []

    def spoken(self, split: str, domain: str, limit: int, made: Artifact | None = None) -> list:
        """The first utterances of a split's domain."""
        return models.select(made or self.tokens, split, domain)[:limit]

    def datastore(self, name: str, audio: str, **changes: Any) -> Artifact:
        """A datastore of the workspace, built if need be."""
        return build_datastore.run(self.about(name, audio, **changes), self.force)

    def store(self, name: str, audio: str, **changes: Any) -> TunedDatastore:
        """A datastore and its settings, chosen on the dev split."""
        about = self.about(name, audio, **changes)
        made = build_datastore.run(about, self.force)
        return tuned_datastore(made, tune.run(about, self.force).path)

    def transcribe(self, how: Mapping[str, Mode], spoken: Sequence[Tokenized]) -> dict:
        """Every utterance in every mode."""
        experiment = self.experiment
        workers = experiment.evaluate.workers
        name, language = self.heard_by.name, self.heard_by.language
        return transcribe_modes(name, experiment.decode, how, spoken, workers, language=language)

    def error_rate(self, heard: Sequence[TranscribedUtterance]) -> float:
        """WER alone, to choose by."""
        references, texts = [one.reference for one in heard], [one.text for one in heard]
        return word_error_rate(references, texts, resamples=1).rate

    @cached_property
    def multimodal(self) -> TunedDatastore:
        return self.store("multimodal", "paired")

    @cached_property
    def text(self) -> TunedDatastore:
        return self.store("text", "none")

    @cached_property
    def spoken_text(self) -> TunedDatastore:
        return self.store("spoken", "spoken")

    def paired(self, share: float) -> TunedDatastore:
        """The multi-modal datastore with the audio of some of its utterances alone."""
        return self.store(f"paired-{round(100 * share)}", "paired", paired_share=share)

    def about(self, name: str, audio: str, **changes: Any) -> Experiment:
        """The experiment of one datastore."""
        changes = {"name": f"{self.prefix}{name}", "audio": audio, **changes}
        datastore = self.experiment.datastore.model_copy(update=changes)
        return self.experiment.model_copy(update={"datastore": datastore})


def tuned_datastore(made: Artifact, tuned: Path) -> TunedDatastore:
    """A datastore with what `jobs.tune` left for it in the directory `tuned`."""
    read = chosen_attention(tuned)
    both = None if read is None else chosen(tuned, BOTH)
    return TunedDatastore(made, chosen(tuned), read, both, distance_scale(tuned))


def ways(store: TunedDatastore, name: str, setting: str | None = None) -> list[Point]:
    """kNN-LM, and where there is something to attend to cross-attention and both."""
    how: dict[str, tuple[KNN | None, RetrievedAttention | None]] = {"knn": (store.knn, None)}
    if store.attention is not None:
        how |= {"cross_attention": (None, store.attention), "both": (store.both, store.attention)}
    path, entries = store.artifact.path, store.artifact.summary["entries"]
    return [
        Point(mode, retrieval_mode(path, *each), name, entries=entries, setting=setting)
        for mode, each in how.items()
    ]


def knn_point(store: TunedDatastore, name: str, setting: str | None = None) -> Point:
    """kNN-LM alone."""
    return ways(replace(store, attention=None), name, setting)[0]


def choose_boost(lab: Lab, dev: Sequence[Tokenized], lists: PhraseLists) -> float:
    """The weight of phrase boosting, of `reproduce.boost`, of least dev WER."""
    how = {str(weight): PhraseBoosting(weight, lists) for weight in lab.settings.boost}
    heard = lab.transcribe(how, dev)
    return min(lab.settings.boost, key=lambda weight: lab.error_rate(heard[str(weight)]))
