"""How many people may speak to the service at a time, how soon each reads what was said, and how
right it is beside the transcript of the same clip sent as a file.

Every session is fed in real time by a process that does nothing else (`live`). A turn ends when
`silence_duration_ms` of silence has been sent; its final transcript counts from then.
"""

from __future__ import annotations

import urllib.request
import wave
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from jobs.benchmark.live import RATE, UNHEARD, Final, Sessions
from jobs.benchmark.load import Answer, Plan
from jobs.benchmark.process import LIVE, LOAD, Process
from jobs.benchmark.repeats import percentiles
from mmrag.score import word_error_rate
from mmrag.speech.audio import SAMPLE_RATE
from mmrag.speech.resampling import Resampler

FEW = 4
"""Sessions at which the time to a final transcript is measured."""
STEPS = (10, 20, 30, 40, 50, 60)
LATE_SECONDS = 1.0
"""A session counts as live while its finals come so soon (95th percentile)."""
WHOLE_SECONDS = 600.0
"""How long the same clips may take as files."""
TRANSCRIBE = "/v1/audio/transcriptions"
WORDS = "ray_mmrag_realtime_words_total"
progress = Console(stderr=True, highlight=False)


def measure(
    url: str,
    clips: Sequence[str],
    seconds: float,
    key: str | None = None,
    said: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The service at `url` with few sessions, then more and more until finals come late; `clips`
    are WAV files at 16 kHz, each step lasts so many seconds, and `said` is what is said in each
    clip, where that is known."""
    raw = tuple(_raw(Path(clip)) for clip in clips)
    address = url.replace("http", "ws", 1) + "/v1/realtime"
    steps: list[dict[str, Any]] = []
    heard: dict[int, list[str]] = {}
    for count in (FEW, *STEPS):
        plan = Sessions(address, raw, count, seconds, key=key)
        with Process(LIVE, plan) as process:
            finals = [Final(**one) for one in process.result()]
        heard = heard or transcripts(finals)  # with few sessions: there was time for all of them
        steps.append(step(count, finals))
        progress.print(_said(steps[-1]))
        if not live(steps[-1]):
            break
    return {
        "realtime.sessions": max((one["sessions"] for one in steps if live(one)), default=0),
        "realtime.final_ms": steps[0]["p95_ms"],
        "realtime.changes": changes(_metrics(url)),
        **quality(heard, _whole(url, clips, sorted(heard), key), said),
        "realtime.steps": steps,
    }


def transcripts(finals: Sequence[Final]) -> dict[int, list[str]]:
    """What was told of each clip, by its number, once for every time that it was played: its turns
    in order, nothing where nobody was heard. Left out is what lost a turn."""
    found: dict[tuple[int, int], list[Final]] = {}
    for one in finals:
        if one.playing is not None:
            found.setdefault((one.session, one.playing), []).append(one)
    told: dict[int, list[str]] = {}
    for turns in found.values():
        if all(one.seconds is not None or one.problem == UNHEARD for one in turns):
            told.setdefault(turns[0].clip, []).append(" ".join(one.text for one in turns).strip())
    return told


def quality(
    heard: Mapping[int, Sequence[str]], whole: Mapping[int, str], said: Sequence[str] | None
) -> dict[str, Any]:
    """Word error rates of live transcripts (`heard`, of clips by their numbers) and of the same
    clips as files (`whole`), against what is `said` in them; and how far the two are apart, as the
    rate of the live ones against those of the files. With 95 % intervals over clips' playings;
    None where there is nothing to compare."""
    pairs = [(clip, text) for clip in sorted(heard) if clip in whole for text in heard[clip]]
    live = [text for _, text in pairs]
    files = [whole[clip] for clip, _ in pairs]
    truth = None if said is None else [said[clip] for clip, _ in pairs]
    return {
        "realtime.wer": _rate(truth, live),
        "realtime.wer_file": _rate(truth, files),
        "realtime.wer_between": _rate(files, live),
        "realtime.playings": len(pairs),
    }


def _rate(references: Sequence[str] | None, texts: Sequence[str]) -> dict[str, Any] | None:
    if not references or not any(one.split() for one in references):
        return None
    found = word_error_rate(references, texts)
    return {
        "rate": found.rate,
        "low": found.low,
        "high": found.high,
        "errors": found.errors,
        "words": found.reference,
    }


def _whole(
    url: str, clips: Sequence[str], numbers: Sequence[int], key: str | None
) -> dict[int, str]:
    """The same clips as files, one after the other: their transcripts, by their numbers."""
    if not numbers:
        return {}
    plan = Plan(
        url=url + TRANSCRIBE,
        clips=tuple(clips[number] for number in numbers),
        seconds=WHOLE_SECONDS,
        concurrency=1,
        requests=len(numbers),
        key=key,
    )
    with Process(LOAD, plan) as process:
        answers = [Answer(**one) for one in process.result()]
    return {numbers[one.clip]: one.text for one in answers if one.status == "200"}


def step(count: int, finals: Sequence[Final]) -> dict[str, Any]:
    """What became of the turns of so many sessions; times in milliseconds."""
    times = [1000 * one.seconds for one in finals if one.seconds is not None]
    unheard = sum(one.problem == UNHEARD for one in finals)
    return {
        "sessions": count,
        "turns": len(times),
        "unheard": unheard,
        "lost": len(finals) - len(times) - unheard,
        "problems": dict(
            Counter(one.problem for one in finals if one.problem and one.problem != UNHEARD)
        ),
        "early": sum(one.deltas > 1 for one in finals) / max(1, len(times)),
        **percentiles(times),
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
