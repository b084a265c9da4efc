"""What the deployments hand each other: typed values, no HTTP in them and no models.

Whatever may be large goes by reference (`handles`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from ray import ObjectRef

from cluster.shards import ShardedRetriever
from mmrag.config import KNN, RetrievalMode, RetrievedAttention
from mmrag.model.whisper import EncodedAudio
from mmrag.records import Units, Word
from mmrag.retrieval.display import Display

Encoded = Units | EncodedAudio
"""Speech as a decoder takes it: units, or the states of a Whisper's encoder."""


def weight(encoded: Encoded) -> int:
    """Bytes of encoded speech."""
    if isinstance(encoded, EncodedAudio):
        return encoded.states.nbytes
    spelled = 0 if encoded.letters is None else encoded.letters.costs.nbytes
    return encoded.ids.nbytes + encoded.durations.nbytes + spelled


class Unavailable(RuntimeError):
    """A part of the service does not answer just now; the same request may succeed later."""


class UnknownDatastore(LookupError):
    """There is no datastore of that name."""


class DatastoreExists(ValueError):
    """There is a datastore of that name already."""


class InvalidRequest(ValueError):
    """A request that cannot be served as it stands; the message says why."""

    def __init__(self, message: str, param: str | None = None) -> None:
        """`param` is the field that is wrong, where one is."""
        super().__init__(message)
        self.param = param


class QuotaExceeded(ValueError):
    """A tenant has as much as it may have of something; the message says so."""

    def __init__(self, quota: str, message: str) -> None:
        """`quota` is the name of the setting."""
        super().__init__(quota, message)
        self.quota, self.message = quota, message


@dataclass(frozen=True)
class Room:
    """What all datastores of a tenant may have together; None for no limit."""

    datastores: int | None = None
    entries: int | None = None


@dataclass(frozen=True)
class ResolvedDatastore:
    """A datastore, resolved: its shards, and how their answers are weighted."""

    key: str
    """Changes whenever the datastore does."""
    uid: str
    """Changes only when another datastore takes the name."""
    retriever: ShardedRetriever
    knn: KNN
    both: KNN
    attention: RetrievedAttention
    whole: np.ndarray | None
    """(N,) entries whose windows are read without a search, for a small datastore."""
    phrases: Path | None = None
    """Where it lies, if its documents are phrases."""
    worded: Path | None = None
    """Where it lies, if any of its documents says how it is written or what it weighs."""
    tenant: str = ""
    """Whose it is."""
    spotted: Path | None = None
    """Where it lies, if it has phrases or terms, that are spotted."""
    spelled: bool = False
    """Whether each of them can be spotted: none is told in IPA."""


@dataclass(frozen=True)
class PhraseList:
    """Phrases that came with a request, as entries, or to be spotted as their wordings alone; `key`
    is a digest of them.

    They lie in the object store once, however many segments of an upload need them.
    """

    key: str
    segment: ObjectRef
    """Of a `Segment`."""
    tenant: str = ""
    """Whose they are."""
    spotted: bool = False
    """Whether they are to be spotted, and there are no entries."""


@dataclass(frozen=True)
class EncodedSegment:
    """The units (or frames) of a segment (T,), and which of them are not in a pause."""

    units: Encoded
    audible: np.ndarray
    start: float
    """When the units begin, seconds from the segment's start."""
    speech: float | None = None
    """How likely it is that anybody speaks; None where nobody asked."""


@dataclass(frozen=True)
class OutputOptions:
    """How a segment's text is chosen, and what comes with it."""

    temperature: float = 0.0
    timed: bool = False
    """Whether words get their times."""
    evidence: bool = False
    """Whether words get their sources."""


@dataclass(frozen=True)
class DecodeRequest:
    """A segment of speech to transcribe."""

    units: Encoded
    audible: np.ndarray | None = None
    """As in `EncodedSegment`."""
    mode: RetrievalMode = "none"
    datastore: ResolvedDatastore | None = None
    phrases: PhraseList | None = None
    shortlist: int | None = None
    """Phrases that are listened for at most, of those of the datastore or the list; 0: all of them;
    None: a few where there are more than are read whole."""
    output: OutputOptions = field(default_factory=OutputOptions)
    begins: str = ""
    """Whole words that the transcript begins with, whatever is heard."""

    @property
    def size(self) -> int | None:
        """Bytes of its arrays; None with phrases, whose reference is not sent by value."""
        if self.phrases is not None:
            return None
        arrays = [self.audible, self.datastore and self.datastore.whole]
        return weight(self.units) + sum(array.nbytes for array in arrays if array is not None)


@dataclass(frozen=True)
class DecodeResult:
    """A segment transcribed."""

    text: str
    words: tuple[Word, ...]
    tokens: tuple[int, ...]
    ends: tuple[int, ...]
    """Index into `tokens` just past each word's last one."""
    mean_logp: float
    """Mean log-probability of its tokens, nats."""
    stopped: bool
    """False where it ran into its length limit."""
    confidence: float | None
    """Share of its words that is expected to be right; None where nobody calibrated."""
    unclear: bool
    """Whether that is too little to rely on them."""
    missing_shards: int = 0
    logps: tuple[float, ...] = ()
    """Log-probability of each of `tokens`, nats."""
    heard: int = 0
    """Units, or frames, of speech that the model was given."""
    language: str | None = None
    """What is spoken, by ISO 639-1, where the model found that out for itself."""
    display: Display = field(default_factory=Display)
    """How the entries in it are to be written: `text` and `words` are the model's own."""

    def shown(self) -> DecodeResult:
        """The same as it is read, entries written as their owner writes them."""
        found = self.display.met(self.text.split()) if self.display else []
        if not found:
            return self
        ends, at = [], 0
        for first, last, written in found if self.ends else []:
            same = len(written) == last - first
            own = self.ends[first:last] if same else [self.ends[last - 1]] * len(written)
            ends += [*self.ends[at:first], *own]
            at = last
        return replace(
            self,
            text=self.display.of_text(self.text),
            words=self.display.of_words(self.words),
            ends=(*ends, *self.ends[at:]),
        )

    def tokens_of(self, first: int, last: int) -> tuple[int, ...]:
        """The tokens of the words `first` to `last`."""
        return self.tokens[self.ends[first - 1] if first else 0 : self.ends[last]]


@dataclass(frozen=True)
class DatastoreSummary:
    """A datastore as the API shows it."""

    name: str
    entries: int
    documents: int
    audio: str
