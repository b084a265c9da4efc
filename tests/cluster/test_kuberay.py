"""The manifests for Kubernetes: that they would be taken, hang together, and run what is there."""

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_schema import KINDS, problems
from ray.autoscaler._private.kuberay import autoscaling_config
from ray.autoscaler._private.prom_metrics import __file__ as AUTOSCALER_METRICS
from ray.dashboard.modules.metrics import dashboards
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema

from cluster.placement import problem_with
from mmrag import config
from serve import app, settings
from serve.operations import startup

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "cluster" / "kuberay"
OVERLAYS = ["small", "large"]
JOBS = sorted((KUBERAY / "jobs").glob("*.yaml"))
IMAGE = "/opt/mmrag/"
TELEMETRY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}
GPU = "nvidia.com/gpu"
RAY_METRIC = re.compile(r"\b(?:ray|autoscaler)_[a-z_]+")
SPECIFIC_TO_HISTOGRAMS = re.compile(r"_(bucket|sum|count)$")


@cache
def rendered(overlay: str) -> list[dict[str, Any]]:
    """The objects of an overlay as `kubectl apply -k` would send them."""
    if not shutil.which("kubectl"):
        pytest.skip("no kubectl")
    command = ["kubectl", "kustomize", KUBERAY / "overlays" / overlay]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return list(yaml.safe_load_all(made.stdout))


def written() -> list[dict[str, Any]]:
    """The objects of the files themselves, as they are before any overlay."""
    files = [*(KUBERAY / "base").glob("*.yaml"), *(KUBERAY / "service").glob("*.yaml")]
    files += [*(KUBERAY / "monitoring").glob("*.yaml"), *JOBS]
    found = [one for file in sorted(files) for one in yaml.safe_load_all(file.read_text())]
    return [one for one in found if one["kind"] not in ("Kustomization", "Component")]


def everything(size: str) -> list[dict[str, Any]]:
    """What a cluster of that size may hold: its overlay's objects, and the service's."""
    return rendered(size) + rendered(f"{size}/service")


