"""A speech corpus: sentences planned by seed and spoken, recordings of people, as FLAC + JSONL."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path

from cluster.parts import Part, parts, work_off
from cluster.recording import RenderSpeech
from cluster.rejections import REJECTED, read_rejections, write_rejections
from cluster.tracking import Run
from jobs import stage
from mmrag import artifact
from mmrag.artifact import Artifact, Draft
from mmrag.config import Experiment, Synthesize, recipe
from mmrag.corpora import manifest, recordings, sentences
from mmrag.corpora.recordings import Rerecorded
from mmrag.corpora.synthetic import Planned, plan
from mmrag.corpora.voices import kokoro
from mmrag.records import Rejection, Utterance
from mmrag.storage import located

PART_UTTERANCES = 64
SPLITS_RECORDED = ("lm", "dev", "test")


def run(experiment: Experiment, force: bool = False) -> Artifact:
    """Make `corpus/`: a manifest `<split>.jsonl` for each split, and `audio/`.

    What could not be spoken or read is in `rejected.jsonl`. Raises OSError for a synthesizer whose
    files are absent, ImportError for one that is not installed, ArtifactError for a text file or
    manifest that is not there.
    """
    settings = experiment.synthesize
    config = recipe({"seed": experiment.seed}, settings)
    if "kokoro" in {*settings.voices, *(settings.held_out_voices or ())}:
        kokoro.ready(settings.kokoro)

    def work(draft: Draft, tracked: Run) -> None:
        planned, rejected = _planned(settings, experiment.seed)
        splits = {
            split: parts(each, lambda _: 1, PART_UTTERANCES, name=split)
            for split, each in planned.items()
        }
        speak = (RenderSpeech, {"directory": draft.path, "kokoro": settings.kokoro})

        def record(what: Iterable[Part], title: str) -> None:
            todo = [each for each in what if not (draft.path / f".{each.name}.jsonl").exists()]
            for _ in work_off([speak], todo, settings.workers, title, "synthesize.workers"):
                pass

        record(chain.from_iterable(splits.values()), "speaking")
        again = _again(draft.path, planned["lm"], splits["lm"], settings.copies, experiment.seed)
        record(again, "recording again")
        splits["lm"] += again
        for part in chain.from_iterable(splits.values()):
            rejected += read_rejections(draft.path / f".{part.name}.rejected")
        for split, shares in splits.items():
            path = draft.path / f"{split}.jsonl"
            rows = [draft.path / f".{part.name}.jsonl" for part in shares]
            lines = "".join(row.read_text(encoding="utf-8") for row in rows)
            path.write_text(lines, encoding="utf-8")
            draft.summary[f"{split}_utterances"] = lines.count("\n")
            tracked.file(path)
        write_rejections(draft.path / REJECTED, rejected)
        draft.summary["rejected"] = len(rejected)
        tracked.file(draft.path / REJECTED)

    return stage.make(
        experiment,
        "corpus",
        "corpus",
        config,
        _inputs(settings),
        work,
        bulk=("audio/",),
        holds=artifact.parts(".*.jsonl"),
        force=force,
    )


def _planned(
    settings: Synthesize, seed: int
) -> tuple[dict[str, list[Planned | Rerecorded]], list[Rejection]]:
    """Every split's utterances, and the lines of text files and manifests that are none."""
    planned: dict[str, list[Planned | Rerecorded]] = {**plan(settings, seed)}
    rejected: list[Rejection] = []
    if settings.sentences:
        rejected += sentences.left_out(settings.sentences.files)
    if settings.recordings:
        manifests = {split: located(path) for split, path in _manifests(settings).items()}
        for split, one in recordings.plan(manifests, settings.recordings.copies, seed):
            if isinstance(one, Rejection):
                rejected.append(one)
            else:
                planned[split].append(one)
    return planned, rejected


def _again(
    draft: Path,
    planned: Iterable[Planned | Rerecorded],
    spoken: Iterable[Part],
    copies: Mapping[str, int],
    seed: int,
) -> list[Part]:
    """Further recordings of what was spoken for training by synthesizers that have `copies`."""
    voices = {one.id: one.voice for one in planned if isinstance(one, Planned)}
    wanted = {id: copies[voice.engine] for id, voice in voices.items() if voice.engine in copies}
    rows = (manifest.read(draft / f".{part.name}.jsonl") for part in (spoken if wanted else ()))
    said = (
        one for one in chain.from_iterable(rows) if isinstance(one, Utterance) and one.id in wanted
    )
    return parts(
        recordings.again(said, wanted, seed), lambda _: 1, PART_UTTERANCES, name="lm-again"
    )


def _manifests(settings: Synthesize) -> dict[str, str]:
    """Split -> manifest of recordings, where there is one."""
    named = {split: getattr(settings.recordings, split, None) for split in SPLITS_RECORDED}
    return {split: path for split, path in named.items() if path is not None}


def _inputs(settings: Synthesize) -> dict[str, Artifact]:
    """The files that the corpus is made from."""
    texts = settings.sentences.files if settings.sentences else ()
    named = {f"sentences/{located(path).stem}": path for path in texts}
    named |= {f"recordings/{split}": path for split, path in _manifests(settings).items()}
    return {role: artifact.outside(path) for role, path in named.items()}


if __name__ == "__main__":
    stage.main(run, __doc__)
