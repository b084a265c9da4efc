"""A workspace's models become the package's, and the package's are what a workspace starts from."""

import json
import shutil
import sys

import pytest
import torch
from random_models import write_calibration

from jobs import publish, stage, train
from mmrag import artifact, shipped
from mmrag.artifact import ArtifactError
from mmrag.config import ConfigError
from mmrag.decoding.tune import DEFAULTS, SETTINGS
from mmrag.model import pretrained
from mmrag.recogniser import CALIBRATION, Recogniser

pytestmark = pytest.mark.ray


@pytest.fixture
def package(monkeypatch, tmp_path):
    """A package whose models are elsewhere."""
    monkeypatch.setattr(shipped, "DIRECTORY", tmp_path / "models")
    return tmp_path / "models" / "tiny"


def shipped_models(experiment):
    """The experiment, starting from the package's models."""
    return experiment.model_copy(
        update={
            "hubert": experiment.hubert.model_copy(update={"weights": shipped.TINY}),
            "tokenize": experiment.tokenize.model_copy(update={"codebook": shipped.TINY}),
            "train": experiment.train.model_copy(update={"base": shipped.TINY}),
        }
    )


def test_what_is_published_is_what_was_made_without_its_log(workspace, package):
    publish.run(workspace.experiment)
    ours, theirs = Recogniser.load(workspace.path), Recogniser.load(shipped.find(shipped.TINY))
    assert ours.identity == theirs.identity
    for one, other in zip(ours.lm.parameters(), theirs.lm.parameters(), strict=True):
        assert torch.equal(one, other)
    assert (workspace.path / "lm" / "metrics.jsonl").exists()
    assert not list(package.rglob("metrics.jsonl"))


def test_it_is_published_under_the_name_that_the_experiment_says(workspace, package):
    publish.run(workspace.experiment.model_copy(update={"published": "small"}))
    assert Recogniser.load(shipped.find("mmrag:small")).identity
    assert not package.exists()


def test_an_adapter_is_published_beside_the_models_where_the_experiment_trains_one(
    adapted, package
):
    publish.run(adapted.experiment)
    found = {file.name for file in (package / "adapter").iterdir()}
    assert found == {"artifact.json", "adapter.safetensors", "adapter.json"}
    ours, theirs = Recogniser.load(adapted.path), Recogniser.load(shipped.find(shipped.TINY))
    assert ours.identity == theirs.identity
    expected = dict(ours.adapter.named_parameters())
    for name, weight in theirs.adapter.named_parameters():
        assert torch.equal(weight, expected[name]), name


def test_a_calibration_goes_with_its_language_model_and_with_no_other(workspace, borrow, package):
    experiment = borrow("hubert", "codebook", "lm")
    lm = artifact.load(experiment.workspace / "lm", "lm").fingerprint
    made = write_calibration(experiment.workspace)
    publish.run(experiment)
    assert Recogniser.load(package).calibration == made
    shutil.rmtree(experiment.workspace / CALIBRATION)
    publish.run(experiment)
    assert Recogniser.load(package).calibration == made, "of the same language model"
    file = experiment.workspace / "lm" / "artifact.json"
    file.write_text(file.read_text().replace(lm, "0123456789abcdef"))
    publish.run(experiment)
    assert Recogniser.load(package).calibration is None


def test_what_was_tuned_becomes_the_models_own_settings_and_goes_with_its_language_model(
    borrow, package
):
    experiment = borrow("hubert", "codebook", "lm")
    lm = artifact.load(experiment.workspace / "lm", "lm")
    place = experiment.workspace / "tuned" / experiment.datastore.name
    with artifact.create(place, "tuned", {}, {"lm": lm}) as draft:
        artifact.write_json(draft.path / SETTINGS, {"k": 3})
    publish.run(experiment)
    assert json.loads((package / DEFAULTS / SETTINGS).read_text()) == {"k": 3}
    file = experiment.workspace / "lm" / "artifact.json"
    file.write_text(file.read_text().replace(lm.fingerprint, "0123456789abcdef"))
    with pytest.raises(ArtifactError, match=f"was made with lm {lm.fingerprint}"):
        publish.run(experiment)
    shutil.rmtree(place)
    publish.run(experiment)
    assert not (package / DEFAULTS).exists()


