"""MLflow: one run a stage, with its configuration, metrics and the files worth opening."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from cluster import mounts
from cluster.delivery import Delivery, warn
from cluster.store import (
    SQLITE,
    URI_VARIABLE,
    answering,
    connect,
    error_code,
    hurry,
    may_pass,
    shown,
    tracking_uri,
)
from mmrag import artifact
from mmrag.config import Tracking

PARAM_BATCH = 100
PARAM_LENGTH = 6000
ERROR = "error"
"""A run's tag: what ended it."""
RESUMED = "resumed"
"""A run's tag: how often it was gone on with."""
CHANGED = "changed."
"""Begins the tags of settings that were others when the run began: `changed.train.log_steps`."""


class Run:
    """An MLflow run being written. A store that goes away meanwhile does not stop the work."""

    def __init__(
        self, client: MlflowClient, run_id: str, store: str, gone: str | None = None
    ) -> None:
        self._client = client
        self._delivery = Delivery(shown(store), may_pass)
        self._store = store
        self._resumed = False
        self._params: dict[str, str] = {}
        self.id = run_id
        self.gone = gone
        """The run that this one should have gone on with, and which is no longer there."""

    def log(self, metrics: Mapping[str, float | None], step: int = 0) -> None:
        """Log metrics; those that are None are left out."""
        now = round(time.time() * 1000)
        entries = [Metric(k, float(v), now, step) for k, v in metrics.items() if v is not None]
        self._send(self._client.log_batch, self.id, metrics=entries)

    def params(self, values: Mapping[str, Any]) -> None:
        """Log a nested mapping as `section.key` parameters.

        A run keeps its first values: what is another one now that it goes on becomes a tag.
        """
        told = {key: str(value)[:PARAM_LENGTH] for key, value in _flatten(values)}
        for key in told.keys() & self._params.keys():
            if told[key] != self._params[key]:
                self.tag(f"{CHANGED}{key}", told[key])
        flat = [Param(key, told[key]) for key in told if key not in self._params]
        for start in range(0, len(flat), PARAM_BATCH):
            self._send(self._client.log_batch, self.id, params=flat[start : start + PARAM_BATCH])

    def last_step(self, metric: str) -> int | None:
        """The last step that a metric was logged at, earlier attempts' too; None for never.

        ConnectionError if the store does not answer.
        """
        if not self._resumed:
            return None
        with answering(self._store):
            points = self._client.get_metric_history(self.id, metric)
        return max((point.step for point in points), default=None)

    def go_on(self, tags: Mapping[str, str], params: Mapping[str, str]) -> None:
        """Take up a run that was stopped, of which these are known."""
        self._resumed = True
        self._params = dict(params)
        self._send(self._client.update_run, self.id, "RUNNING")
        self.tag(RESUMED, str(int(tags.get(RESUMED, 0)) + 1))
        if ERROR in tags:
            self._send(self._client.delete_tag, self.id, ERROR)

    def tag(self, name: str, value: str) -> None:
        """Set a tag."""
        self._send(self._client.set_tag, self.id, name, value)

    def file(self, path: Path) -> None:
        """Attach a file."""
        self._send(self._client.log_artifact, self.id, str(path))

    def directory(self, path: Path, place: str) -> None:
        """Attach the files of a directory, below `place`; raises if they cannot be."""
        self._client.log_artifacts(self.id, str(path), place)

    def end(self, status: str) -> None:
        """Close the run as FINISHED or FAILED."""
        self._send(self._client.set_terminated, self.id, status)
        with hurry():
            self._delivery.finish()

    def _send(self, call: Callable[..., object], *arguments: Any, **named: Any) -> None:
        with hurry():
            self._delivery.send(partial(call, *arguments, **named))


@contextmanager
def run(
    tracking: Tracking, stage: str, params: Mapping[str, Any], draft: Path | None = None
) -> Iterator[Run]:
    """A run named `stage`; it ends as FINISHED, or as FAILED if the block raises.

    With a `draft`, the directory of what is made, the run is written down there, and one that was
    is gone on with: an interrupted stage has one run, and each of its curves is one. Where that run
    was deleted, or the store is another one now, a new run says so in `gone`.

    Raises ConnectionError, within seconds, if the store does not answer, ValueError if its
    experiment was deleted. Once the block runs, a store that goes away does not end it.
    """
    uri = tracking_uri(tracking)
    _warn_of_a_share(uri)
    with answering(uri):
        client = connect(uri)
        run = _run(client, uri, _experiment(client, uri, tracking.experiment), stage, draft)
    run.tag("stage", stage)
    run.params(params)
    try:
        yield run
    except BaseException as error:
        run.tag(ERROR, f"{type(error).__name__}: {error}"[:500])
        run.end("FAILED")
        raise
    run.end("FINISHED")


def check(tracking: Tracking) -> None:
    """Raise what `run` would, before anything is begun."""
    uri = tracking_uri(tracking)
    with answering(uri):
        _experiment(connect(uri), uri, tracking.experiment)


def _run(client: MlflowClient, uri: str, experiment: str, stage: str, draft: Path | None) -> Run:
    """The run that `draft` names, if it is there to be gone on with, else a new one."""
    file = draft and draft / artifact.RECORDED
    known = json.loads(file.read_text())["run"] if file and file.exists() else None
    if known and (found := _found(client, known, experiment)):
        run = Run(client, known, uri)
        run.go_on(found.data.tags, found.data.params)
        return run
    started = client.create_run(experiment, run_name=stage)
    if file:
        artifact.write_json(file, {"run": started.info.run_id})
    return Run(client, started.info.run_id, uri, gone=known)


def _found(client: MlflowClient, run_id: str, experiment: str) -> mlflow.entities.Run | None:
    """A run of this experiment; None if there is none, or if it was deleted."""
    try:
        found = client.get_run(run_id)
    except mlflow.MlflowException as error:
        if error_code(error) != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    own = found.info.experiment_id == experiment and found.info.lifecycle_stage == "active"
    return found if own else None


def _warn_of_a_share(uri: str) -> None:
    """SQLite's locks do not hold between machines: two of them lose what the other one wrote."""
    if uri.startswith(SQLITE):
        path = Path(uri.removeprefix(SQLITE)).resolve()
        if kind := mounts.network(path):
            warn(
                f"the MLflow database {path} lies on {kind}, where several machines may damage it: "
                f"start an MLflow server with a database of its own, and name it in {URI_VARIABLE}"
            )


def _experiment(client: MlflowClient, uri: str, name: str) -> str:
    known = client.get_experiment_by_name(name)
    if known is not None:
        if known.lifecycle_stage == "deleted":
            raise ValueError(
                f"the MLflow experiment {name!r} in {shown(uri)} is deleted. Bring it back with "
                f"`{URI_VARIABLE}={shown(uri)} mlflow experiments restore --experiment-id "
                f"{known.experiment_id}`, or name another in tracking.experiment."
            )
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
