"""How much memory the process that runs a stage takes for each utterance of a corpus.

Each stage runs twice in a process of its own, over few texts and over many, on a cluster of this
machine; what the workers hold does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.benchmark.driven import STAGES, Driving
from jobs.benchmark.process import DRIVEN, Process
from jobs.benchmark.progress import Progress


@dataclass(frozen=True)
class Driver:
    """The most memory that running a stage took, by the size of the corpus."""

    stage: str
    utterances: tuple[int, ...]
    bytes: tuple[int, ...]
    """Beyond what the process had before."""

    @property
    def bytes_an_utterance(self) -> float:
        """By how much it grew with each."""
        more = self.utterances[-1] - self.utterances[0]
        return (self.bytes[-1] - self.bytes[0]) / more


def measure(
    directory: Path,
    sizes: Sequence[int] = (10_000, 200_000),
    stages: Sequence[str] = tuple(STAGES),
    tell: Progress | None = None,
) -> list[Driver]:
    """Each stage at each size, below `directory`; EndpointError for one that failed."""
    tell, found = tell or Progress(), []
    for stage in stages:
        taken = []
        for size in sizes:
            tell(f"{stage} of {size:,} utterances")
            place = directory / f"{stage}-{size}"
            with Process(DRIVEN, Driving(stage, size, str(place))) as process:
                seen = process.result()
            taken.append(seen["peak"] - seen["before"])
        found.append(Driver(stage, tuple(sizes), tuple(taken)))
    return found
