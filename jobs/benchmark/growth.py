"""Plots of how time grows: of a query with the entries that are searched, of a decoding step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png")


def check(path: Path) -> None:
    """ValueError unless a plot can be written there."""
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: a plot's name ends in {' or '.join(FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: there is no directory {path.absolute().parent}")


def plot(path: Path, growth: Sequence[Mapping[str, Any]]) -> None:
    """Write `figure`; the path's suffix says in which format."""
    figure(growth).savefig(path, dpi=150)


def figure(growth: Sequence[Mapping[str, Any]]) -> Figure:
    """Milliseconds a query against entries, both on logarithmic axes: of comparing every key, of
    the index, and as the root of the entries would have it."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    entries = np.array([one["entries"] for one in growth])
    ours = np.array([one["ms_a_query"] for one in growth])
    drawn = Figure(figsize=(7, 4.4), layout="constrained")
    axes = drawn.subplots()
    lines = (
        ("every key compared", [one["flat_ms_a_query"] for one in growth], "#9aa5b1", "o-"),
        ("the index of kind auto", ours, "#2f6db3", "o-"),
        ("in proportion to √N", ours[0] * np.sqrt(entries / entries[0]), "#c2410c", "--"),
    )
    for name, times, colour, style in lines:
        axes.plot(entries, times, style, color=colour, label=name, linewidth=2)
    for times, colour, below in ((lines[0][1], "#5f6b78", False), (ours, "#2f6db3", True)):
        for at, time in zip(entries, times, strict=True):
            place = {"xytext": (0, -19 if below else 9), "textcoords": "offset points"}
            axes.annotate(f"{time:.3g}", (at, time), **place, ha="center", color=colour)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(x=0.08, y=0.15)
    axes.set_xticks(entries, [f"{count:,}" for count in entries])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("entries of one shard")
    axes.set_ylabel("milliseconds a query, one core")
    axes.grid(which="major", color="#e3e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return drawn


def panels(grown: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Milliseconds a decoding step against each thing that grows, on logarithmic axes, with the
    line whose slope is the exponent."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    drawn = Figure(figsize=(10, 6.4), layout="constrained")
    places = drawn.subplots(2, -(-len(grown) // 2), squeeze=False).ravel()
    for axes, one in zip(places, grown.values(), strict=False):
        sizes, times = np.array(one["sizes"], float), np.array(one["ms"])
        level = np.exp(np.mean(np.log(times)) - one["exponent"] * np.mean(np.log(sizes)))
        line = level * sizes ** one["exponent"]
        axes.plot(sizes, times, "o-", color="#2f6db3", linewidth=2)
        axes.plot(sizes, line, "--", color="#c2410c", label=f"N^{one['exponent']:.2f}")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(times.min() / 2, times.max() * 2)
        axes.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_yticks(times[[0, -1]], [f"{time:.3g}" for time in times[[0, -1]]])
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
        axes.set_xlabel(one["title"])
        axes.set_ylabel("ms a step")
        axes.grid(which="major", color="#e3e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return drawn
