"""Tables that are shown on the terminal and written into the documentation alike."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jobs.benchmark.targets import Target, compared, table


@dataclass(frozen=True)
class Grid:
    """A title, columns and rows, of text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def table(self) -> Table:
        """For the terminal."""
        made = table(escape(self.title), *map(escape, self.columns))
        for row in self.rows:
            made.add_row(*map(escape, row))
        return made

    def markdown(self) -> str:
        """For a document."""
        ruled = ["---"] * len(self.columns)
        lines = [f"| {' | '.join(row)} |" for row in (self.columns, ruled, *self.rows)]
        return f"{self.title}:\n\n" + "\n".join(lines) + "\n"


def show(
    grids: Sequence[Grid], remarks: Sequence[str], targets: Mapping[str, Target], results: Mapping
) -> None:
    """What was measured, for people: tables, sentences, and the targets."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    for grid in grids:
        console.print(grid.table())
    for sentence in remarks:
        console.print(sentence)
    console.print(compared(targets, results))
    for key, reason in results.get("reasons", {}).items():
        console.print(f"{key}: {reason}", markup=False)


def power(exponent: float) -> str:
    """How something grows, of the slope of its logarithm."""
    return f"N^{exponent:.2f}"
