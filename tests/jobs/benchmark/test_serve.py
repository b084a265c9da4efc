"""The load generator against a small server, and the arithmetic of the benchmark; no Ray."""

import asyncio
import io
import json
import subprocess
import sys
import threading
import time
import wave
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from aiohttp import web

from jobs.benchmark import endpoint, load, plain, serve, targets
from jobs.benchmark.endpoint import Endpoint, EndpointError
from jobs.benchmark.load import CONNECTION, HANG, Answer, Plan, poisson
from jobs.benchmark.plain import BaselinePlan
from jobs.benchmark.process import LOAD, Process
from jobs.benchmark.repeats import percentiles
from jobs.benchmark.serve import level, statuses, times
from jobs.benchmark.targets import TARGETS, rounded, verdict
from mmrag import shipped
from mmrag.config import Decode
from mmrag.recogniser import Recogniser
from mmrag.transcribe import transcribe

Handler = Callable[[web.Request], object]


@contextmanager
def server(handler: Handler) -> Iterator[str]:
    """The address of a server that answers every POST, in a thread of its own."""
    loop, where, stopped = asyncio.new_event_loop(), Future(), asyncio.Event()

    async def serve() -> None:
        application = web.Application()
        application.router.add_post("/", handler)
        runner = web.AppRunner(application, shutdown_timeout=0.01)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        where.set_result(f"http://127.0.0.1:{runner.addresses[0][1]}/")
        await stopped.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    try:
        yield where.result(10)
    finally:
        loop.call_soon_threadsafe(stopped.set)
        thread.join()
        loop.close()


