"""What the rows of a batch look up, from step to step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmrag.records import Neighbours
from mmrag.retrieval.interpolation import Retrieval, retrieve_each


class RowSearches:
    """The retrieval of each row of a batch, or none."""

    def __init__(self, retrievals: Sequence[Retrieval | None]) -> None:
        self._retrievals = list(retrievals)

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, which may repeat."""
        self._retrievals = [self._retrievals[row] for row in rows]

    def join(self, other: RowSearches) -> None:
        """Go on with the rows of `other`, too."""
        self._retrievals += other._retrievals

    def retrieve(
        self,
        lm_logp: Tensor,
        keys: Tensor,
        chosen: Sequence[int],
        exclude_documents: Sequence[int] | None,
    ) -> tuple[Tensor, Neighbours, list[int]]:
        """As `retrieve_each`; `chosen` is the token that each row chose in the step before, -1 at
        the first."""
        return retrieve_each(lm_logp, keys, self._retrievals, exclude_documents)
