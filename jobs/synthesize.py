"""A speech corpus from text: sentences planned by seed, spoken by espeak-ng, as FLAC + JSONL."""

from __future__ import annotations

from cluster.parts import parts, work_off
from cluster.recording import RenderSpeech
from cluster.tracking import Run
from jobs import stage
from mmrag import artifact
from mmrag.artifact import Artifact, Draft
from mmrag.config import Experiment, recipe
from mmrag.corpora.synthetic import plan

PART_UTTERANCES = 64


def run(experiment: Experiment, force: bool = False) -> Artifact:
    """Make `corpus/`: a manifest `<split>.jsonl` for each split, and `audio/`."""
    settings = experiment.synthesize
    config = recipe({"seed": experiment.seed}, settings)

    def work(draft: Draft, tracked: Run) -> None:
        splits = {
            split: parts(planned, lambda _: 1, PART_UTTERANCES, name=split)
            for split, planned in plan(settings, experiment.seed).items()
        }
        todo = [
            part
            for shares in splits.values()
            for part in shares
            if not (draft.path / f".{part.name}.jsonl").exists()
        ]
        speak = (RenderSpeech, {"directory": draft.path})
        for _ in work_off([speak], todo, settings.workers, "speaking", "synthesize.workers"):
            pass
        for split, shares in splits.items():
            manifest = draft.path / f"{split}.jsonl"
            rows = [draft.path / f".{part.name}.jsonl" for part in shares]
            lines = "".join(row.read_text(encoding="utf-8") for row in rows)
            manifest.write_text(lines, encoding="utf-8")
            draft.summary[f"{split}_utterances"] = sum(len(part.work) for part in shares)
            tracked.file(manifest)

    return stage.make(
        experiment,
        "corpus",
        "corpus",
        config,
        {},
        work,
        bulk=("audio/",),
        holds=artifact.parts(".*.jsonl"),
        force=force,
    )


if __name__ == "__main__":
    stage.main(run, __doc__)
