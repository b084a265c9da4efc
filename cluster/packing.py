"""What every worker of a training reads, packed once by the driver before they start.

A pack lies in the run's own draft, and goes with it. Many parts are read by tasks all over the
cluster; the driver puts what they give one after the other, and holds a few of them at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import ray

from cluster.progress import bar
from mmrag import artifact
from mmrag.artifact import ArtifactError
from mmrag.model.packed import Segment, fingerprint, made, segment, stamps, write
from mmrag.model.vocabulary import Vocabulary
from mmrag.retrieval.contexts import PackedNeighbours, pack_neighbours
from mmrag.speech import tokenized
from mmrag.storage import Location

FOLDER = ".packed"
"""Of a draft: what is packed for its workers."""
MANY = 8
"""Parts from which on tasks read them; the first task of a process takes as long as several."""
AHEAD = 2
"""Tasks a CPU that are under way at once."""


def pack(splits: Sequence[Location], vocabulary: Location, draft: Path) -> Path:
    """The tokenized `splits` packed for the vocabulary of that directory, below `draft`.

    What lies there already is used if it was made from just these parts. Raises TokensError for a
    part that is none.
    """
    lying = [(split, part) for split in splits for part in tokenized.parts(split)]
    parts = [part for _, part in lying]
    known = Vocabulary.load(vocabulary)
    identity = {
        "vocabulary": fingerprint(known),
        "tokens": [_fingerprint(split.parent) for split in splits],
        "parts": stamps(parts),
    }

    def fill(aside: Path) -> dict[str, int]:
        if len(parts) < MANY:
            return write(aside, (segment(part, known) for part in parts), known)
        named = [(split, part.name) for split, part in lying]
        return write(aside, _read_by_tasks(named, vocabulary), known)

    return made(draft / FOLDER / "corpus", identity, fill)


def _fingerprint(tokens: Location) -> str | None:
    with suppress(ArtifactError):
        return artifact.load(tokens, "tokens").fingerprint
    return None


def _read_by_tasks(
    parts: Sequence[tuple[Location, str]], vocabulary: Location
) -> Iterator[Segment]:
    """The parts of splits in order, each read by a task; a few are under way at once."""
    most = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting: deque[ray.ObjectRef] = deque()
    with bar(len(parts), "pack") as count:
        for part in parts:
            waiting.append(_read.remote(*part, vocabulary))
            if len(waiting) == most:
                yield ray.get(waiting.popleft())
                count()
        while waiting:
            yield ray.get(waiting.popleft())
            count()


@ray.remote(num_cpus=1)
def _read(split: Location, part: str, vocabulary: Location) -> Segment:
    """On whichever machine: a split at a URL is read from that machine's copy."""
    return segment(artifact.local(split) / part, _loaded(vocabulary))


@lru_cache(1)
def _loaded(vocabulary: Location) -> Vocabulary:
    return Vocabulary.load(vocabulary)


def pack_contexts(neighbours: Location, names: Sequence[str], draft: Path) -> None:
    """The `neighbours` of those names packed below `draft`, for `packed_contexts`."""
    for name in names:
        pack_neighbours(neighbours / name, draft / FOLDER / f"neighbours-{name}")


def packed_contexts(draft: Path, names: Sequence[str]) -> dict[str, PackedNeighbours]:
    """Those that `pack_contexts` packed, by name."""
    return {name: PackedNeighbours(draft / FOLDER / f"neighbours-{name}") for name in names}
