"""`python -m serve [key=value …]`: the service on this machine, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from threading import Event
from typing import TYPE_CHECKING

from cluster import address
from serve.environment import prepare

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle


def main() -> None:
    """Start, say where, and wait; exit status 1 with one line if the settings are wrong."""
    parser = argparse.ArgumentParser(prog="python -m serve", description=__doc__)
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (default: 8000)")
    parser.add_argument("--dashboard-port", type=int, default=8265, help="Ray's own dashboard")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="as in serve/config.yaml")
    options = parser.parse_args()
    prepare()
    try:
        address.check()
    except (ConnectionError, ValueError) as error:
        sys.exit(f"error: {error}")

    import ray
    from ray import serve

    from mmrag.artifact import ArtifactError
    from mmrag.config import ConfigError
    from serve.app import build
    from serve.settings import http_options

    try:
        application = build(dict(pair.partition("=")[::2] for pair in options.settings))
    except (ConfigError, ArtifactError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    http = http_options()
    http |= {name: value for name in ("host", "port") if (value := getattr(options, name))}
    ray.init(
        address=os.environ.get("RAY_ADDRESS") or "local",
        dashboard_port=options.dashboard_port,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options=http, logging_config={"log_level": "WARNING"})
    print("starting: the models are being read", flush=True)
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    service = serve.run(application, name="mmrag", logging_config=quiet)
    where = f"http://{http['host']}:{http['port']}"
    print(f"ready: {where} (the page), {where}/docs (the API)", flush=True)
    print("logs: /tmp/ray/session_latest/logs/serve", flush=True)
    stop = Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # now: Ray has installed its own
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
    print("stopping: what is being transcribed is finished first", flush=True)
    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)  # the loop ends before Ray expects it
    asyncio.run(_drain(service))
    serve.delete("mmrag")
    ray.shutdown()


async def _drain(service: DeploymentHandle) -> None:
    """Let every replica of the ingress finish what it has begun."""
    await service.broadcast("drain").results_async(return_exceptions=True)


if __name__ == "__main__":
    main()
