"""MLflow: one run a stage, with its configuration, metrics and the files worth opening.

And its model registry: a model goes in as plain files, and `models:/NAME@ALIAS` gets it out again.
A version's tags hold the fingerprint of each artifact, so that what was registered is what is used.

Long because runs and registry are in one store, which either may find silent.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # a stage says it once

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.entities.model_registry import ModelVersion, RegisteredModel

from cluster import mounts
from cluster.address import PROBE_SECONDS
from cluster.delivery import Delivery, warn
from cluster.progress import METRICS
from mmrag import artifact
from mmrag.artifact import Artifact, ArtifactError
from mmrag.config import Tracking
from mmrag.decoding.tune import DEFAULTS
from mmrag.storage import is_url

SQLITE = "sqlite:///"
PARAM_BATCH = 100
PARAM_LENGTH = 6000

ALIAS = "production"
KINDS = ("hubert", "codebook", "lm")
"""What every model has."""
PLACE = re.compile(r"hubert|codebook|lm|adapter|calibration|retrieval|tuned/[a-z0-9][a-z0-9_-]*")
"""Where an artifact may lie in a model; the first part is its kind, but of `retrieval`: tuned."""
MODEL_URI = re.compile(r"models:/(?P<name>\w[\w. -]*)(@(?P<alias>[\w-]+)|/(?P<version>\d+))")
RESERVED = re.compile(r"latest|v\d+", re.IGNORECASE)
"""Aliases that MLflow keeps for itself."""
FINGERPRINT = "fingerprint."
"""Begins a version's tags: `fingerprint.lm` is the fingerprint of its `lm/`."""
MODEL = "model"
"""The directory of a run's files that holds the model."""
ERROR = "error"
"""A run's tag: what ended it."""
RESUMED = "resumed"
"""A run's tag: how often it was gone on with."""
CHANGED = "changed."
"""Begins the tags of settings that were others when the run began: `changed.train.log_steps`."""
HURRY = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "6"}
"""MLflow's own patience with a server that is down is minutes. What the shell exports stays."""
URI_VARIABLE = "MLFLOW_TRACKING_URI"
URI_SETTING = "tracking.uri"
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
PASSING = (None, "INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
"""MLflow's codes of errors that may be over at another try; None is another library's."""


class Run:
    """An MLflow run being written. A store that goes away meanwhile does not stop the work."""

    def __init__(
        self, client: MlflowClient, run_id: str, store: str, gone: str | None = None
    ) -> None:
        self._client = client
        self._delivery = Delivery(_shown(store), _may_pass)
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
        with _answering(self._store):
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
        with _hurry():
            self._delivery.finish()

    def _send(self, call: Callable[..., object], *arguments: Any, **named: Any) -> None:
        with _hurry():
            self._delivery.send(partial(call, *arguments, **named))


def tracking_uri(tracking: Tracking) -> str:
    """The store's URI: MLFLOW_TRACKING_URI or the configured one; SQLite paths made absolute.

    Raises ValueError for an SQLite database at a URL.
    """
    uri = os.environ.get(URI_VARIABLE) or tracking.uri
    if uri.startswith(SQLITE):
        if is_url(uri.removeprefix(SQLITE)):
            raise ValueError(
                f"tracking.uri {_shown(uri)}: a database is a file on a disk, and not at a URL: "
                f"start an MLflow server, and name it in {URI_VARIABLE}"
            )
        path = Path(uri.removeprefix(SQLITE)).expanduser().absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        return f"{SQLITE}{path}"
    return uri


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
    with _answering(uri):
        client = _client(uri)
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
    with _answering(uri):
        _experiment(_client(uri), uri, tracking.experiment)


@contextmanager
def _answering(uri: str) -> Iterator[None]:
    """A store that does not answer the block's calls is a ConnectionError that says what to do."""
    try:
        with _hurry():
            _probe(uri)
            yield
    except ValueError:
        raise
    except Exception as error:  # MLflow hands on whatever its store's own library raises
        raise _unanswered(uri, error) from error


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
        if _code(error) != "RESOURCE_DOES_NOT_EXIST":
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


def register(
    tracking: Tracking, name: str, models: Mapping[str, Artifact], alias: str = ALIAS
) -> str:
    """Upload `models` as a new version of the registered model `name`; give it `alias`.

    `models` maps a place to the artifact that goes there: `hubert`, `codebook` and `lm`, and
    `adapter`, `calibration`, `retrieval` and `tuned/<datastore>` where there are any. Returns the
    version, `"1"` for the first. Nothing is registered unless everything was uploaded.

    Raises ValueError for a name or alias that no URI can hold and for another place, ArtifactError
    for an artifact that is missing or was changed since it was made, ConnectionError if the store
    does not answer.
    """
    if not MODEL_URI.fullmatch(f"models:/{name}@{alias}") or RESERVED.fullmatch(alias):
        raise ValueError(
            f"model {name!r}, alias {alias!r}: a name has letters, digits, '.', '-', '_' and inner "
            "spaces, an alias letters, digits, '-' and '_', and is neither latest nor v1, v2, …"
        )
    if absent := [kind for kind in KINDS if kind not in models]:
        raise ArtifactError(f"a model has {', '.join(KINDS)}; there is no {', '.join(absent)}")
    if strange := [place for place in models if not PLACE.fullmatch(place)]:
        raise ValueError(f"a model has no place for {strange}")
    for place, made in models.items():
        _check(made, made.fingerprint, f"{made.path}, registered as {place},")
    store = tracking_uri(tracking)
    client, known = _ask(store, name)
    fingerprints = {place: made.fingerprint for place, made in models.items()}
    with run(tracking, "register", {"model": name, "alias": alias, **fingerprints}) as uploading:
        for place, made in models.items():
            uploading.directory(made.path, f"{MODEL}/{place}")
        if known is None:
            _create(client, name)
        version = client.create_model_version(
            name,
            f"{client.get_run(uploading.id).info.artifact_uri}/{MODEL}",
            run_id=uploading.id,
            tags={f"{FINGERPRINT}{place}": digest for place, digest in fingerprints.items()},
        ).version
        client.set_registered_model_alias(name, alias, str(version))
    return str(version)


def fetch(uri: str, tracking: Tracking, cache: Path, setting: str = URI_SETTING) -> Path:
    """The directory of a registered model, `hubert/`, `codebook/` and `lm/` below it.

    `uri` is `models:/NAME@ALIAS` or `models:/NAME/VERSION`. The model is downloaded to a directory
    of `cache` that its fingerprints name, unless it is there: whole or not at all, and once however
    many processes ask together. The registry is asked every time, for an alias moves.

    Raises ValueError for a URI of another form and for a model, alias or version that is not there,
    ConnectionError if the store does not answer, OSError if the download fails, and ArtifactError
    for a version without one of the three, or whose files are not those that were registered.
    """
    client, store, version = _registered(uri, tracking, setting)
    fingerprints = {
        key.removeprefix(FINGERPRINT): value
        for key, value in version.tags.items()
        if key.startswith(FINGERPRINT) and PLACE.fullmatch(key.removeprefix(FINGERPRINT))
    }
    content = json.dumps(fingerprints, sort_keys=True).encode()
    path = cache.absolute() / hashlib.sha256(content).hexdigest()[:16]
    cache.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes second waits, and finds it
        if not path.exists():
            aside = path.with_name(f".{path.name}.partial")
            shutil.rmtree(aside, ignore_errors=True)  # a killed download's
            try:
                _download(client, store, version, uri, fingerprints, aside)
                aside.rename(path)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return path


def pinned(uri: str, tracking: Tracking, setting: str = URI_SETTING) -> str:
    """`models:/NAME/VERSION` of the version that `models:/NAME@ALIAS` means now.

    Raises what `fetch` raises for one that is not there.
    """
    _, _, version = _registered(uri, tracking, setting)
    return f"models:/{version.name}/{version.version}"


def _registered(
    uri: str, tracking: Tracking, setting: str
) -> tuple[MlflowClient, str, ModelVersion]:
    """A client, the store, and the version that a URI means now."""
    parts = MODEL_URI.fullmatch(uri)
    if parts is None:
        raise ValueError(f"{uri!r} is neither models:/NAME@ALIAS nor models:/NAME/VERSION")
    store = tracking_uri(tracking)
    if store.startswith(SQLITE) and not Path(store.removeprefix(SQLITE)).exists():
        raise ConnectionError(f"there is no MLflow store at {store}")  # MLflow would make one
    client, known = _ask(store, parts["name"], setting)
    if known is None:
        raise ValueError(f"no model {parts['name']!r} is registered in {_shown(store)}")
    return client, store, _version(client, store, known, parts["alias"], parts["version"])


def _client(uri: str) -> MlflowClient:
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # what does not answer is told once
    return MlflowClient(tracking_uri=uri)


@contextmanager
def _hurry() -> Iterator[None]:
    """MLflow's calls of the block, in any thread, are as patient as HURRY says."""
    global _hurrying
    with _HURRYING:
        if not _hurrying:
            _HURRIED.update({key: one for key, one in HURRY.items() if key not in os.environ})
            os.environ.update(_HURRIED)
        _hurrying += 1
    try:
        yield
    finally:
        with _HURRYING:
            _hurrying -= 1
            if not _hurrying:
                for key in _HURRIED:
                    os.environ.pop(key, None)
                _HURRIED.clear()


_HURRYING, _HURRIED, _hurrying = threading.Lock(), {}, 0
"""What `_hurry` put into the environment, which all threads share, and how many blocks need it."""


def _ask(
    store: str, name: str, setting: str = URI_SETTING
) -> tuple[MlflowClient, RegisteredModel | None]:
    """A client and the registered model, None if there is none.

    ConnectionError, within seconds, if the store does not answer.
    """
    try:
        with _hurry():
            _probe(store)
            client = _client(store)
            return client, client.get_registered_model(name)
    except Exception as error:  # MLflow hands on whatever its store's own library raises
        if _code(error) == "RESOURCE_DOES_NOT_EXIST":
            return client, None
        raise _unanswered(store, error, setting) from error


def _unanswered(store: str, error: Exception, setting: str = URI_SETTING) -> ConnectionError:
    """What to tell whose store does not answer."""
    decided = URI_VARIABLE if os.environ.get(URI_VARIABLE) else setting
    return ConnectionError(
        f"the MLflow store {_shown(store)} does not answer: {_reason(error)}. Start it, or name "
        f"another in {decided}; {SQLITE}FILE needs no server."
    )


def _reason(error: Exception) -> str:
    """What the operating system said, if it did, else the first line of what MLflow says."""
    said = re.search(r"\[Errno -?\d+\] ([^'\")]+)|\b((?:\w+ )?timed out)\b", str(error))
    return (said[1] or said[2]) if said else _shown(error)


def _probe(store: str) -> None:
    """A database that cannot be reached raises here: MLflow tries for most of an hour.

    Servers are asked over HTTP, whose patience is `_hurry`'s.
    """
    if store.startswith(SQLITE):
        with closing(sqlite3.connect(store.removeprefix(SQLITE))) as database:
            database.execute("PRAGMA schema_version")
        return
    parts = urlsplit(store)
    port = parts.port or DATABASE_PORTS.get(parts.scheme.partition("+")[0])
    if not parts.scheme.startswith("http") and parts.hostname and port:
        socket.create_connection((parts.hostname, port), PROBE_SECONDS).close()


def _may_pass(error: Exception) -> bool:
    """Whether a call that failed is worth another try; a file that is gone is not."""
    return _code(error) in PASSING and not isinstance(error, FileNotFoundError)


def _version(
    client: MlflowClient,
    store: str,
    known: RegisteredModel,
    alias: str | None,
    version: str | None,
) -> ModelVersion:
    name = known.name
    if alias is not None:
        version = known.aliases.get(alias)
        if version is None:
            raise ValueError(
                f"model {name!r} in {_shown(store)} has no alias {alias!r}, "
                f"its aliases are {sorted(known.aliases)}"
            )
    try:
        return client.get_model_version(name, str(version))
    except mlflow.MlflowException as error:
        if _code(error) != "RESOURCE_DOES_NOT_EXIST":
            raise ConnectionError(f"{_shown(store)}: {_shown(error)}") from error
        raise ValueError(f"model {name!r} in {_shown(store)} has no version {version}") from None


def _create(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except mlflow.MlflowException as error:
        if _code(error) != "RESOURCE_ALREADY_EXISTS":  # another job was first
            raise


def _download(
    client: MlflowClient,
    store: str,
    version: ModelVersion,
    uri: str,
    fingerprints: Mapping[str, str],
    path: Path,
) -> None:
    """The artifacts that the version's tags name, and no other file, into `path`; all checked."""
    named = f"{uri} (version {version.version} in {_shown(store)})"
    try:
        source = client.get_model_version_download_uri(version.name, version.version)
        listed = mlflow.artifacts.list_artifacts(artifact_uri=source, tracking_uri=store)
        held = {PurePosixPath(one.path).name for one in listed}
        for place in dict.fromkeys((*KINDS, *fingerprints)):
            if place.split("/")[0] not in held:
                raise ArtifactError(f"{named} holds no {place}/")
            if place not in fingerprints:
                raise ArtifactError(f"{named} has no tag {FINGERPRINT}{place} to check it by")
        for place in fingerprints:
            mlflow.artifacts.download_artifacts(
                artifact_uri=f"{source}/{place}",
                dst_path=str((path / place).parent),
                tracking_uri=store,
            )
    except mlflow.MlflowException as error:
        raise OSError(f"{named} cannot be downloaded: {_shown(error)}") from error
    for place, digest in fingerprints.items():
        kind = "tuned" if place == DEFAULTS else place.split("/")[0]
        made = artifact.load(path / place, kind)
        _check(made, digest, f"{place} of {named}")


def _check(made: Artifact, fingerprint: str, named: str) -> None:
    """ArtifactError if `made` says that it is another one, or if its files are of another one."""
    fields = ("schema", "kind", "config", "inputs")
    identity = {field: getattr(made, field) for field in fields}
    for found in (made.fingerprint, artifact.fingerprint(made.path, identity, logs=(METRICS,))):
        if found != fingerprint:
            raise ArtifactError(f"{named} should be {made.kind} {fingerprint}, but is {found}")


def _code(error: Exception) -> str | None:
    return getattr(error, "error_code", None)


def _shown(message: object) -> str:
    """One line, of a URI or of what MLflow has to say about it, without the URI's password."""
    line = (str(message).splitlines() or [""])[0]
    return re.sub(r"//[^/@\s]*@", "//", line)[:300]


def _experiment(client: MlflowClient, uri: str, name: str) -> str:
    known = client.get_experiment_by_name(name)
    if known is not None:
        if known.lifecycle_stage == "deleted":
            raise ValueError(
                f"the MLflow experiment {name!r} in {_shown(uri)} is deleted. Bring it back with "
                f"`{URI_VARIABLE}={_shown(uri)} mlflow experiments restore --experiment-id "
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
