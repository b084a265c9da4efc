"""The clips of a corpus, for models that hear recordings: looked at once, and listed."""

from __future__ import annotations

from itertools import chain
from shutil import rmtree

from cluster.clips import CheckClips
from cluster.parts import work_off
from cluster.rejections import PIECES, REJECTED, Unread, join_rejections, read_rejections
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
        check = (CheckClips, {"settings": settings, "directory": pieces})
        rmtree(pieces, ignore_errors=True)  # of a run that was stopped
        pieces.mkdir()
        reading = tokenize.CutSplits(splits, settings.part_seconds)
        for answer in work_off([check], reading, settings.workers, "clips", tokenize.WORKERS):
            if isinstance(answer, Unread):
                answer.keep(pieces)
        rejected = {split: sorted((pieces / split).glob(PIECES)) for split in splits}
        for split, unusable in rejected.items():
            kept = map(manifest.read, sorted((pieces / split).glob("part-*.jsonl")))
            heard = (one for one in chain.from_iterable(kept) if isinstance(one, Utterance))
            count = manifest.write(draft.path / f"{split}.jsonl", heard)
            if not count and any(one.stat().st_size for one in unusable):
                listed = chain.from_iterable(map(read_rejections, unusable))
                raise tokenize.nothing(experiment, split, listed)
            draft.summary[f"{split}_utterances"] = count
        everything = chain.from_iterable(rejected.values())
        draft.summary["rejected"] = join_rejections(draft.path / REJECTED, everything)
        rmtree(pieces)
        tokenize.write_lists(draft.path, lists)
        tracked.file(draft.path / REJECTED)
        tokenize.aside(experiment).unlink(missing_ok=True)

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
