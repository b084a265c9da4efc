"""The clips of a corpus, for models that hear recordings: looked at once, and listed."""

from __future__ import annotations

from itertools import chain

from cluster.clips import CheckClips
from cluster.parts import parts, work_off
from cluster.rejections import REJECTED, write_rejections
from cluster.tracking import Run
from jobs import stage, tokenize
from mmrag import artifact
from mmrag.artifact import Artifact, Draft
from mmrag.config import Experiment
from mmrag.corpora import manifest
from mmrag.records import Utterance
from mmrag.retrieval import phrases

BESIDE = (REJECTED, phrases.SENTENCES)
"""Files beside the splits' manifests."""
PARTS = ".parts"


def run(experiment: Experiment, window_seconds: float, force: bool = False) -> Artifact:
    """Make `clips/<tokenize.name>/`: a manifest `<split>.jsonl` of what can be heard in windows of
    so many seconds, and what was rejected.

    What is read, and what is left out of it, is as the section `tokenize` says.
    """
    settings = experiment.tokenize
    longest = min(settings.max_seconds, window_seconds)
    settings = settings.model_copy(update={"max_seconds": longest})
    source, splits, lists = tokenize.opened(experiment)

    def work(draft: Draft, tracked: Run) -> None:
        pieces = draft.path / PARTS
        pieces.mkdir(exist_ok=True)
        rejected = {split: list(unread) for split, (_, unread) in splits.items()}
        for split, (utterances, _) in splits.items():
            shares = parts(utterances, tokenize.stated_seconds, settings.part_seconds, name=split)
            check = (CheckClips, {"settings": settings, "directory": pieces})
            for _, left_out in work_off(
                [check], shares, settings.workers, f"clips {split}", tokenize.WORKERS
            ):
                rejected[split] += left_out
            kept = chain.from_iterable(
                manifest.read(pieces / f"{part.name}.jsonl") for part in shares
            )
            heard = [one for one in kept if isinstance(one, Utterance)]
            if rejected[split] and not heard:
                raise tokenize.nothing(experiment, split, rejected[split])
            manifest.write(draft.path / f"{split}.jsonl", heard)
            draft.summary[f"{split}_utterances"] = len(heard)
        for piece in pieces.iterdir():
            piece.unlink()
        pieces.rmdir()
        everything = list(chain.from_iterable(rejected.values()))
        write_rejections(draft.path / REJECTED, everything)
        tokenize.write_lists(draft.path, lists)
        tracked.file(draft.path / REJECTED)
        tokenize.aside(experiment).unlink(missing_ok=True)
        draft.summary["rejected"] = len(everything)

    return stage.make(
        experiment,
        f"clips/{settings.name}",
        "clips",
        {
            "min_seconds": settings.min_seconds,
            "max_seconds": settings.max_seconds,
            "require_text": settings.require_text,
        },
        {"source": source},
        work,
        holds=artifact.nothing,
        force=force,
    )