@pytest.fixture
def clips(tmp_path: Path) -> tuple[str, ...]:
    """Three recordings of different lengths."""
    files = []
    for number in range(3):
        files.append(str(tmp_path / f"{number}.wav"))
        with wave.open(files[-1], "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16000)
            file.writeframes(b"\0\0" * 160 * (number + 1))
    return tuple(files)


def sent(plan: Plan, stop: asyncio.Event | None = None) -> list[Answer]:
    return asyncio.run(load.send(plan, stop or asyncio.Event()))


def answer(seconds: float, status: str = "200", at: float = 0.0, clip: int = 0) -> Answer:
    return Answer(at, seconds, status, clip)


async def hello(request: web.Request) -> web.Response:
    return web.json_response({"text": "hello"})


# --- the load generator


def test_a_request_is_a_form_with_the_clip_and_its_fields(clips):
    seen = []

    async def look(request: web.Request) -> web.Response:
        form = await request.post()
        with wave.open(io.BytesIO(form["file"].file.read())) as file:
            seen.append((file.getnframes(), form["file"].content_type, form.get("datastore")))
        seen[-1] += (request.headers.get("Authorization"),)
        return web.json_response({"text": "hello"})

    with server(look) as url:
        fields = (("datastore", "names"),)
        plan = Plan(url, clips, 60, concurrency=1, requests=4, fields=fields, every=2, key="k")
        answers = sent(plan)
    lengths, kinds, stores, keys = zip(*seen, strict=True)
    assert lengths == (160, 320, 480, 160)
    assert set(kinds) == {"audio/wav"} and set(keys) == {"Bearer k"}
    assert stores == (None, "names", None, "names")
    assert [(one.clip, one.text) for one in answers] == [(n, "hello") for n in (0, 1, 2, 0)]


def test_a_closed_loop_has_as_many_requests_under_way_as_callers(clips):
    inside, most = 0, []

    async def wait(request: web.Request) -> web.Response:
        nonlocal inside
        inside += 1
        most.append(inside)
        await asyncio.sleep(0.02)
        inside -= 1
        return await hello(request)

    with server(wait) as url:
        answers = sent(Plan(url, clips, 0.3, concurrency=3))
    assert max(most) == 3 and len(answers) >= 12
    assert all(one.seconds >= 0.02 for one in answers)


def test_an_open_loop_sends_on_while_nobody_is_answered(clips):
    arrived, release = [], asyncio.Event()

    async def hold(request: web.Request) -> web.Response:
        arrived.append(request)
        if len(arrived) == 10:
            release.set()
        await release.wait()
        return await hello(request)

    with server(hold) as url:
        answers = sent(Plan(url, clips, 60, rate=200, requests=10))
    assert statuses(answers) == {"200": 10}


def test_time_counts_from_when_a_request_was_due(clips):
    """A server that stands still makes those wait, too, that could not even be sent."""

    async def sleepy(request: web.Request) -> web.Response:
        time.sleep(0.05)
        return await hello(request)

    with server(sleepy) as url:
        answers = sent(Plan(url, clips, 0.2, rate=100, seed=1))
    assert sorted(one.sent for one in answers) == pytest.approx(list(poisson(100, 0.2, 1)))
    assert max(one.seconds for one in answers) > 0.3


def test_refusals_errors_and_hangs_are_told_apart(clips):
    replies = iter(["200", "429", "503", "500", "cut", "hang", "200"])

    async def moody(request: web.Request) -> web.Response:
        reply = next(replies)
        if reply == "cut":
            request.transport.close()
        if reply in ("cut", "hang"):
            await asyncio.sleep(5)
        if reply == "200":
            return await hello(request)
        return web.Response(status=int(reply))

    with server(moody) as url:
        answers = sent(Plan(url, clips, 60, concurrency=1, requests=7, timeout=0.3))
    told = [one.status for one in answers]
    assert told == ["200", "429", "503", "500", CONNECTION, HANG, "200"]
    assert sum(map(serve.lost, told)) == 3


def test_a_server_that_is_not_there_is_a_lost_connection(clips):
    with server(hello) as url:
        pass
    assert statuses(sent(Plan(url, clips, 60, concurrency=1, requests=2))) == {CONNECTION: 2}


def test_a_stopped_load_still_waits_for_its_answers(clips):
    stop = asyncio.Event()

    async def slow(request: web.Request) -> web.Response:
        stop.set()
        await asyncio.sleep(0.1)
        return await hello(request)

    with server(slow) as url:
        answers = sent(Plan(url, clips, 60, concurrency=2), stop)
    assert statuses(answers) == {"200": 2}


@pytest.mark.parametrize("how", [{}, {"rate": 1.0, "concurrency": 1}])
def test_a_load_is_either_open_or_closed(clips, how):
    with pytest.raises(ValueError, match="either a concurrency or a rate"):
        sent(Plan("http://127.0.0.1:9/", clips, 1, **how))


def test_arrivals_are_as_many_as_asked_for_and_of_random_distance():
    moments = list(poisson(50, 200, 3))
    gaps = [after - before for before, after in pairwise(moments)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert len(moments) == pytest.approx(50 * 200, rel=0.05)
    assert spread / mean == pytest.approx(1, rel=0.05)  # an exponential's is its mean
    assert moments == list(poisson(50, 200, 3)) != list(poisson(50, 200, 4))
    assert moments[0] > 0 and moments[-1] < 200


def test_the_process_ends_early_when_it_is_told_to(clips):
    with server(hello) as url, Process(LOAD, Plan(url, clips, 60, concurrency=2)) as p:
        time.sleep(1.5)
        p.stop()
        answers = p.result()
    assert {one["status"] for one in answers} == {"200"}
    assert max(one["sent"] for one in answers) < 20


def test_a_process_that_fails_is_an_error_and_one_that_is_left_is_gone(clips, capfd):
    with (
        Process(LOAD, Plan("http://127.0.0.1:9/", clips, 1)) as process,
        pytest.raises(EndpointError, match=r"jobs\.benchmark\.load failed"),
    ):
        process.result()
    assert "either a concurrency or a rate" in capfd.readouterr().err
    with Process(LOAD, Plan("http://127.0.0.1:9/", clips, 60, concurrency=1)) as process:
        pid = process._child.pid
    assert not psutil.pid_exists(pid)


# --- arithmetic


def test_a_level_counts_what_was_done_between_two_moments():
    answers = [answer(1, at=0), answer(1, at=1, clip=1), answer(1, at=2), answer(1, at=3.5)]
    answers.append(answer(0.1, status="429", at=2))
    found = level(answers, (4.0, 6.0), 1.5, 4, 7)
    assert found["requests_per_second"] == pytest.approx(2 / 2.5)
    assert found["real_time_factor"] == pytest.approx(2.5 / 10)
    assert found["concurrency"] == 7 and found["p50_ms"] == 1000
    assert found["statuses"] == {"200": 4, "429": 1}


def test_a_level_without_a_transcript_is_an_error():
    with pytest.raises(EndpointError, match="'503': 1"):
        level([answer(1, status="503")], (1.0,), 0, 10, 4)


def test_percentiles_are_those_of_transcripts_alone():
    answers = [answer(n / 1000) for n in range(1, 102)] + [answer(9, status="429")] * 50
    assert percentiles(times(answers)) == {"p50_ms": 51, "p95_ms": 96, "p99_ms": 100}
    assert percentiles(times([answer(9, status=HANG)])) == dict.fromkeys(
        ("p50_ms", "p95_ms", "p99_ms")
    )


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("serve.throughput_vs_engine", 0.9, 0.89),
        ("serve.added_latency_ms", 15.0, 15.1),
        ("serve.p99_over_p50", 3.0, 3.1),
        ("realtime.sessions", 20, 19),
        ("realtime.final_ms", 300.0, 301.0),
        (
            "serve.autoscale",
            {"replicas": [(0, 1), (5, 2), (40, 1)], "failed": 0, "requests": 9},
            {"replicas": [(0, 1), (5, 2)], "failed": 0, "requests": 9},
        ),
        (
            "serve.autoscale",
            {"replicas": [(0, 1), (5, 2), (40, 1)], "failed": 0, "requests": 9},
            {"replicas": [(0, 1), (5, 2), (40, 1)], "failed": 1, "requests": 9},
        ),
        (
            "serve.overload",
            {"statuses": {"200": 3, "429": 9}, "p50_over_saturation": 2.0},
            {"statuses": {"200": 3, "429": 9}, "p50_over_saturation": 2.1},
        ),
        (
            "serve.overload",
            {"statuses": {"200": 3}, "p50_over_saturation": 2.0},
            {"statuses": {"200": 3, "503": 1}, "p50_over_saturation": 1.0},
        ),
        (
            "serve.overload",
            {"statuses": {"200": 3}, "p50_over_saturation": 2.0},
            {"statuses": {"429": 3}, "p50_over_saturation": None},
        ),
        (
            "serve.faults",
            {"lost": 0, "statuses": {"200": 1}, "killed": {"decoder": {"recovered_s": 9.0}}},
            {"lost": 1, "statuses": {"500": 1}, "killed": {"decoder": {"recovered_s": 9.0}}},
        ),
        (
            "serve.faults",
            {"lost": 0, "statuses": {"200": 1}, "killed": {"decoder": {"recovered_s": 9.0}}},
            {"lost": 0, "statuses": {"200": 1}, "killed": {"decoder": {"recovered_s": None}}},
        ),
    ],
)
def test_verdicts(key, good, bad):
    assert (verdict(TARGETS[key], good), verdict(TARGETS[key], bad)) == ("met", "missed")
    assert verdict(TARGETS[key], None) == "not measured"


