"""How fast things are, and what they stand: `python -m jobs.benchmark serve [--quick] [--json]`.

`serve` measures the transcription service against the same models in one plain process
(`jobs.plain`). The service is started as a user starts it, on the same cores as the plain process
and never at the same time; the load comes from a process that does nothing else (`jobs.load`).
Besides speed: what becomes of requests under a step of load, under far too much, and while
processes are killed. With --url a service that runs already is measured; what would need its
processes, or its cores for the plain process, is then left out.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import wave
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import psutil
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jobs import endpoint
from jobs.endpoint import Endpoint, EndpointError
from jobs.load import CONNECTION, HANG, Answer, Plan
from jobs.plain import Order
from mmrag import shipped
from mmrag.audio import SAMPLE_RATE
from mmrag.config import Synthesize, Workers
from mmrag.corpora import synthetic
from mmrag.corpora.espeak import Synthesizer

CLIPS, SEED = 64, 0
CONCURRENCIES = (4, 8, 12, 16)
TAIL_LOAD, OVERLOAD, STEADY_LOAD = 0.7, 4.0, 0.5
"""Shares of saturation at which tails are measured, requests are refused and processes killed."""
RAMP = 0.2
"""Share of a closed loop's time that is not counted: its callers start all at once."""
DATASTORE, EVERY = "benchmark", 3
"""While processes are killed, every third request looks things up."""
SAMPLE_SECONDS = 0.5
RECOVERY_SECONDS = 90
"""How long a killed process may take to come again, and an idle replica to go."""
TRANSCRIBE = "/v1/audio/transcriptions"
ONE_EACH = {f"{part}.max": 1 for part in ("ingress", "encoder", "retriever", "decoder")}
"""What is compared with one process has one replica of everything."""
SCALING = {
    "decoder.max": 2,
    "decoder.target_ongoing_requests": 4,
    "decoder.upscale_delay_s": 1,
    "decoder.downscale_delay_s": 5,
}
SCALING_ENVIRONMENT = {"RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1"}
"""Load is reported every second and not every ten, so that scaling shows within a minute."""
DECODER = "ray::ServeReplica:mmrag:decoder"
VICTIMS = {
    "encoder": "ray::ServeReplica:mmrag:encoder",
    "retriever": "ray::ServeReplica:mmrag:retriever",
    "decoder": DECODER,
    "index shard": "ray::IndexShardActor",
}
"""Whom to kill -> what its process is called."""
progress = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Pace:
    """How long each measurement takes, seconds."""

    alone: int
    """Requests of a lone caller."""
    level: float
    tail: float
    overload: float
    fault: float
    """How long the load goes on before a process is killed, and after another one is there."""
    step: float
    """How long the load goes on once there are as many replicas as it needs."""
    plain: tuple[int, ...] = CONCURRENCIES
    """Callers of the plain process."""


FULL = Pace(alone=CLIPS, level=12, tail=60, overload=30, fault=8, step=10)
QUICK = Pace(alone=24, level=3, tail=10, overload=10, fault=2, step=2, plain=(8, 16))


