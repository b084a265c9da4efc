"""How keys are indexed where `index.kind` is auto: by their number, their width and the memory."""

from __future__ import annotations

import math
from typing import Any

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
"""Of a dimension in scalar codes: the first, if there is memory for so many in lists; else in the
longer codes beside product-quantized ones, as many as there is memory for."""
SCANNED, MOST_SCANNED = 2_000, 30_000
"""Codes that a query is compared with: where tuning begins, and what it may come to. Of several
shards each has fewer of the nearest, so that it begins with fewer."""
REFINED, MOST_REFINED = 16, 64
"""Likewise of the longer codes, for each neighbour asked for."""
RERANKED, MOST_RERANKED = 4, 16
"""Likewise of the keys that are read, where there are product-quantized codes alone."""
CHOSEN, MOST_CHOSEN = 2, 8
"""Likewise, where scalar codes have chosen them, in lists or beside others."""
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
    codes, held, told = _scalar_codes(width, memory) or _product_codes(width, memory)
    sized = {
        "lists": lists,
        "fast_scan": False,
        "probes": probes(SCANNED / math.sqrt(settings.shards), lists, entries),
        **codes,
    }
    why = (
        f"{codes['kind']}: {entries:,} keys in {lists:,} lists ({LISTS}·√N), {width} dimensions in "
        f"{told}: {held + ID_BYTES} of {settings.entry_bytes} bytes an entry"
    )
    return settings.model_copy(update=sized), why


def _scalar_codes(width: int, memory: int) -> tuple[dict[str, Any], int, str] | None:
    """Settings for codes of the most bits a dimension, their bytes and words for them; None where
    there is no memory for that."""
    bits = SCALAR_BITS[0]
    held = scalar.code_bytes(width, bits)
    if held > memory:
        return None
    codes = {"kind": "ivfsq", "residual": True, "scalar_bits": bits, "rerank": CHOSEN}
    return codes, held, f"{held} bytes, {bits} bits each"


def _product_codes(width: int, memory: int) -> tuple[dict[str, Any], int, str]:
    """The same for product-quantized codes, and as long ones beside them as there is memory for."""
    code, turned = _code(width, memory, CODE_DIMENSIONS)
    bits = _bits(width, memory - code)
    if not bits:
        code, turned = _code(width, memory, LONE_CODE_DIMENSIONS)
    longer = scalar.code_bytes(width, bits)
    codes = {
        "kind": "ivfpq",
        "code_bytes": code,
        "turned": turned,
        "residual": turned or width > LONE_CODE_DIMENSIONS * code,
        "scalar_bits": bits,
        "refine": REFINED,
        "rerank": CHOSEN if bits else RERANKED,
    }
    told = f"{code} bytes{' after a rotation' if turned else ''}"
    return codes, code + longer, told + f" and again in {longer}, {bits} bits each" * bool(bits)


def probes(scanned: float, lists: int, entries: int) -> int:
    """Lists to visit for `scanned` codes, if lists are about as long as each other."""
    return max(1, min(lists, round(scanned * lists / max(1, entries))))


def wider(settings: Index, entries: int) -> list[Index]:
    """Settings that find more: twice the codes, the longer codes or the keys that are read, as far
    as each may grow."""
    limits = {"probes": probes(MOST_SCANNED, settings.lists, entries)}
    limits["rerank"] = MOST_CHOSEN if settings.scalar_bits else MOST_RERANKED
    if settings.kind == "ivfpq" and settings.scalar_bits:
        limits["refine"] = MOST_REFINED
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
