"""An experiment is complete and legal, or the error names the file and the key."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from mmrag import config
from mmrag.config import ConfigError, Experiment


def example(schema: dict[str, Any], definitions: dict[str, Any]) -> Any:
    """The plainest value that `schema` allows; optional keys are left out."""
    schema = definitions[schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema
    if "enum" in schema:
        return schema["enum"][0]
    if "anyOf" in schema:
        return example(schema["anyOf"][0], definitions)
    if "properties" in schema:
        wanted = {name: schema["properties"][name] for name in schema["required"]}
        return {name: example(value, definitions) for name, value in wanted.items()}
    if schema["type"] == "object":  # a mixture
        return {schema["propertyNames"]["enum"][0]: 1.0}
    if schema["type"] == "array":
        return [example(schema["items"], definitions)]
    return {"integer": 1, "number": 1.0, "string": "name", "boolean": True}[schema["type"]]


@pytest.fixture
def values() -> dict[str, Any]:
    """A complete experiment, as its YAML file would hold it."""
    schema = Experiment.model_json_schema()
    values = example(schema, schema["$defs"])
    values["tokenize"] |= {"min_seconds": 0.2, "max_seconds": 30.0}
    values["pretrain"]["rounds"][0]["classes"] = 1
    return values


@pytest.fixture
def file(values: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_complete_file_is_an_experiment(file, values):
    experiment = config.read(file)
    assert experiment.tokenize.max_seconds == 30.0
    assert experiment == config.parse(values, "values")


def test_the_workspace_is_absolute_once_parsed(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.read(file, ["workspace=runs/a"]).workspace == tmp_path / "runs" / "a"
    monkeypatch.setenv("HOME", "/home/somebody")
    assert config.read(file, ["workspace=~/a"]).workspace == Path("/home/somebody/a")


def test_overrides_win_over_the_file_and_later_ones_over_earlier(file):
    overrides = ["knn.k=8", "knn.weight=0.25", "train.learning_rate=3e-4", "knn.k=16"]
    experiment = config.read(file, [*overrides, "evaluate.datastores=[a, b]"])
    assert (experiment.knn.k, experiment.knn.weight) == (16, 0.25)
    assert experiment.train.learning_rate == 3e-4
    assert experiment.evaluate.datastores == ("a", "b")


def test_an_override_does_not_touch_its_neighbours(file):
    plain, changed = config.read(file), config.read(file, ["hubert.width=64"])
    assert changed.hubert.width == 64
    assert changed.model_copy(update={"hubert": plain.hubert}) == plain


def test_the_environment_can_fill_a_value_in(file, monkeypatch):
    override = "tracking.uri=${oc.env:MMRAG_TEST_URI,sqlite:///default.db}"
    assert config.read(file, [override]).tracking.uri == "sqlite:///default.db"
    monkeypatch.setenv("MMRAG_TEST_URI", "http://tracker")
    assert config.read(file, [override]).tracking.uri == "http://tracker"


def test_an_experiment_survives_being_written_out(file):
    experiment = config.read(file)
    file.write_text(yaml.safe_dump(config.as_dict(experiment)))
    assert config.read(file) == experiment


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("lm.widht=512", "lm.widht: unknown key"),
        ("knots.k=1", "knots: unknown key"),
        ("train.phases=[{name: a, steps: 0, mixture: {text: 1}}]", "train.phases.0.steps: "),
        ("train.phases=[{name: a, steps: 1, mixture: {song: 1}}]", "train.phases.0.mixture.song"),
        ("knn=3", "knn: "),
        ("knn.weight=1.5", "knn.weight: "),
        ("knn.gate=0", "knn.gate: "),
        ("train.learning_rate=.nan", "train.learning_rate: "),
        ("train.learning_rate=.inf", "train.learning_rate: "),
        ("tune.weight=[0.5, 1.5]", "tune.weight.1: "),
        ("index.kind=flat", "index: unknown key"),
        ("datastore.index.kind=hnsw", "datastore.index.kind: "),
        ("datastore.name=../elsewhere", "datastore.name: "),
        ("evaluate.split=train", "evaluate.split: "),
        ("seed=", "seed: "),
    ],
)
def test_a_wrong_value_is_an_error_that_names_file_and_key(file, override, reason):
    with pytest.raises(ConfigError) as raised:
        config.read(file, [override])
    assert f"{file}: {reason}" in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["hubert.width=10", "hubert.heads=4"], "hubert: .*width 10 is not a multiple of heads 4"),
        (["hubert.layers=2", "hubert.layer=3"], "hubert: .*layer 3 of an encoder with 2 layers"),
        (["lm.width=10", "lm.heads=4"], "lm: .*width 10 is not a multiple of heads 4"),
        (["lm.width=8", "lm.heads=4", "lm.kv_heads=3"], "lm: .*heads 4 .* kv_heads 3"),
        (["train.workers.count=2"], "train: .*micro_batches 1 .* workers.count 2"),
        (["pretrain.rounds=[{target: hubert, classes: 5, steps: 5}]"], "pretrain: .*first round"),
        (["pretrain.rounds=[{target: mfcc, steps: 5}]"], "rounds.0: .*mfcc: classes are given"),
        (["pretrain.rounds=[{target: phones, classes: 5, steps: 5}]"], "rounds.0: .*phones: "),
        (["tokenize.min_seconds=20"], "tokenize: .*max_seconds 30.0 .* min_seconds 20.0"),
    ],
)
def test_an_illegal_combination_names_both_values(file, overrides, reason):
    with pytest.raises(ConfigError, match=reason) as raised:
        config.read(file, overrides)
    assert str(raised.value).startswith(f"{file}: ")


@pytest.mark.parametrize(
    "override",
    [
        *("knn.k", "", "=3", ".knn=3", "knn..k=3", "knn.=3"),
        *("knn.k=[1", "knn.k=${oc.env:MMRAG_NOT_SET}", "train.phases.0.steps=5"),
    ],
)
def test_a_malformed_override_is_an_error_that_names_it_and_the_file(file, override):
    with pytest.raises(ConfigError) as raised:
        config.read(file, [override])
    assert str(file) in str(raised.value)
    assert override.partition("=")[0] in str(raised.value)


def test_every_section_has_to_be_written_out(file, values):
    del values["decode"]
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"experiment.yaml: decode: Field required"):
        config.read(file)


def test_every_problem_is_reported_at_once(file):
    with pytest.raises(ConfigError) as raised:
        config.read(file, ["knn.k=0", "decode.beams=0"])
    assert "knn.k: " in str(raised.value) and "decode.beams: " in str(raised.value)


@pytest.mark.parametrize(
    "content", [b"", b"3\n", b"- a\n- b\n", b"knn: [1\n", b"seed: 1\nseed: 2\n", b"\xff\xfe"]
)
def test_a_file_that_is_no_experiment_is_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "wrong.yaml"
    path.write_bytes(content)
    for overrides in ([], ["knn.k=3"]):
        with pytest.raises(ConfigError, match=r"wrong.yaml"):
            config.read(path, overrides)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no such config file: .*missing.yaml"):
        config.read(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match=str(tmp_path)):
        config.read(tmp_path)


def test_an_experiment_cannot_be_changed(file):
    with pytest.raises(ValueError, match="frozen"):
        config.read(file).knn.k = 3


def test_training_steps_are_those_of_all_phases(file):
    phases = "[{name: a, steps: 3, mixture: {text: 1}}, {name: b, steps: 4, mixture: {speech: 1}}]"
    assert config.read(file, [f"train.phases={phases}"]).train.steps == 7
