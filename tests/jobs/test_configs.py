"""Each experiment file in jobs/configs is complete, legal, and of the size it says."""

import json
import re
from pathlib import Path

import pytest
import torch
import torchaudio
import yaml
from deepspeed.runtime.config import DeepSpeedConfig

from cluster import train
from cluster.zero import deepspeed_config
from jobs import tokenize
from mmrag import config
from mmrag.config import Experiment
from mmrag.corpora import sources
from mmrag.model.cross_attention import Adapter
from mmrag.model.lm import parameter_count
from mmrag.model.vocabulary import SPECIALS

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "jobs" / "configs").glob("*.yaml"))
PAPER = sorted((ROOT / "jobs" / "configs" / "paper").glob("*.yaml"))
"""Experiments on the corpora of the paper and its field."""
DEEPSPEED = sorted((ROOT / "cluster" / "deepspeed").glob("*.json"))
READING = ["adapter", "adapter_small", "tiny"]
"""Experiments that train an adapter."""
STAGES = {
    "zero2": 2,
    "zero3_offload": 3,
    "one_node": 2,
    "four_nodes": 3,
    "four_nodes_rdma": 3,
}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Paths in the files are relative to the repository, where every stage is run."""
    monkeypatch.chdir(ROOT)
    for name in ("MMRAG_RUNS", "MMRAG_CORPUS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def experiment(name: str, *overrides: str) -> Experiment:
    return config.read(ROOT / "jobs" / "configs" / f"{name}.yaml", overrides)


def parameters(experiment: Experiment) -> int:
    vocabulary = len(SPECIALS) + experiment.vocabulary.pieces + experiment.tokenize.units
    return parameter_count(experiment.lm, vocabulary)


def test_there_is_an_experiment_of_each_size():
    names = ["330m", "6.8b", "adapter", "adapter_small", "reproduce", "reproduce_small", "tiny"]
    names += ["train_small", "train_small_further", "train_tiny", "whisper_tiny"]
    assert [file.stem for file in CONFIGS] == names
    assert [file.stem for file in PAPER] == [
        "librispeech_biasing",
        "slue_voxpopuli",
        "spoken_squad",
    ]


@pytest.mark.parametrize("name", ["330m", "6.8b"])
def test_a_cluster_records_on_a_server_where_one_is_named(name, monkeypatch):
    assert experiment(name).tracking.uri == "sqlite:////mnt/mmrag/runs/mlflow.db"
    monkeypatch.setenv("MMRAG_RUNS", "s3://bucket/runs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    read = experiment(name)
    assert read.tracking.uri == "http://mlflow:5000"
    assert str(read.workspace) == f"s3://bucket/runs/{name}"


@pytest.mark.parametrize("file", PAPER, ids=lambda file: file.stem)
def test_an_experiment_of_a_published_corpus_is_one_of_the_330m_model(file):
    read, model = config.read(file), experiment("330m")
    assert (read.lm, read.hubert) == (model.lm, model.hubert)
    assert read.tokenize.units == model.tokenize.units
    assert read.tokenize.source.startswith(f"{file.stem}:/mnt/mmrag/corpora/")
    assert sources.named(read.tokenize.source)
    assert read.train.ctc_weight == 0 and read.evaluate.split == "test"
    deepspeed_config(read, torch.bfloat16)
    told = re.findall(
        r"^#   python -m (jobs\.\w+) --config (\S+)(.*)$", file.read_text(), re.MULTILINE
    )
    assert [command for command, *_ in told][-1] == "jobs.evaluate"
    for command, path, overrides in told:
        assert (ROOT / f"{command.replace('.', '/')}.py").is_file() and ROOT / path == file
        config.read(file, overrides.split())


@pytest.mark.parametrize("file", PAPER, ids=lambda file: file.stem)
def test_an_experiment_of_a_published_corpus_writes_every_section_out(file):
    # Of another model, or of the package's.
    others = {"reproduce", "whisper", "models", "published", "language"}
    assert yaml.safe_load(file.read_text()).keys() == Experiment.model_fields.keys() - others


def test_experiments_that_train_an_adapter_do_so_for_a_model_of_the_package_as_it_is():
    assert [file.stem for file in CONFIGS if config.read(file).adapter is not None] == READING
    for name in READING:
        read = experiment(name)
        about = "small" if name.endswith("small") else "tiny"
        trained = experiment(f"train_{about}")
        assert (read.lm, read.published, trained.published) == (trained.lm, about, about)
        assert read.train.base == read.hubert.weights == read.tokenize.codebook == f"mmrag:{about}"
    assert experiment("tiny").adapter.shape == experiment("adapter").adapter.shape


@pytest.mark.parametrize("name", READING)
def test_an_adapter_learns_from_windows_as_they_are_stored_and_from_transcription_alone(name):
    read = experiment(name)
    contexts = read.adapter.contexts
    assert read.adapter.shape.window == read.datastore.window
    assert contexts.k <= read.attention.k
    assert {form for phase in read.train.phases for form in phase.mixture} == {"speech_first"}
    assert read.train.ctc_weight == 0
    assert contexts.split not in ("lm", "dev", "test")
    assert contexts.list_length[1] <= read.attention.whole
    assert contexts.wrong not in (contexts.phrases, contexts.retrieved)
    # Now and then there is nothing to find: an adapter has to learn not to listen.
    assert {"phrases", "retrieved", "wrong", "empty"} == contexts.mixture.keys()
    assert contexts.own < 1


@pytest.mark.parametrize("name", READING)
def test_an_adapter_follows_one_of_the_language_models_layers(name):
    read = experiment(name)
    with torch.device("meta"):
        adapter = Adapter(read.adapter.shape, read.lm)
    assert adapter.layers


@pytest.mark.parametrize("file", CONFIGS + PAPER, ids=lambda file: file.stem)
def test_every_experiment_parses_and_has_a_workspace_of_its_own(file):
    assert config.read(file).workspace.name == file.stem.replace("_", "-")


@pytest.mark.parametrize("name", ["330m", "6.8b"])
def test_an_experiment_of_a_cluster_keeps_everything_on_the_shared_volume(name, monkeypatch):
    read = experiment(name)
    assert str(read.workspace) == f"/mnt/mmrag/runs/{name}"
    assert read.tracking.uri == "sqlite:////mnt/mmrag/runs/mlflow.db"
    assert read.tokenize.source == "/mnt/mmrag/corpus"
    monkeypatch.setenv("MMRAG_RUNS", "/other")
    assert str(experiment(name).workspace) == f"/other/{name}"


def test_the_small_model_has_330_million_parameters():
    assert parameters(experiment("330m")) == pytest.approx(330e6, rel=0.02)


def test_the_large_model_has_6_75_billion_parameters():
    assert parameters(experiment("6.8b")) == pytest.approx(6.75e9, rel=0.01)


@pytest.mark.parametrize("file", CONFIGS + PAPER, ids=lambda file: file.stem)
def test_an_index_of_codes_cuts_the_key_into_equal_parts(file):
    read = config.read(file)
    if read.datastore.index.kind == "ivfpq":
        assert read.lm.width % read.datastore.index.code_bytes == 0


@pytest.mark.parametrize("name", ["330m", "6.8b"])
def test_the_written_hubert_shape_is_that_of_the_published_weights(name):
    hubert = experiment(name).hubert
    published = getattr(torchaudio.pipelines, hubert.weights.removeprefix("torchaudio:"))._params
    assert {
        "extractor_mode": hubert.norm,
        "encoder_embed_dim": hubert.width,
        "encoder_num_layers": hubert.layers,
        "encoder_num_heads": hubert.heads,
        "encoder_ff_interm_features": hubert.feed_forward,
    }.items() <= published.items()
    assert {width for width, *_ in published["extractor_conv_layer_config"]} == {
        hubert.conv_channels
    }


def test_a_directory_of_manifests_is_a_corpus_of_splits(tmp_path):
    for split in ("lm", "dev"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": f"a line of {split}"}) + "\n")
    splits = tokenize._splits(tmp_path)
    texts = {name: [one.text for one in said] for name, said in splits.items()}
    assert texts == {"lm": ["a line of lm"], "dev": ["a line of dev"]}
    assert list(tokenize._splits(tmp_path / "dev.jsonl")) == ["all"]


@pytest.mark.parametrize("name", ["330m", "6.8b"])
def test_an_experiment_goes_with_its_deepspeed_file(name):
    read = experiment(name)
    made = DeepSpeedConfig(deepspeed_config(read, torch.bfloat16))
    assert made.zero_config.stage == read.train.zero_stage
    assert made.gradient_accumulation_steps * read.train.workers.count == read.train.micro_batches


def test_workers_find_the_deepspeed_file_whatever_their_working_directory():
    sent = train._with_absolute_paths(experiment("330m"))["train"]
    assert (sent["deepspeed"], sent["base"]) == (f"{ROOT}/cluster/deepspeed/one_node.json", None)


@pytest.mark.parametrize("file", DEEPSPEED, ids=lambda file: file.stem)
def test_every_deepspeed_file_is_accepted_whole(file):
    stage = STAGES[file.stem]
    read = experiment("330m", f"train.deepspeed={file}", f"train.zero_stage={stage}")
    made = deepspeed_config(read, torch.bfloat16)
    settings = json.loads(file.read_text())
    wanted = {**settings.pop("zero_optimization"), "stage": stage}
    assert settings.items() <= made.items() and made["zero_optimization"] == wanted
    assert made["bf16"] == {"enabled": True} and made["gradient_clipping"] == read.train.clip
    parsed = DeepSpeedConfig(made)
    offloads = "offload_optimizer" in wanted
    assert (parsed.zero_config.offload_optimizer is not None) == offloads
    # DeepSpeed refuses to offload any optimizer but its own, and ours is torch's AdamW.
    assert parsed.zero_force_ds_cpu_optimizer != offloads


def test_there_is_a_deepspeed_file_for_every_stage_that_is_named():
    assert {file.stem for file in DEEPSPEED} == STAGES.keys()


@pytest.mark.parametrize("stage", [2, 3])
def test_one_node_takes_weights_partitioned_or_whole(stage):
    file = ROOT / "cluster" / "deepspeed" / "one_node.json"
    about = (f"train.deepspeed={file}", f"train.zero_stage={stage}", "train.workers.count=8")
    read = experiment("6.8b", *about)
    assert DeepSpeedConfig(deepspeed_config(read, torch.bfloat16)).zero_config.stage == stage


def test_nodes_without_rdma_keep_a_copy_of_the_weights_each():
    file = ROOT / "cluster" / "deepspeed" / "four_nodes.json"
    read = experiment("6.8b", f"train.deepspeed={file}")
    zero = DeepSpeedConfig(deepspeed_config(read, torch.bfloat16)).zero_config
    assert zero.zero_hpz_partition_size == 8
    # Weights and gradients in 4 or 8 bits would learn something else.
    assert not zero.zero_quantized_weights and not zero.zero_quantized_gradients
    with pytest.raises(ValueError, match=r"zero_hpz_partition_size 8.*workers\.count 4"):
        deepspeed_config(
            experiment("6.8b", f"train.deepspeed={file}", "train.workers.count=4"), torch.bfloat16
        )
    elastic = ("train.workers.count=[7, 8]", "train.micro_batches=56")
    with pytest.raises(ValueError, match=r"zero_hpz_partition_size 8.*workers\.count 7$"):
        deepspeed_config(experiment("6.8b", f"train.deepspeed={file}", *elastic), torch.bfloat16)


@pytest.mark.parametrize("key", ["zero_quantized_weights", "zero_quantized_gradients"])
def test_a_deepspeed_file_does_not_round_what_is_sent(tmp_path, key):
    file = tmp_path / "quantized.json"
    file.write_text(json.dumps({"zero_optimization": {key: True}}))
    with pytest.raises(ValueError, match=rf"\['zero_optimization.{key}'\], which changes what"):
        deepspeed_config(experiment("tiny", f"train.deepspeed={file}"), torch.float32)


@pytest.mark.parametrize(
    ("settings", "clash"),
    [
        ({"gradient_clipping": 2.0}, "gradient_clipping"),
        ({"bf16": {"enabled": False}}, "bf16"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps"),
        ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage"),
    ],
)
def test_a_deepspeed_file_that_sets_what_the_experiment_decides_is_refused(
    tmp_path, settings, clash
):
    file = tmp_path / "clash.json"
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError) as raised:
        deepspeed_config(experiment("tiny", f"train.deepspeed={file}"), torch.float32)
    assert str(file) in str(raised.value) and f"'{clash}'" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ("[]", "is not one JSON object")]
)
def test_a_deepspeed_file_that_cannot_be_read_is_named(tmp_path, text, message):
    file = tmp_path / "broken.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"train\.deepspeed: {file} {message}"):
        deepspeed_config(experiment("tiny", f"train.deepspeed={file}"), torch.float32)


def test_lists_are_not_searched_by_shards(tmp_path):
    with pytest.raises(config.ConfigError, match="lists are searched in the workers themselves"):
        experiment("tiny", "evaluate.lists=true", "evaluate.retriever=sharded")
