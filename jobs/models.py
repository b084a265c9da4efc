"""Whose states key a datastore, and who transcribes: the workspace's own models, or a Whisper."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from jobs import clips, stage
from mmrag import artifact, shipped
from mmrag.artifact import Artifact, ArtifactError
from mmrag.config import ConfigError, Experiment
from mmrag.corpora import manifest
from mmrag.model import whisper
from mmrag.model.contract import TextVocabulary
from mmrag.model.vocabulary import Vocabulary
from mmrag.recogniser import NGRAM, is_whisper, outline
from mmrag.records import Utterance
from mmrag.speech import tokenized
from mmrag.speech.tokenized import Tokenized


@dataclass(frozen=True)
class Models:
    """What a job's workers load, and what is known of it beforehand."""

    name: str
    """For `mmrag.recogniser.load`."""
    inputs: dict[str, Artifact]
    """What a datastore is keyed by, by role."""
    width: int
    """D of a key."""
    vocabulary: TextVocabulary
    window_seconds: float = math.inf
    """Longest clip that is heard at once."""
    language: str | None = None
    """What a multilingual Whisper is told to hear."""
    ngram: Artifact | None = None
    """What they weigh beside the decoder's language model, where there is one."""

    @property
    def role(self) -> str:
        """Of the decoder among the inputs."""
        return next(iter(self.inputs))

    @property
    def made(self) -> Artifact:
        """The decoder."""
        return self.inputs[self.role]

    @property
    def beside(self) -> dict[str, Artifact]:
        """What else decides about their transcripts, and about no key, by role."""
        return {} if self.ngram is None else {NGRAM: self.ngram}

    @property
    def recipe(self) -> dict[str, str]:
        """What beside the inputs decides about what they make."""
        return {} if self.language is None else {"language": self.language}

    @property
    def own(self) -> bool:
        """Whether they hear units, and may have an adapter."""
        return self.role == "lm"


def named(experiment: Experiment) -> Models:
    """`experiment.models`, else the workspace's language model and the codebook it knows.

    Raises ArtifactError or WhisperError for what is not there, ConfigError for another name.
    """
    if experiment.models is None:
        if experiment.language is not None:
            raise ConfigError(
                f"language {experiment.language!r}: only a multilingual Whisper is told one"
            )
        lm = stage.load(experiment, "lm", "lm", "train")
        codebook = stage.load(experiment, "codebook", "codebook", "tokenize")
        lm.require("codebook", codebook)
        return Models(
            name=str(experiment.workspace),
            inputs={"lm": lm, "codebook": codebook},
            width=experiment.lm.width,
            vocabulary=Vocabulary.load(lm.place),
            ngram=_ngram(experiment, lm),
        )
    if not is_whisper(experiment.models):
        raise ConfigError(
            f"models {experiment.models}: {whisper.PREFIX}DIRECTORY or {whisper.PREFIX}HUB_ID; "
            "the workspace's own models need no name"
        )
    directory = whisper.locate(experiment.models).absolute()
    name = f"{whisper.PREFIX}{directory}"
    known = outline(name, experiment.language)
    checkpoint = Artifact(directory, "whisper", known.keyed_by["whisper"], {}, {})
    return Models(
        name=name,
        inputs={"whisper": checkpoint},
        width=known.width,
        vocabulary=known.vocabulary,
        window_seconds=known.window_seconds,
        language=experiment.language,
    )


def _ngram(experiment: Experiment, lm: Artifact) -> Artifact | None:
    """The workspace's n-gram model; or that of the package's model, if it is its language model."""
    base = experiment.train.base
    if not (experiment.workspace / NGRAM).exists():
        if base is None or not base.startswith(shipped.PREFIX):
            return None
        theirs = shipped.find(base) / NGRAM
        if not theirs.exists() or artifact.load(theirs, NGRAM).inputs["lm"] != lm.fingerprint:
            return None
    made = stage.load(experiment, NGRAM, NGRAM, "ngram")
    made.require("lm", lm)
    return made


def adaptable(experiment: Experiment) -> Models:
    """The workspace's own; ConfigError where the experiment names others."""
    if experiment.models is not None:
        raise ConfigError(
            f"models {experiment.models}: cross-attention adapters belong to mmrag's own language "
            "model, whose states they read"
        )
    return named(experiment)


def corpus(experiment: Experiment, models: Models, force: bool = False) -> Artifact:
    """The speech that `models` hear: the workspace's tokens, or clips, which are made if need be.

    ArtifactError if the tokens' units are not of the codebook that the language model knows.
    """
    if not models.own:
        return clips.run(experiment, models.window_seconds, force)
    made = stage.load(experiment, experiment.tokenize.name, "tokens", "tokenize")
    made.require("codebook", models.inputs["codebook"])
    return made


def splits(made: Artifact) -> list[str]:
    """The names of the splits of what `corpus` gave."""
    if made.kind == "clips":
        kept = (path for path in made.path.glob("*.jsonl") if path.name not in clips.BESIDE)
        return sorted(path.stem for path in kept)
    return sorted(path.name for path in made.path.iterdir() if path.is_dir())


def read(made: Artifact, split: str) -> Iterator[Tokenized]:
    """Every utterance of a split of what `corpus` gave."""
    if made.kind != "clips":
        yield from tokenized.read(made.path / split)
        return
    for line in manifest.read(made.path / f"{split}.jsonl"):
        if not isinstance(line, Utterance):
            raise ArtifactError(f"{made.path} is damaged: {line.source}: {line.reason}")
        yield Tokenized(line, None)


def spoken(one: Tokenized) -> bool:
    """Whether there is speech to hear, as units or in a recording."""
    return one.units is not None or one.utterance.audio is not None


def select(made: Artifact, split: str, domain: str | None) -> list[Tokenized]:
    """All of what `selected` gives."""
    return list(selected(made, split, domain))


def selected(made: Artifact, split: str, domain: str | None) -> Iterator[Tokenized]:
    """A split's spoken utterances with a transcript; of one domain, if one is named.

    ArtifactError if there are none.
    """
    found = False
    for one in read(made, split):
        if spoken(one) and one.utterance.text and domain in (None, one.utterance.domain):
            found = True
            yield one
    if not found:
        which = f" of domain {domain}" if domain else ""
        raise ArtifactError(f"{made.path / split} has no spoken utterance{which}")
