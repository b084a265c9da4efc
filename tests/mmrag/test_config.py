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


@pytest.mark.parametrize("given", ["null", "", "''", "'  '", "5", "[a]", "{a: b}"])
def test_a_workspace_is_named(file, given):
    with pytest.raises(ConfigError, match=r"workspace: .*names no directory and no URL"):
        config.read(file, [f"workspace={given}"])


def test_an_empty_variable_of_the_environment_is_one_that_is_not_set(file, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MMRAG_RUNS", "")
    named = "workspace=${oc.env:MMRAG_RUNS,%s}/a"
    assert config.read(file, [named % "runs"]).workspace == tmp_path / "runs" / "a"
    assert config.read(file, [named % 5]).workspace == tmp_path / "5" / "a"
    with pytest.raises(ConfigError, match="'MMRAG_RUNS' is not set, or is empty"):
        config.read(file, ["workspace=${oc.env:MMRAG_RUNS}/a"])
    monkeypatch.setenv("MMRAG_RUNS", "/elsewhere")
    assert config.read(file, [named % "runs"]).workspace == Path("/elsewhere/a")


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
        (
            ["train.workers.count=[2, 4]", "train.micro_batches=8"],
            "train: .*micro_batches 8 .* workers.count 3",
        ),
        (["train.workers.count=[4, 2]"], "train.workers: .*the fewest come first"),
        (["train.workers.count=[1, 2, 4]"], r"train.workers.count: .*\[1, 2, 4\] is neither a num"),
        (["train.workers.count=[0, 2]"], r"train.workers.count: .*\[0, 2\] is neither a number"),
        (["train.workers.count=0"], "train.workers.count: .*0 is neither a number of workers"),
        (["train.compiled=true", "train.zero_stage=3"], "train: .*compiled .* zero_stage 0, 1"),
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


ROLES = {
    "": "workspace:o seed models:o published:o language",
    "tracking": "uri:o experiment:o",
    "synthesize": "lm adapter mentions dev test text everyday_share voices held_out_voices copies "
    "kokoro:o sentences.files:o sentences.held_out sentences.lm sentences.dev sentences.test "
    "recordings.lm:o recordings.dev:o recordings.test:o recordings.copies "
    "workers.count:o workers.num_cpus:o workers.num_gpus:o",
    "hubert": "weights front conv_channels stack convolved norm width layers heads feed_forward "
    "layer stored",
    "pretrain": "spelling_weight alphabet base anchor_weight base_share precision "
    "rounds batch_seconds crop_seconds learning_rate mask_probability mask_length "
    "rough band_masks band_width band_warp layer_drop seen_weight balance domain_weights "
    "sample_seconds leave_out:c "
    "checkpoint_steps:o log_steps:o workers:o max_failures:o num_cpus:o num_gpus:o",
    "tokenize": "name:o source:o codebook:o units sample_seconds min_seconds max_seconds "
    "batch_seconds:o part_seconds:l require_text precision compile:o operators:o decoders:o "
    "workers.count:o workers.num_cpus:o workers.num_gpus:o",
    "vocabulary": "pieces tokenizer sentences threads:o",
    "lm": "width layers heads kv_heads feed_forward tied rope_theta norm_eps qkv_bias head_width",
    "train": "phases base leave_out:c micro_batch_tokens micro_batches learning_rate warmup_steps "
    "weight_decay clip ctc_weight unit_dropout precision zero_stage:o deepspeed:o "
    "activation_checkpointing:o loss_chunk:o compiled:o "
    "checkpoint_steps:o staging:o log_steps:o max_failures:o workers.count:o workers.num_cpus:o "
    "workers.num_gpus:o peak_flops:o dev.split:o dev.loss_steps:o dev.loss_utterances:o "
    "dev.wer_steps:o dev.wer_utterances:o dev.wer_copy_gib:o",
    "datastore": "name:o source:o splits domain utterances audio voices kokoro:o paired_share "
    "metric entries window batch_tokens:o part_utterances:l local:o index.kind index.shards "
    "index.lists index.entry_bytes index.min_recall index.residual index.turned index.code_bytes "
    "index.fast_scan index.scalar_bits index.probes index.refine index.rerank index.gpu:o "
    "workers.count:o workers.num_cpus:o workers.num_gpus:o",
    "knn": "k weight temperature gate certain settled patience follow agreeing recent:o query",
    "attention": "k stride whole gate certain",
    "ngram": "least files",
    "decode": "beams length_penalty tokens_per_second max_seconds speech ctc_weight ngram_weight "
    "agreement "
    "unclear:o batch_seconds:o",
    "spotting": "least weight floor",
    "tune": "k weight temperature gate certain query finalists utterances attention both_weight "
    "decoy harm",
    "evaluate": "split domain modes datastores lists retriever:o replicas:o shard_cpus:o "
    "shard_gpus:o resamples workers.count:o workers.num_cpus:o workers.num_gpus:o",
    "adapter": "base shape.every shape.heads shape.head_width shape.window shape.encoder_layers "
    "shape.encoder_heads shape.encoder_feed_forward contexts.split contexts.phrases "
    "contexts.retrieved contexts.wrong contexts.mixture contexts.list_length contexts.own "
    "contexts.near contexts.k contexts.strides",
    "reproduce": "docs:o utterances sweep_utterances phrases listed carriers mentions boost harm "
    "shares sizes strides documents conditions passages:o topics tasks:o whisper:o",
    "whisper": "shape.width shape.heads shape.encoder_layers shape.decoder_layers "
    "shape.feed_forward shape.mel_bands shape.window_seconds shape.tokens shape.pieces "
    "shape.dropout split steps batch learning_rate ctc_weight phone_weight leave_out:c "
    "checkpoint_steps:o log_steps:o num_cpus:o num_gpus:o",
}
"""Every key and what it was decided to be: identity unless marked o(peration), l(ayout) or
c(orrection). A new key has to be decided about here too."""


def test_every_key_was_decided_to_be_identity_or_operation():
    letters = {"": "identity", "o": "operation", "l": "layout", "c": "correction"}
    decided = {}
    for section, keys in ROLES.items():
        for each in keys.split():
            key, _, letter = each.partition(":")
            decided[f"{section}.{key}".removeprefix(".")] = letters[letter]
    found = {key: str(role) for key, role in config.roles(Experiment).items()}
    assert sorted(found) == sorted(decided), "a key is not decided about, or is gone"
    assert found == decided


def test_identity_and_operation_of_a_section_are_all_of_it_and_share_nothing(file):
    experiment = config.read(file)
    for name in Experiment.model_fields:
        section = getattr(experiment, name)
        if isinstance(section, config.Section):
            divided = config.recipe({name: section})
            assert divided.settings == {name: config.as_dict(section)}, name
            assert divided.identity.get(name, {}) == config.identity(section)
            assert divided.operation.get(name, {}) == config.operation(section)
    assert "workers" not in config.identity(experiment.train)
    assert config.operation(experiment.train)["workers"] == config.as_dict(experiment.train.workers)


def test_a_recipe_of_a_section_alone_has_its_keys_at_the_top(file):
    made = config.recipe({"seed": 3}, config.read(file).tokenize)
    assert made.identity["seed"] == 3 and made.identity["units"] == 1
    assert made.layout == {"part_seconds"} and "part_seconds" in made.operation
    named = config.recipe({"train": config.read(file).train})
    assert named.layout == set()
    assert named.corrections == {"train.leave_out"}
