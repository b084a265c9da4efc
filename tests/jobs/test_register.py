"""A workspace's models, or the package's, become a version of a registered model."""

import shutil
import sys

import pytest

from cluster.registry import fetch
from jobs import register, stage
from mmrag import artifact, shipped
from mmrag.artifact import ArtifactError
from mmrag.config import Tracking, read
from mmrag.recogniser import Recogniser


@pytest.fixture
def own(experiment, tmp_path):
    """The experiment in a workspace of this test's own that holds the package's models."""
    shutil.copytree(shipped.find(shipped.TINY), tmp_path / "workspace")
    tracking = Tracking(uri=experiment.tracking.uri, experiment=tmp_path.name)
    return experiment.model_copy(update={"workspace": tmp_path / "workspace", "tracking": tracking})


def registered(experiment, cache, version="@production"):
    return fetch(f"models:/{experiment.tracking.experiment}{version}", experiment.tracking, cache)


def tuned(experiment, name, *roles):
    """Settings tuned with these artifacts of the workspace."""
    inputs = {role: artifact.load(experiment.workspace / role, role) for role in roles}
    path = experiment.workspace / "tuned" / name
    with artifact.create(path, "tuned", {}, inputs) as draft:
        (draft.path / "knn.json").write_text("{}")
    return artifact.load(path, "tuned")


def forge(experiment, kind, role):
    """Let an artifact of the workspace have been made with another `role`."""
    file = experiment.workspace / kind / artifact.FILE
    true = artifact.load(file.parent, kind).inputs[role]
    file.write_text(file.read_text().replace(true, "0123456789abcdef"))


def test_a_workspace_is_registered_with_its_adapter_and_what_was_tuned(own, tmp_path):
    settings = tuned(own, "names", "lm", "adapter")
    (own.workspace / "tuned" / ".names.lock").touch()
    (own.workspace / "tuned" / ".other.partial").mkdir()
    with stage.console.capture() as said:
        version = register.run(own, own.tracking.experiment)
    assert version == "1"
    directory = registered(own, tmp_path / "cache")
    ours, theirs = Recogniser.load(own.workspace), Recogniser.load(directory)
    assert ours.identity == theirs.identity
    assert theirs.adapter is not None
    assert artifact.load(directory / "tuned" / "names", "tuned").fingerprint == settings.fingerprint
    name = own.tracking.experiment
    for part in (name, "version 1", "alias production", f"models:/{name}@production"):
        assert part in said.get()
    assert f"tuned/names {settings.fingerprint}" in said.get()


def test_the_packages_models_are_registered_by_name(own, tmp_path):
    shutil.rmtree(own.workspace)
    register.run(own, own.tracking.experiment, shipped.TINY, "trial")
    directory = registered(own, tmp_path / "cache", "@trial")
    found = {path.name for path in directory.iterdir()}
    assert found == {"hubert", "codebook", "lm", "adapter", "calibration", "retrieval"}
    assert not own.workspace.exists()


def test_a_workspace_without_an_adapter_is_registered_without_one(own, tmp_path):
    shutil.rmtree(own.workspace / "adapter")
    register.run(own, own.tracking.experiment)
    directory = registered(own, tmp_path / "cache")
    found = {path.name for path in directory.iterdir()}
    assert found == {"hubert", "codebook", "lm", "calibration", "retrieval"}


def test_an_empty_workspace_registers_what_its_experiment_starts_from(own, tmp_path):
    tiny = read(stage.CONFIGS / "tiny.yaml")
    empty = {"workspace": tmp_path / "empty", "tracking": own.tracking}
    register.run(tiny.model_copy(update=empty), own.tracking.experiment)
    theirs = Recogniser.load(registered(own, tmp_path / "cache"))
    assert theirs.identity == Recogniser.load(shipped.find(shipped.TINY)).identity
    assert theirs.adapter is not None


def test_models_that_were_not_made_yet_are_named_with_what_makes_them(own):
    shutil.rmtree(own.workspace / "lm")
    with pytest.raises(ArtifactError, match=r"/lm .*\(made by: python -m jobs\.train\)"):
        register.run(own, own.tracking.experiment)


@pytest.mark.parametrize(
    ("kind", "role"), [("codebook", "hubert"), ("lm", "codebook"), ("adapter", "lm")]
)
def test_models_that_do_not_belong_together_are_refused(own, kind, role):
    forge(own, kind, role)
    with pytest.raises(ArtifactError, match=f"{kind} was made with {role} 0123456789abcdef"):
        register.run(own, own.tracking.experiment)


@pytest.mark.parametrize("role", ["lm", "adapter"])
def test_settings_tuned_for_another_model_are_refused(own, role):
    tuned(own, "names", "lm", "adapter")
    file = own.workspace / "tuned" / "names" / artifact.FILE
    true = artifact.load(own.workspace / role, role).fingerprint
    file.write_text(file.read_text().replace(true, "0123456789abcdef"))
    with pytest.raises(ArtifactError, match=f"names was made with {role} 0123456789abcdef"):
        register.run(own, own.tracking.experiment)


def test_the_command_registers_and_says_what_to_serve(own, monkeypatch, tmp_path):
    name = own.tracking.experiment
    arguments = ["--models", "mmrag:tiny", "--name", name, "--alias", "trial"]
    monkeypatch.setattr(sys, "argv", ["register", *arguments, f"tracking.uri={own.tracking.uri}"])
    with stage.console.capture() as said:
        register.main()
    assert f"models:/{name}@trial" in said.get()
    assert registered(own, tmp_path / "cache", "/1").is_dir()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--models", "mmrag:huge"], "no model 'mmrag:huge' in the package"),
        (["--models", "no/such"], "no such directory"),
        (["--models", "mmrag:tiny", "--name", "a/b"], "a name has letters"),
        (["tracking.url=x"], "unknown key"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(monkeypatch, arguments, said):
    monkeypatch.setattr(sys, "argv", ["register", *arguments])
    with pytest.raises(SystemExit) as stopped:
        register.main()
    assert stopped.value.code.startswith("error: ") and said in stopped.value.code
    assert "\n" not in stopped.value.code
