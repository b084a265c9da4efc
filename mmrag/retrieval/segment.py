"""Entries in memory: what a datastore's segment holds, and its keys' distances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mmrag.retrieval.wording import Entry

Metric = Literal["l2", "ip", "cosine"]


class DatastoreError(RuntimeError):
    """A datastore is missing, damaged, or keyed by another model; the message says which."""


@dataclass(frozen=True)
class Description:
    """What a datastore's keys are, and what made them."""

    width: int
    """D of a key."""
    window: int
    """W, tokens in an entry's window."""
    metric: Metric
    audio: Literal["paired", "none", "spoken"]
    """Keyed over the utterance's own units, text alone, or units of synthetic speech."""
    identity: dict[str, str]
    """Role (lm, codebook, vocabulary) -> fingerprint of the artifact that made the keys."""


@dataclass(frozen=True)
class Segment:
    """N entries to write. `keys` (N, D), `windows` (N, W), the rest (N,).

    `tokens` is the token that follows each key, `positions` its index among its utterance's
    tokens, `utterances` the index of its utterance in `names`: (utterance, document) pairs.
    """

    keys: np.ndarray
    tokens: np.ndarray
    windows: np.ndarray
    positions: np.ndarray
    utterances: np.ndarray
    names: Sequence[tuple[str, str]]
    wordings: Mapping[str, Entry] = field(default_factory=dict)
    """Document -> the entry that it is, for those that were given as one."""
    surprisals: np.ndarray | None = None
    """How little the model expects each token from the words before it alone, nats; None where
    nobody asked."""

    @classmethod
    def empty(cls, width: int, window: int) -> Segment:
        """A segment without entries."""
        none = np.empty(0, np.int32)
        keys, windows = np.empty((0, width), np.float32), np.empty((0, window), np.int32)
        return cls(keys, none, windows, none, none, ())

    def expected(self) -> np.ndarray:
        """The `surprisals`; where nobody asked, 0: nothing surprises."""
        if self.surprisals is None:
            return np.zeros(len(self.tokens), np.float16)
        return self.surprisals


def join(segments: Sequence[Segment]) -> Segment:
    """Several segments as one, in order."""
    first_names = np.cumsum([0, *(len(segment.names) for segment in segments)])
    shifted = [s.utterances + first for s, first in zip(segments, first_names, strict=False)]
    return Segment(
        keys=np.concatenate([segment.keys for segment in segments]),
        tokens=np.concatenate([segment.tokens for segment in segments]),
        windows=np.concatenate([segment.windows for segment in segments]),
        positions=np.concatenate([segment.positions for segment in segments]),
        utterances=np.concatenate(shifted),
        names=[name for segment in segments for name in segment.names],
        wordings={name: one for segment in segments for name, one in segment.wordings.items()},
        surprisals=np.concatenate([segment.expected() for segment in segments]),
    )


def prepare(keys: np.ndarray, metric: Metric) -> np.ndarray:
    """Keys, or queries, as they are compared: (N, D) -> (N, D) float32.

    Unit length for cosine, unchanged otherwise. `distances` of prepared vectors is the metric.
    """
    keys = np.asarray(keys, np.float32)
    if metric != "cosine":
        return keys
    lengths = np.linalg.norm(keys, axis=-1, keepdims=True)
    return keys / np.where(lengths > 0, lengths, 1)


def distances(queries: np.ndarray, keys: np.ndarray, metric: Metric) -> np.ndarray:
    """Distance of each query to the key in the same row, both prepared: (M, D) x 2 -> (M,) float32.

    Squared L2 for l2 and for cosine (of unit vectors: 2 - 2 cos), the negated inner product for
    ip. A pair's distance does not depend on the rows around it.
    """
    if metric == "ip":
        return -(queries * keys).sum(axis=1, dtype=np.float32)
    difference = queries - keys
    return (difference * difference).sum(axis=1, dtype=np.float32)


def windows_of(tokens: np.ndarray, window: int) -> np.ndarray:
    """The `window` tokens around each position, padded with 0: (T,) -> (T, W) int32.

    The position itself is column `window // 2`.
    """
    before = window // 2
    padded = np.pad(np.asarray(tokens, np.int32), (before, window - before - 1))
    return padded[np.arange(len(tokens))[:, None] + np.arange(window)]
