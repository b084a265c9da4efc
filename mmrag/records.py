"""What flows between the stages: plain values, and the one protocol that retrieval has to keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from mmrag.storage import Location

NO_ENTRY = -1
"""Entry id of a neighbour that was not found. It never indexes anything."""
NAT_PARTS = 10
"""Parts of a nat in which letters' costs count."""
LEAST_LIKELY = 255
"""The highest cost of a letter."""


@dataclass(frozen=True)
class Timed:
    """A word or a phone that is said; `start` and `end` in seconds from the clip's start."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Utterance:
    """One spoken or written sentence. `audio` is None for text without speech."""

    id: str
    text: str | None = None
    audio: Location | None = None
    duration: float | None = None
    """Seconds, as the corpus states it; None where the audio has not been opened."""
    offset: float | None = None
    """Second of the recording at which it begins; None where it is all there is to hear."""
    speaker: str = ""
    age: float | None = None
    """Of the speaker, years, where the corpus says it."""
    document: str = ""
    """What retrieval excludes as a whole (a book, a call); the utterance's own id by default."""
    domain: str = ""
    entities: tuple[str, ...] = ()
    words: tuple[Timed, ...] = ()
    phones: tuple[Timed, ...] = ()
    """An alignment, where there is one: HuBERT pretraining may learn from it."""


@dataclass(frozen=True)
class Rejection:
    """An input that was left out, and why. `source` is a path, or `path:line` of a manifest."""

    source: str
    reason: str


@dataclass(frozen=True)
class Letters:
    """What a CTC head hears of a clip: how likely each frame of it is which letter.

    `alphabet` of A letters, in which a space is the gap between words. `costs` (F, 1 + A) uint8
    are negative log-probabilities in tenths of a nat, 255 for that and less likely; column 0 is
    the blank, column n letter n - 1.
    """

    alphabet: str
    costs: np.ndarray

    def __post_init__(self) -> None:
        if self.costs.ndim != 2 or self.costs.shape[1] != 1 + len(self.alphabet):
            raise ValueError(
                f"an alphabet of {len(self.alphabet)} letters has costs "
                f"(F, {1 + len(self.alphabet)}), not {self.costs.shape}"
            )
        if self.costs.dtype != np.uint8:
            raise ValueError(f"costs are uint8, not {self.costs.dtype}")

    @classmethod
    def of(cls, alphabet: str, logp: np.ndarray) -> Letters:
        """From log-probabilities (F, 1 + A), each rounded to the nearest tenth of a nat."""
        tenths = np.rint(np.asarray(logp, np.float32) * -NAT_PARTS)
        return cls(alphabet, tenths.clip(0, LEAST_LIKELY).astype(np.uint8))

    def __len__(self) -> int:
        return len(self.costs)

    def logp(self) -> np.ndarray:
        """Log-probabilities (F, 1 + A) float32, off by at most 0.05 nats down to -25.5."""
        return self.costs.astype(np.float32) / -NAT_PARTS


@dataclass(frozen=True)
class Units:
    """Discrete speech: runs of equal codebook ids, collapsed.

    `ids` (T,) int32, no two neighbours equal; `durations` (T,) int32, the length of each run in
    encoder frames. `durations.sum()` frames F make up the clip; `letters` is what a CTC head
    hears in them, None where the encoder has none.
    """

    ids: np.ndarray
    durations: np.ndarray
    letters: Letters | None = None

    def __post_init__(self) -> None:
        if self.ids.shape != self.durations.shape or self.ids.ndim != 1:
            raise ValueError(
                f"units need one duration an id: {self.ids.shape} ids, "
                f"{self.durations.shape} durations"
            )
        if self.letters is not None and len(self.letters) != self.durations.sum():
            raise ValueError(
                f"units of {self.durations.sum()} frames have letters in as many, "
                f"not in {len(self.letters)}: costs {self.letters.costs.shape}"
            )

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Neighbours:
    """What a search found for B queries, nearest first; `missing_shards` did not answer.

    `distances` (B, K) float32, smaller is nearer; `tokens` (B, K) int32, the token that follows
    each key; `entries` (B, K) int64, datastore entry ids; `documents` (B, K) int32. A missing
    neighbour has entry `NO_ENTRY`, distance +inf, token 0 and document -1.
    """

    distances: np.ndarray
    tokens: np.ndarray
    entries: np.ndarray
    documents: np.ndarray
    missing_shards: int = 0

    @classmethod
    def none(cls, queries: int, k: int, missing_shards: int = 0) -> Neighbours:
        """Nothing found for any query."""
        return cls(
            distances=np.full((queries, k), np.inf, np.float32),
            tokens=np.zeros((queries, k), np.int32),
            entries=np.full((queries, k), NO_ENTRY, np.int64),
            documents=np.full((queries, k), -1, np.int32),
            missing_shards=missing_shards,
        )

    def top(self, k: int) -> Neighbours:
        """The first (nearest) k columns."""
        return replace(
            self,
            distances=self.distances[:, :k],
            tokens=self.tokens[:, :k],
            entries=self.entries[:, :k],
            documents=self.documents[:, :k],
        )