def test_every_aim_has_a_row_whatever_was_left_out(capsys):
    one = level([answer(0.1)], (2.0,), 0, 1, 1)
    results = {"levels": [one], "saturation": one, **dict.fromkeys(TARGETS)}
    memory = {"start_mb": None, "peak_mb": None}
    results["tail"] = {"rate": 9.0, "statuses": {"200": 7}}
    results["serve.overload"] = {"statuses": {"200": 1}, "p50_over_saturation": 1.0} | memory
    targets.show(results)
    printed = capsys.readouterr().out
    assert printed.count("not measured") == len(TARGETS) - 1 and " met" in printed
    assert all(target.title.split(":")[0].split(",")[0] in printed for target in TARGETS.values())


def test_numbers_are_rounded_at_any_depth():
    assert rounded({"a": [1.23456, (2, 0.000123456)], "b": None}) == {
        "a": [1.235, [2, 0.0001235]],
        "b": None,
    }


# --- the plain process


def test_the_plain_process_hears_what_transcribe_does_whoever_listens(tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "CLIPS", 3)
    spoken = serve.speak(tmp_path)
    told = endpoint.settings()
    order = BaselinePlan(
        model=str(shipped.find("mmrag:tiny")),
        device="cpu",
        decode=told["decode"],
        rows=2,
        compute=None,
        compiled=False,
        decoder_threads=1,
        encoder_threads=1,
        batch_seconds=20,
        clips=spoken.files,
        alone=3,
        callers=(1, 3),
        seconds=0.5,
    )
    found = plain.carry_out(order)
    texts = {one.clip: one.text for one in found["alone"]}
    recogniser, settings = Recogniser.load(Path(order.model)), Decode(**told["decode"])
    for clip, file in enumerate(spoken.files):
        heard = transcribe(Path(file), recogniser, settings)
        assert texts[clip] == " ".join(one.text for one in heard if one.text)
    for by_callers in found["ways"].values():
        for callers, answers in by_callers.items():
            assert len(answers) >= callers
            assert all(one.text == texts[one.clip] for one in answers)


