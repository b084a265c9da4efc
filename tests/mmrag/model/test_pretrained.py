import json

import pytest
import torch
from random_models import perturb
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mmrag.config import CrossAttention, LanguageModel
from mmrag.model import pretrained
from mmrag.model.cross_attention import Adapter
from mmrag.model.lm import LM
from mmrag.model.pretrained import CheckpointError
from mmrag.model.vocabulary import BOS, EOS, SPECIALS, SentencePieces, Vocabulary

UNITS = 7
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}


def shape(**changes):
    fields = {
        "width": 16,
        "layers": 2,
        "heads": 4,
        "kv_heads": 4,
        "feed_forward": 24,
        "tied": False,
        "rope_theta": 100.0,
        "norm_eps": 1e-3,
    }
    return LanguageModel(**{**fields, **changes})


def enlarge(model, seed=0):
    """Weights large enough for every one of them to matter."""
    torch.manual_seed(seed)
    return perturb(model).eval().requires_grad_(False)


def draw_ids(rows, time, top):
    return torch.randint(0, top, (rows, time), generator=torch.Generator().manual_seed(0))


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


class Pieces:
    """As many pieces as the base model's vocabulary; their text plays no part."""

    unknown = None

    def __init__(self, size):
        self.size = size


VOCABULARY = Vocabulary(SentencePieces.train(["some text to learn"], 50), UNITS)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": True},
        {"kv_heads": 2},
        {"qkv_bias": True, "kv_heads": 1},
        {"qkv_bias": True, "tied": True},
        {"head_width": 6},
        {"head_width": 6, "qkv_bias": True},
    ],
    ids=str,
)
def test_an_exported_model_has_the_same_logits_in_transformers(tmp_path, changes):
    lm = enlarge(LM(shape(**changes), 29))
    pretrained.to_huggingface(tmp_path, lm)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = draw_ids(2, 11, 29)
    close(lm(ids).logits.view(2, 11, 29), theirs(ids).logits)
    config = theirs.config
    assert (config.bos_token_id, config.eos_token_id) == (BOS, EOS)


def test_an_exported_model_is_imported_as_it_was(tmp_path):
    lm = enlarge(LM(shape(qkv_bias=True, kv_heads=2, head_width=6), 29))
    pretrained.to_huggingface(tmp_path, lm)
    assert pretrained.huggingface_config(tmp_path) == lm.config
    tensors = dict(pretrained.huggingface_tensors(tmp_path))
    assert tensors.keys() == lm.state_dict().keys()
    for name, tensor in lm.state_dict().items():
        assert torch.equal(tensors[name], tensor)


def base_model(directory, kind="llama", shard_size="1GB", **changes):
    config_class, model_class = MODELS[kind]
    fields = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "bos_token_id": 38,
        "eos_token_id": 39,
    }
    model = enlarge(model_class(config_class(**{**fields, **changes})))
    model.save_pretrained(directory, max_shard_size=shard_size)
    return model


def edit_config(directory, drop=(), **fields):
    path = directory / "config.json"
    old = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**old, **fields}.items() if k not in drop}))


def older_rope(directory):
    edit_config(directory, drop=["rope_parameters"], rope_theta=100.0, rope_scaling=None)


def several_ends(directory):
    edit_config(directory, eos_token_id=[39, 37])


def in_several_files(directory):
    assert len(list(directory.glob("*.safetensors"))) > 1


def import_model(directory, vocabulary):
    lm = LM(pretrained.huggingface_config(directory), vocabulary.size).eval().requires_grad_(False)
    parameters = dict(lm.named_parameters())
    for name, tensor in pretrained.huggingface_tensors(directory):
        pretrained.place(name, parameters.pop(name), tensor, vocabulary, directory)
    assert not parameters, "weights that nothing was placed in"
    return lm


@pytest.mark.parametrize(
    ("changes", "edit"),
    [
        ({"kind": "llama"}, None),
        ({"kind": "llama", "tie_word_embeddings": True}, None),
        ({"kind": "llama", "head_dim": 6}, None),
        ({"kind": "llama"}, older_rope),
        ({"kind": "llama", "shard_size": "5KB"}, in_several_files),
        ({"kind": "mistral", "sliding_window": None}, None),
        ({"kind": "qwen2"}, None),
        ({"kind": "qwen2", "tie_word_embeddings": True}, several_ends),
    ],
)
def test_an_imported_model_has_its_own_logits_over_pieces(tmp_path, changes, edit):
    theirs = base_model(tmp_path, **changes)
    if edit:
        edit(tmp_path)
    vocabulary = Vocabulary(Pieces(40), UNITS)
    lm = import_model(tmp_path, vocabulary)
    ids = draw_ids(2, 11, 38)
    ours = torch.cat((torch.full((2, 1), BOS), ids + vocabulary.first_piece), 1)
    expected = theirs(torch.cat((torch.full((2, 1), 38), ids), 1)).logits
    got = lm(ours).logits.view(2, 12, -1)
    close(got[..., vocabulary.first_piece : vocabulary.first_unit], expected)
    close(got[..., BOS], expected[..., 38])
    close(got[..., EOS], expected[..., 39])


