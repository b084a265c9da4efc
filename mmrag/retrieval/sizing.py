"""How keys are indexed where `index.kind` is auto: by their number, their width and the memory."""

from __future__ import annotations

import math

from mmrag.config import Index
from mmrag.retrieval.ivf import TURNED_DIMENSIONS

FLAT_ENTRIES = 20_000
"""So many keys are compared one by one within a millisecond or two."""
LISTS = 4
"""Inverted lists, times the square root of the entries."""
LISTS_MULTIPLE = 64
ID_BYTES = 8
"""Of an entry in an inverted list, beside its code."""
CODE_DIMENSIONS = 2
"""Dimensions for a byte of a code, if the memory allows it."""
SCANNED, MOST_SCANNED = 2_000, 30_000
"""Codes that a query is compared with: where tuning begins, and what it may come to."""
RERANKED, MOST_RERANKED = 4, 16
"""Likewise of the keys that are read for each neighbour asked for."""
GIVEN = "as the settings say"
"""Why a kind was chosen that is not auto's choice."""
GOOD_RECALL = 0.97
"""Where tuning ends before that."""


def chosen(settings: Index, entries: int, width: int) -> tuple[Index, str]:
    """Settings for so many keys of that width, and why. Those of another kind than auto stay."""
    if settings.kind != "auto":
        return settings, f"{settings.kind}, {GIVEN}"
    if entries <= FLAT_ENTRIES:
        told = f"flat: {entries:,} keys are soon compared one by one"
        return settings.model_copy(update={"kind": "flat"}), told
    lists = LISTS_MULTIPLE * max(1, round(LISTS * math.sqrt(entries) / LISTS_MULTIPLE))
    code, turned = _code(width, max(1, settings.entry_bytes - ID_BYTES))
    sized = {
        "kind": "ivfpq",
        "lists": lists,
        "code_bytes": code,
        "turned": turned,
        "residual": turned or width > CODE_DIMENSIONS * code,
        "probes": probes(SCANNED, lists, entries),
        "rerank": RERANKED,
    }
    told = (
        f"ivfpq: {entries:,} keys in {lists:,} lists ({LISTS}·√N), {width} dimensions in {code} "
        f"bytes{' after a rotation' if turned else ''}: {code + ID_BYTES} of "
        f"{settings.entry_bytes} bytes an entry"
    )
    return settings.model_copy(update=sized), told


def probes(scanned: int, lists: int, entries: int) -> int:
    """Lists to visit for `scanned` codes, if lists are about as long as each other."""
    return max(1, min(lists, round(scanned * lists / max(1, entries))))


def wider(settings: Index, entries: int) -> list[Index]:
    """Settings that find more: twice the codes, or twice the keys that are read, as far as either
    may grow."""
    most = probes(MOST_SCANNED, settings.lists, entries)
    grown = []
    if settings.probes < most:
        grown.append({"probes": min(most, 2 * settings.probes)})
    if settings.rerank < MOST_RERANKED:
        grown.append({"rerank": min(MOST_RERANKED, 2 * settings.rerank)})
    return [settings.model_copy(update=each) for each in grown]


def _code(width: int, most: int) -> tuple[int, bool]:
    """Bytes of a code, and whether keys are turned into fewer dimensions first."""
    wanted = min(most, max(1, width // CODE_DIMENSIONS))
    whole = max(each for each in range(1, wanted + 1) if width % each == 0)
    if whole * TURNED_DIMENSIONS >= width:
        return whole, False
    return min(most, width // TURNED_DIMENSIONS), True
