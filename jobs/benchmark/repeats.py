"""Ways to do the same thing, timed in turn and more than once: medians, and how far they spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jobs.benchmark.targets import Target


def interleaved(
    ways: Mapping[str, Callable[[], object]], repeats: int, tell: Callable[[str], None]
) -> dict[str, list[float]]:
    """Seconds of each way, repeat by repeat; every way has its turn before the next repeat."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
        latest = ", ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items())
        tell(f"  {repeat + 1} of {repeats}: {latest}")
    return seconds


def spread(values: Sequence[float]) -> dict[str, Any]:
    """The median, the least and the most of some values, and how many they are."""
    return {
        "median": float(np.median(values)),
        "least": float(min(values)),
        "most": float(max(values)),
        "repeats": len(values),
    }


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, Any]:
    """`spread` of the quotients of what was measured side by side."""
    return spread([one / other for one, other in zip(above, below, strict=True)])


def worst(measured: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Of several ratios that should be small the largest, and `of` which it is."""
    name = max(measured, key=lambda one: measured[one]["median"])
    return {**measured[name], "of": name, "each": dict(measured)}


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The power of the sizes that the values grow as: a line through their logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def at_least(title: str, wanted: float) -> Target:
    """A ratio's median that should not be below this."""
    return Target(title, f"≥ {wanted:g}", lambda r: r["median"] >= wanted, told)


def at_most(title: str, wanted: float) -> Target:
    """A ratio's median that should not be above this."""
    return Target(title, f"≤ {wanted:g}", lambda r: r["median"] <= wanted, told)


def told(measured: Mapping[str, Any], form: str = "{:.2f}") -> str:
    """As people read it: the median, and the least and the most beside it."""
    middle, least, most = (form.format(measured[name]) for name in ("median", "least", "most"))
    text = f"{middle} ({least} to {most})"
    return f"{text}, {measured['of']}" if "of" in measured else text


def percentiles(times: Sequence[float]) -> dict[str, float | None]:
    """Of milliseconds; None where there are none."""
    return {
        f"p{share}_ms": float(np.percentile(times, share)) if times else None
        for share in (50, 95, 99)
    }
