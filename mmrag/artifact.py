"""A stage's output directory: written aside, renamed into place, fingerprinted.

`artifact.json` says what a directory holds (`kind`, `schema`), from which configuration and which
inputs it was made, and its `fingerprint`: a digest of its contents that later stages record.
What is unfinished is never deleted but by force, and what counts has reached the disk. One that is
to lie at a URL is made on this machine's disk and then copied, its `artifact.json` last; it is read
through a copy (`mmrag.cached`). Nothing here knows what the stages do.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmrag import cached
from mmrag.config.section import Recipe
from mmrag.differing import differing, plain
from mmrag.durable import sync, sync_tree, write_text
from mmrag.folders import printable, walk
from mmrag.storage import Location, Url, located, upload

FILE = "artifact.json"
PLAN = ".plan.json"
RECORDED = ".recorded.json"
"""In a draft: where its making is recorded, for whoever goes on with it. No work that is lost."""
SCHEMA = 1
OUTSIDE = "outside"
"""The kind of what no stage made: a user's own file or directory."""
FINGERPRINT = re.compile(r"[0-9a-f]{16}")
UNSAID = (((), ()), ((), ("metrics.jsonl",)), (("audio/",), ()))
"""`bulk` and `logs` of artifacts whose description does not tell them yet."""


class ArtifactError(RuntimeError):
    """An artifact is missing, half made, of another kind, or made from something else."""


@dataclass(frozen=True)
class Artifact:
    """A finished directory, or a user's own file or directory (`outside`)."""

    place: Location
    """Where it lies; absolute. Workers are told this, and find their own way to it (`local`)."""
    kind: str
    fingerprint: str
    config: dict[str, Any]
    inputs: dict[str, str]
    """Name of each input -> its fingerprint."""
    summary: dict[str, Any] = field(default_factory=dict)
    """What the stage counted or measured."""
    operation: dict[str, Any] = field(default_factory=dict)
    """How it was made: settings that are no part of what it is."""
    schema: int = SCHEMA
    bulk: Sequence[str] = ()
    logs: Sequence[str] = ()
    """What of it entered the fingerprint by size alone, and what not at all, as in `create`."""

    @property
    def path(self) -> Path:
        """Its directory on this machine's disk; of one at a URL a copy, fetched if need be.

        Raises ArtifactError if the files are not those that were fingerprinted, StorageError. What
        is a user's own has none: it is read where it lies.
        """
        if isinstance(self.place, Path):
            return self.place
        if self.kind == OUTSIDE:
            raise ArtifactError(f"{self.place} is read where it lies")
        return cached.copy(self.place, f"{self.place.name}-{self.fingerprint}", self._check)

    def _check(self, directory: Path) -> None:
        identity = {each: getattr(self, each) for each in ("schema", "kind", "config", "inputs")}
        told = (tuple(self.bulk), tuple(self.logs))
        for bulk, logs in UNSAID if told == ((), ()) else (told,):
            if fingerprint(directory, identity, bulk, logs) == self.fingerprint:
                return
        raise ArtifactError(
            f"{self.place} is damaged: its files are not those of {self.kind} {self.fingerprint}. "
            "If somebody is replacing it just now, try again; else upload it or make it again."
        )

    def require(self, role: str, other: Artifact) -> None:
        """Check that `other` is the very input that this artifact was made from."""
        expected = self.inputs.get(role)
        if expected != other.fingerprint:
            raise ArtifactError(
                f"{self.place} was made with {role} {expected}, "
                f"but {other.place} is {role} {other.fingerprint}"
            )


class Draft:
    """The directory being written. A killed stage finds its draft again on the next run."""

    def __init__(self, path: Path, resumed: bool, discarded: str | None = None) -> None:
        self.path = path
        self.resumed = resumed
        self.discarded = discarded
        """What force threw away to make room for it."""
        self.summary: dict[str, Any] = {}


@dataclass(frozen=True)
class Held:
    """What a draft holds that would be lost with it."""

    what: str
    """For a person to read: `3 parts`."""
    laid_out: bool = True
    """Whether it can only go on with the layout that it was begun with."""


Contents = Callable[[Path], Held | None]
"""A draft's directory -> what it holds; None for nothing that a run would miss."""


def files(draft: Path) -> Held | None:
    """Every file counts, scratch included."""
    count = sum(p.is_file() and not p.name.startswith((PLAN, RECORDED)) for p in draft.rglob("*"))
    return Held(counted(count, "file")) if count else None


def nothing(draft: Path) -> Held | None:
    """Of a stage that always starts from the beginning."""
    return None


def parts(pattern: str) -> Contents:
    """The finished parts, which are what `pattern` matches below the draft."""

    def held(draft: Path) -> Held | None:
        count = sum(1 for _ in draft.glob(pattern))
        return Held(counted(count, "part")) if count else None

    return held


