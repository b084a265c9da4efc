"""A quick look: the same experiments with a few of everything, beside the real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.reproduce.report import QUICK
from mmrag.config import Experiment

LM, ADAPTER = 200, 40
"""Utterances of the splits that say nothing about what is tested: the decoy, names in lists."""
UTTERANCES, SWEEP = 30, 12
LISTED = 100
"""Phrases of the longest list."""


def quick(experiment: Experiment) -> Experiment:
    """The experiment in minutes, in a workspace of its own, where its tables go too.

    The sentences of dev and test are the same: neither they nor their voices may be among what the
    model was trained on.
    """
    place = experiment.workspace.parent / f"{experiment.workspace.name}{QUICK}"
    docs = place / "docs" if isinstance(place, Path) else Path("runs") / place.name
    corpus, grid = experiment.synthesize, experiment.tune
    changes: dict[str, Any] = {
        "workspace": place,
        "synthesize": _fewer(corpus, lm=LM, adapter=ADAPTER, text=0).model_copy(
            update={"mentions": 1, "recordings": _of_test(corpus.recordings)}
        ),
        "tune": _fewer(grid, finalists=2, utterances=SWEEP).model_copy(
            update={
                "k": grid.k[-1:],
                "weight": grid.weight[:2],
                "temperature": grid.temperature[:2],
                "gate": grid.gate[-1:],
                "certain": grid.certain[-1:],
                "attention": grid.attention[:1],
                "both_weight": grid.both_weight[:1],
            }
        ),
    }
    about = experiment.reproduce
    if about is not None:
        few = _fewer(about, utterances=UTTERANCES, sweep_utterances=SWEEP, topics=1)
        lists = tuple(count for count in about.phrases if count <= LISTED) or about.phrases[:1]
        narrowed = {"docs": docs, "phrases": lists, "boost": about.boost[1:3] or about.boost}
        narrowed |= {"sizes": about.sizes[:2], "strides": about.strides[:2]}
        narrowed |= {"documents": about.documents[:1], "shares": about.shares[:2]}
        changes["reproduce"] = few.model_copy(update=narrowed)
    return experiment.model_copy(update=changes)


def _fewer(section: Any, **most: int) -> Any:
    """A section with at most so many; None is as many as there are."""
    now = {name: getattr(section, name) for name in most}
    fewer = {
        name: limit if now[name] is None else min(now[name], limit) for name, limit in most.items()
    }
    return section.model_copy(update=fewer)


def _of_test(recordings: Any) -> Any:
    """The recordings of the test split alone, as they are."""
    if recordings is None:
        return None
    return recordings.model_copy(update={"lm": None, "dev": None, "copies": 1})
