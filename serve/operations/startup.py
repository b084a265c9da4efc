"""What `python -m serve` makes sure of before it deploys: a cluster without another service, and
room for every deployment. Each check raises StartupError with one sentence.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.schema import ApplicationStatus

from cluster import placement
from cluster.placement import Demand
from serve.operations.replacement import reason
from serve.settings import Settings

APPLICATION = "mmrag"
DEPLOYMENTS = ("ingress", "encoder", "retriever", "decoder")
CONTROLLER = {"name": "SERVE_CONTROLLER_ACTOR", "namespace": "serve"}
"""Ray Serve's own actor, which knows where a running Serve listens."""
POLL_SECONDS = 0.2
REMINDER_SECONDS = 15.0
"""After which a start says what it waits for; twice as long before each further time."""


class StartupError(RuntimeError):
    """The service cannot start here; the message says why, and what to change."""


def serve_runs(http: dict[str, Any], dashboard: str | None) -> bool:
    """Whether Serve runs in this cluster already, without this application, at this address.

    `dashboard` is that of the cluster, host:port, which Serve's commands want. Raises StartupError
    if the application runs, or if Serve listens elsewhere: it would go on listening there, and the
    first service could no longer be stopped.
    """
    try:
        controller = ray.get_actor(**CONTROLLER)
    except ValueError:
        return False
    listens = ray.get(controller.get_http_config.remote())
    where = f"http://{listens.host}:{listens.port}"
    found = serve.status().applications.get(APPLICATION)
    stop = f" (`serve shutdown --address http://{dashboard}` does)" if dashboard else ""
    own = "without RAY_ADDRESS, `make serve` starts a cluster of its own"
    if found is not None:
        state = found.status.value.lower()
        raise StartupError(
            f"this Ray cluster serves {APPLICATION} already ({state}), at {where}; stop that one "
            f"first, with Ctrl-C where it was started, or end Serve{stop}; {own}"
        )
    if (listens.host, listens.port) != (http["host"], http["port"]):
        raise StartupError(
            f"Ray Serve runs in this cluster already and listens at {where}, not at "
            f"http://{http['host']}:{http['port']}: use --host {listens.host} --port "
            f"{listens.port}, or end Serve first{stop}; {own}"
        )
    return True


def require_room(settings: Settings) -> None:
    """Raises StartupError if a deployment has no place in the cluster."""
    try:
        placement.require(*demands(settings))
    except placement.PlacementError as error:
        raise StartupError(str(error)) from None


def demands(settings: Settings) -> list[Demand]:
    """What the deployments reserve from the start."""
    parts = {name: getattr(settings, name) for name in DEPLOYMENTS}
    return [
        Demand(name, part.min, part.num_cpus, part.num_gpus, counted="min")
        for name, part in parts.items()
    ]


def listen(http: dict[str, Any], tracing: dict[str, Any] | None = None) -> None:
    """Start Serve and whatever takes HTTP for it; StartupError if that does not come up."""
    quiet = {"log_level": "WARNING"}
    try:
        serve.start(http_options=http, logging_config=quiet, tracing_config=tracing)
    except (RayError, TimeoutError) as error:
        raise StartupError(
            f"Ray Serve's HTTP proxy does not start ({type(error).__name__}): is this machine too "
            "busy? Its logs are in /tmp/ray/session_latest/logs/serve"
        ) from None


def wait_until_running(stopped: Callable[[], bool], say: Callable[[str], None]) -> bool:
    """Return once the application runs and somebody listens: True; or once `stopped`: False.

    `say` gets a line about what is being waited for, now and then. Raises StartupError if the
    application cannot start.
    """
    pause = REMINDER_SECONDS
    remind = time.monotonic() + pause
    while not stopped():
        status = serve.status()
        found, listens = status.applications.get(APPLICATION), "HEALTHY" in status.proxies.values()
        if found is not None and found.status == ApplicationStatus.RUNNING and listens:
            return True
        if found is not None and found.status == ApplicationStatus.DEPLOY_FAILED:
            raise StartupError(f"the service cannot start: {reason(found)}")
        if found is not None and time.monotonic() > remind:
            pause *= 2
            remind = time.monotonic() + pause
            waiting = [
                name for name, one in found.deployments.items() if one.status.value != "HEALTHY"
            ]
            waiting += [] if listens else ["the HTTP proxy"]
            say(f"still starting: {', '.join(waiting)}; {_free()}")
        time.sleep(POLL_SECONDS)
    return False


def _free() -> str:
    """What of the cluster's processors is not reserved."""
    free, total = ray.available_resources(), ray.cluster_resources()
    kinds = [kind for kind in ("CPU", "GPU") if total.get(kind)]
    return ", ".join(
        f"{free.get(kind, 0):.3g} of {total[kind]:g} {kind}s are free" for kind in kinds
    )