def test_imported_rows_of_units_keep_their_start_and_spare_rows_are_left_out(tmp_path):
    theirs = base_model(tmp_path)
    vocabulary = Vocabulary(Pieces(36), UNITS)  # the base model pads its embedding to 40 rows
    torch.manual_seed(1)
    start = LM(pretrained.huggingface_config(tmp_path), vocabulary.size).embedding.weight.detach()
    torch.manual_seed(1)
    rows = import_model(tmp_path, vocabulary).embedding.weight
    first, last = vocabulary.first_piece, vocabulary.first_unit
    assert torch.equal(rows[last:], start[last:])
    assert torch.equal(rows[first:last], theirs.get_input_embeddings().weight[:36])
    for control in set(range(len(SPECIALS))) - {BOS, EOS}:
        assert torch.equal(rows[control], start[control])


def test_a_weight_of_another_shape_is_named(tmp_path):
    base_model(tmp_path)
    name, parameter = "blocks.0.feed_forward.up.weight", torch.zeros(30, 16)
    tensor = dict(pretrained.huggingface_tensors(tmp_path))[name]
    with pytest.raises(CheckpointError, match=rf"{name} is \[24, 16\].*\[30, 16\]"):
        pretrained.place(name, parameter, tensor, VOCABULARY, tmp_path)
    with pytest.raises(CheckpointError, match=r"embedding\.weight"):
        pretrained.place(
            "embedding.weight", torch.zeros(40, 8), torch.zeros(40, 16), VOCABULARY, tmp_path
        )


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8}}, "llama3"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_size": 8, "rms_norm_eps": 1e-5}, "lacks num_hidden_layers, num_attention_heads"),
    ],
    ids=str,
)
def test_a_checkpoint_that_is_no_plain_llama_is_refused_by_name(tmp_path, fields, named):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **fields}))
    with pytest.raises(CheckpointError, match=rf"{tmp_path}.*{named}"):
        pretrained.huggingface_config(tmp_path)


def test_a_checkpoint_without_config_or_safetensors_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=rf"{tmp_path} holds no config\.json"):
        pretrained.huggingface_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        pretrained.huggingface_config(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=rf"{tmp_path} holds no \.safetensors"):
        list(pretrained.huggingface_tensors(tmp_path))


@pytest.mark.parametrize(
    "name",
    [
        "transformer.h.0.attn.c_attn.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.mlp.experts.weight",
        "score.weight",
    ],
)
def test_a_weight_we_have_no_place_for_is_named(tmp_path, name):
    save_file({name: torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=name):
        list(pretrained.huggingface_tensors(tmp_path))


def test_stored_rotary_frequencies_of_old_checkpoints_are_passed_over(tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({name: torch.zeros(1)}, tmp_path / "model.safetensors")
    assert list(pretrained.huggingface_tensors(tmp_path)) == []


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def saved(request, tmp_path):
    lm = enlarge(LM(shape(tied=request.param, qkv_bias=True), VOCABULARY.size))
    pretrained.save(tmp_path / "lm", lm.config, VOCABULARY, lm.state_dict().items())
    return tmp_path / "lm", lm


@pytest.mark.parametrize("bf16", [True, False])
def test_weights_are_computed_in_what_the_processor_has(saved, monkeypatch, bf16):
    directory, lm = saved
    capable = {"avx512_bf16": bf16}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capable)
    for stored in (torch.float16, torch.bfloat16, torch.float32):
        tensors = {name: t.to(stored) for name, t in lm.state_dict().items()}
        pretrained.save(directory, lm.config, VOCABULARY, tensors.items())
        loaded, _ = pretrained.load(directory)
        emulated = stored == torch.float16 or (stored == torch.bfloat16 and not bf16)
        for name, t in loaded.state_dict().items():
            assert t.dtype == (torch.float32 if emulated else stored)
            assert torch.equal(t, tensors[name].to(t.dtype))


def test_a_saved_model_is_loaded_as_it_was(saved):
    directory, lm = saved
    loaded, vocabulary = pretrained.load(directory)
    ids = draw_ids(2, 9, VOCABULARY.size)
    assert torch.equal(loaded(ids).logits, lm(ids).logits)
    assert loaded.config == lm.config
    assert not loaded.training
    assert vocabulary.encode("some text") == VOCABULARY.encode("some text")
    assert vocabulary.units == UNITS


@pytest.mark.parametrize("missing", ["lm.safetensors", "lm.json", "vocabulary.json"])
def test_a_directory_that_lacks_a_file_is_named_with_it(saved, missing):
    directory, _ = saved
    (directory / missing).unlink()
    with pytest.raises(CheckpointError, match=rf"{directory} holds no language model.*{missing}"):
        pretrained.load(directory)


def damage_weights(directory):
    path = directory / "lm.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def damage_shape(directory):
    (directory / "lm.json").write_text("{")


def lose_a_weight(directory):
    tensors = load_file(directory / "lm.safetensors")
    del tensors["norm.weight"]
    save_file(tensors, directory / "lm.safetensors")


def another_vocabulary(directory):
    Vocabulary(VOCABULARY.pieces, UNITS + 1).save(directory)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_weights, "damaged"),
        (damage_shape, "damaged"),
        (lose_a_weight, "norm.weight"),
        (another_vocabulary, "differ in size"),
    ],
)
def test_files_that_are_damaged_or_do_not_fit_are_refused(saved, damage, message):
    directory, _ = saved
    damage(directory)
    with pytest.raises(CheckpointError, match=rf"(?s){directory}.*{message}"):
        pretrained.load(directory)


