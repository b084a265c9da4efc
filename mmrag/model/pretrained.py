"""Language models on disk: our own directory, and Hugging Face checkpoints in and out.

Weights are safetensors and JSON, never pickle. Foreign weights travel as a stream of (name,
tensor), so that whoever holds the parameters (one process, or many under ZeRO) decides how to
place them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmrag import shipped
from mmrag.artifact import local
from mmrag.config import CrossAttention, LanguageModel, as_dict
from mmrag.model.cross_attention import Adapter
from mmrag.model.lm import LM
from mmrag.model.precision import computed_in
from mmrag.model.vocabulary import BOS, EOS, Vocabulary
from mmrag.storage import Location

WEIGHTS, SHAPE = "lm.safetensors", "lm.json"
ADAPTER_WEIGHTS, ADAPTER_SHAPE = "adapter.safetensors", "adapter.json"
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
DEMANDED = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    "rms_norm_eps",
)
"""What a Hugging Face config.json has to say."""
NAMES = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
"""Our name inside a block -> Hugging Face's."""
OUTER_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
"""Our name outside the blocks -> Hugging Face's."""


class CheckpointError(ValueError):
    """A directory is not a model we can read; the message names it and what is wrong."""


def save(
    directory: Path,
    config: LanguageModel,
    vocabulary: Vocabulary,
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Write `lm.safetensors`, `lm.json` and the vocabulary into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors}, directory / WEIGHTS)
    fields = {**as_dict(config), "vocabulary": vocabulary.size}
    (directory / SHAPE).write_text(json.dumps(fields, indent=2) + "\n")
    vocabulary.save(directory)


def load(directory: Location, device: torch.device | str = "cpu") -> tuple[LM, Vocabulary]:
    """Read what `save` wrote, in evaluation mode; CheckpointError names what is wrong.

    Weights in a format that the device would emulate become float32: several times quicker.
    """
    directory = local(directory)
    try:
        fields = json.loads((directory / SHAPE).read_text())
        vocabulary = Vocabulary.load(directory)
        tensors = load_file(directory / WEIGHTS, device=str(device))
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory} holds no language model: {error}") from None
    except (json.JSONDecodeError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: a file is damaged: {error}") from None
    if fields.pop("vocabulary") != vocabulary.size:
        raise CheckpointError(f"{directory}: {SHAPE} and the vocabulary differ in size")
    with torch.device("meta"):
        lm = LM(LanguageModel(**fields), vocabulary.size)
    tensors = {name: t.to(computed_in(t.dtype, device)) for name, t in tensors.items()}
    try:
        lm.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{directory}: {WEIGHTS} does not fit {SHAPE}: {error}") from None
    return lm.eval(), vocabulary


def save_adapter(
    directory: Path, config: CrossAttention, tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write `adapter.safetensors` and `adapter.json` into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    held = {name: t.detach().cpu().contiguous() for name, t in tensors}
    save_file(held, directory / ADAPTER_WEIGHTS)
    (directory / ADAPTER_SHAPE).write_text(json.dumps(as_dict(config), indent=2) + "\n")


def load_adapter(directory: Location, lm: LM) -> Adapter:
    """Read what `save_adapter` wrote, in the precision and on the device of `lm`.

    CheckpointError names what is wrong, a language model of another shape among it.
    """
    directory = local(directory)
    like = lm.embedding.weight
    try:
        config = CrossAttention(**json.loads((directory / ADAPTER_SHAPE).read_text()))
        tensors = load_file(directory / ADAPTER_WEIGHTS, device=str(like.device))
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory} holds no adapter: {error}") from None
    except (ValueError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: a file is damaged: {error}") from None
    with torch.device("meta"):
        adapter = Adapter(config, lm.config)
    try:
        adapter.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{directory}: {ADAPTER_WEIGHTS} does not fit {ADAPTER_SHAPE} and the language model: "
            f"{error}"
        ) from None
    return adapter.to(like.dtype).eval()


def adapter_tensors(base: str) -> Iterator[tuple[str, Tensor]]:
    """The weights of an adapter to start from: of a model of this package, or in a directory."""
    named = shipped.find(base) / "adapter" if base.startswith(shipped.PREFIX) else base
    directory = local(named)
    try:
        yield from load_file(directory / ADAPTER_WEIGHTS).items()
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory} holds no adapter: {error}") from None
    except SafetensorError as error:
        raise CheckpointError(f"{directory}: {ADAPTER_WEIGHTS} is damaged: {error}") from None


def base_config(base: str) -> LanguageModel:
    """The shape of a model to start from: one of ours, or a Hugging Face directory."""
    if (own := ours(base)) is None:
        return huggingface_config(base)
    fields = json.loads((own / SHAPE).read_text())
    del fields["vocabulary"]
    return LanguageModel(**fields)


def base_tensors(base: str) -> Iterator[tuple[str, Tensor]]:
    """Its weights under our names, one at a time."""
    if (own := ours(base)) is None:
        return huggingface_tensors(base)
    return iter(load_file(own / WEIGHTS).items())


