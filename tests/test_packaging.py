"""What surrounds the code: the lock, the Makefile, the manifests of a cluster."""

import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cluster.train import deepspeed_config
from mmrag import config

ROOT = Path(__file__).parents[1]
KUBERAY = sorted((ROOT / "cluster" / "kuberay").glob("*.yaml"))
LAUNCHER = ROOT / "ray_cluster.yaml"
DOCKERFILE = ROOT / "cluster" / "Dockerfile"
IMAGE = "/opt/mmrag/"
PINS = {
    "torch": "2.14.1",
    "torchaudio": "2.11.0",
    "ray": "2.60.0",
    "deepspeed": "0.19.8",
    "transformers": "5.23.0",
}
REGISTRY = re.compile(
    r"index[-_]url|find-links|trusted-host|pypi\.org|pythonhosted|download\.pytorch\.org|\S @ http"
)
TELEMETRY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}


@pytest.fixture
def lock() -> dict[str, str]:
    """Package -> version of requirements.lock."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


@pytest.fixture
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def documents(file: Path) -> list[dict]:
    return list(yaml.safe_load_all(file.read_text()))


def pods() -> Iterator[dict]:
    """The pod templates of every RayCluster."""
    for file in KUBERAY:
        for document in documents(file):
            if document["kind"] == "RayCluster":
                spec = document["spec"]
                yield spec["headGroupSpec"]["template"]["spec"]
                yield from (group["template"]["spec"] for group in spec["workerGroupSpecs"])


def commands(file: Path) -> list[list[str]]:
    """The arguments after `python -m` of each stage that a manifest runs or tells how to run."""
    run = [d["spec"]["entrypoint"] for d in documents(file) if d.get("kind") == "RayJob"]
    told = re.findall(r"^# +(python -m jobs\..*)$", file.read_text(), flags=re.MULTILINE)
    return [shlex.split(command)[2:] for command in run + told]


@pytest.mark.parametrize(("name", "version"), PINS.items())
def test_the_lock_pins_the_versions_that_were_measured(lock, name, version):
    assert lock[name] == version


def test_the_lock_satisfies_every_range_of_the_project(lock, project):
    extras = project["project"]["optional-dependencies"]
    wanted = [
        *project["project"]["dependencies"],
        *extras["cpu"],
        *extras["speech"],
        *extras["corpora"],
        *extras["dev"],
    ]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(lock[canonicalize_name(requirement.name)]), (
            f"{requirement} is not satisfied by requirements.lock"
        )


def test_every_package_directory_is_listed(project):
    listed = set(project["tool"]["setuptools"]["packages"])
    tops = ("mmrag", "cluster", "jobs", "serve")
    found = {
        file.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for top in tops
        for file in (ROOT / top).rglob("__init__.py")
    }
    assert listed == found


def test_no_file_names_a_package_registry():
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    files = {ROOT / name for name in listing.stdout.splitlines()} - {Path(__file__)}
    naming = [
        file
        for file in sorted(files)
        if file.is_file() and REGISTRY.search(file.read_text(errors="replace"))
    ]
    assert naming == []


@pytest.mark.parametrize("target", ["setup", "demo", "test", "test-slow", "test-gpu", "lint"])
def test_the_makefile_has_the_target(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    planned = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True)
    assert planned.returncode == 0, planned.stderr.decode()


def test_continuous_integration_lints_and_tests():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    lines = script.read_text().splitlines()
    assert lines[0].startswith("#!") and "set -euo pipefail" in lines
    assert lines.index("make lint") < lines.index("make test")


@pytest.mark.parametrize("file", [LAUNCHER, *KUBERAY], ids=lambda file: file.stem)
def test_paths_in_a_manifest_are_there(file):
    text = file.read_text()
    inside = re.findall(rf"{IMAGE}([\w./-]+)", text)
    beside = re.findall(r"(?:cluster/kuberay|jobs/configs)/[\w.-]+\.yaml", text)
    assert all((ROOT / path).is_file() for path in inside + beside)


@pytest.mark.parametrize("file", [LAUNCHER, ROOT / "cluster" / "kuberay" / "rayjob.yaml"])
def test_a_stage_in_a_manifest_would_start(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert commands(file)
    for module, flag, path, *overrides in commands(file):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
        assert flag == "--config"
        here = [word.replace(IMAGE, f"{ROOT}/") for word in (path, *overrides)]
        deepspeed_config(config.read(here[0], here[1:]), torch.bfloat16)


def test_the_job_runs_a_stage_on_the_cluster_that_is_declared():
    declared = {
        document["metadata"]["name"]
        for file in KUBERAY
        for document in documents(file)
        if document["kind"] == "RayCluster"
    }
    jobs = [d for file in KUBERAY for d in documents(file) if d["kind"] == "RayJob"]
    assert jobs
    for job in jobs:
        assert job["spec"]["clusterSelector"]["ray.io/cluster"] in declared
        assert job["spec"]["entrypoint"].startswith("python -m jobs.")


def test_every_pod_shares_the_volume_that_holds_the_artifacts_and_sends_no_telemetry():
    claims = {
        document["metadata"]["name"]: document["spec"]["accessModes"]
        for file in KUBERAY
        for document in documents(file)
        if document["kind"] == "PersistentVolumeClaim"
    }
    checked = list(pods())
    assert len(checked) == 2
    for pod in checked:
        (container,) = pod["containers"]
        (volume,) = [v["name"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
        (claim,) = [v["persistentVolumeClaim"] for v in pod["volumes"] if v["name"] == volume]
        assert claims[claim["claimName"]] == ["ReadWriteMany"]
        assert {"name": volume, "mountPath": "/mnt/mmrag"} in container["volumeMounts"]
        environment = {one["name"]: one["value"] for one in container["env"]}
        assert Path(environment["MMRAG_RUNS"]).is_relative_to("/mnt/mmrag")
        assert TELEMETRY.items() <= environment.items()


def test_a_cluster_on_kubernetes_takes_its_token_from_a_secret_that_no_file_holds(lock):
    clusters = [d for file in KUBERAY for d in documents(file) if d["kind"] == "RayCluster"]
    assert clusters
    for cluster in clusters:
        secret = cluster["spec"]["authOptions"]
        assert secret == {"mode": "token", "secretName": "mmrag-ray-token"}
        assert cluster["spec"]["rayVersion"] == lock["ray"]
    assert not any(d["kind"] == "Secret" for file in KUBERAY for d in documents(file))


def test_the_launcher_file_is_one_that_ray_accepts():
    (cluster,) = documents(LAUNCHER)
    schema = Path(ray.autoscaler.__file__).with_name("ray-schema.json")
    jsonschema.validate(cluster, json.loads(schema.read_text()))
    assert cluster["head_node_type"] in cluster["available_node_types"]


def test_the_launcher_sends_every_node_what_setup_needs_and_the_token():
    (cluster,) = documents(LAUNCHER)
    mounts = cluster["file_mounts"]
    assert "~/.ray/auth_token" in mounts.values()
    local = {path for path in mounts.values() if not path.startswith("~")}
    assert local == {
        *("Makefile", "pyproject.toml", "requirements.lock", "README.md"),
        *("mmrag", "cluster", "jobs", "serve"),
    }
    assert all((ROOT / path).exists() for path in local)
    assert "make -C ~/mmrag setup" in cluster["setup_commands"]


def test_every_node_of_the_launcher_asks_for_a_token_and_sends_no_telemetry():
    (cluster,) = documents(LAUNCHER)
    (environment,) = [c for c in cluster["setup_commands"] if c.endswith("> ~/mmrag/environment")]
    settings = dict(word.split("=", 1) for word in shlex.split(environment) if "=" in word)
    assert settings["RAY_AUTH_MODE"] == "token"
    assert Path(settings["MMRAG_RUNS"]).is_relative_to("/mnt/mmrag")
    assert TELEMETRY.items() <= settings.items()
    for command in cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]:
        assert command.startswith(". ~/mmrag/environment;")


def test_the_image_copies_what_is_there_and_sends_no_telemetry():
    text = DOCKERFILE.read_text()
    copied = [
        source
        for line in re.findall(r"^COPY (.+)$", text, flags=re.MULTILINE)
        for source in line.split()[:-1]
    ]
    assert copied and all((ROOT / source).exists() for source in copied)
    assert {"mmrag", "cluster", "jobs", "serve", "requirements.lock"} <= set(copied)
    for name, value in TELEMETRY.items():
        assert f"{name}={value}" in text
