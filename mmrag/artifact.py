"""A stage's output directory: written aside, renamed into place, fingerprinted.

`artifact.json` says what a directory holds (`kind`, `schema`), from which configuration and which
inputs it was made, and its `fingerprint`: a digest of its contents that later stages record.
Nothing here knows what the stages do.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmrag.folders import printable, walk

FILE = "artifact.json"
SCHEMA = 1


class ArtifactError(RuntimeError):
    """An artifact is missing, half made, of another kind, or made from something else."""


@dataclass(frozen=True)
class Artifact:
    """A finished directory. `path` is absolute."""

    path: Path
    kind: str
    fingerprint: str
    config: dict[str, Any]
    inputs: dict[str, str]
    """Name of each input -> its fingerprint."""
    summary: dict[str, Any] = field(default_factory=dict)
    """What the stage counted or measured."""
    schema: int = SCHEMA

    def require(self, role: str, other: Artifact) -> None:
        """Check that `other` is the very input that this artifact was made from."""
        expected = self.inputs.get(role)
        if expected != other.fingerprint:
            raise ArtifactError(
                f"{self.path} was made with {role} {expected}, "
                f"but {other.path} is {role} {other.fingerprint}"
            )


class Draft:
    """The directory being written. A killed stage finds its draft again on the next run."""

    def __init__(self, path: Path, resumed: bool) -> None:
        self.path = path
        self.resumed = resumed
        self.summary: dict[str, Any] = {}


def load(path: Path | str, kind: str) -> Artifact:
    """Read `path/artifact.json`; raise ArtifactError if it is not a finished `kind`."""
    path = Path(path).absolute()
    if _aside(path, "old").exists():
        with suppress(ArtifactError), _lock(path):  # whoever is writing now recovers by itself
            _recover(path)
    try:
        fields = json.loads((path / FILE).read_text())
    except (FileNotFoundError, NotADirectoryError):
        hint = "it holds no artifact.json" if path.is_dir() else "no such directory"
        raise ArtifactError(f"{path} is not a finished {kind}: {hint}") from None
    except ValueError as error:
        raise ArtifactError(f"{path / FILE} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ArtifactError(f"{path / FILE} is not a JSON object")
    if fields.get("schema") != SCHEMA:
        raise ArtifactError(
            f"{path} has schema {fields.get('schema')}, this version reads {SCHEMA}"
        )
    if fields.get("kind") != kind:
        raise ArtifactError(f"{path} is a {fields.get('kind')}, not a {kind}")
    try:
        return Artifact(path=path, **fields)
    except TypeError as error:
        raise ArtifactError(f"{path / FILE} lacks a field or has one too many: {error}") from None


def finished(
    path: Path | str, kind: str, config: Mapping[str, Any], inputs: Mapping[str, Artifact]
) -> Artifact | None:
    """The artifact if it was made from just this; None if there is none yet.

    Raises ArtifactError, naming what differs, if it was made from something else.
    """
    path = Path(path).absolute()
    if not path.exists() and not _aside(path, "old").exists():
        return None
    made, config = load(path, kind), _plain(config)
    differences = [
        f"{name} was {made.config.get(name)!r} and is now {config.get(name)!r}"
        for name in sorted({*made.config, *config})
        if made.config.get(name) != config.get(name)
    ]
    for name in sorted({*made.inputs, *inputs}):
        now = inputs[name].fingerprint if name in inputs else None
        if made.inputs.get(name) != now:
            differences.append(f"input {name} was {made.inputs.get(name)} and is now {now}")
    if differences:
        raise ArtifactError(
            f"{path} was made from something else: {'; '.join(differences)}. "
            "Use --force to make it again, or another workspace to keep both."
        )
    return made


@contextmanager
def create(
    path: Path | str,
    kind: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, Artifact],
    *,
    bulk: tuple[str, ...] = (),
    logs: tuple[str, ...] = (),
    force: bool = False,
) -> Iterator[Draft]:
    """Write an artifact: yields a draft directory beside `path`, renamed into place at the end.

    A draft left by a killed run with the same configuration and inputs is handed back
    (`draft.resumed`); any other draft, and with `force` every draft, is deleted first. Names
    starting with one of `bulk` enter the fingerprint by size alone, those starting with one of
    `logs` not at all, and those starting with a dot, at any depth, are scratch: they are removed
    before the rename. If the body raises, the draft stays and the old artifact with it; an
    OSError that names no file (a full disk does not) then names the draft.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    wanted = {
        "schema": SCHEMA,
        "kind": kind,
        "config": _plain(config),
        "inputs": {name: made.fingerprint for name, made in inputs.items()},
    }
    with _lock(path), _naming(path):
        _recover(path)
        draft = _open_draft(path, wanted, force)
        yield draft
        for scratch in list(draft.path.rglob(".*")):
            if scratch.is_dir():
                shutil.rmtree(scratch)
            else:
                scratch.unlink(missing_ok=True)  # gone with its directory
        digest = fingerprint(draft.path, wanted, bulk, logs)
        fields = {**wanted, "fingerprint": digest, "summary": draft.summary}
        write_json(draft.path / FILE, fields)
        _replace(draft.path, path)


