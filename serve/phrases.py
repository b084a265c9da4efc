"""The phrases that come with requests: spoken and read once, and remembered for each tenant by
itself, so that the time of an answer tells of nobody else's.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from mmrag.retrieval.phrases import WINDOW
from mmrag.retrieval.segment import Segment, join
from mmrag.retrieval.wording import Entry, entries
from serve import shelf
from serve.additions import Additions
from serve.messages import InvalidRequest

REMEMBERED = 20_000
"""Phrases of requests that a replica keeps, spoken and read, of all tenants together."""
Way = tuple[Entry, bool]
"""What of a phrase is heard, and whether it was said in a hurry."""


class SpokenPhrases:
    """Those of every tenant."""

    def __init__(self, additions: Additions, width: int) -> None:
        """`width` is that of a key."""
        self._additions = additions
        self._width = width
        self._kept: defaultdict[str, OrderedDict[Way, Segment]] = defaultdict(OrderedDict)

    async def of(self, given: Sequence[Entry], tenant: str) -> tuple[str, Segment]:
        """Phrases for one request as entries, and a digest of them and of whose they are.

        Each is spoken and read the first time that the tenant sends it, and kept: a request that
        was given up goes on there when it is made again. Those that were never said by the voices
        that are set are said in a hurry where they are too many, and by those voices once they come
        in a shorter list. What weighs nothing is not spoken. Raises InvalidRequest for one that
        cannot be.
        """
        given, kept = entries(given), self._kept[tenant]
        told = {one.text: one.spoken for one in given if one.weight > 0}
        unsaid = [one for one in told.values() if (one, False) not in kept]
        hurried = self._additions.hurried(unsaid)
        ways: dict[Entry, Way] = {one: (one, False) for one in told.values()}
        if hurried:
            ways |= {one: (one, True) for one in unsaid}
        found = {way: kept[way] for way in ways.values() if way in kept}
        new = [one for one, way in ways.items() if way not in found]

        def keep(made: dict[str, Segment]) -> None:
            spoken = {ways[told[text]]: segment for text, segment in made.items()}
            kept.update(spoken)
            found.update(spoken)

        await self._additions.phrases(new, keep, hurried)
        if missing := [text for text, one in told.items() if ways[one] not in found]:
            raise InvalidRequest(f"nothing to listen for in {missing[0]!r}")
        for way in ways.values():
            kept[way] = found[way]
            kept.move_to_end(way)
        shelf.forget(self._kept, REMEMBERED)
        quickly = [text for text, one in told.items() if ways[one][1]]
        segments = [Segment.empty(self._width, WINDOW), *(found[way] for way in ways.values())]
        joined = await asyncio.to_thread(join, segments)
        worded = replace(joined, wordings={one.text: one for one in given})
        return _digest(given, tenant, quickly), worded

    def worded(self, given: Sequence[Entry], tenant: str) -> tuple[str, Segment]:
        """As `of`, of phrases that nobody has to say: no entries, and how they are worded."""
        given = entries(given)
        wordings = {one.text: one for one in given}
        empty = replace(Segment.empty(self._width, WINDOW), wordings=wordings)
        return _digest(given, tenant, "worded"), empty


def _digest(given: Sequence[Entry], tenant: str, how: object) -> str:
    fields = json.dumps([tenant, [one.fields() for one in given], how])
    return hashlib.sha256(fields.encode()).hexdigest()
