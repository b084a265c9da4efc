"""The service as Ray Serve runs it: `serve run serve.app:build`, with settings as `key=value`.

HTTP ─ ingress ─┬─ encoder     audio -> units
                ├─ retriever   datastores, index shards, phrases
                └─ decoder     units -> text, and straight to the shards

With `model_check_s`, the three on the right are an application of their own for each version of the
model, and the ingress learns of it from `Models` (`replacement`).
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application

from serve.api import Api
from serve.fetched import fetch_datastores
from serve.model import described, pinned, require_voices
from serve.operations.deployments import deployed, parts
from serve.operations.replacement import Models
from serve.settings import read

MODELS_CPUS = 0.02
"""What starts and ends other deployments has little to do itself."""


def build(args: dict[str, Any]) -> Application:
    """The application, with `args` merged over those of `config.yaml`.

    Raises ConfigError, which names the setting that is wrong, ValueError or ArtifactError if there
    is no such model or its parts were not made for each other, ConfigError for voices that are not
    there.
    """
    settings = read(args)
    now = pinned(settings)
    described(now)
    require_voices(settings)
    fetch_datastores(settings)
    ingress = deployed(Api, settings.ingress)
    if not settings.model_check_s:
        return ingress.bind(now, *parts(now))
    models = serve.deployment(
        Models, name="models", num_replicas=1, ray_actor_options={"num_cpus": MODELS_CPUS}
    )
    return ingress.bind(settings, models=models.bind(settings))
