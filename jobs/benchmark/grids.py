"""Tables that are shown on the terminal and written into the documentation alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from jobs.benchmark.targets import table


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


def power(exponent: float) -> str:
    """How something grows, of the slope of its logarithm."""
    return f"N^{exponent:.2f}"