def ours(base: Path | str) -> Path | None:
    """The directory of a language model that `save` wrote, in the package or elsewhere; None for
    a foreign one."""
    if str(base).startswith(shipped.PREFIX):
        return shipped.find(base) / "lm"
    directory = local(base)
    return directory if (directory / SHAPE).exists() else None


def huggingface_config(directory: Path | str) -> LanguageModel:
    """The shape of a Hugging Face checkpoint; CheckpointError if it is not a plain Llama."""
    path = local(directory) / "config.json"
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{directory} holds no config.json") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if fields.get("model_type") not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: model_type {fields.get('model_type')!r} is not one of {list(ARCHITECTURES)}"
        )
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))  # "type" is the older name
    if scaling != "default":
        raise CheckpointError(f"{path}: scaled rotary positions ({scaling}) are unknown")
    for bias in ("attention_bias", "mlp_bias"):
        if fields.get(bias):
            raise CheckpointError(f"{path}: {bias} is unknown; biases are read in qwen2 alone")
    theta = rope.get("rope_theta") or fields.get("rope_theta") or 10_000.0
    if missing := [name for name in DEMANDED if name not in fields]:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}")
    return LanguageModel(
        width=fields["hidden_size"],
        layers=fields["num_hidden_layers"],
        heads=fields["num_attention_heads"],
        kv_heads=fields.get("num_key_value_heads") or fields["num_attention_heads"],
        feed_forward=fields["intermediate_size"],
        tied=fields.get("tie_word_embeddings", False),
        rope_theta=theta,
        norm_eps=fields["rms_norm_eps"],
        qkv_bias=fields["model_type"] == "qwen2",
        head_width=fields.get("head_dim"),
    )


def huggingface_tensors(directory: Path | str) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a Hugging Face checkpoint under our name, one at a time."""
    ours = {theirs: name for name, theirs in NAMES.items()}
    files = sorted(local(directory).glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory} holds no .safetensors (pickled weights are not read)")
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                if not name.endswith("rotary_emb.inv_freq"):
                    yield _our_name(name, ours), tensors.get_tensor(name)


def place(
    name: str, parameter: Tensor, tensor: Tensor, vocabulary: Vocabulary, base: Path | str
) -> None:
    """Copy a base model's `tensor` into our `parameter`.

    Rows of Hugging Face's embedding and head are pieces: they move to where our id space has them,
    the base model's begin and end tokens to ours. Rows of units keep their random start.
    CheckpointError if the shapes differ otherwise.
    """
    if ours(base) is not None or name not in ("embedding.weight", "head.weight"):
        put(name, parameter, tensor, base)
        return
    _check(name, parameter.shape[1:], tensor.shape[1:], base)
    with torch.no_grad():
        rows = min(len(tensor), vocabulary.pieces.size)
        parameter[vocabulary.first_piece : vocabulary.first_piece + rows] = tensor[:rows].to(
            parameter
        )
        fields = json.loads((local(base) / "config.json").read_text())
        for own, key in ((BOS, "bos_token_id"), (EOS, "eos_token_id")):
            theirs = fields.get(key)
            theirs = theirs[0] if isinstance(theirs, list) else theirs
            if theirs is not None:
                parameter[own] = tensor[theirs].to(parameter)


def put(name: str, parameter: Tensor, tensor: Tensor, base: Path | str) -> None:
    """Copy `tensor` of `base` into a parameter of its shape; CheckpointError if it has another."""
    _check(name, parameter.shape, tensor.shape, base)
    with torch.no_grad():
        parameter.copy_(tensor)


def _check(name: str, wanted: torch.Size, given: torch.Size, base: Path | str) -> None:
    if wanted != given:
        raise CheckpointError(f"{base}: {name} is {list(given)}, ours is {list(wanted)}")


def to_huggingface(directory: Path, lm: LM) -> None:
    """Write a Llama (Qwen2 where there are biases) checkpoint over our whole id space."""
    directory.mkdir(parents=True, exist_ok=True)
    config = lm.config
    kind = "qwen2" if config.qkv_bias else "llama"
    fields = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": lm.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.feed_forward,
        "head_dim": config.head_width or config.width // config.heads,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "dtype": str(lm.embedding.weight.dtype).removeprefix("torch."),
    }
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    tensors = {_their_name(name): t.detach().contiguous() for name, t in lm.state_dict().items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _our_name(name: str, ours: dict[str, str]) -> str:
    outer = {theirs: name for name, theirs in OUTER_NAMES.items()}
    if name in outer:
        return outer[name]
    parts = name.split(".")
    inner = ".".join(parts[3:-1])
    if parts[:2] != ["model", "layers"] or inner not in ours:
        raise CheckpointError(f"a weight named {name} has no place in this model")
    return f"blocks.{parts[2]}.{ours[inner]}.{parts[-1]}"


def _their_name(name: str) -> str:
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    _, layer, *inner, leaf = name.split(".")
    return f"model.layers.{layer}.{NAMES['.'.join(inner)]}.{leaf}"
