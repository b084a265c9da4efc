"""The ledger: what all replicas of the ingress count together, and what tenants have used by day.

One actor holds it for the service. What a replica has reported is on the disk when it is answered,
with the report's number: a report that is made again, because its answer was lost, counts once.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.idling import Idling, asked
from mmrag import durable
from serve.access.usage import Bucket, Others, Report, Used

KEPT_DAYS = 400
"""Days of which usage is kept, for each tenant."""
KEPT_REPORTS = 32
"""Replicas whose last report's number is kept: those that reported last."""
GONE_SECONDS = 5.0
"""After which a replica that does not report has nothing in flight any more."""
log = logging.getLogger("ray.serve")


@dataclass
class _Page:
    """What one tenant has used."""

    days: dict[str, Used] = field(default_factory=dict)
    reports: dict[str, int] = field(default_factory=dict)
    """Replica -> the number of the last of its reports that is counted."""


class Ledger:
    """Counts of every replica of the ingress."""

    def __init__(self, directory: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        """Usage is kept in `directory`, a file a tenant; None: until the process ends."""
        self._directory = directory
        self._clock = clock
        self._pages: dict[str, _Page] = {}
        self._buckets: dict[str, Bucket] = {}
        self._live: dict[str, tuple[float, dict[str, dict[str, int]]]] = {}
        """Replica -> when it last reported, and what it has in flight."""
        if directory is not None:
            durable.make_directory(directory)

    def report(self, replica: str, number: int, report: Report) -> Others:
        """Count what a replica reports, and tell it what the others have."""
        now = self._clock()
        self._live = {
            name: (when, live)
            for name, (when, live) in self._live.items()
            if now - when < GONE_SECONDS
        }
        self._live[replica] = now, report.live
        for tenant, taken in report.audio.items():
            if tenant not in self._buckets or len(self._live) == 1:
                # It is new, or this process is, or nobody else takes any: the replica knows best.
                self._buckets[tenant] = Bucket(taken.missing, now)
                continue
            self._buckets[tenant].missing(taken.most, now)
            self._buckets[tenant].take(taken.seconds)
        for tenant, used in report.used.items():
            self._count(tenant, replica, number, report.day, used)
        return Others(self._elsewhere(replica), {n: b.lacks for n, b in self._buckets.items()})

    def usage(self, tenant: str) -> dict[str, Used]:
        """Day -> what a tenant used, the last day first."""
        return dict(sorted(self._page(tenant).days.items(), reverse=True))

    def _elsewhere(self, replica: str) -> dict[str, dict[str, int]]:
        """Tenant -> what the other replicas have in flight."""
        found: dict[str, dict[str, int]] = {}
        for name, (_, live) in self._live.items():
            if name != replica:
                for tenant, counts in live.items():
                    sums = found.setdefault(tenant, {})
                    for what, count in counts.items():
                        sums[what] = sums.get(what, 0) + count
        return found

    def _count(self, tenant: str, replica: str, number: int, day: str, used: Used) -> None:
        page = self._page(tenant)
        if page.reports.get(replica, -1) >= number:
            return
        page.reports.pop(replica, None)
        page.reports = dict(list(page.reports.items())[1 - KEPT_REPORTS :]) | {replica: number}
        page.days[day] = page.days.get(day, Used()) + used
        page.days = dict(sorted(page.days.items())[-KEPT_DAYS:])
        if self._directory is not None:
            days = {name: asdict(one) for name, one in page.days.items()}
            text = json.dumps({"days": days, "reports": page.reports})
            durable.write_text(self._directory / f"{tenant}.json", text)

    def _page(self, tenant: str) -> _Page:
        if tenant not in self._pages:
            self._pages[tenant] = self._read(tenant)
        return self._pages[tenant]

    def _read(self, tenant: str) -> _Page:
        path = self._directory and self._directory / f"{tenant}.json"
        if path is None or not path.exists():
            return _Page()
        try:
            kept: dict[str, Any] = json.loads(path.read_text())
            days = {day: Used(**used) for day, used in kept["days"].items()}
            return _Page(days, kept["reports"])
        except (ValueError, KeyError, TypeError):  # whoever wrote it: it is kept aside
            log.error("%s is no record of usage: it is put aside, and counts begin anew", path)
            path.rename(path.with_suffix(".unreadable"))
            return _Page()


class LedgerActor(Idling):
    """The ledger in a process of its own; it ends when no replica has reported for long."""

    def __init__(self, directory: Path, idle_seconds: float) -> None:
        self._ledger = Ledger(directory)
        self._end_when_idle(idle_seconds)

    @asked
    def report(self, replica: str, number: int, report: Report) -> Others:
        """As `Ledger.report`."""
        return self._ledger.report(replica, number, report)

    @asked
    def usage(self, tenant: str) -> dict[str, Used]:
        """As `Ledger.usage`."""
        return self._ledger.usage(tenant)
