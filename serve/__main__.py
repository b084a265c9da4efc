"""`python -m serve [key=value …]`: the service on this machine, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from cluster import address
from serve.operations.environment import prepare

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from serve.settings import Settings

PORTS = range(1, 65_536)
INTERRUPTED = 130


class Stop:
    """What Ctrl-C and SIGTERM ask for; a second one asks not to wait for what is under way."""

    def __init__(self) -> None:
        self.asked, self.hurry = Event(), Event()
        self.cluster = False
        """Whether there is a cluster to leave: before, the process ends at once."""

    def listen(self) -> None:
        """Take the signals; again after Ray has installed handlers of its own."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, *_: Any) -> None:
        if not self.cluster:
            _write("stopped")
            os._exit(INTERRUPTED)
        if self.asked.is_set():
            self.hurry.set()
        self.asked.set()


def main() -> None:
    """Start, say where, and wait; exit status 1 with one line if it cannot start."""
    stop = Stop()
    stop.listen()
    parser = argparse.ArgumentParser(prog="python -m serve", description=__doc__)
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=_port, help="port to listen on (default: 8000)")
    parser.add_argument(
        "--dashboard-port", type=_port, default=8265, help="Ray's own dashboard (default: 8265)"
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="as in serve/config.yaml")
    options = parser.parse_intermixed_args()
    prepare()
    try:
        address.check()
    except (ConnectionError, ValueError) as error:
        sys.exit(f"error: {error}")

    from serve.operations.listening import ListenError, require_port
    from serve.settings import http_options

    given = dict(pair.partition("=")[::2] for pair in options.settings)
    http = http_options()
    http |= {name: value for name in ("host", "port") if (value := getattr(options, name))}
    if not os.environ.get("RAY_ADDRESS"):
        try:
            require_port(http["host"], http["port"])
            require_port("127.0.0.1", options.dashboard_port, "--dashboard-port")
        except ListenError as error:
            sys.exit(f"error: {error}")
    _serve(given, http, options.dashboard_port, stop)


def _serve(given: dict[str, str], http: dict[str, Any], dashboard_port: int, stop: Stop) -> None:
    """Serve with the settings that are given."""
    from mmrag.artifact import ArtifactError
    from mmrag.config import ConfigError
    from serve.access.keys import Keys
    from serve.app import build
    from serve.operations.listening import ListenError
    from serve.operations.startup import StartupError
    from serve.settings import read

    try:
        settings, application = read(given), build(given)
        Keys(settings.limits.tenant, settings.datastores)  # wrong ones are named here
        _run(settings, application, http, dashboard_port, stop)
        _write("stopped")
    except (ConfigError, ArtifactError, ListenError, StartupError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _run(
    settings: Settings, application: Any, http: dict[str, Any], dashboard_port: int, stop: Stop
) -> None:
    """Serve the application in a cluster until it is stopped; raises StartupError."""
    import ray

    from serve.operations.guardian import guarded
    from serve.operations.startup import StartupError
    from serve.traces import tracing

    traced = tracing(settings.traces)
    stop.cluster = True
    address = os.environ.get("RAY_ADDRESS")
    try:
        context = ray.init(
            address=address or "local",
            dashboard_port=None if address else dashboard_port,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        doing = f"join the cluster at RAY_ADDRESS={address}" if address else "start Ray"
        raise StartupError(f"cannot {doing}: {reason}") from None
    stop.listen()  # again: Ray has installed its own
    session = None if address else Path(context.address_info["session_dir"])
    with guarded(session) if session else nullcontext():
        _serve_there(settings, application, http, context.dashboard_url, stop, traced)


def _serve_there(
    settings: Settings,
    application: Any,
    http: dict[str, Any],
    dashboard: str,
    stop: Stop,
    traced: dict[str, Any] | None,
) -> None:
    """Serve the application in the cluster that this process is connected to, and leave it."""
    import ray

    from serve.operations import startup
    from serve.operations.listening import require_port

    address = os.environ.get("RAY_ADDRESS")
    service, leave = None, False
    try:
        runs = startup.serve_runs(http, dashboard)
        if address and not runs:
            require_port(http["host"], http["port"])
        startup.require_room(settings)
        if stop.asked.is_set():
            return  # the cluster is left below
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        leave = True
        service = _deploy(application, http, traced)
        if startup.wait_until_running(stop.asked.is_set, _write):
            where = f"http://{http['host']}:{http['port']}"
            _write(f"ready: {where} (the page), {where}/docs (the API)")
            _write("logs: /tmp/ray/session_latest/logs/serve")
            stop.asked.wait()
            _write("stopping: what is being transcribed is finished first (Ctrl-C: at once)")
        else:
            _write("stopping before it is ready")
            service = None
    finally:
        with _silent():  # Ray reports as failures that processes end which were told to
            if leave:
                asyncio.run(_leave(service, stop, alone=bool(address) and not runs))
            ray.shutdown()


def _deploy(
    application: Any, http: dict[str, Any], traced: dict[str, Any] | None
) -> DeploymentHandle:
    """Begin to start the application; nobody waits for it here."""
    from ray import serve
    from ray.serve.api import RunTarget

    from serve.operations.startup import APPLICATION, listen

    listen(http, traced)
    _write("starting: the models are being read")
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    target = RunTarget(application, name=APPLICATION, logging_config=quiet)
    [service] = serve.run_many(
        [target],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )
    return service


async def _leave(service: DeploymentHandle | None, stop: Stop, alone: bool) -> None:
    """End the application once its ingress has finished what it has begun, unless there is no time.

    `alone`: Serve itself was started for it and ends with it, in a cluster that goes on.
    """
    from ray import serve

    from serve.operations.startup import APPLICATION

    if service is not None:
        drained = asyncio.ensure_future(
            service.broadcast("drain").results_async(return_exceptions=True)
        )
        while not drained.done() and not stop.hurry.is_set():
            await asyncio.wait([drained], timeout=0.2)
        drained.cancel()
    with suppress(Exception):  # what does not end here ends with the cluster
        await asyncio.to_thread(serve.delete, APPLICATION)
        if alone:
            await serve.shutdown_async()


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing of the block is printed, not even by C++ or by other threads."""
    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)
    streams = {number: os.dup(number) for number in (1, 2)}
    with open(os.devnull, "wb") as nowhere:
        for number in streams:
            os.dup2(nowhere.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, kept in streams.items():
            os.dup2(kept, number)
            os.close(kept)


def _write(line: str) -> None:
    """A line for whoever started the service, at once. Safe in a signal handler."""
    os.write(sys.stdout.fileno(), f"{line}\n".encode())


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) not in PORTS:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: {PORTS.start} to {PORTS.stop - 1}")
    return int(text)


if __name__ == "__main__":
    main()
