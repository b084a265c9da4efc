"""How far a benchmark is, and how long it has been at it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from rich.console import Console


@dataclass(frozen=True)
class Progress:
    """Called with what happens next, it says so on the standard error stream."""

    started: float = field(default_factory=time.time)
    """Seconds since the epoch, so that another process goes on with the same clock."""

    def __call__(self, text: str) -> None:
        """One line, behind the minutes and seconds since the beginning."""
        minutes, seconds = divmod(int(time.time() - self.started), 60)
        console = Console(stderr=True, highlight=False)
        console.print(f"{minutes:3d}:{seconds:02d} {text}", markup=False)