@dataclass(frozen=True)
class Passages:
    """M windows of at most W tokens with what the language model knew before each of them.

    `tokens` (M, W) int32, `keys` (M, W, D) float16 the tokens' own retrieval keys, `present`
    (M, W) bool; a window's tokens come first, its padding after them.
    """

    tokens: np.ndarray
    keys: np.ndarray
    present: np.ndarray


def merge(parts: Sequence[Neighbours], k: int) -> Neighbours:
    """The k nearest over several shards' answers to the same queries.

    Ties go to the lower entry id, so the answer does not depend on how entries were sharded.
    """
    distances = np.concatenate([part.distances for part in parts], axis=1)
    entries = np.concatenate([part.entries for part in parts], axis=1)
    order = np.lexsort((entries, distances), axis=1)[:, :k]

    def pick(columns: list[np.ndarray]) -> np.ndarray:
        return np.take_along_axis(np.concatenate(columns, axis=1), order, axis=1)

    return Neighbours(
        distances=np.take_along_axis(distances, order, axis=1),
        tokens=pick([part.tokens for part in parts]),
        entries=np.take_along_axis(entries, order, axis=1),
        documents=pick([part.documents for part in parts]),
        missing_shards=sum(part.missing_shards for part in parts),
    )


class Retriever(Protocol):
    """Nearest-neighbour search over one datastore. Local and sharded retrievers are the same."""

    def search(
        self, queries: np.ndarray, k: int, exclude_documents: Sequence[int] | None = None
    ) -> Neighbours:
        """The k nearest entries to each of `queries` (B, D) float32.

        `exclude_documents` names at most one document a query (B,), -1 for none: its entries are
        not returned to that query.
        """
        ...

    def windows(self, entries: np.ndarray) -> np.ndarray:
        """Token windows (…, W) int32 around `entries` (…,); all padding for `NO_ENTRY`."""
        ...

    def passages(self, entries: np.ndarray) -> Passages:
        """The windows around `entries` (M,), existing ones, each token with its own key."""
        ...

    def origins(self, entries: np.ndarray) -> list[tuple[str, str]]:
        """Document and utterance of `entries` (M,), existing ones; "" twice where unknown."""
        ...


@dataclass(frozen=True)
class Source:
    """Where a retrieved token came from: enough to show a person."""

    entry: int
    distance: float | None
    """From the state that asked to the entry's key; None where nothing was searched."""
    attention: float | None
    """Share of the model's attention that the entry's window got; None without an adapter."""
    document: str
    utterance: str
    text: str
    """The window around the entry, as text."""


@dataclass(frozen=True)
class Line:
    """What a synthesizer is to say where that is more than a text."""

    text: str
    phonetic: bool = False
    """Whether what stands between slashes in `text` is IPA."""
    language: str | None = None
    """Whose voice is to say it (BCP 47); None: as ever."""
    take: int = 0
    """How many others have said it before: each time another voice does."""


@dataclass(frozen=True)
class Word:
    """One word of a transcript with the evidence for it.

    `probability` is the product over its tokens of what they were chosen by: the mixed
    distribution, weighed with the letters that were heard. `lm_probability` is that of the language
    model alone. `changed` says that the language model alone would have chosen
    another token somewhere in the word, after the same prefix.
    """

    text: str
    probability: float
    lm_probability: float
    changed: bool = False
    source: Source | None = None
    start: float | None = None
    """Seconds from the recording's start; None where nobody asked."""
    end: float | None = None
    confidence: float | None = None
    """Probability that the word is right; None where the models are not calibrated."""
    unclear: bool = False
    """Whether its segment is too unsure to rely on."""


@dataclass(frozen=True)
class Transcript:
    """What was said between `start` and `end` (seconds)."""

    text: str
    words: tuple[Word, ...] = ()
    start: float = 0.0
    end: float = 0.0
    stopped: bool = field(default=True)
    """False where the decoder ran into its length limit before the end token."""
    confidence: float | None = None
    """Share of the words that is expected to be right; None where the models are not calibrated."""
    unclear: bool = False
    """Whether `confidence` is too small to rely on the words."""
