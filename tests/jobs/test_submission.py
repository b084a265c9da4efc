"""Stages as jobs of a cluster that asks for a token: submitted, followed, stopped, gone on with.

The commands are those of the manifests for Kubernetes, at tiny size: what a RayJob would run, the
server that MLflow's Deployment would start, and the endpoint as the RayService would deploy it.
"""

import json
import re
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from mlflow import MlflowClient
from submitted import BIN, Head, head, server

from cluster.ports import free_ports
from mmrag import artifact
from mmrag.config import Experiment, read

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "cluster" / "kuberay"
STAGES = {
    "hubert": "hubert",
    "codebook": "codebook",
    "tokens": "tokens",
    "lm": "lm",
    "datastores/multimodal": "datastore",
    "tuned/multimodal": "tuned",
    "evaluation": "evaluation",
}
"""Artifacts that the job's stages leave, and their kinds."""
KEY = "a-key"
STEPS = 100
"""Of training, with a checkpoint every ten."""

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(2400)]


@dataclass
class Story:
    """What was seen while the jobs ran."""

    mlflow: str
    workspace: Path
    experiment: str
    said: dict[str, str] = field(default_factory=dict)
    """What a command said, by what it was for."""
    answers: dict[str, requests.Response] = field(default_factory=dict)


def written(experiment: Experiment, directory: Path) -> tuple[Path, Path]:
    """A file of the miniature experiment, trained for longer and as the 330M model is; and its
    workspace."""
    values = experiment.model_dump(mode="json")
    values["workspace"] = str(directory / "runs" / "tiny")
    speech = {"speech_first": 2, "text_first": 1, "speech": 1}
    values["train"] |= {
        "phases": [{"name": "speech", "steps": STEPS, "mixture": speech}],
        "zero_stage": 2,
        "deepspeed": "cluster/deepspeed/zero2.json",
    }
    file = directory / "tiny.yaml"
    file.write_text(yaml.safe_dump(values))
    return file, read(file).workspace


def mlflow_command(directory: Path, port: int) -> list[str]:
    """What the Deployment starts, with a file in the place of its database."""
    documents = yaml.safe_load_all((KUBERAY / "base" / "mlflow.yaml").read_text())
    [deployment] = [one for one in documents if one["kind"] == "Deployment"]
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    here = {
        "--port=5000": f"--port={port}",
        "--workers=2": "--workers=1",
        "--backend-store-uri=postgresql://mlflow@mmrag-mlflow-database:5432/mlflow": (
            f"--backend-store-uri=sqlite:///{directory}/mlflow.db"
        ),
        "--artifacts-destination=/mnt/mmrag/runs/mlartifacts": (
            f"--artifacts-destination={directory}/mlartifacts"
        ),
    }
    assert here.keys() <= set(container["args"])
    arguments = [here.get(one, one) for one in container["args"]]
    # Here it is asked for on another port.
    arguments = [one.replace("localhost:5000", f"localhost:{port}") for one in arguments]
    command, *more = container["command"]
    return [str(BIN / command), *more, *arguments]


def served(directory: Path, mlflow: str, port: int) -> Path:
    """The file for `serve deploy` that the RayService holds, sized for this machine."""
    service = yaml.safe_load((KUBERAY / "service" / "rayservice.yaml").read_text())
    given = yaml.safe_load(service["spec"]["serveConfigV2"])
    given["http_options"] |= {"host": "127.0.0.1", "port": port}
    [application] = given["applications"]
    arguments: dict[str, Any] = application["args"]
    arguments |= {"registry": mlflow, "device": "cpu", "cache": str(directory / "models")}
    arguments |= {"datastores": str(directory / "datastores"), "local": None}
    for name, part in arguments.items():
        if isinstance(part, dict) and "num_cpus" in part:
            part |= {"num_cpus": 0.2, "num_gpus": 0, "max": 1}
            arguments[name] = part
    file = directory / "serve.yaml"
    file.write_text(yaml.safe_dump(given))
    return file


def entrypoint(config: Path) -> list[str]:
    """The command of the RayJob, for that experiment and in the working directory of a job."""
    job = yaml.safe_load((KUBERAY / "jobs" / "330m.yaml").read_text())
    here = {"/opt/mmrag/cluster/stages.sh": "cluster/stages.sh"}
    here["jobs/configs/330m.yaml"] = str(config)
    words = shlex.split(job["spec"]["entrypoint"])
    assert here.keys() <= set(words)
    return [here.get(word, word) for word in words]


