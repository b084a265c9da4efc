"""The steps of the images: what each layer is for, and what would make one wrong."""

import re
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "cluster" / "Dockerfile"
TARGETS = ["service", "node"]
TELEMETRY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}


@dataclass
class Stage:
    """A stage of the build: what it is made from, why, and its steps."""

    name: str
    base: str
    purpose: str
    steps: list[tuple[str, str]] = field(default_factory=list)


def read(text: str) -> dict[str, Stage]:
    """The stages of a Dockerfile, by name."""
    stages: dict[str, Stage] = {}
    comment = ""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if line.startswith("#"):
            comment += line.removeprefix("#")
            continue
        if not line.strip():
            comment = ""
            continue
        keyword, _, rest = line.partition(" ")
        if keyword == "FROM":
            base, _, name = rest.partition(" AS ")
            stages[name] = Stage(name, base, comment.strip())
            latest = stages[name]
        else:
            latest.steps.append((keyword, " ".join(rest.split())))
        comment = ""
    return stages


@pytest.fixture
def stages() -> dict[str, Stage]:
    return read(DOCKERFILE.read_text())


def steps(stages: dict[str, Stage], target: str) -> list[tuple[str, str]]:
    """Every step of a target, those that it is made from first."""
    own = stages[target]
    before = steps(stages, own.base) if own.base in stages else []
    return before + own.steps


def copied(stage: Stage) -> list[str]:
    return [
        source for keyword, rest in stage.steps if keyword == "COPY" for source in rest.split()[:-1]
    ]


def test_every_layer_says_what_it_is_for(stages):
    assert list(stages) == ["system", "environment", "code", "service", "node"]
    assert all(len(stage.purpose) > 60 for stage in stages.values())


def test_it_starts_from_one_image_of_a_certain_version(stages):
    bases = [stage.base for stage in stages.values() if stage.base not in stages]
    assert len(bases) == 1
    assert re.fullmatch(r"python:3\.11\.\d+-\w+", bases[0])


def test_what_is_copied_is_there_and_in_the_builds_context(stages):
    allowed = [
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    sources = [source for stage in stages.values() for source in copied(stage)]
    assert {"mmrag", "cluster", "jobs", "serve", "requirements.lock"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source, pattern) for pattern in allowed), source
    assert set(allowed) == set(sources)


def test_the_environment_is_built_anew_when_the_lock_changes_and_not_when_code_does(stages):
    assert copied(stages["environment"]) == ["requirements.lock"]
    assert not copied(stages["system"])
    installs = [rest for _, rest in stages["code"].steps if "pip install" in rest]
    assert len(installs) == 1 and "--no-deps" in installs[0]
    for _, rest in stages["environment"].steps:
        assert rest.count("pip install") == rest.count("--no-cache-dir")


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_as_a_user_without_rights(stages, target):
    users = [rest for keyword, rest in steps(stages, target) if keyword == "USER"]
    assert users[-1] == "1000"
    after = [
        keyword
        for keyword, _ in steps(stages, target)[
            [keyword for keyword, _ in steps(stages, target)].index("USER") :
        ]
    ]
    assert "RUN" not in after and "COPY" not in after


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_sends_no_telemetry_and_holds_no_secret(stages, target):
    settings = " ".join(rest for keyword, rest in steps(stages, target) if keyword == "ENV")
    for name, value in TELEMETRY.items():
        assert f"{name}={value}" in settings
    declared = [rest for keyword, rest in steps(stages, target) if keyword in ("ENV", "ARG")]
    assert not re.search(r"TOKEN|PASSWORD|KEY|SECRET", " ".join(declared))


def test_packages_of_the_operating_system_leave_no_lists_behind(stages):
    for stage in stages.values():
        for keyword, rest in stage.steps:
            if keyword == "RUN" and "apt-get" in rest:
                assert "--no-install-recommends" in rest
                assert "rm -rf /var/lib/apt/lists/*" in rest
                assert rest.index("apt-get update") < rest.index("apt-get install")


def test_the_lock_names_faiss_as_the_image_looks_for_it(stages):
    [(_, install)] = [one for one in stages["environment"].steps if "pip install" in one[1]]
    pattern = re.search(r"s/(\^faiss-cpu==)/\$FAISS==/", install)
    assert len(re.findall(pattern[1], (ROOT / "requirements.lock").read_text(), re.MULTILINE)) == 1


def test_the_endpoints_image_serves_and_says_whether_it_does(stages):
    own = dict(stages["service"].steps)
    assert own["CMD"] == '["python", "-m", "serve", "--host", "0.0.0.0"]'
    assert f"http://127.0.0.1:{own['EXPOSE']}/readyz" in own["HEALTHCHECK"]


def test_what_is_built_without_a_target_is_a_node(stages):
    assert list(stages)[-1] == "node"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("FROM python:latest AS system\n", test_it_starts_from_one_image_of_a_certain_version),
        ("# x\nFROM python:3.11.1-x AS system\n", test_every_layer_says_what_it_is_for),
    ],
)
def test_a_wrong_step_would_be_found(text, wrong):
    with pytest.raises(AssertionError):
        wrong(read(text))
