"""MLflow's model registry: a model goes in as plain files, and `models:/NAME@ALIAS` gets it out.

A version's tags hold the fingerprint of each artifact, so that what was registered is what is used.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel

from cluster import tracking as runs
from cluster.progress import METRICS
from cluster.store import (
    SQLITE,
    URI_SETTING,
    connect,
    error_code,
    hurry,
    probe,
    shown,
    tracking_uri,
    unanswered,
)
from mmrag import artifact
from mmrag.artifact import Artifact, ArtifactError
from mmrag.config import Tracking
from mmrag.decoding.tune import DEFAULTS

ALIAS = "production"
KINDS = ("hubert", "codebook", "lm")
"""What every model has."""
PLACE = re.compile(
    r"hubert|codebook|lm|adapter|ngram|calibration|retrieval|tuned/[a-z0-9][a-z0-9_-]*"
)
"""Where an artifact may lie in a model; the first part is its kind, but of `retrieval`: tuned."""
MODEL_URI = re.compile(r"models:/(?P<name>\w[\w. -]*)(@(?P<alias>[\w-]+)|/(?P<version>\d+))")
RESERVED = re.compile(r"latest|v\d+", re.IGNORECASE)
"""Aliases that MLflow keeps for itself."""
FINGERPRINT = "fingerprint."
"""Begins a version's tags: `fingerprint.lm` is the fingerprint of its `lm/`."""
MODEL = "model"
"""The directory of a run's files that holds the model."""


def register(
    tracking: Tracking, name: str, models: Mapping[str, Artifact], alias: str = ALIAS
) -> str:
    """Upload `models` as a new version of the registered model `name`; give it `alias`.

    `models` maps a place to the artifact that goes there: `hubert`, `codebook` and `lm`, and
    `adapter`, `ngram`, `calibration`, `retrieval` and `tuned/<datastore>` where there are any.
    Returns the version, `"1"` for the first. Nothing is registered unless everything was uploaded.

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
    with runs.run(
        tracking, "register", {"model": name, "alias": alias, **fingerprints}
    ) as uploading:
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
        raise ValueError(f"no model {parts['name']!r} is registered in {shown(store)}")
    return client, store, _version(client, store, known, parts["alias"], parts["version"])


def _ask(
    store: str, name: str, setting: str = URI_SETTING
) -> tuple[MlflowClient, RegisteredModel | None]:
    """A client and the registered model, None if there is none.

    ConnectionError, within seconds, if the store does not answer.
    """
    try:
        with hurry():
            probe(store)
            client = connect(store)
            return client, client.get_registered_model(name)
    except Exception as error:  # MLflow hands on whatever its store's own library raises
        if error_code(error) == "RESOURCE_DOES_NOT_EXIST":
            return client, None
        raise unanswered(store, error, setting) from error


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
                f"model {name!r} in {shown(store)} has no alias {alias!r}, "
                f"its aliases are {sorted(known.aliases)}"
            )
    try:
        return client.get_model_version(name, str(version))
    except mlflow.MlflowException as error:
        if error_code(error) != "RESOURCE_DOES_NOT_EXIST":
            raise ConnectionError(f"{shown(store)}: {shown(error)}") from error
        raise ValueError(f"model {name!r} in {shown(store)} has no version {version}") from None


def _create(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except mlflow.MlflowException as error:
        if error_code(error) != "RESOURCE_ALREADY_EXISTS":  # another job was first
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
    named = f"{uri} (version {version.version} in {shown(store)})"
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
        raise OSError(f"{named} cannot be downloaded: {shown(error)}") from error
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
