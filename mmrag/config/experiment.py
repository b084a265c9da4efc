"""One experiment: every section, read from one complete YAML file and overrides.

OmegaConf reads the file (so `${oc.env:NAME,default}` works) and merges the overrides; pydantic
checks the result. Unknown keys and illegal combinations are errors that name the key.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from omegaconf import Container, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, NonNegativeInt, PlainSerializer, PlainValidator, ValidationError
from yaml import YAMLError

from mmrag.config.decoding import BatchDecode, Evaluate, Reproduce, Tune
from mmrag.config.model import (
    AdapterTraining,
    LanguageModel,
    NGramCounts,
    Train,
    Vocabulary,
    WhisperTraining,
)
from mmrag.config.retrieval import KNN, Datastore, RetrievedAttention, Spotting
from mmrag.config.section import SLUG, ConfigError, Operation, Section, explain
from mmrag.config.speech import Hubert, Pretrain, Synthesize, Tokenize
from mmrag.storage import Location, Url, located


class Tracking(Section):
    """Where runs are recorded."""

    uri: Operation[str]
    """MLflow tracking URI; MLFLOW_TRACKING_URI in the environment wins."""
    experiment: Operation[str]


def _located(place: Any) -> Location:
    if not isinstance(place, str | Path | Url) or not str(place).strip():
        raise ValueError(f"names no directory and no URL: {place!r:.80}")
    found = located(place)
    return found.expanduser().absolute() if isinstance(found, Path) else found


Place = Annotated[
    Location,
    PlainValidator(_located, json_schema_input_type=str),
    PlainSerializer(str, when_used="json"),
]
"""A directory, or a URL."""


class Experiment(Section):
    """Everything that a run needs to know. Every section is written out in the YAML file."""

    workspace: Operation[Place]
    """Directory of the artifacts, absolute once parsed, or a URL (`s3://bucket/runs/330m`)."""
    seed: NonNegativeInt
    tracking: Tracking
    synthesize: Synthesize
    hubert: Hubert
    pretrain: Pretrain
    tokenize: Tokenize
    vocabulary: Vocabulary
    lm: LanguageModel
    train: Train
    ngram: NGramCounts | None = None
    """Given, `jobs.ngram` counts the corpus's text for the decoder."""
    datastore: Datastore
    knn: KNN
    """Used where no tuned settings are named."""
    attention: RetrievedAttention
    spotting: Spotting = Field(default_factory=Spotting)
    """How the phrases of a list are spotted."""
    decode: BatchDecode
    tune: Tune
    evaluate: Evaluate
    adapter: AdapterTraining | None = None
    """Given, `jobs.train` trains an adapter for the workspace's language model."""
    reproduce: Reproduce | None = None
    whisper: WhisperTraining | None = None
    """Given, `jobs.train_whisper` trains a small Whisper on the workspace's corpus."""
    models: Operation[str | None] = None
    """What transcribes in place of the workspace's own models: `whisper:` and a checkpoint's
    directory, or a hub's id."""
    published: Operation[str] = Field(default="tiny", pattern=SLUG)
    """The model of the package that `jobs.publish` makes of the workspace's: `mmrag:` and this."""
    language: str | None = None
    """What is spoken (ISO 639-1), for a multilingual Whisper; None to let it find out."""


def read(path: Path | str, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment in YAML file `path`, with `section.key=value` overrides merged in."""
    path = Path(path)
    try:
        merged = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"no such config file: {path}") from None
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: {error}") from None
    for override in overrides:
        if not re.match(r"[^.=]+(\.[^.=]+)*=", override):
            raise ConfigError(f"{path}: override {override!r} is not of the form key.sub=value")
        try:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([override]))
        except (TypeError, YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"{path}: override {override!r}: {error}") from None
    try:
        values = resolved(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error}") from None
    return parse(values, str(path))


def resolved(merged: Container) -> Any:
    """What OmegaConf has read, as plain values; an empty variable of the environment is no value,
    and the default stands in its place."""
    with warnings.catch_warnings():  # 2.4 warns of this name, and 2.3 has no other
        warnings.simplefilter("ignore")
        OmegaConf.register_new_resolver("oc.env", _variable, replace=True)
    return OmegaConf.to_container(merged, resolve=True)


def _variable(name: str, *default: Any) -> str | None:
    if value := os.environ.get(name):
        return value
    if not default:
        raise KeyError(f"Environment variable {name!r} is not set, or is empty")
    return None if default[0] is None else str(default[0])


def parse(values: Any, source: str) -> Experiment:
    """Check `values` (the parsed YAML of `source`)."""
    try:
        return Experiment.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, source)) from None
