"""A workspace's models into the package: `mmrag/models/<published>/`."""

from __future__ import annotations

import shutil
from pathlib import Path

from cluster.progress import METRICS
from cluster.rejections import REJECTED
from jobs import stage
from mmrag import artifact, shipped, terminal
from mmrag.config import Experiment, read
from mmrag.decoding.tune import DEFAULTS
from mmrag.recogniser import CALIBRATION, NGRAM

KINDS = {"hubert": "pretrain_hubert", "codebook": "tokenize", "lm": "train"}
BESIDE = {NGRAM: "ngram", CALIBRATION: "calibrate"}
"""What a model may have besides, and which job makes it."""
LEFT = (METRICS, REJECTED)
"""What tells how a model was made, and is not needed to use it."""
LIMIT_MB = 60
"""What a repository can carry."""


def run(experiment: Experiment) -> None:
    """Copy `hubert/`, `codebook/`, `lm/`, `adapter/` if the experiment trains one, and `ngram/` and
    `calibration/` if there are any, over the package's model that `published` names.

    What was tuned for the experiment's datastore becomes the model's own settings for any.
    ValueError if they are too large for a package, ArtifactError if they do not belong together.
    """
    made = {kind: stage.load(experiment, kind, kind, by) for kind, by in KINDS.items()}
    made["codebook"].require("hubert", made["hubert"])
    made["lm"].require("codebook", made["codebook"])
    if experiment.adapter is not None:
        made["adapter"] = stage.load(experiment, "adapter", "adapter", "train")
        made["adapter"].require("lm", made["lm"])
    for kind, by in BESIDE.items():
        if (experiment.workspace / kind).exists():
            made[kind] = stage.load(experiment, kind, kind, by)
            made[kind].require("lm", made["lm"])
    tuned = f"tuned/{experiment.datastore.name}"
    if (experiment.workspace / tuned).exists():
        made[DEFAULTS] = stage.load(experiment, tuned, "tuned", "tune")
        made[DEFAULTS].require("lm", made["lm"])
        if "adapter" in made[DEFAULTS].inputs and "adapter" in made:
            made[DEFAULTS].require("adapter", made["adapter"])
    files = [file for each in made.values() for file in _files(each.path)]
    size = sum(file.stat().st_size for file in files) / 1e6
    if size > LIMIT_MB:
        raise ValueError(f"{experiment.workspace}: models of {size:.0f} MB; {LIMIT_MB} are allowed")
    model = shipped.DIRECTORY / experiment.published
    if (model / "lm").exists():
        replaced = artifact.load(model / "lm", "lm").fingerprint
        if replaced != made["lm"].fingerprint:  # what was made for it is of no use to the new one
            for kind in ("adapter", *BESIDE, DEFAULTS):
                shutil.rmtree(model / kind, ignore_errors=True)
    for kind, each in made.items():
        shutil.rmtree(model / kind, ignore_errors=True)
        (model / kind).mkdir(parents=True)
        for file in _files(each.path):
            shutil.copyfile(file, model / kind / file.name)
    stage.console.print(f"{model}: {size:.1f} MB in {len(files)} files")


def _files(directory: Path) -> list[Path]:
    return sorted(each for each in directory.iterdir() if each.name not in LEFT)


def main() -> None:
    """Publish from the command line; what the package has is replaced each time."""
    parser = stage.of_experiment(__doc__)
    with terminal.command("error"):
        arguments = parser.parse_args()
        stage.explained(lambda: run(read(arguments.config, arguments.overrides)))


if __name__ == "__main__":
    main()