READS = CrossAttention(
    every=1,
    heads=2,
    head_width=8,
    window=4,
    encoder_layers=1,
    encoder_heads=2,
    encoder_feed_forward=24,
)


@pytest.fixture
def adapter(tmp_path):
    """A directory with a trained adapter, and what it holds."""
    own = enlarge(Adapter(READS, shape()))
    pretrained.save_adapter(tmp_path / "adapter", READS, own.state_dict().items())
    return tmp_path / "adapter", own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_adapter_is_loaded_as_it_was_in_the_models_precision(adapter, dtype):
    directory, own = adapter
    loaded = pretrained.load_adapter(directory, LM(shape(), 29).to(dtype))
    assert loaded.config == READS
    assert loaded.layers == own.layers
    assert not loaded.training
    weights = loaded.state_dict()
    assert weights.keys() == own.state_dict().keys()
    for name, tensor in own.state_dict().items():
        assert torch.equal(weights[name], tensor.to(dtype))


def without_a_weight(directory):
    tensors = load_file(directory / "adapter.safetensors")
    del tensors["blocks.1.gate.weight"]
    save_file(tensors, directory / "adapter.safetensors")


def cut_short(directory):
    path = directory / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def edit_adapter(directory, **changes):
    path = directory / "adapter.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_short, "damaged"),
        (lambda directory: (directory / "adapter.json").write_text("{"), "damaged"),
        (lambda directory: edit_adapter(directory, every=0), "damaged.*every"),
        (lambda directory: edit_adapter(directory, colour=3), "damaged.*colour"),
        (lambda directory: edit_adapter(directory, head_width=6), "does not fit.*blocks.0.match"),
        (without_a_weight, "blocks.1.gate.weight"),
        (lambda d: (d / "adapter.json").unlink(), r"holds no adapter: .*adapter\.json"),
        (lambda d: (d / "adapter.safetensors").unlink(), "holds no adapter"),
    ],
)
def test_an_adapter_that_is_damaged_or_does_not_fit_is_refused(adapter, damage, message):
    directory, _ = adapter
    damage(directory)
    with pytest.raises(CheckpointError, match=rf"(?s){directory}.*{message}"):
        pretrained.load_adapter(directory, LM(shape(), 29))


def test_a_damaged_adapter_is_no_base(adapter):
    directory, _ = adapter
    cut_short(directory)
    with pytest.raises(CheckpointError, match=rf"{directory}: adapter\.safetensors is damaged"):
        list(pretrained.adapter_tensors(str(directory)))


@pytest.mark.parametrize("changes", [{"layers": 3}, {"layers": 1}, {"width": 24}], ids=str)
def test_an_adapter_for_a_model_of_another_shape_is_refused(adapter, changes):
    directory, _ = adapter
    with pytest.raises(CheckpointError, match=rf"{directory}.*and the language model"):
        pretrained.load_adapter(directory, LM(shape(**changes), 29))


def test_a_model_of_ours_is_a_base_as_it_was_saved(saved):
    directory, lm = saved
    assert pretrained.ours(directory) == pretrained.ours(str(directory)) == directory
    assert pretrained.base_config(str(directory)) == lm.config
    fresh = LM(lm.config, VOCABULARY.size)
    parameters = dict(fresh.named_parameters())
    for name, tensor in pretrained.base_tensors(str(directory)):
        pretrained.place(name, parameters.pop(name), tensor, VOCABULARY, directory)
    assert not parameters
    for name, tensor in lm.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor)


def test_a_foreign_model_and_a_directory_of_neither_are_not_ours(tmp_path):
    assert pretrained.ours(tmp_path) is None
    base_model(tmp_path)
    assert pretrained.ours(tmp_path) is None
    assert pretrained.base_config(str(tmp_path)) == pretrained.huggingface_config(tmp_path)
