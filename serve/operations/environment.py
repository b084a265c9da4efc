"""What Ray Serve reads from the environment when it is imported, set for a small machine.

HAProxy takes requests in the place of a proxy in Python, and a replica has one event loop: HTTP
then leaves more of the processor to the models. What the shell exports stays as it is.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from cluster.ports import free_ports

HAPROXY = Path(__file__).parent / "haproxy.sh"

VARIABLES = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_BINARY_PATH": str(HAPROXY),
    "MMRAG_PYTHON": sys.executable,  # by which it runs
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.access.request_ids:outermost",
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "30",  # for a header, and between two parts of a body
    # A connection outlives a change of the replicas: as long as limits.session_seconds.
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "14400",
    "RAY_SERVE_HAPROXY_NBTHREAD": "2",
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # a message a request to a process in Python
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # the usual 0.1 take a twentieth of a core
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "2000",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",  # on a busy machine the usual 5 do not suffice
    "RAY_worker_niceness": "0",  # as HAProxy's, which would else be served first
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
PORTS = (
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
)
"""Any free ones, so that two services fit on a machine, and neither answers for the other."""


def prepare() -> None:
    """Set the variables; to be called before Ray is imported."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    for name, port in zip(PORTS, free_ports(len(PORTS)), strict=True):
        os.environ.setdefault(name, str(port))