def named(documents: list[dict[str, Any]], kind: str, name: str = "mmrag") -> dict[str, Any]:
    [found] = [one for one in documents if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return found


def of_kind(documents: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [one for one in documents if one["kind"] == kind]


def clusters(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The specifications of every Ray cluster."""
    return [one["spec"] for one in of_kind(documents, "RayCluster")] + [
        one["spec"]["rayClusterConfig"] for one in of_kind(documents, "RayService")
    ]


def ray_pods(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pod templates of every Ray cluster."""
    return [
        template["template"]
        for spec in clusters(documents)
        for template in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
    ]


def pods(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every pod template."""
    others = [
        one["spec"]["template"] for one in documents if one["kind"] in ("Deployment", "StatefulSet")
    ]
    return ray_pods(documents) + others


def containers(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for pod in pods(documents) for one in pod["spec"]["containers"]]


def environment(container: dict[str, Any]) -> dict[str, str]:
    """The variables that a manifest writes out."""
    return {one["name"]: one["value"] for one in container.get("env", ()) if "value" in one}


def values_of(document: Any, key: str) -> Iterator[Any]:
    """Every value under that key, at any depth."""
    if isinstance(document, list):
        for one in document:
            yield from values_of(one, key)
    elif isinstance(document, dict):
        for name, value in document.items():
            if name == key:
                yield value
            yield from values_of(value, key)


# What the API server says of them.


def test_every_object_would_be_taken():
    found = written()
    assert {one["kind"] for one in found} >= {"RayCluster", "RayJob", "RayService", "PodMonitor"}
    assert [problem for one in found for problem in problems(one)] == []


@pytest.mark.parametrize("size", OVERLAYS)
def test_every_object_of_an_overlay_would_be_taken(size):
    found = everything(size)
    assert {one["kind"] for one in found} == {kind for _, kind in KINDS} - {"RayJob"}
    assert [problem for one in found for problem in problems(one)] == []
    assert {one["metadata"]["namespace"] for one in found} == {"mmrag"}


@pytest.mark.parametrize(
    ("was", "becomes", "said"),
    [
        ("idleTimeoutSeconds: 1800", "idleTimeoutSecond: 1800", "idleTimeoutSecond: unknown field"),
        ("maxReplicas: 1", "maxReplica: 1", "maxReplica: unknown field of WorkerGroupSpec"),
        ("maxReplicas: 1", "maxReplicas: one", "maxReplicas: 'one' is no integer"),
        ('num-cpus: "0"', "num-cpus: 0", "rayStartParams: {'num-cpus': 0"),
        ("upscalingMode: Default", "upscalingMode: default", "is none of Default|Aggressive"),
        ("groupName: gpu", "labels: {}", "workerGroupSpecs[0].groupName: missing"),
        ("cpu: 500m", "cpu: 500x", "no quantities"),
        ("name: gcs-server", "name: a-very-long-name-of-a-port", "is no name of a port"),
        ("effect: NoSchedule", "effect: Never", "effect: 'Never' is none of"),
    ],
)
def test_what_would_be_refused_is_found(was, becomes, said):
    text = (KUBERAY / "base" / "raycluster.yaml").read_text()
    assert was in text
    wrong = yaml.safe_load(text.replace(was, becomes))
    assert any(said in problem for problem in problems(wrong))


def test_a_kind_that_nobody_looked_up_is_refused():
    assert problems({"apiVersion": "ray.io/v1alpha1", "kind": "RayCluster"})


# How they hang together.


def secrets_made(directory: Path) -> tuple[dict[str, str], str, str]:
    """Run secrets.sh with a kubectl that notes what it is told: name -> key, what was printed and
    what a second run printed."""
    noted = directory / "noted"
    fake = directory / "kubectl"
    fake.write_text(
        f"""#!/usr/bin/env bash
case "$*" in
*"get namespace"*) exit 1 ;;
*"get secret "*) grep -q " generic ${{@: -1}} " {noted} ;;
*) echo "$*" >> {noted}; [[ "$*" != *"/dev/stdin"* ]] || cat >> {directory / "values"} ;;
esac
"""
    )
    fake.chmod(0o755)
    noted.touch()
    variables = os.environ | {"PATH": f"{directory}:{os.environ['PATH']}"}
    said = [
        subprocess.run(
            [KUBERAY / "secrets.sh", "mmrag"],
            env=variables,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    ]
    made = re.findall(r"generic (\S+) --from-file=(\S+)=/dev/stdin$", noted.read_text(), re.M)
    assert noted.read_text().startswith("create namespace mmrag\n")
    return dict(made), said[0], said[1]


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return secrets_made(tmp_path_factory.mktemp("secrets"))[0]


def test_the_script_makes_each_secret_once_and_shows_none(tmp_path):
    made, first, second = secrets_made(tmp_path)
    values = (tmp_path / "values").read_text().split()
    assert len(values) == len(set(values)) == len(made) == 4
    assert all(len(value) == 64 for value in values)
    for value in values:
        assert value not in first + second + (tmp_path / "noted").read_text()
    assert second.count("is there already") == len(made)


@pytest.mark.parametrize("size", OVERLAYS)
def test_every_secret_that_is_named_is_one_that_the_script_makes(size, secrets):
    found = everything(size)
    for named_secret in values_of(found, "secretKeyRef"):
        assert secrets[named_secret["name"]] == named_secret["key"]
    for spec in clusters(found):
        assert spec["authOptions"]["mode"] == "token"
        assert secrets[spec["authOptions"]["secretName"]] == "auth_token"
    mounted = [one["secretName"] for one in values_of(found, "secret") if "secretName" in one]
    assert mounted and set(mounted) <= secrets.keys()
    for one in containers(of_kind(found, "RayService")):
        file = Path(environment(one)[settings.KEYS_FILE])
        [mount] = [m for m in one["volumeMounts"] if m["name"] == "api-keys"]
        assert file.parent == Path(mount["mountPath"]) and mount["readOnly"]
        assert file.name == secrets["mmrag-api-keys"]
    assert not of_kind(found, "Secret")


@pytest.mark.parametrize("size", OVERLAYS)
def test_every_volume_that_is_mounted_is_there_and_the_artifacts_are_shared(size):
    found = everything(size)
    claims = {
        one["metadata"]["name"]: one["spec"]["accessModes"]
        for one in of_kind(found, "PersistentVolumeClaim")
    }
    for pod in pods(found):
        volumes = {one["name"]: one for one in pod["spec"].get("volumes", ())}
        for container in pod["spec"]["containers"]:
            mounts = {one["name"] for one in container["volumeMounts"]}
            assert mounts - volumes.keys() <= {"data"}  # of the claim templates
            for name in mounts & volumes.keys():
                if claim := volumes[name].get("persistentVolumeClaim"):
                    assert claims[claim["claimName"]] == ["ReadWriteMany"]
    for pod in ray_pods(found):
        [container] = pod["spec"]["containers"]
        assert {"name": "mmrag", "mountPath": "/mnt/mmrag"} in container["volumeMounts"]
        assert Path(environment(container)["MMRAG_RUNS"]).is_relative_to("/mnt/mmrag")
        assert TELEMETRY.items() <= environment(container).items()


@pytest.mark.parametrize("size", OVERLAYS)
def test_every_selector_finds_what_it_is_for(size):
    found = everything(size)
    labels = [pod["metadata"]["labels"] for pod in pods(found)]
    ports = {
        port["name"]: port["containerPort"]
        for one in containers(found)
        for port in one.get("ports", ())
    }
    for one in of_kind(found, "Service"):
        wanted = one["spec"]["selector"].items()
        assert any(wanted <= own.items() for own in labels)
        assert all(port["targetPort"] in ports for port in one["spec"]["ports"])
    for one in found:
        if one["kind"] in ("Deployment", "StatefulSet"):
            own = one["spec"]["template"]["metadata"]["labels"].items()
            assert one["spec"]["selector"]["matchLabels"].items() <= own
    for one in of_kind(found, "NetworkPolicy"):
        wanted = one["spec"]["podSelector"]["matchLabels"].items()
        assert any(wanted <= own.items() for own in labels)
    services = {one["metadata"]["name"]: one for one in of_kind(found, "Service")}
    addresses = {environment(one).get("MLFLOW_TRACKING_URI") for one in containers(found)}
    addresses |= {
        f"//{spec['gcsFaultToleranceOptions']['redisAddress']}" for spec in clusters(found)
    }
    addresses |= {word for one in containers(found) for word in one.get("args", ())}
    hosts = re.findall(r"//(?:\w+@)?(mmrag[\w-]*):(\d+)", " ".join(filter(None, addresses)))
    assert len(set(hosts)) == 3  # MLflow, its database, Redis
    for host, port in hosts:
        assert int(port) in [one["port"] for one in services[host]["spec"]["ports"]]


@pytest.mark.parametrize("size", OVERLAYS)
def test_images_have_versions_and_pods_no_rights_that_they_do_not_need(size):
    found = everything(size)
    for container in containers(found):
        name, _, tag = container["image"].partition(":")
        assert name and tag and "latest" not in tag
        assert "REGISTRY" not in name  # an overlay names it, in one line
    for pod in pods(found):
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["runAsUser"] > 0


# Heads, nodes and GPUs.


@pytest.mark.parametrize("size", OVERLAYS)
def test_a_head_takes_no_work_and_survives_its_own_end(size):
    for spec in clusters(everything(size)):
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert GPU not in json.dumps(spec["headGroupSpec"])
        assert spec["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]


@pytest.mark.parametrize(
    ("size", "experiment", "nodes"), [("small", "330m", 1), ("large", "6.8b", 4)]
)
def test_rays_autoscaler_sees_as_many_gpus_as_the_experiment_asks_for(size, experiment, nodes):
    """Ray's own reading of the object, which decides what nodes it asks for."""
    seen = autoscaling_config._derive_autoscaling_config_from_ray_cr(
        named(rendered(size), "RayCluster")
    )
    gpu = seen["available_node_types"]["gpu"]
    assert (gpu["min_workers"], gpu["max_workers"], gpu["resources"]["GPU"]) == (0, nodes, 8)
    asked = config.read(ROOT / "jobs" / "configs" / f"{experiment}.yaml").train.workers
    assert asked.count * asked.num_gpus == 8 * nodes
    assert problem_with([], [gpu["resources"]] * nodes) is None
    assert seen["available_node_types"]["headgroup"]["resources"]["CPU"] == 0
    # Between two stages no node is let go.
    assert seen["idle_timeout_minutes"] >= 15


@pytest.mark.parametrize("size", OVERLAYS)
def test_a_pod_with_gpus_may_be_where_they_are_and_says_what_disk_it_takes(size):
    for pod in ray_pods(everything(size)):
        [container] = pod["spec"]["containers"]
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert {"cpu", "memory", "ephemeral-storage"} <= requests.keys()
        extended = {name for name in requests | limits if "/" in name}
        assert {n: requests[n] for n in extended} == {n: limits[n] for n in extended}
        tolerated = {one["key"] for one in pod["spec"].get("tolerations", ())}
        assert (GPU in tolerated) == (GPU in requests)
        if GPU in requests:  # a last checkpoint, the last requests
            assert pod["spec"]["terminationGracePeriodSeconds"] >= 120
        assert pod["metadata"]["annotations"]["prometheus.io/port"] == "8080"


def test_the_large_clusters_nodes_reach_each_others_memory():
    [gpu] = [
        one
        for one in named(rendered("large"), "RayCluster")["spec"]["workerGroupSpecs"]
        if one["groupName"] == "gpu"
    ]
    [container] = gpu["template"]["spec"]["containers"]
    assert any(name.startswith("rdma/") for name in container["resources"]["limits"])
    assert "IPC_LOCK" in container["securityContext"]["capabilities"]["add"]
    assert gpu["template"]["spec"]["nodeSelector"]
    assert len(gpu["template"]["spec"]["tolerations"]) == 2
    assert "kubernetes.io/hostname" in values_of(gpu, "topologyKey")


# What they run.


def entrypoints() -> list[tuple[str, str]]:
    """Every entrypoint of a job, with its file's name."""
    return [(file.stem, yaml.safe_load(file.read_text())["spec"]["entrypoint"]) for file in JOBS]


def stages(entrypoint: str, directory: Path) -> list[tuple[str, list[str]]]:
    """The stages that a job would start, and with which arguments: run here, with a `python` that
    only says what it was told."""
    python = directory / "python"
    python.write_text('#!/bin/sh\necho "told $*"\n')
    python.chmod(0o755)
    ran = subprocess.run(
        [word.replace(IMAGE, f"{ROOT}/") for word in shlex.split(entrypoint)],
        cwd=directory,
        env=os.environ | {"PATH": f"{directory}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    told = [shlex.split(line) for line in ran.stdout.splitlines() if line.startswith("told ")]
    assert all(flag == "-m" for _, flag, *_ in told)
    return [(module, arguments) for _, _, module, *arguments in told]


def test_there_is_a_job_for_each_model_on_the_cluster_that_is_declared():
    assert [name for name, _ in entrypoints()] == ["330m", "6.8b"]
    for file in JOBS:
        job = yaml.safe_load(file.read_text())
        assert job["spec"]["clusterSelector"] == {"ray.io/cluster": "mmrag"}
        assert job["metadata"]["namespace"] == "mmrag"


@pytest.mark.parametrize(("name", "entrypoint"), entrypoints())
def test_every_stage_of_a_job_would_start(name, entrypoint, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = stages(entrypoint, tmp_path)
    told = ("pretrain_hubert", "tokenize", "train", "build_datastore", "tune", "evaluate")
    assert [module for module, _ in found] == [f"jobs.{one}" for one in (*told, "register")]
    for module, (flag, path, *overrides) in found:
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
        assert (flag, path) == ("--config", f"jobs/configs/{name}.yaml")
        read = config.read(path, overrides)
        assert Path(read.train.deepspeed).is_file()


@pytest.mark.parametrize(("_", "entrypoint"), entrypoints())
def test_a_command_is_of_plain_words(_, entrypoint):
    """Ray joins the words of a job's command again, and its quotes are others than a shell's."""
    assert shlex.join(shlex.split(entrypoint)) == entrypoint


def test_stages_end_with_the_first_that_fails(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$2"\n[ "$2" != jobs.train ]\n')
    python.chmod(0o755)
    ran = subprocess.run(
        [ROOT / "cluster" / "stages.sh", "tokenize,train,evaluate"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1
    assert ran.stdout.splitlines() == ["== tokenize", "jobs.tokenize", "== train", "jobs.train"]


def test_paths_in_the_files_are_there():
    for file in KUBERAY.rglob("*.*"):
        text = file.read_text()
        inside = re.findall(rf"{IMAGE}([\w./-]+)", text)
        beside = re.findall(r"(?:cluster/kuberay|jobs/configs)/[\w./-]*\w", text)
        missing = [path for path in inside + beside if not (ROOT / path).exists()]
        assert missing == [], file


def test_the_scripts_may_be_run():
    for script in (KUBERAY / "secrets.sh", ROOT / "cluster" / "stages.sh"):
        assert script.stat().st_mode & stat.S_IXUSR
        subprocess.run(["bash", "-n", script], check=True)


# The endpoint.


@pytest.fixture(params=OVERLAYS)
def service(request, monkeypatch) -> dict[str, Any]:
    """The RayService of an overlay, in the environment of its pods."""
    found = named(rendered(f"{request.param}/service"), "RayService", "mmrag-endpoint")
    told = [environment(one) for one in containers([found])]
    assert all(one == told[0] for one in told)  # the head builds what the workers run
    for name, value in told[0].items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    return found


def arguments_of(service: dict[str, Any]) -> dict[str, Any]:
    given = yaml.safe_load(service["spec"]["serveConfigV2"])
    [application] = given["applications"]
    return application["args"]


def test_serve_takes_the_services_configuration(service):
    given = yaml.safe_load(service["spec"]["serveConfigV2"])
    checked = ServeDeploySchema.model_validate(given)
    assert (
        given.keys() <= ServeDeploySchema.model_fields.keys()
    )  # Serve passes over what it knows not
    [application] = checked.applications
    module, _, name = application.import_path.partition(":")
    assert getattr(app, name) is app.build and module == app.__name__
    assert application.name == startup.APPLICATION
    [head] = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert checked.http_options.port in [one["containerPort"] for one in head["ports"]]
    assert checked.http_options.host == "0.0.0.0"  # of pods; who is asked for a key has none
    assert settings.KEYS_FILE in environment(head)


def test_the_application_is_built_from_the_services_arguments(service):
    built = app.build(arguments_of(service) | {"model": "mmrag:tiny"})
    assert isinstance(built, Application)


def test_replicas_ask_for_the_gpus_that_they_use_and_fit_on_the_pods(service):
    read = settings.read(arguments_of(service))
    assert read.device == "cuda"
    assert read.encoder.num_gpus > 0 and read.decoder.num_gpus > 0
    [group] = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    [container] = group["template"]["spec"]["containers"]
    pod = {
        "CPU": float(container["resources"]["limits"]["cpu"]),
        "GPU": float(container["resources"]["limits"][GPU]),
    }
    assert problem_with(startup.demands(read), [pod] * group["minReplicas"]) is None
    most = {part: getattr(read, part) for part in startup.DEPLOYMENTS}
    largest = read.model_copy(
        update={name: part.model_copy(update={"min": part.max}) for name, part in most.items()}
    )
    assert problem_with(startup.demands(largest), [pod] * group["maxReplicas"]) is None
    assert read.decoder.max == group["maxReplicas"]


def test_models_and_artifacts_of_the_service_are_found_where_the_jobs_leave_them(service):
    read = settings.read(arguments_of(service))
    job = environment(containers(of_kind(rendered("small"), "RayCluster"))[0])
    assert read.registry == job["MLFLOW_TRACKING_URI"]
    assert read.datastores.is_relative_to("/mnt/mmrag")


# What is watched.


def our_metrics() -> set[str]:
    """The names under which this service counts, as Ray exports them."""
    text = "".join(file.read_text() for file in sorted((ROOT / "serve").rglob("*.py")))
    whole = re.findall(r'(?:Counter|Gauge|Histogram)\(\s*"(mmrag_[a-z_]+)"', text)
    [prefix] = re.findall(r'name = "(mmrag_decoder_)\{\}"\.format', text)
    parts = re.findall(r'(?:Counter|Gauge)\(\s*name\("([a-z_]+)"\)', text)
    assert len(whole) >= 8 and len(parts) == 7
    return {f"ray_{name}" for name in (*whole, *(prefix + part for part in parts))}


def dashboard() -> dict[str, Any]:
    return json.loads((KUBERAY / "monitoring" / "grafana.json").read_text())


def shown() -> set[str]:
    """The metrics that the dashboard asks Prometheus for."""
    queries = [one["expr"] for panel in dashboard()["panels"] for one in panel["targets"]]
    labels = {"ray_io_cluster", "ray_train_run_name"}
    found = {name for query in queries for name in RAY_METRIC.findall(query)} - labels
    # A metric carries its own state as a label of the same name.
    return {SPECIFIC_TO_HISTOGRAMS.sub("", name) for name in found}


def test_the_dashboard_asks_for_all_that_the_service_counts_and_for_nothing_else_of_it():
    assert {name for name in shown() if name.startswith("ray_mmrag_")} == our_metrics()


def test_the_page_of_the_endpoint_names_the_same_metrics():
    text = (ROOT / "docs" / "serving.md").read_text()
    for name in our_metrics():
        assert f"`_{name.removeprefix('ray_mmrag_')}`" in text or f"`{name}`" in text, name


def test_the_dashboard_asks_for_metrics_that_ray_exports():
    texts = [file.read_text() for file in Path(dashboards.__file__).parent.glob("*.py")]
    known = set(RAY_METRIC.findall("".join(texts)))
    own = re.findall(r'(?:Gauge|Counter)\(\s*"([a-z_]+)"', Path(AUTOSCALER_METRICS).read_text())
    known |= {f"autoscaler_{name}" for name in own}
    assert {name for name in shown() if not name.startswith("ray_mmrag_")} <= known


def test_the_dashboards_panels_do_not_lie_upon_each_other():
    panels = dashboard()["panels"]
    cells = [
        (x, y)
        for one in panels
        for x in range(one["gridPos"]["x"], one["gridPos"]["x"] + one["gridPos"]["w"])
        for y in range(one["gridPos"]["y"], one["gridPos"]["y"] + one["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert (
        len({one["id"] for one in panels}) == len({one["title"] for one in panels}) == len(panels)
    )


@pytest.mark.parametrize("size", OVERLAYS)
def test_prometheus_finds_ports_that_the_pods_have(size):
    found = everything(size)
    for monitor in of_kind(found, "PodMonitor"):
        [kind] = monitor["spec"]["selector"]["matchLabels"].values()
        groups = {"head": [], "worker": []}
        for spec in clusters(found):
            groups["head"].append(spec["headGroupSpec"])
            groups["worker"] += spec["workerGroupSpecs"]
        for group in groups[kind]:
            [container] = group["template"]["spec"]["containers"]
            names = {port["name"] for port in container["ports"]}
            assert {one["port"] for one in monitor["spec"]["podMetricsEndpoints"]} <= names
    board = named(found, "ConfigMap", "mmrag-grafana")
    assert json.loads(board["data"]["grafana.json"]) == dashboard()
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_the_manifests_name_the_version_of_ray_that_is_installed():
    [version] = re.findall(r"^ray==(.+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    for size in OVERLAYS:
        assert {spec["rayVersion"] for spec in clusters(everything(size))} == {version}


@pytest.mark.parametrize("size", OVERLAYS)
def test_no_two_objects_of_ray_would_make_a_service_of_the_same_name(size):
    found = everything(size)
    names = [one["metadata"]["name"] for one in found if one["apiVersion"] == "ray.io/v1"]
    made = [f"{name}-head-svc" for name in names]
    made += [one["metadata"]["name"] for one in of_kind(found, "Service")]
    assert len(made) == len(set(made))
    for port_forward in re.findall(r"svc/(\S+)", (ROOT / "docs" / "cluster.md").read_text()):
        serves = [f"{one['metadata']['name']}-serve-svc" for one in of_kind(found, "RayService")]
        assert port_forward in made + serves