def test_models_without_an_adapter_are_published_without_one(workspace, package):
    publish.run(workspace.experiment)
    assert not (package / "adapter").exists()
    assert Recogniser.load(package).adapter is None


def test_an_adapter_for_another_language_model_is_not_published(adapted, borrow, package):
    experiment = borrow("hubert", "codebook", "lm", "adapter", of=adapted)
    file = experiment.workspace / "lm" / "artifact.json"
    true = artifact.load(file.parent, "lm").fingerprint
    file.write_text(file.read_text().replace(true, "0123456789abcdef"))
    with pytest.raises(ArtifactError, match=f"adapter was made with lm {true}"):
        publish.run(experiment)
    assert not package.exists()


def test_an_adapter_that_was_not_trained_yet_is_named(adapted, borrow, package):
    experiment = borrow("hubert", "codebook", "lm", of=adapted)
    with pytest.raises(ArtifactError, match=r"/adapter .*\(made by: python -m jobs\.train\)"):
        publish.run(experiment)
    assert not package.exists()


def test_a_workspace_takes_the_packages_adapter_where_it_has_none(adapted, package, tmp_path):
    publish.run(adapted.experiment)
    own = shipped_models(adapted.experiment).model_copy(update={"workspace": tmp_path / "own"})
    taken = stage.load(own, "adapter", "adapter", "train")
    assert taken.path == tmp_path / "own" / "adapter"
    assert taken.fingerprint == artifact.load(adapted.path / "adapter", "adapter").fingerprint


def test_publishing_again_leaves_nothing_of_what_was_there(workspace, package):
    for _ in range(2):
        publish.run(workspace.experiment)
        found = {path.relative_to(package).as_posix() for path in package.rglob("*.*")}
        assert "lm/old.bin" not in found and "lm/artifact.json" in found
        (package / "lm" / "old.bin").touch()


def test_models_that_do_not_belong_together_are_refused(borrow, package):
    experiment = borrow("hubert", "codebook", "lm")
    file = experiment.workspace / "hubert" / "artifact.json"
    true = artifact.load(file.parent, "hubert").fingerprint
    file.write_text(file.read_text().replace(true, "0123456789abcdef"))
    with pytest.raises(ArtifactError, match=f"{true}.*0123456789abcdef|0123456789abcdef.*{true}"):
        publish.run(experiment)
    assert not package.exists()


def test_models_too_large_for_a_package_are_refused(borrow, package):
    experiment = borrow("hubert", "codebook", "lm")
    with (experiment.workspace / "lm" / "much").open("wb") as much:
        much.truncate(61_000_000)
    with pytest.raises(ValueError, match="60 are allowed"):
        publish.run(experiment)
    assert not package.exists()


def test_a_workspace_takes_the_packages_models_where_it_has_none(workspace, package, tmp_path):
    publish.run(workspace.experiment)
    own = shipped_models(workspace.experiment).model_copy(update={"workspace": tmp_path / "own"})
    for kind, by in publish.KINDS.items():
        taken = stage.load(own, kind, kind, by)
        assert taken.path == tmp_path / "own" / kind
        assert taken.fingerprint == artifact.load(workspace.path / kind, kind).fingerprint
    assert Recogniser.load(tmp_path / "own").identity == Recogniser.load(package).identity


def test_training_starts_from_the_packages_weights(workspace, package):
    publish.run(workspace.experiment)
    lm, _ = pretrained.load(package / "lm")
    assert pretrained.base_config(shipped.TINY) == lm.config
    tensors = dict(pretrained.base_tensors(shipped.TINY))
    for name, parameter in lm.named_parameters():
        assert torch.equal(tensors[name], parameter), name


def test_a_base_of_another_shape_is_refused_naming_what_it_takes(borrow, workspace, package):
    publish.run(workspace.experiment)
    experiment = shipped_models(borrow("hubert", "codebook", "tokens"))
    wide = experiment.lm.model_copy(update={"width": 64})
    with pytest.raises(ConfigError, match=r"lm\.width=32"):
        train.run(experiment.model_copy(update={"lm": wide}))


def test_the_command_replaces_what_was_published_and_offers_no_force(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main(monkeypatch, "--force")
    assert stopped.value.code == 2 and "--force" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"error: .*made by: python -m jobs\.pretrain_hubert"):
        main(monkeypatch, f"workspace={tmp_path}", "hubert.weights=null")


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["publish", *arguments])
    publish.main()