@pytest.fixture(scope="module")
def story(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """Everything happens here, once; the tests say what came of it."""
    directory = tmp_path_factory.mktemp("submitted")
    config, workspace = written(experiment, directory)
    port, listening = free_ports(2)
    mlflow = f"http://localhost:{port}"
    keys = directory / "keys"
    keys.write_text(f"{KEY}\n")
    story = Story(mlflow, workspace, "mmrag")
    variables = {"MLFLOW_TRACKING_URI": mlflow, "MMRAG_API_KEYS_FILE": str(keys)}
    with (
        server(mlflow_command(directory, port), directory, f"{mlflow}/health"),
        head(directory, **variables) as cluster,
    ):
        _run_jobs(cluster, story, config)
        _ask_mlflow(story)
        _serve(cluster, story, served(directory, mlflow, listening), listening)
        yield story


def _run_jobs(cluster: Head, story: Story, config: Path) -> None:
    stranger = Head(cluster.dashboard, cluster.variables | {"RAY_AUTH_MODE": "disabled"})
    refused = stranger.ray("job", "list", "--address", cluster.dashboard)
    story.said["stranger"] = f"{refused.returncode} {refused.stdout} {refused.stderr}"
    story.said["synthesize"] = cluster.submit(
        "synthesize", "bash", "cluster/stages.sh", "synthesize", "--config", str(config)
    )
    command = entrypoint(config)
    cluster.submit("stopped", *command, wait=False)
    story.said["followed"] = cluster.follow(
        "stopped", rf"step [2-9]0/{STEPS}"
    )  # behind a checkpoint
    story.said["status"] = cluster.stop("stopped")
    story.said["resumed"] = cluster.submit("resumed", *command)


def _ask_mlflow(story: Story) -> None:
    for host in ("mmrag-mlflow:5000", "evil.example"):
        story.answers[host] = requests.get(
            f"{story.mlflow}/api/2.0/mlflow/experiments/get-by-name",
            params={"experiment_name": story.experiment},
            headers={"Host": host},
            timeout=30,
        )


def _serve(cluster: Head, story: Story, config: Path, port: int) -> None:
    deployed = cluster.ray("deploy", str(config), "--address", cluster.dashboard, program="serve")
    assert deployed.returncode == 0, deployed.stderr[-3000:]
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 200
    while True:
        try:
            if requests.get(f"{url}/readyz", timeout=10).status_code == 200:
                break
        except requests.RequestException:
            pass
        if time.monotonic() > deadline:
            said = cluster.ray("status", "--address", cluster.dashboard, program="serve").stdout
            raise AssertionError(said[-3000:])
        time.sleep(1)
    clip = next((story.workspace / "corpus" / "audio").glob("test-*/*.flac"))
    for name, headers in (("no key", {}), ("key", {"Authorization": f"Bearer {KEY}"})):
        story.answers[name] = requests.post(
            f"{url}/v1/audio/transcriptions",
            files={"file": (clip.name, clip.read_bytes())},
            headers=headers,
            timeout=120,
        )
    story.answers["models"] = requests.get(
        f"{url}/v1/models", headers={"Authorization": f"Bearer {KEY}"}, timeout=60
    )
    cluster.ray("shutdown", "-y", "--address", cluster.dashboard, program="serve")


def test_who_has_no_token_is_refused(story):
    assert not story.said["stranger"].startswith("0 ")
    assert "401" in story.said["stranger"] or "token" in story.said["stranger"].lower()


def test_a_job_is_followed_and_stopped_in_the_middle(story):
    assert "synthesize: " in story.said["synthesize"]
    assert re.search(rf"step \d+/{STEPS} ", story.said["followed"])
    assert "was stopped" in story.said["status"]


def test_the_same_command_goes_on_where_the_stopped_one_was(story):
    said = story.said["resumed"]
    assert "tokens: nothing to do" in said.replace("\n", " ")
    assert "lm: going on where a stopped run left off" in said
    first = int(re.findall(rf"step (\d+)/{STEPS} ", said)[0])
    assert first > 10, said  # of a checkpoint, not of nothing
    assert re.search(r"evaluation: \d", said)
    assert "succeeded" in said


def test_every_stage_left_its_artifact(story):
    for name, kind in STAGES.items():
        assert artifact.load(story.workspace / name, kind).fingerprint


def test_every_stage_left_its_run_in_mlflow_and_the_stopped_one_is_told_from_it(story):
    client = MlflowClient(tracking_uri=story.mlflow)
    found = client.search_runs([client.get_experiment_by_name(story.experiment).experiment_id])
    finished = {run.info.run_name: run for run in found if run.info.status == "FINISHED"}
    assert STAGES.keys() <= finished.keys()
    made = artifact.load(story.workspace / "lm", "lm")
    assert finished["lm"].data.tags["fingerprint"] == made.fingerprint
    assert [one.path for one in client.list_artifacts(finished["lm"].info.run_id)]


def test_mlflow_answers_under_the_name_that_the_pods_use_and_under_no_other(story):
    assert story.answers["mmrag-mlflow:5000"].status_code == 200
    assert story.answers["evil.example"].status_code == 403


def test_the_endpoint_serves_the_model_that_was_registered(story):
    assert story.answers["no key"].status_code == 401
    assert story.answers["key"].status_code == 200
    assert isinstance(story.answers["key"].json()["text"], str)
    [model] = story.answers["models"].json()["data"]
    made = artifact.load(story.workspace / "lm", "lm")
    assert made.fingerprint in json.dumps(model)
