"""What the sessions of a replica share: how much may be decoded before it is final, and metrics.

Partial transcripts are for whoever watches; what has been said to its end is waited for. So the
first give way to the second: one that finds too much under way is passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray.serve.metrics import Counter, Histogram

from serve.gauges import Gauge

PARTIALS = 2
"""Partial transcripts that are made at a time, for all sessions together."""
BUSY = 2
"""Final transcripts under way from which on no partial one is begun."""


class Load:
    """Counts of one replica of the ingress."""

    def __init__(self) -> None:
        self.partials = 0
        self.finals = 0
        self._partial = Counter(
            "mmrag_realtime_partials_total", "Partial transcripts, run or skipped.", ("became",)
        )
        self._words = Counter(
            "mmrag_realtime_words_total",
            "Words told, and words of partial transcripts that the next one had otherwise.",
            ("became",),
        )
        self._turns = Counter(
            "mmrag_realtime_turns_total", "Turns, by what became of them.", ("became",)
        )
        self._sessions = Gauge("mmrag_realtime_sessions", "Sessions open.")
        self._audio = Counter("mmrag_realtime_audio_seconds_total", "Audio of sessions, seconds.")
        self._final = Histogram(
            "mmrag_realtime_final_seconds",
            "Time from the end of a turn to its transcript, seconds.",
            boundaries=[0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10],
        )

    @property
    def free(self) -> bool:
        """Whether a partial transcript may be begun."""
        return self.partials < PARTIALS and self.finals < BUSY

    @contextmanager
    def partial(self) -> Iterator[None]:
        """One is being made."""
        self._partial.inc(tags={"became": "run"})
        self.partials += 1
        try:
            yield
        finally:
            self.partials -= 1

    @contextmanager
    def final(self) -> Iterator[None]:
        """A turn is over, and its transcript is being made."""
        self.finals += 1
        try:
            yield
        finally:
            self.finals -= 1

    def skipped(self) -> None:
        """A partial transcript was not made, so that others are quick."""
        self._partial.inc(tags={"became": "skipped"})

    def ended(self, seconds: float, told: int, revised: int) -> None:
        """A turn has its transcript, so many seconds after its end: words told, and words that
        would have been taken back, had every partial transcript been told."""
        self._turns.inc(tags={"became": "completed"})
        self._final.observe(seconds)
        for became, count in (("told", told), ("revised", revised)):
            if count:
                self._words.inc(count, tags={"became": became})

    def failed(self) -> None:
        """A turn got no transcript."""
        self._turns.inc(tags={"became": "failed"})

    def heard(self, seconds: float) -> None:
        """Audio came in."""
        if seconds > 0:
            self._audio.inc(seconds)

    def open(self, sessions: int) -> None:
        """So many sessions are open now."""
        self._sessions.set(sessions)
