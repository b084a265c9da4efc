"""How keys are indexed where `index.kind` is auto: by their number, their width and the memory."""

from __future__ import annotations

import math

from mmrag.config import Index
from mmrag.retrieval import scalar
from mmrag.retrieval.ivf import TURNED_DIMENSIONS

FLAT_ENTRIES = 20_000
"""So many keys are compared one by one within a millisecond or two."""
LISTS = 4
"""Inverted lists, times the square root of the entries."""
LISTS_MULTIPLE = 64
ID_BYTES = 8
"""Of an entry in an inverted list, beside its code."""
CODE_DIMENSIONS = 4
"""Dimensions for a byte of a code, if the memory allows it and longer codes beside it."""
LONE_CODE_DIMENSIONS = 2
"""The same where there is no memory for longer ones."""
SCALAR_BITS = (8, 6, 4)
"""Of a dimension in the longer codes: as many as the memory allows."""
SCANNED, MOST_SCANNED = 2_000, 30_000
"""Codes that a query is compared with: where tuning begins, and what it may come to."""
REFINED, MOST_REFINED = 16, 64
"""Likewise of the longer codes, for each neighbour asked for."""
RERANKED, MOST_RERANKED = 4, 16
"""Likewise of the keys that are read, where there are no longer codes."""
CHOSEN, MOST_CHOSEN = 2, 8
"""Likewise, where longer codes have chosen them."""
GOOD_RECALL = 0.96
"""Where tuning ends before that."""
LEAST_GAIN = 0.01
"""Of recall: what twice as much of something has to find more, or tuning ends."""


def chosen(settings: Index, entries: int, width: int) -> tuple[Index, str]:
    """Settings for so many keys of that width, and why. Those of another kind than auto stay."""
    if settings.kind != "auto":
        return settings, f"{settings.kind}, as the settings say"
    if entries <= FLAT_ENTRIES:
        told = f"flat: {entries:,} keys are soon compared one by one"
        return settings.model_copy(update={"kind": "flat"}), told
    lists = LISTS_MULTIPLE * max(1, round(LISTS * math.sqrt(entries) / LISTS_MULTIPLE))
    memory = max(1, settings.entry_bytes - ID_BYTES)
    code, turned = _code(width, memory, CODE_DIMENSIONS)
    bits = _bits(width, memory - code)
    if not bits:
        code, turned = _code(width, memory, LONE_CODE_DIMENSIONS)
    sized = {
        "kind": "ivfpq",
        "lists": lists,
        "code_bytes": code,
        "turned": turned,
        "residual": turned or width > LONE_CODE_DIMENSIONS * code,
        "fast_scan": False,
        "scalar_bits": bits,
        "probes": probes(SCANNED, lists, entries),
        "refine": REFINED,
        "rerank": CHOSEN if bits else RERANKED,
    }
    longer = scalar.code_bytes(width, bits)
    told = (
        f"ivfpq: {entries:,} keys in {lists:,} lists ({LISTS}·√N), {width} dimensions in {code} "
        f"bytes{' after a rotation' if turned else ''}"
        f"{f' and again in {longer}, {bits} bits each' if bits else ''}: "
        f"{code + longer + ID_BYTES} of {settings.entry_bytes} bytes an entry"
    )
    return settings.model_copy(update=sized), told


def probes(scanned: int, lists: int, entries: int) -> int:
    """Lists to visit for `scanned` codes, if lists are about as long as each other."""
    return max(1, min(lists, round(scanned * lists / max(1, entries))))


def wider(settings: Index, entries: int) -> list[Index]:
    """Settings that find more: twice the codes, the longer codes or the keys that are read, as far
    as each may grow."""
    limits = {"probes": probes(MOST_SCANNED, settings.lists, entries)}
    if settings.scalar_bits:
        limits |= {"refine": MOST_REFINED, "rerank": MOST_CHOSEN}
    else:
        limits["rerank"] = MOST_RERANKED
    grown = []
    for name, most in limits.items():
        value = getattr(settings, name)
        if value < most:
            grown.append(settings.model_copy(update={name: min(most, 2 * value)}))
    return grown


def _code(width: int, most: int, dimensions: int) -> tuple[int, bool]:
    """Bytes of a code, `dimensions` in each if it may be so long, and whether keys are turned into
    fewer dimensions first."""
    wanted = min(most, max(1, width // dimensions))
    whole = max(each for each in range(1, wanted + 1) if width % each == 0)
    if whole * TURNED_DIMENSIONS >= width:
        return whole, False
    return min(most, width // TURNED_DIMENSIONS), True


def _bits(width: int, memory: int) -> int:
    """Bits a dimension of the longer codes that so many bytes hold; 0 if none do."""
    fitting = (bits for bits in SCALAR_BITS if scalar.code_bytes(width, bits) <= memory)
    return next(fitting, 0)
