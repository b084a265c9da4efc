"""How texts are pronounced, remembered for each tenant by itself: the time of an answer tells of
nobody else's.
"""

from __future__ import annotations

from collections import OrderedDict

from mmrag.corpora.voices.espeak import Synthesizer
from mmrag.retrieval.shortlist import Remembered

TENANTS = 32
"""Tenants whose texts are remembered: those that asked last."""


class Pronouncing:
    """Says every tenant's texts, each of them once."""

    def __init__(self) -> None:
        self._of: OrderedDict[str, Remembered] = OrderedDict()

    def of(self, tenant: str) -> Remembered:
        """What says the texts of a tenant."""
        if tenant not in self._of:
            self._of[tenant] = Remembered(lambda texts: Synthesizer().pronounce(texts))
        self._of.move_to_end(tenant)
        while len(self._of) > TENANTS:
            self._of.popitem(last=False)
        return self._of[tenant]