def adopt(source: Path | str, path: Path | str, kind: str) -> Artifact:
    """Copy the finished artifact `source` to `path`, whole or not at all, fingerprint and all.

    Raises ArtifactError if `path` holds anything but that very artifact already.
    """
    original, path = load(source, kind), Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path), _naming(path):
        _recover(path)
        if not path.exists():
            aside = _aside(path, "partial")
            shutil.rmtree(aside, ignore_errors=True)
            shutil.copytree(original.path, aside)
            aside.rename(path)
    found = load(path, kind)
    if found.fingerprint != original.fingerprint:
        raise ArtifactError(
            f"{path} is {kind} {found.fingerprint}, not {original.fingerprint} of {original.path}. "
            "Remove it to use that one, or choose another workspace."
        )
    return found


def outside(path: Path | str) -> Artifact:
    """A user's own file or directory as an input: a file by its contents, a directory by the
    names and sizes of its files, those behind links to folders among them. ArtifactError if there
    is no such thing."""
    path = Path(path).absolute()
    try:
        is_file, is_directory = path.is_file(), path.is_dir()
    except OSError as error:
        raise ArtifactError(f"cannot look at {printable(path)}: {error.strerror}") from None
    if is_file:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    elif is_directory:
        files = sorted(
            (printable(one.relative_to(path)), _size(one))
            for one in walk(path)
            if isinstance(one, Path)  # what cannot be listed has no files to know it by
        )
        digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    else:
        raise ArtifactError(f"no such file or directory: {printable(path)}")
    return Artifact(path, "outside", digest[:16], config={}, inputs={})


def _size(path: Path) -> int:
    """Bytes of a file; -1 of one that cannot be looked at, such as a link that leads nowhere."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def fingerprint(
    root: Path,
    identity: Mapping[str, Any],
    bulk: tuple[str, ...] = (),
    logs: tuple[str, ...] = (),
) -> str:
    """16 hex digits over `identity` and the files below `root`, but for `artifact.json`."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for file in sorted(p for p in root.rglob("*") if p.is_file() and p != root / FILE):
        name = file.relative_to(root).as_posix()
        if name.startswith(logs):
            continue
        digest.update(f"\0{name}\0{file.stat().st_size}\0".encode())
        if not name.startswith(bulk):
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that `path` holds the old text or the new one, never half."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("w") as stream:
        json.dump(value, stream, indent=2, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(path)


def as_json(artifact: Artifact) -> dict[str, Any]:
    """The fields of `artifact.json` and its path."""
    return {**asdict(artifact), "path": str(artifact.path)}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` as JSON gives it back, so that a tuple equals the list it was written as."""
    return json.loads(json.dumps(dict(config)))


def _open_draft(path: Path, wanted: Mapping[str, Any], force: bool) -> Draft:
    draft, plan = _aside(path, "partial"), ".plan.json"
    if draft.exists():
        try:
            resumed = not force and json.loads((draft / plan).read_text()) == wanted
        except (FileNotFoundError, json.JSONDecodeError):
            resumed = False
        if resumed:
            return Draft(draft, resumed=True)
        shutil.rmtree(draft)
    draft.mkdir()
    write_json(draft / plan, wanted)
    return Draft(draft, resumed=False)


def _replace(draft: Path, path: Path) -> None:
    """Put `draft` in the place of `path`. `_recover` undoes a kill between the two renames."""
    old = _aside(path, "old")
    if path.exists():
        path.rename(old)
    draft.rename(path)
    if old.exists():
        shutil.rmtree(old)


def _recover(path: Path) -> None:
    old = _aside(path, "old")
    if old.exists() and not path.exists():
        old.rename(path)
    elif old.exists():
        shutil.rmtree(old, ignore_errors=True)


def _aside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with _aside(path, "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArtifactError(f"another process is writing {path}") from None
        yield
