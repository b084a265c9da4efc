"""What every stage has in common: its command line, its artifact, its MLflow run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray
from pydantic import ValidationError
from ray.exceptions import RayTaskError
from rich.console import Console

from cluster import tracking
from cluster.connection import connection
from mmrag import artifact, cached, shipped, terminal
from mmrag.artifact import Artifact, ArtifactError, Draft
from mmrag.config import ConfigError, Experiment, Recipe, read
from mmrag.retrieval.segment import DatastoreError
from mmrag.storage import Url, located

CONFIGS = Path(__file__).parent / "configs"
EXPLAINED = (ArtifactError, DatastoreError, ValueError, OSError, ImportError)
"""Errors whose message says what to do; their traceback would only be in the way."""
WIDTH = 110
"""Columns where there is no terminal to ask: a table fits in a log unbroken."""
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH)

Work = Callable[[Draft, tracking.Run], None]
"""Fills a draft; counts go to `draft.summary`, metrics to the run."""


def main(
    stage: Callable[[Experiment, bool], Any],
    description: str,
    config: str = "tiny.yaml",
    other_models: bool = False,
    quick: Callable[[Experiment], Experiment] | None = None,
) -> None:
    """Run one stage from the command line: `[--config FILE] [--force] [key.sub=value…]`.

    `config` is what FILE is by default, in `jobs/configs/`; `other_models` adds `--models NAME`,
    `quick` a flag `--quick` that makes another experiment of the one in FILE.
    """
    parser = of_experiment(description, config)
    parser.set_defaults(models=None, quick=False)
    if other_models:
        parser.add_argument(
            "--models",
            metavar="NAME",
            help="what transcribes in place of the workspace's own models: whisper:DIRECTORY",
        )
    if quick is not None:
        parser.add_argument(
            "--quick", action="store_true", help="a few of everything, in a workspace of its own"
        )
    parser.add_argument("--force", action="store_true", help="make it again though it is finished")
    with terminal.command("error"):
        _run(stage, parser.parse_args(), quick)


def of_experiment(description: str, config: str = "tiny.yaml") -> argparse.ArgumentParser:
    """Takes `[--config FILE] [key.sub=value…]`, what an experiment is read from (`config.read`)."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--config",
        type=Path,
        default=CONFIGS / config,
        help="experiment YAML (default: %(default)s)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    return parser


def _run(
    stage: Callable[[Experiment, bool], Any],
    arguments: argparse.Namespace,
    quick: Callable[[Experiment], Experiment] | None,
) -> None:
    named = [] if arguments.models is None else [f"models={arguments.models}"]

    def work() -> None:
        experiment = read(arguments.config, [*named, *arguments.overrides])
        if quick is not None and arguments.quick:
            experiment = quick(experiment)
        with connection():
            stage(experiment, arguments.force)

    explained(work)


def explained(work: Callable[[], None]) -> None:
    """Do it; exit with one line where an error explains itself."""
    try:
        work()
    except BrokenPipeError:  # nobody reads: the command ends quietly
        raise
    except Exception as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if not isinstance(cause, EXPLAINED) or isinstance(cause, ValidationError):
            raise
        sys.exit(f"error: {cause}")


def make(
    experiment: Experiment,
    directory: str,
    kind: str,
    config: Recipe | Mapping[str, Any],
    inputs: Mapping[str, Artifact],
    work: Work,
    *,
    bulk: tuple[str, ...] = (),
    logs: tuple[str, ...] = (),
    holds: artifact.Contents = artifact.files,
    force: bool = False,
) -> Artifact:
    """The finished artifact `directory` of the workspace: found as it is, or made by `work`.

    `config`, `bulk`, `logs` and `holds` are as in `artifact.create`.
    """
    path, made_by = experiment.workspace / directory, Recipe.of(config)
    _reachable(experiment)
    if not force:
        if done := artifact.finished(path, kind, made_by, inputs):
            console.print(f"[dim]{directory}: nothing to do, {path} is finished[/dim]")
            return done
        artifact.resumable(path, kind, made_by, inputs, holds)  # refused before a run is recorded
    params = {"stage": directory, "workspace": experiment.workspace, **made_by.settings}
    creating = artifact.create(
        path, kind, made_by, inputs, bulk=bulk, logs=logs, holds=holds, force=force
    )
    tracking.check(experiment.tracking)  # before --force throws anything away
    with ExitStack() as recording:
        with creating as draft:
            # Whoever else makes the same was refused: two processes never write one run.
            run = recording.enter_context(
                tracking.run(experiment.tracking, directory, params, draft.path)
            )
            _announce(directory, path, draft, run)
            work(draft, run)
        made = artifact.load(path, kind)
        run.log({k: v for k, v in made.summary.items() if isinstance(v, int | float)})
        run.tag("fingerprint", made.fingerprint)
        run.file(made.path / artifact.FILE)
    counts = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in made.summary.items())
    console.print(f"{directory}: {counts}")
    return made


def _announce(directory: str, path: Path, draft: Draft, run: tracking.Run) -> None:
    if draft.resumed:
        console.print(f"{directory}: going on where a stopped run left off")
    if draft.discarded:
        console.print(f"{directory}: --force threw away {draft.discarded} of {path}")
    if run.gone:
        console.print(
            f"{directory}: MLflow run {run.gone} is no longer there; run {run.id} takes its place"
        )


def _reachable(experiment: Experiment) -> None:
    """Every machine has to see what its workers write; ConfigError where they would not."""
    if isinstance(experiment.workspace, Url) and cached.DRAFTS not in os.environ:
        machines = sum(node["Alive"] for node in ray.nodes()) if ray.is_initialized() else 1
        if machines > 1:
            raise ConfigError(
                f"workspace {experiment.workspace}: its outputs are made on disk first, and this "
                f"cluster has {machines} machines: set {cached.DRAFTS} to a directory that all of "
                "them see, here and where Ray is started"
            )


def load(experiment: Experiment, directory: str, kind: str, made_by: str) -> Artifact:
    """A finished artifact of the workspace; ArtifactError says which job makes it.

    A model that the workspace does not hold is taken from the package, if the experiment names one.
    """
    model = {
        "hubert": experiment.hubert.weights,
        "codebook": experiment.tokenize.codebook,
        "lm": experiment.train.base,
        "adapter": experiment.train.base,
        "ngram": experiment.train.base,
    }.get(kind)
    absent = not (experiment.workspace / directory).exists()
    if absent and model and model.startswith(shipped.PREFIX):
        return adopt(experiment, directory, model, kind)
    try:
        return artifact.load(experiment.workspace / directory, kind)
    except ArtifactError as error:
        raise ArtifactError(f"{error} (made by: python -m jobs.{made_by})") from None


def part(name: str, kind: str) -> Artifact:
    """A part of a model of this package (`mmrag:small`), or an artifact's directory; ArtifactError
    where there is none."""
    packaged = name.startswith(shipped.PREFIX)
    return artifact.load(shipped.find(name) / kind if packaged else located(name), kind)


def adopt(experiment: Experiment, directory: str, model: str, kind: str) -> Artifact:
    """A model's own artifact as the workspace's `directory`; `model` as in `shipped.find`."""
    source = shipped.find(model) / kind
    adopted = artifact.adopt(source, experiment.workspace / directory, kind)
    console.print(f"{directory}: {kind} {adopted.fingerprint} of {model}")
    return adopted
