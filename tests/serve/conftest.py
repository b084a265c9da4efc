"""One service for all tests of this room: the real one, on Ray Serve, over HTTP.

It listens to clips that a synthesizer speaks, the same samples every time, and a recogniser in this
process says what the service should hear.
"""

import io
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests
import soundfile
from openai import OpenAI

from cluster.ports import free_ports
from mmrag import shipped
from mmrag.recogniser import Recogniser
from mmrag.speech import audio
from mmrag.speech.audio import SAMPLE_RATE
from mmrag.transcribe import transcribe
from serve.settings import Settings, read

PARTS = ("ingress", "encoder", "retriever", "decoder")
APPLICATION = "under-test"
"""Unlike any that runs on this machine: its processes are looked for by name."""
SECONDS = 60
"""No answer may take longer."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whichever test is the first to need the service waits until it is up."""
    for item in items:
        if "service" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)
            if not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(120))


@dataclass(frozen=True)
class Service:
    """The service under test, and what its callers do."""

    url: str
    directory: Path
    """Of its datastores."""
    settings: Settings

    def request(self, method: str, path: str, **more: Any) -> requests.Response:
        """Any request; an answer within SECONDS."""
        return requests.request(method, self.url + path, timeout=SECONDS, **more)

    def transcribe(
        self, data: bytes, file_name: str = "clip.flac", **form: Any
    ) -> requests.Response:
        """POST a file; `context`, `include` and `timestamp_granularities` are lists."""
        lists = ("context", "include", "timestamp_granularities")
        fields = {f"{name}[]" if name in lists else name: value for name, value in form.items()}
        files = {"file": (file_name, data)}
        return self.request("POST", "/v1/audio/transcriptions", files=files, data=fields)

    def text(self, data: bytes, **form: Any) -> str:
        """The transcript of a file that has one."""
        response = self.transcribe(data, **form)
        assert response.status_code == 200, response.text
        return response.json()["text"]

    def create(self, name: str, *texts: str) -> dict[str, Any]:
        """Make a datastore of texts."""
        response = self.request("POST", "/v1/datastores", json={"name": name, "texts": texts})
        assert response.status_code == 201, response.text
        return response.json()

    def ready(self) -> None:
        """Return once every part answers."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            try:
                if self.request("GET", "/readyz").status_code == 200:
                    return
            except requests.ConnectionError:
                pass
            time.sleep(0.2)
        raise TimeoutError("the service did not become ready")

    def processes(self, kind: str) -> list[psutil.Process]:
        """This session's processes of a deployment ("decoder"), or "DatastorePool"."""
        replica = f"ServeReplica:{APPLICATION}:{kind}"
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                title = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if title.startswith((f"ray::{replica}", f"ray::{kind}")):
                found.append(process)
        return found

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels; 0 where there is none."""
        lines = self.request("GET", "/metrics").text.splitlines()
        samples = [line for line in lines if re.match(rf"ray_mmrag_{name}[{{ ]", line)]
        asked = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(float(s.split()[-1]) for s in samples if all(part in s for part in asked))


@contextmanager
def running(settings: dict[str, Any]) -> Iterator[str]:
    """The service on a free port of the session's cluster; afterwards the cluster is empty."""
    import ray
    from ray import serve

    from cluster.shards import NAMESPACE
    from serve.app import build

    [port] = free_ports(1)
    quiet = {"log_level": "ERROR", "enable_access_log": False}
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config=quiet)
        serve.run(build(settings), name=APPLICATION, logging_config=quiet)
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        for actor in ray.util.list_named_actors(all_namespaces=True):
            if actor["namespace"] == NAMESPACE:
                ray.kill(ray.get_actor(**actor))


@pytest.fixture(scope="session")
def service(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The service with one replica of everything and an upload limit that is met quickly."""
    directory = tmp_path_factory.mktemp("served") / "datastores"
    given = {
        "model": shipped.TINY,
        "datastores": str(directory),
        "cache": str(directory.parent / "models"),
        "limits": {"upload_mb": 2, "requests": 32, "texts": 50, "timeout_seconds": SECONDS},
        "decode": {"max_seconds": 4},
        **{part: {"max": 1, "drain_s": 2} for part in PARTS},
        "decoder.compiled": False,  # rounded as the recogniser of this process is
    }
    with running(given) as url:
        yield Service(url, directory, read(given))


@pytest.fixture
def datastore(service: Service) -> Iterator[Callable[..., str]]:
    """`datastore(*texts)`: the name of a new datastore, which goes when the test ends."""
    made = []

    def make(*texts: str) -> str:
        made.append(f"made-{len(made)}")
        service.create(made[-1], *texts)
        return made[-1]

    yield make
    for name in made:
        service.request("DELETE", f"/v1/datastores/{name}")


@pytest.fixture
def client(service: Service) -> OpenAI:
    """OpenAI's own client, which does not know that we are somebody else."""
    return OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=SECONDS)