def counted(count: int, what: str) -> str:
    """`1 part`, `2 parts`."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def load(path: Location | str, kind: str) -> Artifact:
    """Read `path/artifact.json`; raise ArtifactError if it is not a finished `kind`.

    The files of one at a URL are fetched when its `path` is asked for.
    """
    path = located(path).absolute()
    if isinstance(path, Path) and _aside(path, "old").exists():
        with suppress(ArtifactError), _lock(path):  # whoever is writing now recovers by itself
            _recover(path)
    try:
        fields = json.loads((path / FILE).read_bytes())
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
        made = Artifact(path, **fields)
    except TypeError as error:
        raise ArtifactError(f"{path / FILE} lacks a field or has one too many: {error}") from None
    if not FINGERPRINT.fullmatch(str(made.fingerprint)):  # a copy's directory is called by it
        raise ArtifactError(f"{path / FILE} has no fingerprint but {made.fingerprint!r}")
    return made


def local(place: Location | str) -> Path:
    """`place` on this machine's disk: itself, or of what lies at a URL a copy.

    What is copied is the artifact that it is, or is a part of; or else the folder, which is known
    by the names and sizes of its files. Raises ArtifactError if there is neither, StorageError.
    """
    place = folder = located(place)
    if isinstance(place, Path):
        return place
    while folder != folder.parent:
        if (folder / FILE).exists():
            kind = json.loads((folder / FILE).read_bytes())["kind"]
            return load(folder, kind).path / place.relative_to(folder)
        folder = folder.parent
    if not place.is_dir():
        raise ArtifactError(f"{place}: there is no such directory")
    return cached.copy(place, f"{place.name}-{outside(place).fingerprint}", lambda directory: None)


def finished(
    path: Location | str,
    kind: str,
    config: Recipe | Mapping[str, Any],
    inputs: Mapping[str, Artifact],
) -> Artifact | None:
    """The artifact if it was made from just this, however it was made; None if there is none yet.

    Raises ArtifactError, naming what differs, if it was made from something else.
    """
    path = located(path).absolute()
    if isinstance(path, Url):
        if not (path / FILE).exists():
            waiting = finished(cached.draft_place(path), kind, config, inputs)
            if waiting is None:
                return None
            _publish(waiting, path)  # it was made, and its copying was stopped
    elif not path.exists() and not _aside(path, "old").exists():
        return None
    made, recipe = load(path, kind), Recipe.of(config)
    before = {"config": made.config, "inputs": made.inputs}
    if found := differing(before, recipe, _fingerprints(inputs)):
        raise ArtifactError(
            f"{path} was made from something else: {'; '.join(found)}. Use --force to make it "
            f"again, which throws this {kind} away, or another workspace to keep both."
        )
    return made


def resumable(
    path: Location | str,
    kind: str,
    config: Recipe | Mapping[str, Any],
    inputs: Mapping[str, Artifact],
    holds: Contents = files,
) -> bool:
    """Whether a killed stage left a draft of `path` that goes on with this.

    Raises ArtifactError, naming what differs and what is at stake, if what it holds does not.
    """
    draft, recipe = _aside(made_at(path), "partial"), Recipe.of(config)
    held = holds(draft) if draft.exists() else None
    try:
        plan = json.loads((draft / PLAN).read_text())
        laid_out = held is not None and held.laid_out
        found = differing(plan, recipe, _fingerprints(inputs), draft=True, laid_out=laid_out)
        if plan["schema"] != SCHEMA:
            found.append(f"schema was {plan['schema']} and is now {SCHEMA}")
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError):
        found = [f"{PLAN}, which says from what, cannot be read"]
    if held is not None and found:
        raise ArtifactError(
            f"{draft} is an unfinished {kind} made from something else: {'; '.join(found)}. "
            "Put that back to go on with it, or choose another workspace to keep both; --force "
            f"throws away {held.what} in {draft}."
        )
    return not found


def made_at(path: Location | str) -> Path:
    """Where what is to lie at `path` is made: just there, or on this machine if that is a URL."""
    place = located(path).absolute()
    return cached.draft_place(place) if isinstance(place, Url) else place


@contextmanager
def create(
    path: Location | str,
    kind: str,
    config: Recipe | Mapping[str, Any],
    inputs: Mapping[str, Artifact],
    *,
    bulk: tuple[str, ...] = (),
    logs: tuple[str, ...] = (),
    holds: Contents = files,
    force: bool = False,
) -> Iterator[Draft]:
    """Write an artifact: yields a draft directory beside `path`, renamed into place at the end.

    A mapping for `config` is a recipe of identity alone. A draft left by a killed run of the same
    identity and inputs is handed back (`draft.resumed`), whatever its operation was. Any other
    draft is refused as in `resumable` if it holds work; with `force` it is deleted first, and
    `draft.discarded` says what it held. Names starting with one of `bulk` enter the fingerprint by
    size alone, those starting with one of `logs` not at all, and those starting with a dot, at any
    depth, are scratch: they are removed before the rename. Everything is on the disk before the
    rename. If the body raises, the draft stays and the old artifact with it; an OSError that names
    no file (a full disk does not) then names the draft. For a URL all this happens where
    `cached.draft_place` says, and the finished artifact is then copied to the URL.
    """
    place, path, recipe = located(path), made_at(path), Recipe.of(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    identity = {
        "schema": SCHEMA,
        "kind": kind,
        "config": plain(recipe.identity),
        "inputs": _fingerprints(inputs),
    }
    wanted = {**identity, "operation": plain(recipe.operation)}
    with _lock(path), _naming(path):
        _recover(path)
        resumed = not force and resumable(path, kind, recipe, inputs, holds)
        draft = _open_draft(path, wanted, resumed, holds)
        yield draft
        for scratch in list(draft.path.rglob(".*")):
            if scratch.is_dir():
                shutil.rmtree(scratch)
            else:
                scratch.unlink(missing_ok=True)  # gone with its directory
        digest = fingerprint(draft.path, identity, bulk, logs)
        fields = {**wanted, "fingerprint": digest, "summary": draft.summary}
        fields |= {name: told for name, told in (("bulk", bulk), ("logs", logs)) if told}
        write_json(draft.path / FILE, fields)
        sync_tree(draft.path)
        _replace(draft.path, path)
        if isinstance(place, Url):
            _publish(load(path, kind), place)


def adopt(source: Location | str, path: Location | str, kind: str) -> Artifact:
    """Copy the finished artifact `source` to `path`, whole or not at all, fingerprint and all.

    Raises ArtifactError if `path` holds anything but that very artifact already.
    """
    original, path = load(source, kind), located(path).absolute()
    if isinstance(path, Url):
        if not (path / FILE).exists():
            _copy_to(original.path, path)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path), _naming(path):
            _recover(path)
            if not path.exists():
                aside = _aside(path, "partial")
                shutil.rmtree(aside, ignore_errors=True)
                shutil.copytree(original.path, aside)
                sync_tree(aside)
                aside.rename(path)
                sync(path.parent)
    found = load(path, kind)
    if found.fingerprint != original.fingerprint:
        raise ArtifactError(
            f"{path} is {kind} {found.fingerprint}, not {original.fingerprint} of "
            f"{original.place}. Remove it to use that one, or choose another workspace."
        )
    return found


def outside(path: Location | str) -> Artifact:
    """A user's own file or directory as an input: a file by its contents, a directory by the
    names and sizes of its files, those behind links to folders among them. ArtifactError if there
    is no such thing."""
    path = located(path).absolute()
    try:
        is_file, is_directory = path.is_file(), path.is_dir()
    except OSError as error:
        raise ArtifactError(f"cannot look at {printable(path)}: {error.strerror}") from None
    if is_file:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    elif is_directory:
        files = sorted(path.listing()[0].items() if isinstance(path, Url) else _listed(path))
        digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    else:
        raise ArtifactError(f"no such file or directory: {printable(path)}")
    return Artifact(path, OUTSIDE, digest[:16], config={}, inputs={})


def _listed(directory: Path) -> Iterator[tuple[str, int]]:
    """Names and sizes of the files below a directory; what cannot be listed has none to know."""
    for one in walk(directory):
        if isinstance(one, Path):
            yield printable(one.relative_to(directory)), _size(one)


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
    """Write JSON so that `path` holds the old text or the new one, never half; both on the disk."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _fingerprints(inputs: Mapping[str, Artifact]) -> dict[str, str]:
    return {name: made.fingerprint for name, made in inputs.items()}


