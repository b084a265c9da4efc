"""The service as Ray Serve runs it: `serve run serve.app:build`, with settings as `key=value`.

HTTP ─ ingress ─┬─ encoder     audio -> units
                ├─ retriever   datastores, index shards, phrases
                └─ decoder     units -> text, and straight to the shards
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig

from serve.api import Api
from serve.decoder import Decoder
from serve.encoder import Encoder
from serve.fetched import fetch_datastores
from serve.model import described
from serve.retriever import Retriever
from serve.settings import Replicas, read

HEALTH_PERIOD_SECONDS = 10
HEALTH_TIMEOUT_SECONDS = 30


def build(args: dict[str, Any]) -> Application:
    """The application, with `args` merged over those of `config.yaml`.

    Raises ConfigError, which names the setting that is wrong, ValueError or ArtifactError if there
    is no such model or its parts were not made for each other.
    """
    settings = read(args)
    described(settings)
    fetch_datastores(settings)
    decoder = _deployed(Decoder, settings.decoder).bind(settings)
    encoder = _deployed(Encoder, settings.encoder).bind(settings)
    retriever = _deployed(Retriever, settings.retriever).bind(settings, encoder, decoder)
    return _deployed(Api, settings.ingress).bind(settings, encoder, retriever, decoder)


def _deployed(cls: type, replicas: Replicas) -> serve.Deployment:
    return serve.deployment(
        cls,
        name=cls.__name__.lower(),
        ray_actor_options={"num_cpus": replicas.num_cpus, "num_gpus": replicas.num_gpus},
        autoscaling_config=AutoscalingConfig(
            min_replicas=replicas.min,
            max_replicas=replicas.max,
            target_ongoing_requests=replicas.target_ongoing_requests,
            upscale_delay_s=replicas.upscale_delay_s,
            downscale_delay_s=replicas.downscale_delay_s,
        ),
        max_ongoing_requests=replicas.max_ongoing_requests,
        max_queued_requests=replicas.max_queued_requests,
        graceful_shutdown_timeout_s=replicas.drain_s,
        health_check_period_s=HEALTH_PERIOD_SECONDS,
        health_check_timeout_s=HEALTH_TIMEOUT_SECONDS,
    )
