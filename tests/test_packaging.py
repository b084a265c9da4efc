"""What surrounds the code: the lock, the Makefile, continuous integration."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
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


@pytest.fixture
def lock() -> dict[str, str]:
    """Package -> version of requirements.lock."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


@pytest.fixture
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


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