@pytest.fixture(scope="session")
def synthesizer():
    """Speaks."""
    from mmrag.corpora.voices.espeak import Synthesizer

    return Synthesizer()


@pytest.fixture(scope="session")
def wave(synthesizer) -> Callable[..., np.ndarray]:
    """`wave(sentence)`: somebody saying it, (T,) float32 at 16 kHz, always the same."""
    from mmrag.corpora import synthetic

    @cache
    def say(sentence: str, seed: int = 0) -> np.ndarray:
        [planned] = synthetic.assign_voices([sentence], seed)
        return synthetic.render(planned, synthesizer).wave

    return say


@pytest.fixture(scope="session")
def clip(wave) -> Callable[..., bytes]:
    """`clip(*sentences)`: a FLAC file of somebody saying them, half a second between them."""

    def record(*sentences: str) -> bytes:
        pause = np.zeros(SAMPLE_RATE // 2, np.float32)
        waves = [part for sentence in sentences for part in (wave(sentence), pause)]
        return written(np.concatenate(waves[:-1]))

    return record


def written(
    wave: np.ndarray, format: str = "FLAC", rate: int = SAMPLE_RATE, subtype: str | None = None
) -> bytes:
    """A wave (T,) or (T, channels) as a file."""
    handle = io.BytesIO()
    channels = 1 if wave.ndim == 1 else wave.shape[1]
    with soundfile.SoundFile(handle, "w", rate, channels, subtype, format=format) as file:
        for start in range(0, len(wave), rate):  # libsndfile's Vorbis dies of long blocks
            file.write(wave[start : start + rate])
    return handle.getvalue()


@pytest.fixture(scope="session")
def write() -> Callable[..., bytes]:
    """`write(wave, format, rate, subtype)`: the file of a wave."""
    return written


@pytest.fixture
def second(write: Callable[..., bytes]) -> dict[str, tuple[str, bytes]]:
    """A form's file with a second of anything."""
    return {"file": ("a.wav", write(np.zeros(SAMPLE_RATE, np.float32), "WAV"))}


@pytest.fixture(scope="session")
def heard_here(service: Service) -> Callable[[bytes], str]:
    """`heard_here(file)`: its transcript as one process makes it, without retrieval."""
    recogniser = Recogniser.load(shipped.find(service.settings.model))

    def hear(data: bytes) -> str:
        told = transcribe(data, recogniser, service.settings.decode)
        return " ".join(part.text for part in told if part.text)

    return hear


@pytest.fixture(scope="session")
def duration() -> Callable[[bytes], float]:
    """`duration(file)`: its length, seconds."""
    return audio.duration


@pytest.fixture
def at_once() -> Iterator[Callable[..., list[Any]]]:
    """`at_once(f, calls)`: what `f` returns for each of them, all called at the same moment."""

    def run(function: Callable[[Any], Any], calls: list[Any]) -> list[Any]:
        together = threading.Barrier(len(calls))

        def call(argument: Any) -> Any:
            together.wait(SECONDS)
            return function(argument)

        with ThreadPoolExecutor(len(calls)) as pool:
            return list(pool.map(call, calls))

    return run


INSIDE = re.compile(
    r"\w/\w+/|\.py\b|traceback|[a-z]error\b|exception|<class|object at 0|0x[0-9a-f]{4}|\bray\b"
    r"|replica",
    re.IGNORECASE,
)
"""What no caller should read: paths, classes, and how the service is made."""


@pytest.fixture(scope="session")
def refused() -> Callable[..., str]:
    """`refused(response, status, code, param)`: its message, once its shape has been checked."""

    def check(response: Any, status: int, code: str | None = None, param: str | None = None) -> str:
        assert response.status_code == status, response.text
        assert response.headers["Content-Type"] == "application/json"
        [(name, error)] = response.json().items()
        assert name == "error" and set(error) == {"message", "type", "param", "code"}
        special = {401: "authentication_error", 429: "rate_limit_error"}
        usual = "server_error" if status >= 500 else "invalid_request_error"
        assert error["type"] == special.get(status, usual)
        assert (error["code"], error["param"]) == (code, param), error
        assert error["message"] and not INSIDE.search(response.text), error["message"]
        if status in (429, 503):
            assert int(response.headers["Retry-After"]) >= 1
        if status == 401:
            assert response.headers["WWW-Authenticate"] == "Bearer"
        return error["message"]

    return check
