"""Where the service's model lies: the registry's, the package's, or a directory."""

from __future__ import annotations

from pathlib import Path

import torch

from mmrag import artifact, shipped
from mmrag.config import Tracking
from serve.settings import Settings

REGISTERED = "models:/"


def locate(settings: Settings) -> Path:
    """The directory with hubert/, codebook/ and lm/; a registered model is fetched first.

    Raises ValueError or ArtifactError, which name the model and what is wrong with it.
    """
    if settings.model.startswith(REGISTERED):
        from cluster import tracking  # MLflow takes seconds to import

        registry = Tracking(uri=settings.registry, experiment="mmrag")
        return tracking.fetch(settings.model, registry, settings.cache, setting="registry")
    return shipped.find(settings.model)


def check(directory: Path) -> None:
    """See that a model's parts were made for each other; ArtifactError names both fingerprints."""
    made = {kind: artifact.load(directory / kind, kind) for kind in ("hubert", "codebook", "lm")}
    made["codebook"].require("hubert", made["hubert"])
    made["lm"].require("codebook", made["codebook"])
    if (directory / "adapter").exists():
        artifact.load(directory / "adapter", "adapter").require("lm", made["lm"])


def device(settings: Settings) -> str:
    """The device that models run on."""
    if settings.device != "auto":
        return settings.device
    return "cuda" if torch.cuda.is_available() else "cpu"
