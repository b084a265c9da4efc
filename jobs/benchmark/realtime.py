"""How many people may speak to the service at a time, and how soon each reads what was said.

Every session is fed in real time by a process that does nothing else (`live`). A turn ends when
`silence_duration_ms` of silence has been sent; its final transcript counts from then.
"""

from __future__ import annotations

import urllib.request
import wave
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from jobs.benchmark.live import RATE, Final, Sessions
from jobs.benchmark.process import LIVE, Process
from mmrag.speech.audio import SAMPLE_RATE
from mmrag.speech.resampling import Resampler

FEW = 4
"""Sessions at which the time to a final transcript is measured."""
STEPS = (10, 20, 30, 40, 50, 60)
LATE_SECONDS = 1.0
"""A session counts as live while its finals come so soon (95th percentile)."""
WORDS = "ray_mmrag_realtime_words_total"
progress = Console(stderr=True, highlight=False)


def measure(
    url: str, clips: Sequence[str], seconds: float, key: str | None = None
) -> dict[str, Any]:
    """The service at `url` with few sessions, then more and more until finals come late; `clips`
    are WAV files at 16 kHz, and each step lasts so many seconds."""
    raw = tuple(_raw(Path(clip)) for clip in clips)
    address = url.replace("http", "ws", 1) + "/v1/realtime"
    steps: list[dict[str, Any]] = []
    for count in (FEW, *STEPS):
        plan = Sessions(address, raw, count, seconds, key=key)
        with Process(LIVE, plan) as process:
            steps.append(step(count, [Final(**one) for one in process.result()]))
        progress.print(_said(steps[-1]))
        if not live(steps[-1]):
            break
    return {
        "realtime.sessions": max((one["sessions"] for one in steps if live(one)), default=0),
        "realtime.final_ms": steps[0]["p95_ms"],
        "realtime.changes": changes(_metrics(url)),
        "realtime.steps": steps,
    }


def step(count: int, finals: Sequence[Final]) -> dict[str, Any]:
    """What became of the turns of so many sessions; times in milliseconds."""
    times = [1000 * one.seconds for one in finals if one.seconds is not None]
    return {
        "sessions": count,
        "turns": len(times),
        "lost": len(finals) - len(times),
        "problems": dict(Counter(one.problem for one in finals if one.problem)),
        "early": sum(one.deltas > 1 for one in finals) / max(1, len(times)),
        **{
            f"p{share}_ms": float(np.percentile(times, share)) if times else None
            for share in (50, 95, 99)
        },
    }


def live(found: dict[str, Any]) -> bool:
    """Whether so many people may speak at a time."""
    return found["lost"] == 0 and (found["p95_ms"] or np.inf) <= 1000 * LATE_SECONDS


def changes(metrics: str) -> float | None:
    """Words of partial transcripts that the next one had otherwise, over words told; None where
    nothing was."""
    counts = Counter()
    for line in metrics.splitlines():
        for became in ("told", "revised"):
            if line.startswith(WORDS) and f'became="{became}"' in line:
                counts[became] += float(line.split()[-1])
    return counts["revised"] / counts["told"] if counts["told"] else None


def _metrics(url: str) -> str:
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as reply:
        return reply.read().decode()


def _raw(clip: Path) -> str:
    """A file beside a WAV file with its samples at 24 kHz and nothing else."""
    with wave.open(str(clip)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    resampler = Resampler(SAMPLE_RATE, RATE)
    given = torch.from_numpy(samples.astype(np.float32))
    made = torch.cat([resampler.push(given), resampler.flush()]).numpy()
    path = clip.with_suffix(".raw")
    path.write_bytes(made.round().clip(-32768, 32767).astype("<i2").tobytes())
    return str(path)


def _said(found: dict[str, Any]) -> str:
    if not found["turns"]:
        return f"  {found['sessions']} sessions: no transcript, {found['problems']}"
    return (
        f"  {found['sessions']} sessions: finals {found['p50_ms']:.0f} ms after the end of a turn, "
        f"95 % within {found['p95_ms']:.0f} ms; {found['lost']} of {found['turns']} lost"
    )
