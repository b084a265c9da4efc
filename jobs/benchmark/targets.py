"""Targets, what the service's are, and its measurements as people read them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

TAIL_LOAD, OVERLOAD, STEADY_LOAD = 0.7, 4.0, 0.5
"""Shares of saturation at which tails are measured, requests are refused and processes killed."""


@dataclass(frozen=True)
class Target:
    """What a measurement should show: in words, and of its result whether it does."""

    title: str
    wanted: str
    met: Callable[[Any], bool]
    shown: Callable[[Any], str]


TARGETS = {
    "serve.throughput_vs_engine": Target(
        "requests a second, against one plain process",
        "≥ 0.90",
        lambda ratio: ratio >= 0.90,
        lambda ratio: f"{ratio:.2f}",
    ),
    "serve.added_latency_ms": Target(
        "time added to a lone request's median",
        "≤ 15 ms",
        lambda added: added <= 15,
        lambda added: f"{added:.1f} ms",
    ),
    "serve.p99_over_p50": Target(
        f"99th percentile over median, random arrivals at {TAIL_LOAD:.0%} of saturation",
        "≤ 3",
        lambda ratio: ratio <= 3,
        lambda ratio: f"{ratio:.2f}",
    ),
    "realtime.sessions": Target(
        "people who speak at a time, transcripts within 1 s of the end of a turn",
        "≥ 20",
        lambda sessions: sessions >= 20,
        str,
    ),
    "realtime.final_ms": Target(
        "time from the end of a turn to its transcript, 95th percentile",
        "≤ 300 ms",
        lambda final: final <= 300,
        lambda final: f"{final:.0f} ms",
    ),
    "serve.autoscale": Target(
        "a step of load: decoder replicas, failed requests",
        "1 → 2 → 1, 0 failed",
        lambda r: [count for _, count in r["replicas"]] == [1, 2, 1] and not r["failed"],
        lambda r: (
            f"{' → '.join(str(count) for _, count in r['replicas'])}, "
            f"{r['failed']} of {r['requests']} failed"
        ),
    ),
    "serve.overload": Target(
        f"{OVERLOAD:g} × saturation: answers, median of the accepted over that at saturation",
        "200 or 429 alone, ≤ 2",
        lambda r: set(r["statuses"]) <= {"200", "429"} and (r["p50_over_saturation"] or 9) <= 2,
        lambda r: (
            f"{_counts(r['statuses'])}; {_or_dash(r['p50_over_saturation'])}; "
            f"memory {_or_dash(r['start_mb'])} → {_or_dash(r['peak_mb'])} MB"
        ),
    ),
    "serve.faults": Target(
        f"processes killed at {STEADY_LOAD:.0%} of saturation: requests lost",
        "0",
        lambda r: r["lost"] == 0 and all(one["recovered_s"] for one in r["killed"].values()),
        lambda r: f"{r['lost']} of {sum(r['statuses'].values())}; {_counts(r['statuses'])}",
    ),
}


def rounded(value: Any) -> Any:
    """Numbers with as many digits as they are good for."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list | tuple) else value


def verdict(target: Target, result: Any) -> str:
    """Whether a result meets its target, in words."""
    return "not measured" if result is None else "met" if target.met(result) else "missed"


def compared(targets: Mapping[str, Target], results: Mapping[str, Any]) -> Table:
    """A row a target: what was measured, what should have been, and whether it is."""
    rows = table("Targets", "", "measured", "target", "")
    for key, target in targets.items():
        shown = "–" if results[key] is None else target.shown(results[key])
        told = shown, target.wanted, verdict(target, results[key])
        rows.add_row(f"{key}\n{escape(target.title)}", *told)
    return rows


def show(results: Mapping[str, Any]) -> None:
    """Tables for people."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    if "machine" in results:
        about = results["machine"]
        threads = ", ".join(f"{part} {count}" for part, count in about["torch_threads"].items())
        console.print(
            f"{about['model']} on {about['cores']} cores; threads: {threads}; {about['rows']} rows"
        )
    speeds = table("Requests", "where", "at a time", "a second", "p50", "p95", "p99", "× real time")
    rows = [(one["way"], one) for one in results.get("plain", {}).get("levels", ())]
    rows += [("service", one) for one in results["levels"]]
    for where, one in rows:
        times = [f"{one[f'p{share}_ms']:.0f} ms" for share in (50, 95, 99)]
        rate, factor = f"{one['requests_per_second']:.1f}", f"{one['real_time_factor']:.3f}"
        speeds.add_row(where, str(one["concurrency"]), rate, *times, factor)
    console.print(speeds)
    if (first := results.get("first")) is not None:
        console.print(
            "a service's first request: {first_ms:.0f} ms, its tenth: {tenth_ms:.0f} ms "
            "(the median of nine more: {again_ms:.0f} ms)".format(**first)
        )
    rate, told = results["tail"]["rate"], _counts(results["tail"]["statuses"])
    console.print(f"random arrivals, {rate:.1f} a second: {told}")
    for victim, one in ((results["serve.faults"] or {}).get("killed") or {}).items():
        again = "did not come again" if not (s := one["recovered_s"]) else f"again after {s:.1f} s"
        slowest = f"slowest answer {one['slowest_s']:.1f} s"
        console.print(f"{victim} killed: {again}; {_counts(one['statuses'])}; {slowest}")
    if (live := results.get("realtime.wer_between")) is not None:
        console.print(
            f"live transcripts of {results['realtime.playings']} clips: "
            f"{_wer(results['realtime.wer'])} of their words wrong, "
            f"{_wer(results['realtime.wer_file'])} of the same as files; "
            f"the two differ in {_wer(live)}"
        )
    if "transcripts_compared" in results:
        told = results["transcripts_that_differ"], results["transcripts_compared"]
        console.print("{} of {} transcripts differ from the plain process's\n".format(*told))
    console.print(compared(TARGETS, results))


def table(title: str, *columns: str) -> Table:
    """An empty one."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for column in columns:
        made.add_column(column)
    return made


def _counts(found: Mapping[str, int]) -> str:
    return ", ".join(f"{status}: {count}" for status, count in found.items())


def _wer(found: Mapping[str, Any] | None) -> str:
    """A word error rate and its interval."""
    return "–" if found is None else "{rate:.1%} ({low:.1%} to {high:.1%})".format(**found)


def _or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
