"""Where the service's models lie: the registry's, the package's, a directory, or a Whisper."""

from __future__ import annotations

import re

import torch

from mmrag import shipped
from mmrag.config import ConfigError, Tracking
from mmrag.corpora.voices import engines
from mmrag.decoding.tune import Tuned, default
from mmrag.model import whisper
from mmrag.recogniser import Outline, is_whisper, outline
from mmrag.retrieval.datastore import Datastore
from mmrag.storage import Location, located
from serve.settings import RetrievalDefaults, Settings

REGISTERED = "models:/"


def locate(settings: Settings) -> str:
    """The name by which `mmrag.recogniser` loads the models; registered ones are fetched first.

    Raises ValueError or ArtifactError, which name the model and what is wrong with it.
    """
    if settings.model.startswith(REGISTERED):
        from cluster import registry  # MLflow takes seconds to import

        return str(
            registry.fetch(settings.model, _registry(settings), settings.cache, setting="registry")
        )
    if is_whisper(settings.model):
        return f"{whisper.PREFIX}{whisper.locate(settings.model).absolute()}"
    return str(shipped.find(settings.model))


def pinned(settings: Settings) -> Settings:
    """The same settings with the version that an alias means now, so that a replica which starts
    later has the others' model. Raises what `locate` raises for one that is not there."""
    if not settings.model.startswith(REGISTERED):
        return settings
    from cluster import registry  # MLflow takes seconds to import

    model = registry.pinned(settings.model, _registry(settings), setting="registry")
    return settings.model_copy(update={"model": model, "model_check_s": 0})


def version(settings: Settings) -> str | None:
    """The number of a registered version; None for another model."""
    found = re.fullmatch(rf"{REGISTERED}[^/]+/(\d+)", settings.model)
    return found and found[1]


def language(settings: Settings) -> str | None:
    """What a Whisper is told to hear, where the settings name one language; others are told
    nothing."""
    single = is_whisper(settings.model) and len(settings.languages) == 1
    return settings.languages[0] if single else None


def described(settings: Settings) -> Outline:
    """What the models are; ValueError or ArtifactError where they do not fit together or the
    settings."""
    known = outline(locate(settings), language(settings))
    if settings.decode.max_seconds > known.window_seconds:
        raise ConfigError(
            f"decode.max_seconds {settings.decode.max_seconds:g}: {settings.model} hears at most "
            f"{known.window_seconds:g} s at once"
        )
    return known


def require_voices(settings: Settings) -> None:
    """Raises ConfigError where a synthesizer of `speaking.voices` or its files are not there."""
    speaking = settings.speaking
    try:
        engines.require(speaking.voices, speaking.kokoro, "speaking.kokoro")
    except (ImportError, OSError, ValueError) as error:
        raise ConfigError(f"speaking.voices: {error}") from None


def _registry(settings: Settings) -> Tracking:
    return Tracking(uri=settings.registry, experiment="mmrag")


def device(settings: Settings) -> str:
    """The device that models run on."""
    if settings.device != "auto":
        return settings.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def tuned_below(settings: Settings) -> Location:
    """The directory below which lies what `jobs.tune` chose: the models' own, or for a Whisper,
    whose checkpoint holds nothing of ours, that of the datastores."""
    if is_whisper(settings.model):
        return settings.datastores.parent
    return located(locate(settings))


def retrieval_defaults(
    settings: Settings, tuned: Location, datastore: Datastore
) -> Tuned | RetrievalDefaults:
    """Retrieval parameters of a datastore that nobody tuned any for: as set, else as the models
    have them in the directory `tuned`. Raises ArtifactError if those are another model's."""
    return settings.retrieval_defaults or default(tuned, datastore)
