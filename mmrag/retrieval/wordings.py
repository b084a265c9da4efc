"""What the segments of a datastore say of documents that were given as entries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from mmrag.retrieval.stored import IDS, StoredSegment
from mmrag.retrieval.wording import Entry


class Wordings:
    """The entries that documents are; read where they are asked for."""

    def __init__(
        self, segments: Sequence[StoredSegment], starts: np.ndarray, deleted: np.ndarray
    ) -> None:
        """`starts` is where each segment's entries begin, `deleted` (M,) those that are gone."""
        pairs = zip(segments, starts.tolist(), strict=False)
        self._segments = [(one, start) for one, start in pairs if one.worded]
        self._deleted = deleted

    def __bool__(self) -> bool:
        """Whether any document was given as an entry."""
        return bool(self._segments)

    def __call__(self, documents: Iterable[str] | None = None, about: str = "") -> dict[str, Entry]:
        """The entries that documents are, by their names, of those that were given as entries and
        are not deleted; of all in order of appearance, or of these `documents`, or of those that
        have a field `about`."""
        wanted = None if documents is None else set(documents)
        found: dict[int, Entry] = {}
        for one, start in self._segments:
            if wanted is None:
                local = one.with_wordings(f'"{about}"' if about else "")
            else:
                known = [at for name in wanted if (at := one.document(name)) is not None]
                local = np.array(known, np.int64)
            for at in self._living(one, start, local).tolist():
                if worded := one.wording(at):
                    found[int(one.arrays[IDS][at])] = worded  # the latest
        return {one.text: one for _, one in sorted(found.items())}

    def pronunciations(self) -> dict[str, tuple[str, ...]]:
        """How the documents that have pronunciations are said."""
        return {name: one.pronunciations for name, one in self(about="pronunciations").items()}

    def weights(self) -> tuple[np.ndarray, np.ndarray]:
        """The entries (M,) int64 that weigh more or less than one, ascending, and what they weigh
        (M,) float32; the deleted ones too."""
        entries, weights = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
        for one, start in self._segments:
            if (one.arrays["wording_weights"] != 1).any():
                own = one.weights()
                at = np.flatnonzero(own != 1)
                entries.append(start + at)
                weights.append(own[at])
        return np.concatenate(entries), np.concatenate(weights)

    def _living(self, one: StoredSegment, start: int, documents: np.ndarray) -> np.ndarray:
        """Of documents (M,) of a segment, those with entries in it that are not deleted."""
        if not len(documents):
            return documents
        owners = one.arrays["utterance_documents"][one.arrays["utterances"]]
        rows = np.flatnonzero(np.isin(owners, documents))
        place = np.searchsorted(self._deleted, start + rows)
        gone = np.append(self._deleted, -1)[place] == start + rows
        return np.unique(owners[rows[~gone]])
