"""A name with a prefix is a model of the package; everything else is a path."""

import re
from pathlib import Path

import pytest

from mmrag import shipped


@pytest.fixture
def models(monkeypatch, tmp_path):
    """A package with two models, and a third that lacks its language model."""
    for name in ("tiny/hubert", "tiny/lm", "other/lm", "half/hubert"):
        (tmp_path / "models" / name).mkdir(parents=True)
    monkeypatch.setattr(shipped, "DIRECTORY", tmp_path / "models")
    return tmp_path / "models"


def test_a_model_of_the_package_is_found_by_its_name(models):
    assert shipped.find(shipped.TINY) == models / "tiny"
    assert shipped.find("mmrag:other") == models / "other"


@pytest.mark.parametrize("path", ["runs/tiny", "tiny", "/models/mmrag:tiny", "a/mmrag:tiny", "."])
def test_anything_else_is_a_path_whether_it_exists_or_not(models, path):
    assert shipped.find(path) == shipped.find(Path(path)) == Path(path)


@pytest.mark.parametrize(
    "name", ["huge", "half", "", ".", "..", "../tiny", "tiny/lm", "tiny/../other", "/", "TINY"]
)
def test_a_model_that_the_package_lacks_is_an_error_that_names_those_it_has(models, name):
    message = re.escape(f"no model 'mmrag:{name}' in the package, which has ['other', 'tiny']")
    with pytest.raises(ValueError, match=message):
        shipped.find(f"mmrag:{name}")


def test_a_package_without_models_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(shipped, "DIRECTORY", tmp_path / "none")
    with pytest.raises(ValueError, match=r"no model 'mmrag:tiny' in the package, which has \[\]"):
        shipped.find(shipped.TINY)


def test_the_names_that_others_write_carry_the_prefix():
    assert shipped.TINY.startswith(shipped.PREFIX)
    assert Path(shipped.__file__).parent == shipped.DIRECTORY.parent
