"""What tenants have used, by day, and what replicas of the ingress tell each other of it."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field
from datetime import UTC, datetime

MINUTE = 60.0


@dataclass
class Used:
    """Amounts of a tenant; they are added and taken away."""

    requests: int = 0
    sessions: int = 0
    audio_seconds: float = 0.0
    tokens: int = 0
    """Of transcripts."""

    def __add__(self, other: Used) -> Used:
        return Used(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: Used) -> Used:
        return Used(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __bool__(self) -> bool:
        return any(astuple(self))

    def copy(self) -> Used:
        """The amounts as they are now."""
        return self + Used()


@dataclass
class Bucket:
    """What a tenant may take of something in a minute: it fills all the time, up to a minute's."""

    lacks: float = 0.0
    filled: float = 0.0
    """When that was so, in seconds of some clock."""

    def missing(self, most: float, now: float) -> float:
        """What it lacks now, if it holds `most`; more than that where more was taken at once."""
        self.lacks = max(0.0, self.lacks - max(0.0, now - self.filled) * most / MINUTE)
        self.filled = now
        return self.lacks

    def take(self, amount: float) -> None:
        """Take something out, whatever is there."""
        self.lacks += amount


@dataclass(frozen=True)
class Taken:
    """What a tenant took out of its bucket at one replica."""

    seconds: float
    """Since the last report."""
    missing: float
    """What the bucket lacks, as far as that replica knows."""
    most: float


@dataclass(frozen=True)
class Report:
    """What one replica of the ingress tells the others, once a second."""

    live: dict[str, dict[str, int]] = field(default_factory=dict)
    """Tenant -> requests and sessions in flight."""
    audio: dict[str, Taken] = field(default_factory=dict)
    """Tenant -> what it took of its seconds of audio a minute."""
    used: dict[str, Used] = field(default_factory=dict)
    """Tenant -> what has been used since the last report."""
    day: str = ""


@dataclass(frozen=True)
class Others:
    """What a replica of the ingress is told of all of them."""

    live: dict[str, dict[str, int]] = field(default_factory=dict)
    """Tenant -> requests and sessions in flight at the others."""
    missing: dict[str, float] = field(default_factory=dict)
    """Tenant -> what its bucket of audio lacks."""


def today() -> str:
    """The day, in UTC: 2026-11-27."""
    return datetime.now(UTC).date().isoformat()
