"""MLflow: one run a stage, with its configuration, metrics and the files worth opening."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from mmrag.config import Tracking

SQLITE = "sqlite:///"
PARAM_BATCH = 100
PARAM_LENGTH = 6000


class Run:
    """An MLflow run being written."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client = client
        self.id = run_id

    def log(self, metrics: Mapping[str, float | None], step: int = 0) -> None:
        """Log metrics; those that are None are left out."""
        now = round(time.time() * 1000)
        entries = [Metric(k, float(v), now, step) for k, v in metrics.items() if v is not None]
        self._client.log_batch(self.id, metrics=entries)

    def params(self, values: Mapping[str, Any]) -> None:
        """Log a nested mapping as `section.key` parameters."""
        flat = [Param(k, str(v)[:PARAM_LENGTH]) for k, v in _flatten(values)]
        for start in range(0, len(flat), PARAM_BATCH):
            self._client.log_batch(self.id, params=flat[start : start + PARAM_BATCH])

    def tag(self, name: str, value: str) -> None:
        """Set a tag."""
        self._client.set_tag(self.id, name, value)

    def file(self, path: Path) -> None:
        """Attach a file."""
        self._client.log_artifact(self.id, str(path))


def tracking_uri(tracking: Tracking) -> str:
    """The store's URI: MLFLOW_TRACKING_URI or the configured one; SQLite paths made absolute."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or tracking.uri
    if uri.startswith(SQLITE):
        path = Path(uri.removeprefix(SQLITE)).expanduser().absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        return f"{SQLITE}{path}"
    return uri


@contextmanager
def run(tracking: Tracking, stage: str, params: Mapping[str, Any]) -> Iterator[Run]:
    """A run named `stage`; it ends as FINISHED, or as FAILED if the block raises."""
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = tracking_uri(tracking)
    client = MlflowClient(tracking_uri=uri)
    started = client.create_run(_experiment(client, uri, tracking.experiment), run_name=stage)
    run = Run(client, started.info.run_id)
    run.tag("stage", stage)
    run.params(params)
    try:
        yield run
    except BaseException as error:
        run.tag("error", f"{type(error).__name__}: {error}"[:500])
        client.set_terminated(run.id, "FAILED")
        raise
    client.set_terminated(run.id, "FINISHED")


def _experiment(client: MlflowClient, uri: str, name: str) -> str:
    known = client.get_experiment_by_name(name)
    if known is not None:
        return known.experiment_id
    location = None
    if uri.startswith(SQLITE):
        # MLflow's default is a directory relative to wherever the job happens to run.
        location = (Path(uri.removeprefix(SQLITE)).parent / "mlartifacts").as_uri()
    try:
        return client.create_experiment(name, artifact_location=location)
    except mlflow.MlflowException:  # another job was first
        return client.get_experiment_by_name(name).experiment_id


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
