"""A workspace's models, or the package's, into MLflow's registry, to be served from there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from cluster import registry
from jobs import publish, stage
from mmrag import artifact, shipped, terminal
from mmrag.artifact import Artifact
from mmrag.config import Experiment, read
from mmrag.decoding.tune import DEFAULTS
from mmrag.storage import Location

NAME = "mmrag"


def run(
    experiment: Experiment,
    name: str = NAME,
    models: str | None = None,
    alias: str = registry.ALIAS,
) -> str:
    """Register `hubert/`, `codebook/`, `lm/`, and what there is of `adapter/`, `ngram/`,
    `calibration/`, `retrieval/` and `tuned/`, as a new version of `name`.

    They are the workspace's, or those of `models` (as in `shipped.find`). Returns the version,
    which `alias` names from now on. ArtifactError if they do not belong together.
    """
    made = _belonging(experiment, models)
    version = registry.register(experiment.tracking, name, made, alias)
    parts = ", ".join(f"{place} {one.fingerprint}" for place, one in made.items())
    stage.console.print(
        f"registered {name}, version {version}, alias {alias}: {parts}\n"
        f"serve it by models:/{name}@{alias}, or this version for good by models:/{name}/{version}"
    )
    return version


def _belonging(experiment: Experiment, models: str | None) -> dict[str, Artifact]:
    """Place in the model -> its artifact, each made for the others."""
    directory = experiment.workspace if models is None else shipped.find(models)
    kinds = dict(publish.KINDS)
    if (directory / "adapter").exists() or (models is None and experiment.adapter is not None):
        kinds["adapter"] = "train"
    kinds |= {kind: by for kind, by in publish.BESIDE.items() if (directory / kind).exists()}
    if models is None:
        made = {kind: stage.load(experiment, kind, kind, by) for kind, by in kinds.items()}
    else:
        made = {kind: artifact.load(directory / kind, kind) for kind in kinds}
    made["codebook"].require("hubert", made["hubert"])
    made["lm"].require("codebook", made["codebook"])
    for kind in ("adapter", *publish.BESIDE):
        if kind in made:
            made[kind].require("lm", made["lm"])
    for place in _tuned(directory):
        tuned = artifact.load(place, "tuned")
        tuned.require("lm", made["lm"])
        if "adapter" in tuned.inputs and "adapter" in made:
            tuned.require("adapter", made["adapter"])
        made[str(place.relative_to(directory))] = tuned
    return made


def _tuned(directory: Location) -> Iterator[Location]:
    """Where what was tuned lies; a name with a dot is a stage's scratch."""
    root = directory / "tuned"
    if isinstance(root, Path):
        yield from sorted(root.glob("[!.]*"))
    else:
        yield from sorted((root / name).parent for name in root.listing()[0] if _described(name))
    if (directory / DEFAULTS).exists():
        yield directory / DEFAULTS


def _described(name: str) -> bool:
    return re.fullmatch(rf"[^./][^/]*/{re.escape(artifact.FILE)}", name) is not None


def main() -> None:
    """Register from the command line."""
    parser = stage.of_experiment(__doc__)
    parser.add_argument("--name", default=NAME, help="registered model (default: %(default)s)")
    parser.add_argument(
        "--models",
        help="directory with hubert/, codebook/ and lm/, or a model of the package (mmrag:tiny); "
        "default: the experiment's workspace",
    )
    parser.add_argument(
        "--alias", default=registry.ALIAS, help="name of the new version (default: %(default)s)"
    )
    with terminal.command("error"):
        arguments = parser.parse_args()

        def work() -> None:
            experiment = read(arguments.config, arguments.overrides)
            run(experiment, arguments.name, arguments.models, arguments.alias)

        stage.explained(work)


if __name__ == "__main__":
    main()
