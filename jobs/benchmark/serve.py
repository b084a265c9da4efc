"""The transcription service against the same models in one plain process (`plain`).

The service is started as a user starts it, on the same cores as the plain process and never at the
same time; the load comes from a process that does nothing else (`load`). Besides speed: what
becomes of requests under a step of load, under far too much, and while processes are killed. A
service that runs already is measured as it is; what would need its processes, or its cores for the
plain process, is then left out.
"""

from __future__ import annotations

import os
import time
import wave
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console

from jobs.benchmark import endpoint, realtime
from jobs.benchmark.endpoint import Endpoint, EndpointError
from jobs.benchmark.load import CONNECTION, HANG, Answer, Plan
from jobs.benchmark.plain import BaselinePlan
from jobs.benchmark.process import LOAD, PLAIN, Process
from jobs.benchmark.realtime import TRANSCRIBE
from jobs.benchmark.repeats import percentiles
from jobs.benchmark.targets import OVERLOAD, STEADY_LOAD, TAIL_LOAD, TARGETS
from mmrag import shipped
from mmrag.config import Synthesize, Workers
from mmrag.corpora import synthetic
from mmrag.corpora.voices.espeak import Synthesizer
from mmrag.speech.audio import SAMPLE_RATE

CLIPS, SEED = 64, 0
CONCURRENCIES = (4, 8, 12, 16)
RAMP = 0.2
"""Share of a closed loop's time that is not counted: its callers start all at once."""
DATASTORE, EVERY = "benchmark", 3
"""While processes are killed, every third request looks things up."""
FIRST = 10
"""Requests of a service that has just started."""
SAMPLE_SECONDS = 0.5
RECOVERY_SECONDS = 90
"""How long a killed process may take to come again, and an idle replica to go."""
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
    "index shard": "ray::DatastorePool",
}
"""Whom to kill -> what its process is called."""
progress = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Profile:
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
    live: float
    """How long people speak in so many sessions."""
    plain: tuple[int, ...] = CONCURRENCIES
    """Callers of the plain process."""


FULL = Profile(alone=CLIPS, level=12, tail=60, overload=30, fault=8, step=10, live=40)
QUICK = Profile(alone=24, level=3, tail=10, overload=10, fault=2, step=2, live=15, plain=(8, 16))


@dataclass(frozen=True)
class Clips:
    """Recordings to send: WAV files, their lengths in seconds, and names that are said in them."""

    files: tuple[str, ...]
    seconds: tuple[float, ...]
    names: tuple[str, ...]
    texts: tuple[str, ...]
    """What is said in each."""


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
    texts = tuple(one.text for one in planned)
    return Clips(tuple(files), tuple(seconds), tuple(names), texts)


class Serving:
    """The measurements of the service, in order."""

    def __init__(self, clips: Clips, pace: Profile) -> None:
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
            results |= self.live()
            results["serve.overload"] = self.overload(results["saturation"], service)
            results["serve.faults"] = self.faults(results["saturation"], service)
        with self._started(ONE_EACH | SCALING, SCALING_ENVIRONMENT) as service:
            results["serve.autoscale"] = self.autoscale(service)
        return {"machine": machine(settings), **results, "plain": plain}

    def there(self, url: str) -> dict[str, Any]:
        """What can be measured of a service that runs already."""
        self._url = url.rstrip("/")
        self._key = os.environ.get("MMRAG_API_KEYS", "").partition(",")[0] or None
        results = self.speed(None) | self.live()
        results["serve.overload"] = self.overload(results["saturation"], None)
        left_out = dict.fromkeys(key for key in TARGETS if key not in results)
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
        order = BaselinePlan(
            model=str(shipped.find(settings["model"])),
            device=settings["device"],
            decode=settings["decode"],
            rows=decoder["rows"],
            compute=decoder.get("compute"),
            compiled=decoder.get("compiled", False),
            decoder_threads=decoder.get("threads", 1),
            encoder_threads=encoder.get("threads", 1),
            batch_seconds=encoder["batch_seconds"],
            clips=self.clips.files,
            alone=self.pace.alone,
            callers=self.pace.plain,
            seconds=self.pace.level,
        )
        with Process(PLAIN, order) as process:
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
            "alone_p50_ms": percentiles(times(alone))["p50_ms"],
            "texts": {str(one.clip): one.text for one in alone},
            "levels": levels,
        }

    def speed(self, service: Endpoint | None) -> dict[str, Any]:
        """The service by itself: its first requests, a lone caller, more and more of them, random
        arrivals."""
        first = self._first() if service else None
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
        tail = {"rate": rate, "statuses": statuses(answers), **percentiles(times(answers))}
        return {
            "first": first,
            "saturation": best,
            "levels": levels,
            "serve.p99_over_p50": tail["p99_ms"] / tail["p50_ms"],
            "tail": tail,
            "texts": {str(one.clip): one.text for one in answers if one.status == "200"},
        }

    def _first(self) -> dict[str, float]:
        """How long the first request of all takes, and later ones of the same clip."""
        answers = self._load(concurrency=1, seconds=600, requests=FIRST, clips=self.clips.files[:1])
        first, *more = (1e3 * one.seconds for one in answers)
        return {"first_ms": first, "tenth_ms": more[-1], "again_ms": float(np.median(more))}

    def live(self) -> dict[str, Any]:
        """People who speak to the service, more and more of them."""
        progress.print("realtime sessions")
        files, said = self.clips.files, self.clips.texts
        return realtime.measure(self._url, files, self.pace.live, self._key, said)

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
        with Process(LOAD, self._plan(rate=rate, seconds=self.pace.overload)) as load:
            deadline = time.monotonic() + self.pace.overload
            while service is not None and time.monotonic() < deadline:
                time.sleep(SAMPLE_SECONDS)
                memory.append(service.memory_mb())
            answers = _answers(load.result())
        accepted = percentiles(times(answers))
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
            with Process(LOAD, plan) as load:
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
            with Process(LOAD, plan) as load:
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
        return Plan(
            **{"url": url, "clips": self.clips.files, "key": self._key, "seed": SEED, **how}
        )

    def _load(self, **how: Any) -> list[Answer]:
        with Process(LOAD, self._plan(**how)) as load:
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
        **percentiles(times(good)),
        "statuses": statuses(answers),
    }


def times(answers: Sequence[Answer]) -> list[float]:
    """That transcripts took, milliseconds."""
    return [1e3 * one.seconds for one in answers if one.status == "200"]


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


def _answers(told: Sequence[Mapping[str, Any]]) -> list[Answer]:
    return [Answer(**one) for one in told]


def _all_well(answers: Sequence[Answer], service: Endpoint | None) -> None:
    """EndpointError unless every request of a lone caller got its transcript."""
    if set(statuses(answers)) != {"200"}:
        log = service.last_lines() if service else ""
        raise EndpointError(f"single requests fail: {statuses(answers)}\n{log}")
