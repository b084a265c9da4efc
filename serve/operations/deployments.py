"""How each part of the service becomes a deployment of Ray Serve."""

from __future__ import annotations

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig

from serve.decoder import Decoder
from serve.encoder import Encoder
from serve.retriever import Retriever
from serve.settings import Replicas, Settings

HEALTH_PERIOD_SECONDS = 10
HEALTH_TIMEOUT_SECONDS = 30


def parts(settings: Settings) -> tuple[Application, Application, Application]:
    """The encoder, the retriever and the decoder of one model; the retriever calls the others."""
    decoder = deployed(Decoder, settings.decoder).bind(settings)
    encoder = deployed(Encoder, settings.encoder).bind(settings)
    retriever = deployed(Retriever, settings.retriever).bind(settings, encoder, decoder)
    return encoder, retriever, decoder


def deployed(cls: type, replicas: Replicas) -> serve.Deployment:
    """A class with as many replicas as the settings say."""
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