def _open_draft(path: Path, wanted: Mapping[str, Any], resumed: bool, holds: Contents) -> Draft:
    draft, discarded = _aside(path, "partial"), None
    if not resumed:
        if draft.exists():
            held = holds(draft)
            discarded = held and held.what
            # Renamed first: one that was killed half-way through must not be gone on with.
            gone = _aside(path, "discarded")
            shutil.rmtree(gone, ignore_errors=True)
            draft.rename(gone)
            shutil.rmtree(gone)
        draft.mkdir()
    write_json(draft / PLAN, wanted)
    return Draft(draft, resumed, discarded)


def _replace(draft: Path, path: Path) -> None:
    """Put `draft` in the place of `path`. `_recover` undoes a kill between the two renames."""
    old = _aside(path, "old")
    if path.exists():
        path.rename(old)
    draft.rename(path)
    sync(path.parent)
    if old.exists():
        shutil.rmtree(old)


def _publish(made: Artifact, url: Url) -> None:
    """Copy what was made here to where it belongs; what was made becomes this machine's copy."""
    _copy_to(made.path, url)
    cached.adopt(made.path, f"{url.name}-{made.fingerprint}")


def _copy_to(directory: Path, url: Url) -> None:
    """Without its description a directory is nothing: that goes first, and comes last."""
    (url / FILE).unlink(missing_ok=True)
    before, _ = url.listing()
    names = {one.relative_to(directory).as_posix() for one in directory.rglob("*") if one.is_file()}
    upload(directory, sorted(names - {FILE}), url)
    for name in before.keys() - names:
        (url / name).unlink(missing_ok=True)
    (url / FILE).write_bytes((directory / FILE).read_bytes())


def _recover(path: Path) -> None:
    shutil.rmtree(_aside(path, "discarded"), ignore_errors=True)
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
