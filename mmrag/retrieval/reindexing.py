"""An index that has fallen behind its datastore is built again, beside the one that is in use.

What was deleted since an index was built stays in it, hidden, and what was added lies in the last
shard's memory: both are little until they are a good part of it. Whoever searches the old index
goes on, and finds the new one when he next opens the datastore.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmrag.config import Index
from mmrag.retrieval import sizing
from mmrag.retrieval.datastore import deleted_entries, describe, locked, read_list
from mmrag.retrieval.index import (
    IndexShard,
    asked_for,
    build_again,
    left_out,
    read_shard,
    saved_shards,
)

CHANGED_SHARE = 0.25
"""Of an index: deleted entries in it, or ones added since it was built, that are worth building it
again."""
INDEXING = ".indexing"
"""The lock of whoever builds an index."""


class TooManyShardsError(ValueError):
    """More shards are asked for than a datastore has entries."""


@dataclass(frozen=True)
class Rebuilt:
    """What `catch_up` did."""

    why: str
    shards: list[IndexShard]


def index_anew(directory: Path | str, settings: Index) -> list[IndexShard]:
    """Index a datastore as `build_again` does, when nobody else does just now. Raises
    TooManyShardsError where some of them would be empty."""
    directory = Path(directory).absolute()
    with locked(directory, INDEXING):
        entries = _entries(read_list(directory))
        if settings.shards > max(1, entries):
            raise TooManyShardsError(
                f"shards: {settings.shards:,} for {entries:,} entries: a shard has one at least"
            )
        return build_again(directory, settings)


def catch_up(directory: Path | str) -> Rebuilt | None:
    """Build the index again, with the settings that it was built with, if it is `behind`.

    May run while others search, publish and delete: what changes meanwhile is taken in by whoever
    opens the new index. Stopped at any moment, it leaves the old index or the new one. Raises what
    `build_again` raises.
    """
    directory = Path(directory).absolute()
    with locked(directory, INDEXING):
        why = behind(directory)
        if why is None:
            return None
        last = saved_shards(directory)[-1]
        return Rebuilt(why, build_again(directory, asked_for(read_shard(last))))


def behind(directory: Path | str) -> str | None:
    """Why the index of a datastore should be built again; None if it need not, or there is none.

    Reads what is written of the shards, and opens nothing.
    """
    directory = Path(directory).absolute()
    places = saved_shards(directory)
    if not places:
        return None
    shards = [read_shard(one) for one in places]
    listed = read_list(directory)
    entries, deleted = _entries(listed), deleted_entries(directory, listed)
    return (
        _outgrown(shards[-1], entries, describe(directory).width)
        or _grown(shards, entries)
        or _emptied(places, shards, deleted)
    )


def _entries(listed: Mapping[str, Any]) -> int:
    """How many a datastore's list names, deleted ones among them."""
    return sum(one["entries"] for one in listed["segments"])


def _outgrown(last: dict, entries: int, width: int) -> str | None:
    """The last shard is of another kind than auto would choose for what it has become."""
    size = entries - last["start"]
    chosen, _ = sizing.chosen(asked_for(last), size, width)
    if chosen.kind == last["settings"]["kind"]:
        return None
    kind = last["settings"]["kind"]
    return f"the last shard has {size:,} entries, for which auto does not choose {kind}"


def _grown(shards: list[dict], entries: int) -> str | None:
    """Much was added: one flat shard alone is none the worse for it."""
    indexed = shards[-1]["stop"]
    if len(shards) == 1 and shards[0]["settings"]["kind"] == "flat":
        return None
    if entries - indexed <= CHANGED_SHARE * indexed:
        return None
    return f"{entries - indexed:,} entries were added to the {indexed:,} that were indexed"


def _emptied(places: list[Path], shards: list[dict], deleted: np.ndarray) -> str | None:
    """Much of what is coded was deleted, or is not coded and there again."""
    coded = gone = back = 0
    for place, one in zip(places, shards, strict=True):
        if one["settings"]["kind"] == "flat":
            continue
        without = left_out(place) + one["start"]
        first, last = np.searchsorted(deleted, (one["start"], one["stop"]))
        back += len(np.setdiff1d(without, deleted[first:last], assume_unique=True))
        coded += one["stop"] - one["start"] - len(without)
        gone += len(np.setdiff1d(deleted[first:last], without, assume_unique=True))
    if back:
        return f"{back:,} entries that it leaves out are there again"
    if gone > CHANGED_SHARE * coded:
        return f"{gone:,} of the {coded:,} entries that it holds are deleted"
    return None
