"""What the deployments hand each other: typed values, no HTTP in them and no models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster.shards import ShardedRetriever
from mmrag.config import KNN, Read, Retrieves
from mmrag.datastore import Segment
from mmrag.records import Units, Word


class Unavailable(RuntimeError):
    """A part of the service does not answer just now; the same request may succeed later."""


class UnknownDatastore(LookupError):
    """There is no datastore of that name."""


class DatastoreExists(ValueError):
    """There is a datastore of that name already."""


class Refused(ValueError):
    """A request that cannot be served as it stands; the message says why."""


@dataclass(frozen=True)
class Found:
    """A datastore, resolved: whom to ask and how far to trust the answers."""

    key: str
    """Changes whenever the datastore does."""
    uid: str
    """Changes only when another datastore takes the name."""
    retriever: ShardedRetriever
    knn: KNN
    both: KNN
    read: Read
    whole: np.ndarray | None
    """(N,) entries whose windows are read without a search, for a small datastore."""


@dataclass(frozen=True)
class Listed:
    """Phrases that came with a request, spoken and read; `key` is a digest of them."""

    key: str
    segment: Segment


@dataclass(frozen=True)
class Heard:
    """What was heard in a stretch: T units, and which of them are not in a pause (T,) bool."""

    units: Units
    audible: np.ndarray
    start: float
    """When the units begin, seconds from the stretch's start."""


@dataclass(frozen=True)
class Order:
    """A stretch of speech to transcribe."""

    units: Units
    audible: np.ndarray | None = None
    """As in `Heard`."""
    mode: Retrieves = "none"
    datastore: Found | None = None
    phrases: Listed | None = None
    temperature: float = 0.0
    timed: bool = False
    """Whether words get their times."""
    evidence: bool = False
    """Whether words get their sources."""


@dataclass(frozen=True)
class Reply:
    """A stretch transcribed."""

    text: str
    words: tuple[Word, ...]
    tokens: tuple[int, ...]
    ends: tuple[int, ...]
    """Index into `tokens` just past each word's last one."""
    mean_logp: float
    """Mean log-probability of its tokens, nats."""
    stopped: bool
    """False where it ran into its length limit."""
    missing_shards: int = 0

    def tokens_of(self, first: int, last: int) -> tuple[int, ...]:
        """The tokens of the words `first` to `last`."""
        return self.tokens[self.ends[first - 1] if first else 0 : self.ends[last]]


@dataclass(frozen=True)
class Stored:
    """A datastore as the API shows it."""

    name: str
    entries: int
    documents: int
    audio: str
