"""The page about speed: what was measured last of each subject, kept as JSON and written out as
Markdown. `python -m jobs.benchmark.performance docs` writes the page anew from the JSON.

A sentence in the JSON under `reasons`, by a target's key, says why that one is missed; it stays
there when a subject is measured again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.benchmark import decode, growth, tokenize, train
from jobs.benchmark.grids import Grid
from jobs.benchmark.machine import described, told
from jobs.benchmark.targets import rounded, verdict
from mmrag import terminal
from mmrag.artifact import write_json

FIGURES, PAGE, PLOT = "performance.json", "performance.md", "performance.png"
SUBJECTS = {"decode": decode, "tokenize": tokenize, "train": train}
"""Subject -> the module that measures it, with TARGETS, `grids` and `remarks`."""
TITLES = {"decode": "Decoding", "tokenize": "Tokenizing", "train": "Training"}
HEAD = """# Performance

How fast this package is beside others, on one machine, in the same run. Ways that are compared
take turns; figures are medians, with the least and the most behind them. A missed target stands
here as missed.

`python -m jobs.benchmark.performance docs` writes this page from `performance.json`; each section
names the command that measures it.
"""
UNEXPLAINED = "why is not known yet"


def check(docs: Path) -> None:
    """ValueError unless `docs` is a directory."""
    if not docs.is_dir():
        raise ValueError(f"--docs: there is no directory {docs}")


def write(docs: Path, subject: str, results: Mapping[str, Any]) -> None:
    """Put a subject's results in the place of those before, and write the page."""
    file = docs / FIGURES
    figures = json.loads(file.read_text()) if file.exists() else {"reasons": {}}
    measured = {key: value for key, value in results.items() if key != "reasons"}
    measured = {"machine": described(), **measured}
    figures["reasons"] |= results.get("reasons", {})
    write_json(file, {**figures, subject: rounded(measured)})
    rewrite(docs)


def rewrite(docs: Path) -> None:
    """Write the page, and the plot, of the figures that are there."""
    figures = json.loads((docs / FIGURES).read_text())
    (docs / PAGE).write_text(page(figures))
    if "decode" in figures:
        growth.panels(figures["decode"]["growth"]).savefig(docs / PLOT, dpi=150)


def page(figures: Mapping[str, Any]) -> str:
    """The page as Markdown."""
    parts = [HEAD]
    for subject, module in SUBJECTS.items():
        if subject not in figures:
            continue
        results = figures[subject]
        parts.append(f"## {TITLES[subject]}\n")
        parts.append(f"`python -m jobs.benchmark {subject}` on {told(results['machine'])}.\n")
        parts.append(_targets(module.TARGETS, results, figures["reasons"]))
        parts.append(" ".join(module.remarks(results)) + "\n")
        parts += [grid.markdown() for grid in module.grids(results)]
        if subject == "decode":
            parts.append(f"![Time of a step against what grows]({PLOT})\n")
    return "\n".join(parts)


def _targets(
    targets: Mapping[str, Any], results: Mapping[str, Any], reasons: Mapping[str, str]
) -> str:
    """A row a target, and below them a sentence about each that is not met."""
    rows, explained = [], []
    for key, target in targets.items():
        result = results.get(key)
        said = verdict(target, result)
        shown = "–" if result is None else target.shown(result)
        rows.append((f"`{key}`", target.title, shown, target.wanted, _marked(said)))
        if said != "met":
            explained.append(f"* `{key}` {said}: {reasons.get(key, UNEXPLAINED)}.\n")
    grid = Grid("Targets", ("", "", "measured", "target", ""), rows)
    return grid.markdown() + "\n" + "".join(explained)


def _marked(said: str) -> str:
    return f"**{said}**" if said == "missed" else said


if __name__ == "__main__":
    with terminal.command("error"):
        check(Path(sys.argv[1]))
        rewrite(Path(sys.argv[1]))
