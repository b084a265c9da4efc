"""The alias of a registered model is moved while callers are served: nobody notices but by what is
heard."""

import json
import shutil
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import requests
from mlflow import MlflowClient
from service_process import serving

from cluster.progress import METRICS
from cluster.registry import ALIAS
from jobs import register
from mmrag import artifact, shipped
from mmrag.config import Tracking
from mmrag.recogniser import Recogniser
from mmrag.transcribe import transcribe
from serve.settings import read

NAME = "rolled"
SMALL = shipped.DEFAULT
SENTENCE = "is the helmet still on the old farm"
CALLERS = 4
SECONDS = 60

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def registry(experiment, tmp_path_factory):
    """`registry(models)`: a model of the package becomes the version that the alias means."""
    directory = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{directory / 'mlflow.db'}"
    own = experiment.model_copy(update={"tracking": Tracking(uri=uri, experiment=NAME)})

    def add(models: str, alias: str = ALIAS) -> str:
        return register.run(own, NAME, models, alias)

    add.uri = uri
    return add


@pytest.fixture(scope="module")
def rolled(registry, tmp_path_factory):
    """The service with the first version."""
    registry(shipped.TINY)
    settings = (
        f"model=models:/{NAME}@{ALIAS}",
        f"registry={registry.uri}",
        "model_check_s=1",
        "decode.max_seconds=4",
        "limits.requests=32",
    )
    with serving(tmp_path_factory.mktemp("rolled"), *settings) as process:
        yield process


@pytest.fixture(scope="module")
def heard(clip):
    """What each of the two models hears, by its name."""
    decode = read({"decode.max_seconds": 4}).decode
    found = {}
    for name in (shipped.TINY, SMALL):
        recogniser = Recogniser.load(shipped.find(name))
        told = transcribe(clip(SENTENCE), recogniser, decode)
        found[name] = " ".join(part.text for part in told if part.text)
    return found


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model with another codebook and another language model than the first version's."""
    directory, known = tmp_path_factory.mktemp("other") / "models", {}
    shutil.copytree(shipped.find(SMALL), directory)
    for kind in ("hubert", "codebook", "lm", "ngram", "calibration", "retrieval"):
        file = directory / kind / artifact.FILE
        told = json.loads(file.read_text())
        told["inputs"] = {role: known.get(role, one) for role, one in told["inputs"].items()}
        identity = {field: told[field] for field in ("schema", "kind", "config", "inputs")}
        known[kind] = artifact.fingerprint(directory / kind, identity, logs=(METRICS,))
        file.write_text(json.dumps(told | {"fingerprint": known[kind]}))
    return str(directory)


def ask(process, data, **form):
    return requests.post(
        f"{process.url}/v1/audio/transcriptions",
        files={"file": ("a.flac", data)},
        data=form,
        timeout=SECONDS,
    )


def told(process):
    [model] = requests.get(f"{process.url}/v1/models", timeout=SECONDS).json()["data"]
    return model["version"]


def until(condition, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def metric(process, name):
    lines = requests.get(f"{process.url}/metrics", timeout=SECONDS).text.splitlines()
    return [line for line in lines if line.startswith(f"ray_mmrag_{name}{{")]


class Load:
    """Callers that ask again and again, and what they were answered."""

    def __init__(self, process, data):
        self.seen, self._stop = [], threading.Event()
        self._process, self._data = process, data
        self._callers = [threading.Thread(target=self._call, args=(n,)) for n in range(CALLERS)]

    def _call(self, number):
        form = {"stream": "true"} if number % 2 else {}
        while not self._stop.is_set():
            try:
                answer = ask(self._process, self._data, **form)
                told = answer.text.rpartition("data: ")[2] if form else answer.text
                text = json.loads(told).get("text")
                self.seen.append((answer.status_code, text))
            except requests.RequestException as error:
                self.seen.append((type(error).__name__, None))

    def __enter__(self):
        for caller in self._callers:
            caller.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for caller in self._callers:
            caller.join(SECONDS)


def test_a_moved_alias_is_followed_and_no_request_fails(rolled, registry, other, clip, heard):
    data = clip(SENTENCE)
    assert told(rolled) == "1"
    assert ask(rolled, data).json()["text"] == heard[shipped.TINY]
    made = requests.post(
        f"{rolled.url}/v1/datastores",
        json={"name": "names", "texts": ["priya raghavan"]},
        timeout=SECONDS,
    )
    assert made.status_code == 201
    with Load(rolled, data) as load:
        until(lambda: len(load.seen) > 20)
        registry(other)
        until(lambda: told(rolled) == "2")
        switched = len(load.seen)
        until(lambda: len(load.seen) > switched + 40)
    counts = Counter(load.seen)
    old, new = (200, heard[shipped.TINY]), (200, heard[SMALL])
    assert set(counts) == {old, new}, "no request fails, and none is of two models"
    assert min(counts.values()) > 20 and load.seen[-1] == new
    refused = ask(rolled, data, datastore="names")
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "unusable"


def test_the_old_versions_processes_end(rolled):
    def of_old() -> bool:
        family = psutil.Process(rolled.pid).children(recursive=True)
        return any("ServeReplica:mmrag-v1-" in " ".join(one.cmdline()) for one in family)

    until(lambda: not of_old())


def test_a_version_that_cannot_be_loaded_leaves_the_one_that_serves(
    rolled, registry, clip, heard, tmp_path
):
    """Its files were damaged after it was registered: another one's without a calibration, so that
    nobody has fetched them already."""
    shutil.copytree(shipped.find(shipped.TINY), tmp_path / "models")
    shutil.rmtree(tmp_path / "models" / "calibration")
    version = registry(str(tmp_path / "models"), "trial")
    client = MlflowClient(registry.uri)
    source = client.get_model_version_download_uri(NAME, version).removeprefix("file://")
    (Path(source) / "lm" / "lm.safetensors").write_bytes(b"damaged")
    client.set_registered_model_alias(NAME, ALIAS, version)
    until(lambda: any(line.endswith(" 1.0") for line in metric(rolled, "model_refused")))
    assert told(rolled) == "2"
    assert ask(rolled, clip(SENTENCE)).json()["text"] == heard[SMALL]
    assert any('outcome="refused"' in line for line in metric(rolled, "model_replacements_total"))
    shown = {line for line in metric(rolled, "model_version") if line.endswith(" 1.0")}
    assert len(shown) == 1 and f'model="models:/{NAME}/2"' in shown.pop()
    client.set_registered_model_alias(NAME, ALIAS, "2")
    until(lambda: all(line.endswith(" 0.0") for line in metric(rolled, "model_refused")))
