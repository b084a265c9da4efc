"""What each tenant has and takes: requests in flight, live sessions, audio; and what it has used.

Every replica of the ingress counts for itself and hears once a second what the others count
(`ledger`): with one replica the limits are exact, with several a tenant may exceed them by what the
others have let in within that second. Audio is a bucket that fills at the quota's rate and holds a
minute of it: whoever sends more at once than it holds may do so when it is full, and waits longer
afterwards.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from serve.access.keys import Caller
from serve.access.usage import MINUTE, Bucket, Others, Report, Taken, Used, today
from serve.errors import ApiError

Live = Literal["requests", "sessions"]


@dataclass
class _Account:
    """What a tenant has just now, here and elsewhere."""

    requests: int = 0
    sessions: int = 0
    elsewhere: dict[str, int] = field(default_factory=dict)
    bucket: Bucket = field(default_factory=Bucket)
    most: float | None = None
    """Seconds of audio a minute, as its last caller had them."""
    taken: float = 0.0
    """Seconds of audio of which the other replicas do not know yet."""

    def total(self, what: Live) -> int:
        """Here and elsewhere."""
        return getattr(self, what) + self.elsewhere.get(what, 0)


class Quotas:
    """The counts of one replica of the ingress."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._accounts: defaultdict[str, _Account] = defaultdict(_Account)
        self._used: defaultdict[str, Used] = defaultdict(Used)

    @contextmanager
    def request(self, caller: Caller) -> Iterator[None]:
        """Count a request as in flight. Raises ApiError (429)."""
        with self._live(caller, "requests"):
            self._used[caller.tenant.name].requests += 1
            yield

    @contextmanager
    def session(self, caller: Caller) -> Iterator[None]:
        """Count a live session. Raises ApiError (429)."""
        with self._live(caller, "sessions"):
            self._used[caller.tenant.name].sessions += 1
            yield

    def audio(self, caller: Caller, seconds: float) -> None:
        """Take seconds of audio out of the tenant's minute. Raises ApiError (429), which says when
        to come again."""
        account = self._accounts[caller.tenant.name]
        most = account.most = caller.tenant.quotas.audio_seconds
        if most is not None:
            missing = account.bucket.missing(most, self._clock())
            if missing + min(seconds, most) > most + 1e-9:
                left, short = max(0.0, most - missing), missing + min(seconds, most) - most
                message = (
                    f"more than {most:g} s of audio a minute: {left:.0f} s are left, and this has "
                    f"{seconds:.0f} s"
                )
                wait = {"Retry-After": str(max(1, math.ceil(short * MINUTE / most)))}
                raise ApiError(429, message, "quota_audio_seconds", headers=wait)
            account.bucket.take(seconds)
            account.taken += seconds
        self._used[caller.tenant.name].audio_seconds += seconds

    def tokens(self, caller: Caller, count: int) -> None:
        """Count tokens of transcripts."""
        self._used[caller.tenant.name].tokens += count

    def headers(self, caller: Caller) -> dict[str, str]:
        """What a caller is told of the quotas that its tenant has, in OpenAI's way."""
        account, quotas = self._accounts[caller.tenant.name], caller.tenant.quotas
        found: dict[str, str] = {}
        if quotas.requests is not None:
            left = max(0, quotas.requests - account.total("requests"))
            found |= _told("requests", quotas.requests, left, 0 if left else 1)
        if quotas.audio_seconds is not None:
            most = quotas.audio_seconds
            missing = account.bucket.missing(most, self._clock())
            left, full = max(0.0, most - missing), missing * MINUTE / most
            found |= _told("audio-seconds", most, left, full)
        return found

    def report(self) -> Report:
        """What the other replicas are to know, and what has been used; `told` ends it."""
        live = {
            name: {"requests": one.requests, "sessions": one.sessions}
            for name, one in self._accounts.items()
        }
        now = self._clock()
        audio = {
            name: Taken(one.taken, one.bucket.missing(one.most, now), one.most)
            for name, one in self._accounts.items()
            if one.most is not None
        }
        used = {name: one.copy() for name, one in self._used.items() if one}
        return Report(live, audio, used, today())

    def told(self, report: Report, others: Others) -> None:
        """A report has arrived, and this is what the others say."""
        now = self._clock()
        for name, used in report.used.items():
            self._used[name] -= used
        for name in {*self._accounts, *others.live, *others.missing}:
            account = self._accounts[name]
            account.elsewhere = others.live.get(name, {})
            if name in report.audio:
                account.taken -= report.audio[name].seconds
            if name in others.missing:
                account.bucket = Bucket(others.missing[name] + account.taken, now)

    @contextmanager
    def _live(self, caller: Caller, what: Live) -> Iterator[None]:
        account = self._accounts[caller.tenant.name]
        most = getattr(caller.tenant.quotas, what)
        if most is not None and account.total(what) >= most:
            named = {"requests": "requests at a time", "sessions": "live sessions"}[what]
            raise ApiError(429, f"more than {most} {named}: try again", f"quota_{what}")
        setattr(account, what, getattr(account, what) + 1)
        try:
            yield
        finally:
            setattr(account, what, getattr(account, what) - 1)


def _told(what: str, limit: float, left: float, reset: float) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{what}": f"{limit:g}",
        f"x-ratelimit-remaining-{what}": f"{math.floor(left)}",
        f"x-ratelimit-reset-{what}": f"{math.ceil(reset)}s",
    }