def test_clips_are_the_same_every_time_and_of_several_voices(tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "CLIPS", 4)
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        clips = serve.speak(tmp_path / name)
        made.append([Path(file).read_bytes() for file in clips.files])
    assert made[0] == made[1] and len(set(made[0])) == 4
    with wave.open(clips.files[0]) as file:
        assert file.getframerate() == 16000
        assert file.getnframes() / 16000 == pytest.approx(clips.seconds[0])
    assert len(set(clips.names)) == len(clips.names) > 0


# --- the service as a process


@pytest.mark.parametrize("key", sorted(serve.ONE_EACH | serve.SCALING))
def test_what_is_changed_is_a_setting_of_the_service(key):
    section, name = key.split(".")
    assert name in endpoint.settings()[section]


def sleeper(*titles: str) -> list[str]:
    """A command that starts a sleeping child for each title, as its title, and sleeps."""
    program = (
        "import subprocess, sys, time\n"
        "for title in sys.argv[1:]: subprocess.Popen([title, '60'], executable='sleep')\n"
        "print('ready to sleep', flush=True)\n"
        "time.sleep(60)\n"
    )
    return [sys.executable, "-c", program, *titles]


@contextmanager
def pretended(tmp_path: Path, *titles: str) -> Iterator[Endpoint]:
    """An endpoint whose processes only sleep."""
    log = tmp_path / "log"
    with endpoint._process(sleeper(*titles), {}, log) as process:
        deadline = time.monotonic() + 30
        while "ready" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        yield Endpoint("http://127.0.0.1:9", process, log)


def test_processes_are_found_by_title_and_only_among_ones_own(tmp_path):
    title = "ray::ServeReplica:mmrag:decoder"
    with ExitStack() as stack:
        stack.callback((other := subprocess.Popen([title, "60"], executable="sleep")).wait)
        stack.callback(other.kill)
        with pretended(tmp_path, title, title + ".method", "ray::DatastorePool") as service:
            assert len(service.processes(title)) == 2
            assert len(service.processes()) == 4
            assert service.memory_mb() > 1


def test_everything_that_was_started_is_stopped_also_after_an_error(tmp_path):
    def fail() -> None:
        with pretended(tmp_path, "ray::DatastorePool") as service:
            left.extend(service.processes())
            raise KeyboardInterrupt

    left: list[psutil.Process] = []
    with pytest.raises(KeyboardInterrupt):
        fail()
    assert len(left) == 2 and not any(one.is_running() for one in left)


def test_a_service_that_ends_before_it_is_ready_is_an_error_with_its_last_words(tmp_path):
    command = [sys.executable, "-c", "print('no such model')"]
    with (
        endpoint._process(command, {}, tmp_path / "log") as process,
        pytest.raises(EndpointError, match=r"(?s)has ended.*no such model"),
    ):
        Endpoint("http://127.0.0.1:9", process, tmp_path / "log").wait()


def test_a_service_that_is_never_ready_is_an_error_in_time(tmp_path):
    with (
        pretended(tmp_path) as service,
        pytest.raises(EndpointError, match=r"(?s)not ready.*ready to sleep"),
    ):
        service.wait(0.1)


def test_a_killed_process_has_recovered_once_there_is_another_one(tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "SAMPLE_SECONDS", 0.05)
    first, second, other = (subprocess.Popen(["sleep", "60"]) for _ in range(3))
    replicas = [psutil.Process(first.pid), psutil.Process(other.pid)]
    looks = 0

    def processes(title: str) -> list[psutil.Process]:
        nonlocal looks
        looks += 1
        if looks == 4:  # it has come again
            replicas.append(psutil.Process(second.pid))
        first.poll()
        return [one for one in replicas if one.is_running()]

    service = SimpleNamespace(processes=processes, ready=lambda: True, last_lines=str)
    assert serve.kill(service, "a title") > 0.1  # three samples
    assert first.wait(5) == -9 and looks == 4
    monkeypatch.setattr(serve, "RECOVERY_SECONDS", 0.2)
    assert serve.kill(service, "a title") is None  # nobody comes a second time
    replicas.clear()
    for one in (second, other):
        one.kill()
        one.wait()
    with pytest.raises(EndpointError, match="no process a title"):
        serve.kill(service, "a title")


def test_a_plan_survives_the_way_to_the_other_process(clips):
    plan = Plan("http://x/", clips, 1, rate=2, fields=(("datastore", "a"),))
    assert load.read(json.dumps(asdict(plan))) == plan
