"""Places for what is done at a time, shared among tenants: who has much leaves room for others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

KEPT_SHARE = 4
"""One place in so many is kept for tenants that have less than their share."""


class Places:
    """So many of them. Where there are several tenants, one that has its equal share of the places
    takes no more of the last quarter (at least one): load of its own never shuts others out, and
    those reach their share as its places become free."""

    def __init__(self, total: int, tenants: Callable[[], int]) -> None:
        """`tenants` says how many there are."""
        self.total = total
        self._tenants = tenants
        self._taken: Counter[str] = Counter()

    @property
    def taken(self) -> int:
        """How many are not free."""
        return self._taken.total()

    def has_room(self, tenant: str) -> bool:
        """Whether the tenant may take one now."""
        free = self.total - self.taken
        if free <= 0 or self._tenants() < 2:
            return free > 0
        at_work = len({*self._taken, tenant})
        share = max(1, self.total // max(2, at_work))
        kept = max(1, self.total // KEPT_SHARE)
        return free > kept or self._taken[tenant] < share

    def take(self, tenant: str) -> None:
        """One is taken, whether there was room or not."""
        self._taken[tenant] += 1

    def leave(self, tenant: str) -> None:
        """One is free again."""
        self._taken[tenant] -= 1
        self._taken += Counter()  # who has none is forgotten