@dataclass(frozen=True)
class Clips:
    """Recordings to send: WAV files, their lengths in seconds, and names that are said in them."""

    files: tuple[str, ...]
    seconds: tuple[float, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Aim:
    """What a measurement should show: in words, and of its result whether it does."""

    title: str
    target: str
    met: Callable[[Any], bool]
    told: Callable[[Any], str]


AIMS = {
    "serve.throughput_vs_engine": Aim(
        "requests a second, against one plain process",
        "≥ 0.85",
        lambda ratio: ratio >= 0.85,
        lambda ratio: f"{ratio:.2f}",
    ),
    "serve.added_latency_ms": Aim(
        "time added to a lone request's median",
        "≤ 25 ms",
        lambda added: added <= 25,
        lambda added: f"{added:.1f} ms",
    ),
    "serve.p99_over_p50": Aim(
        f"99th percentile over median, random arrivals at {TAIL_LOAD:.0%} of saturation",
        "≤ 3",
        lambda ratio: ratio <= 3,
        lambda ratio: f"{ratio:.2f}",
    ),
    "serve.autoscale": Aim(
        "a step of load: decoder replicas, failed requests",
        "1 → 2 → 1, 0 failed",
        lambda r: [count for _, count in r["replicas"]] == [1, 2, 1] and not r["failed"],
        lambda r: (
            f"{' → '.join(str(count) for _, count in r['replicas'])}, "
            f"{r['failed']} of {r['requests']} failed"
        ),
    ),
    "serve.overload": Aim(
        f"{OVERLOAD:g} × saturation: answers, median of the accepted over that at saturation",
        "200 or 429 alone, ≤ 2",
        lambda r: set(r["statuses"]) <= {"200", "429"} and (r["p50_over_saturation"] or 9) <= 2,
        lambda r: (
            f"{_counts(r['statuses'])}; {_or_dash(r['p50_over_saturation'])}; "
            f"memory {_or_dash(r['start_mb'])} → {_or_dash(r['peak_mb'])} MB"
        ),
    ),
    "serve.faults": Aim(
        f"processes killed at {STEADY_LOAD:.0%} of saturation: requests lost",
        "0",
        lambda r: r["lost"] == 0 and all(one["recovered_s"] for one in r["killed"].values()),
        lambda r: f"{r['lost']} of {sum(r['statuses'].values())}; {_counts(r['statuses'])}",
    ),
}


def main() -> None:
    """Measure, and print a table or JSON; exit status 1 with one line where that is impossible."""
    parser = argparse.ArgumentParser(prog="python -m jobs.benchmark", description=__doc__)
    parser.add_argument("part", choices=["serve"], help="what to measure")
    parser.add_argument("--quick", action="store_true", help="about four minutes, rougher figures")
    parser.add_argument("--json", action="store_true", help="print one JSON object, not a table")
    parser.add_argument(
        "--url", help="a service that runs already; MMRAG_API_KEYS may hold its key"
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    try:
        with tempfile.TemporaryDirectory() as directory:
            clips = speak(Path(directory))
            measure = Serving(clips, QUICK if options.quick else FULL)
            results = measure.there(options.url) if options.url else measure.here()
    except (EndpointError, ImportError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    if options.json:
        print(json.dumps(rounded(results), indent=1))
    else:
        show(results)


def speak(directory: Path) -> Clips:
    """Requests to an assistant in the voices of the test split; the same every time."""
    counts = {"lm": 1, "adapter": 1, "mentions": 1, "dev": 1, "text": 0, "everyday_share": 0}
    workers = Workers(count=1, num_cpus=1)
    planned = synthetic.plan(Synthesize(test=CLIPS, workers=workers, **counts), SEED)["test"]
    synthesizer, files, seconds = Synthesizer(), [], []
    for one in planned:
        spoken = synthetic.render(one, synthesizer).wave
        files.append(str(directory / f"{one.id}.wav"))
        seconds.append(len(spoken) / SAMPLE_RATE)
        with wave.open(files[-1], "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(SAMPLE_RATE)
            file.writeframes((spoken * 32767).round().astype("<i2").tobytes())
    names = dict.fromkeys(name for one in planned for name in one.entities)
    return Clips(tuple(files), tuple(seconds), tuple(names))


class Process:
    """A child that takes JSON in and gives JSON out; it does not outlive the `with` block."""

    def __init__(self, module: str, told: Any) -> None:
        self.module = module
        self._child = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is ours alone
        )
        self._input: IO[bytes] = self._child.stdin
        self._input.write(json.dumps(asdict(told)).encode() + b"\n")
        self._input.flush()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.wait()
        self._input.close()
        self._child.stdout.close()

    def stop(self) -> None:
        """Ask for an early end."""
        self._input.close()

    def result(self) -> Any:
        """What it found out, once it is done; EndpointError if it failed."""
        found = self._child.stdout.read()
        if self._child.wait() != 0:
            raise EndpointError(f"python -m {self.module} failed (what it said stands above)")
        return json.loads(found)


class Serving:
    """The measurements of the service, in order."""

    def __init__(self, clips: Clips, pace: Pace) -> None:
        self.clips = clips
        self.pace = pace
        self._url = ""
        self._key: str | None = None

    def here(self) -> dict[str, Any]:
        """Everything, with a plain process and services started for it."""
        settings = endpoint.settings()
        progress.print("a plain process with the same models")
        plain = self.plain(settings)
        progress.print(f"  {plain['requests_per_second']:.1f} requests a second ({plain['way']})")
        with self._started(ONE_EACH, {}) as service:
            results = self.speed(service)
            results |= self.against(plain, results)
            results["serve.overload"] = self.overload(results["saturation"], service)
            results["serve.faults"] = self.faults(results["saturation"], service)
        with self._started(ONE_EACH | SCALING, SCALING_ENVIRONMENT) as service:
            results["serve.autoscale"] = self.autoscale(service)
        return {"machine": machine(settings), **results, "plain": plain}

    def there(self, url: str) -> dict[str, Any]:
        """What can be measured of a service that runs already."""
        self._url = url.rstrip("/")
        self._key = os.environ.get("MMRAG_API_KEYS", "").partition(",")[0] or None
        results = self.speed(None)
        results["serve.overload"] = self.overload(results["saturation"], None)
        left_out = dict.fromkeys(key for key in AIMS if key not in results)
        return {"url": self._url, **results, **left_out}

    @contextmanager
    def _started(
        self, changes: Mapping[str, Any], environment: Mapping[str, str]
    ) -> Iterator[Endpoint]:
        progress.print("starting the service")
        with endpoint.running(changes, environment) as service:
            self._url, self._key = service.url, None
            yield service
            progress.print("stopping the service")

    def plain(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """One process without a service; its better way to listen, and the best number of callers.

        ValueError for a model that first has to be fetched from the registry.
        """
        if str(settings["model"]).startswith("models:/"):
            raise ValueError(f"{settings['model']}: give a directory or a model of the package")
        decoder, encoder = settings["decoder"], settings["encoder"]
        order = Order(
            model=str(shipped.find(settings["model"])),
            device=settings["device"],
            decode=settings["decode"],
            rows=decoder["rows"],
            decoder_threads=decoder.get("threads", 1),
            encoder_threads=encoder.get("threads", 1),
            batch_seconds=encoder["batch_seconds"],
            clips=self.clips.files,
            alone=self.pace.alone,
            callers=self.pace.plain,
            seconds=self.pace.level,
        )
        with Process("jobs.plain", order) as process:
            found = process.result()
        levels = [
            {"way": way, **self._closed(int(callers), _answers(told))}
            for way, by_callers in found["ways"].items()
            for callers, told in by_callers.items()
        ]
        best = max(levels, key=lambda level: level["requests_per_second"])
        alone = _answers(found["alone"])
        return {
            "way": best["way"],
            "requests_per_second": best["requests_per_second"],
            "alone_p50_ms": percentiles(alone)["p50_ms"],
            "texts": {str(one.clip): one.text for one in alone},
            "levels": levels,
        }

    def speed(self, service: Endpoint | None) -> dict[str, Any]:
        """The service by itself: a lone caller, more and more of them, random arrivals."""
        self._load(concurrency=max(CONCURRENCIES), seconds=3)  # the first requests are slow
        progress.print("one request at a time")
        answers = self._load(concurrency=1, seconds=600, requests=self.pace.alone)
        _all_well(answers, service)
        levels = [level(answers, self.clips.seconds, 0, max(one.done for one in answers), 1)]
        for callers in CONCURRENCIES:
            answers = self._load(concurrency=callers, seconds=self.pace.level)
            levels.append(self._closed(callers, answers))
            rate = levels[-1]["requests_per_second"]
            progress.print(f"  {callers} at a time: {rate:.1f} requests a second")
        best = max(levels, key=lambda one: one["requests_per_second"])
        rate = TAIL_LOAD * best["requests_per_second"]
        progress.print(f"random arrivals, {rate:.1f} requests a second")
        answers = self._load(rate=rate, seconds=self.pace.tail)
        tail = {"rate": rate, "statuses": statuses(answers), **percentiles(answers)}
        return {
            "saturation": best,
            "levels": levels,
            "serve.p99_over_p50": tail["p99_ms"] / tail["p50_ms"],
            "tail": tail,
            "texts": {str(one.clip): one.text for one in answers if one.status == "200"},
        }

    def against(self, plain: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
        """The service beside the plain process; takes the transcripts out of both."""
        texts, own = plain.pop("texts"), results.pop("texts")
        same = [texts[clip] == own[clip] for clip in texts if clip in own]
        best = results["saturation"]["requests_per_second"]
        return {
            "serve.throughput_vs_engine": best / plain["requests_per_second"],
            "serve.added_latency_ms": results["levels"][0]["p50_ms"] - plain["alone_p50_ms"],
            "transcripts_compared": len(same),
            "transcripts_that_differ": same.count(False),
        }

    def overload(self, saturation: Mapping[str, Any], service: Endpoint | None) -> dict[str, Any]:
        """Far more requests than can be answered."""
        rate = OVERLOAD * saturation["requests_per_second"]
        progress.print(f"far too much: {rate:.0f} requests a second")
        memory = [] if service is None else [service.memory_mb()]
        with Process("jobs.load", self._plan(rate=rate, seconds=self.pace.overload)) as load:
            deadline = time.monotonic() + self.pace.overload
            while service is not None and time.monotonic() < deadline:
                time.sleep(SAMPLE_SECONDS)
                memory.append(service.memory_mb())
            answers = _answers(load.result())
        accepted = percentiles(answers)
        median = accepted["p50_ms"]
        return {
            "rate": rate,
            "statuses": statuses(answers),
            "p50_over_saturation": median and median / saturation["p50_ms"],
            "start_mb": memory[0] if memory else None,
            "peak_mb": max(memory, default=None),
            **accepted,
        }

    def faults(self, saturation: Mapping[str, Any], service: Endpoint) -> dict[str, Any]:
        """Kill one process of each kind while requests come in."""
        service.create(DATASTORE, list(self.clips.names))
        rate = STEADY_LOAD * saturation["requests_per_second"]
        looks_up = {"fields": (("datastore", DATASTORE),), "every": EVERY}
        self._load(rate=rate, seconds=3, **looks_up)  # starts the shard, and reads its windows
        killed, every = {}, []
        for victim, title in VICTIMS.items():
            progress.print(f"killing: {victim}")
            plan = self._plan(rate=rate, seconds=2 * RECOVERY_SECONDS, **looks_up)
            with Process("jobs.load", plan) as load:
                time.sleep(self.pace.fault)
                recovered = kill(service, title)
                time.sleep(self.pace.fault)
                load.stop()
                answers = _answers(load.result())
            killed[victim] = {
                "recovered_s": recovered,
                "lost": sum(lost(one.status) for one in answers),
                "statuses": statuses(answers),
                "slowest_s": max(one.seconds for one in answers),
            }
            every += answers
        gone = sum(lost(one.status) for one in every)
        return {"rate": rate, "lost": gone, "statuses": statuses(every), "killed": killed}

    def autoscale(self, service: Endpoint) -> dict[str, Any]:
        """Sixteen callers until there is a second decoder, then one until it is gone again."""
        progress.print("a step of load")
        seen: list[tuple[float, int]] = []
        started = time.monotonic()

        def wait(count: int) -> None:
            deadline = time.monotonic() + RECOVERY_SECONDS
            while time.monotonic() < deadline:
                replicas = len(service.processes(DECODER))
                if not seen or seen[-1][1] != replicas:
                    seen.append((time.monotonic() - started, replicas))
                    progress.print(f"  {replicas} decoder(s) after {seen[-1][0]:.0f} s")
                if replicas == count:
                    return
                time.sleep(SAMPLE_SECONDS)

        wait(1)
        answers = []
        for callers, count in ((max(CONCURRENCIES), 2), (1, 1)):
            plan = self._plan(concurrency=callers, seconds=2 * RECOVERY_SECONDS)
            with Process("jobs.load", plan) as load:
                wait(count)
                time.sleep(self.pace.step)
                load.stop()
                answers += _answers(load.result())
        failed = [one for one in answers if one.status != "200"]
        return {
            "replicas": seen,
            "requests": len(answers),
            "failed": len(failed),
            "statuses": statuses(answers),
            "settings": {**SCALING, **SCALING_ENVIRONMENT},
        }

    def _plan(self, **how: Any) -> Plan:
        url = self._url + TRANSCRIBE
        return Plan(url=url, clips=self.clips.files, key=self._key, seed=SEED, **how)

    def _load(self, **how: Any) -> list[Answer]:
        with Process("jobs.load", self._plan(**how)) as load:
            return _answers(load.result())

    def _closed(self, callers: int, answers: Sequence[Answer]) -> dict[str, Any]:
        seconds = self.pace.level
        return level(answers, self.clips.seconds, RAMP * seconds, seconds, callers)


def level(
    answers: Sequence[Answer], lengths: Sequence[float], start: float, stop: float, callers: int
) -> dict[str, Any]:
    """What was achieved between two moments (seconds); `lengths` are the clips', in seconds.

    The real-time factor is time over audio transcribed in it. EndpointError if nothing was.
    """
    good = [one for one in answers if one.status == "200" and start <= one.done <= stop]
    if not good:
        raise EndpointError(f"no transcript at concurrency {callers}: {statuses(answers)}")
    return {
        "concurrency": callers,
        "requests_per_second": len(good) / (stop - start),
        "real_time_factor": (stop - start) / sum(lengths[one.clip] for one in good),
        **percentiles(good),
        "statuses": statuses(answers),
    }


def percentiles(answers: Sequence[Answer]) -> dict[str, float | None]:
    """Of the time that transcripts took, milliseconds; None where there are none."""
    times = [1e3 * one.seconds for one in answers if one.status == "200"]
    return {
        f"p{share}_ms": float(np.percentile(times, share)) if times else None
        for share in (50, 95, 99)
    }


def statuses(answers: Sequence[Answer]) -> dict[str, int]:
    """How often each status came back."""
    return dict(sorted(Counter(one.status for one in answers).items()))


def lost(status: str) -> bool:
    """Whether a request is lost to its caller: neither answered, nor asked to try again."""
    return status in (CONNECTION, HANG) or status not in ("200", "429", "503")


def kill(service: Endpoint, title: str) -> float | None:
    """Kill the first process of that title; seconds until another one is there and the service is
    ready again, None if that takes too long. EndpointError if there is no such process."""
    before = service.processes(title)
    if not before:
        raise EndpointError(f"no process {title} to kill\n{service.last_lines()}")
    before[0].kill()
    killed = time.monotonic()
    while time.monotonic() - killed < RECOVERY_SECONDS:
        time.sleep(SAMPLE_SECONDS)
        if len(set(service.processes(title)) - {before[0]}) >= len(before) and service.ready():
            return time.monotonic() - killed
    return None


def machine(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What it was measured on."""
    parts = ("encoder", "decoder")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_mb": psutil.virtual_memory().total / 1e6,
        "torch_threads": {part: settings[part].get("threads", 1) for part in parts},
        "rows": settings["decoder"]["rows"],
        "model": settings["model"],
    }


def rounded(value: Any) -> Any:
    """Numbers with as many digits as they are good for."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list | tuple) else value


def verdict(key: str, result: Any) -> str:
    """Whether a result is what was aimed at, in words."""
    return "not measured" if result is None else "met" if AIMS[key].met(result) else "missed"


def show(results: Mapping[str, Any]) -> None:
    """Tables for people."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    if "machine" in results:
        about = results["machine"]
        threads = ", ".join(f"{part} {count}" for part, count in about["torch_threads"].items())
        console.print(
            f"{about['model']} on {about['cores']} cores; threads: {threads}; {about['rows']} rows"
        )
    speeds = _table(
        "Requests", "where", "at a time", "a second", "p50", "p95", "p99", "× real time"
    )
    rows = [(one["way"], one) for one in results.get("plain", {}).get("levels", ())]
    rows += [("service", one) for one in results["levels"]]
    for where, one in rows:
        times = [f"{one[f'p{share}_ms']:.0f} ms" for share in (50, 95, 99)]
        rate, factor = f"{one['requests_per_second']:.1f}", f"{one['real_time_factor']:.3f}"
        speeds.add_row(where, str(one["concurrency"]), rate, *times, factor)
    console.print(speeds)
    rate, told = results["tail"]["rate"], _counts(results["tail"]["statuses"])
    console.print(f"random arrivals, {rate:.1f} a second: {told}")
    for victim, one in ((results["serve.faults"] or {}).get("killed") or {}).items():
        again = "did not come again" if not (s := one["recovered_s"]) else f"again after {s:.1f} s"
        slowest = f"slowest answer {one['slowest_s']:.1f} s"
        console.print(f"{victim} killed: {again}; {_counts(one['statuses'])}; {slowest}")
    if "transcripts_compared" in results:
        told = results["transcripts_that_differ"], results["transcripts_compared"]
        console.print("{} of {} transcripts differ from the plain process's\n".format(*told))
    aims = _table("What was aimed at", "", "measured", "target", "")
    for key, aim in AIMS.items():
        told = "–" if results[key] is None else aim.told(results[key])
        aims.add_row(escape(aim.title), told, aim.target, verdict(key, results[key]))
    console.print(aims)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for column in columns:
        table.add_column(column)
    return table


def _answers(told: Sequence[Mapping[str, Any]]) -> list[Answer]:
    return [Answer(**one) for one in told]


def _all_well(answers: Sequence[Answer], service: Endpoint | None) -> None:
    """EndpointError unless every request of a lone caller got its transcript."""
    if set(statuses(answers)) != {"200"}:
        log = service.last_lines() if service else ""
        raise EndpointError(f"single requests fail: {statuses(answers)}\n{log}")


def _counts(found: Mapping[str, int]) -> str:
    return ", ".join(f"{status}: {count}" for status, count in found.items())


def _or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    main()
