"""HuBERT (arXiv 2106.07447): waveforms to frame features.

The weights sit in torchaudio's own wav2vec2 model, so published ones load as they are; the forward
pass is written here, channels last, where it runs several times faster on a CPU, and it stops at
the layer that is asked for. No clip sees another's padding. There is no dropout anywhere. An
encoder may have a CTC head as well, which spells what it hears.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchaudio.models import wav2vec2_model
from torchaudio.models.wav2vec2.utils import import_huggingface_model

from mmrag.artifact import local, write_json
from mmrag.config import Hubert
from mmrag.records import Letters
from mmrag.speech.attention import Attention
from mmrag.speech.audio import SAMPLE_RATE
from mmrag.speech.ends import MEL_FIELD, MEL_HOP, ConvolvedWindows, LogMel, Speller
from mmrag.storage import Location

CONVOLUTIONS = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))
"""Kernel and stride of each convolution of every published HuBERT."""

POSITION_GROUPS = 16
SPELLER = "speller."
"""What the names of the CTC head's weights begin with, in a file."""


def window(convolutions: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Samples that one frame sees, and samples from one frame to the next.

    `convolutions` are (kernel, stride), first layer first, all without padding.
    """
    field, hop = 1, 1
    for kernel, stride in convolutions:
        field += (kernel - 1) * hop
        hop *= stride
    return field, hop


class HubertEncoder(nn.Module):
    """Waveforms at 16 kHz to one feature vector a frame."""

    def __init__(
        self,
        architecture: Mapping[str, Any],
        layer: int,
        normalize: bool,
        mel: bool = False,
        stack: int | None = None,
        convolved: bool = False,
        alphabet: str | None = None,
    ) -> None:
        """Random weights; `create`, `from_published` and `load` are the usual ways in.

        `architecture` holds the arguments of torchaudio's `wav2vec2_model`; its dropouts are
        ignored. `layer` (1 = first) is the transformer layer whose output are the features.
        `normalize` scales each clip to zero mean and unit variance first. `mel` puts as many
        log-mel bands as the convolutions have channels in their place, over the same windows; or,
        with `stack`, those of so many windows of MEL_FIELD samples, MEL_HOP apart, together:
        side by side, or `convolved`. With an `alphabet` there is a CTC head that spells in it.
        """
        super().__init__()
        layers = architecture["encoder_num_layers"]
        if not 1 <= layer <= layers:
            raise ValueError(f"layer {layer} of an encoder with {layers} layers")
        drop = [name for name in architecture if name.endswith(("dropout", "layer_drop"))]
        self.architecture = {**architecture, **dict.fromkeys(drop, 0.0), "aux_num_out": None}
        self.layer = layer
        self.normalize = normalize
        self.mel = mel
        self.stack = stack
        self.convolved = convolved
        self.model = wav2vec2_model(**self.architecture)
        for each in self.model.encoder.transformer.layers:
            each.attention = Attention(each.attention)
        shapes = self.architecture["extractor_conv_layer_config"]
        self.field, self.hop = window([(kernel, stride) for _, kernel, stride in shapes])
        if mel and stack:
            self.model.feature_extractor = LogMel(shapes[-1][0] // stack, MEL_FIELD, MEL_HOP, stack)
            self.field, self.hop = MEL_FIELD + (stack - 1) * MEL_HOP, MEL_HOP * stack
            if convolved:
                width = self.architecture["encoder_embed_dim"]
                projection = ConvolvedWindows(shapes[-1][0] // stack, stack, width)
                self.model.encoder.feature_projection = projection
        elif mel:
            self.model.feature_extractor = LogMel(shapes[-1][0], self.field, self.hop)
        self.width: int = self.architecture["encoder_embed_dim"]
        self.alphabet = alphabet
        heads = self.architecture["encoder_num_heads"]
        self.speller = Speller(self.width, heads, len(alphabet)) if alphabet else None

    @classmethod
    def create(cls, config: Hubert, seed: int, alphabet: str | None = None) -> HubertEncoder:
        """Random weights in the shape of `config`, with a head that spells in `alphabet` or none.

        Group norm comes with HuBERT base's arrangement (normalise after each block), layer norm
        with large's (normalise before it, biases in the convolutions, normalised waveforms). The
        positional convolution spans base's 128 frames at base's width and fewer below it.
        Convolutions start from He's initialisation, as HuBERT's do: under torch's own, whose
        gain is smaller, they learn several times more slowly.
        """
        large = config.norm == "layer_norm"
        channels = config.conv_channels * (config.stack or 1)
        architecture = {
            "extractor_mode": config.norm,
            "extractor_conv_layer_config": [[channels, *c] for c in CONVOLUTIONS],
            "extractor_conv_bias": large,
            "encoder_embed_dim": config.width,
            "encoder_projection_dropout": 0.0,
            "encoder_pos_conv_kernel": min(128, max(2, config.width // 6)),
            "encoder_pos_conv_groups": math.gcd(config.width, POSITION_GROUPS),
            "encoder_num_layers": config.layers,
            "encoder_num_heads": config.heads,
            "encoder_attention_dropout": 0.0,
            "encoder_ff_interm_features": config.feed_forward,
            "encoder_ff_interm_dropout": 0.0,
            "encoder_dropout": 0.0,
            "encoder_layer_norm_first": large,
            "encoder_layer_drop": 0.0,
        }
        with seeded_at(seed):
            mel = config.front == "mel"
            normalize = large or mel
            front = {"mel": mel, "stack": config.stack, "convolved": config.convolved}
            encoder = cls(architecture, config.layer, normalize, **front, alphabet=alphabet)
            for module in encoder.model.feature_extractor.modules():
                if isinstance(module, nn.Conv1d):
                    nn.init.kaiming_normal_(module.weight)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        return encoder

    @classmethod
    def from_published(cls, weights: str, layer: int | None = None) -> HubertEncoder:
        """Published weights; `layer` defaults to the last.

        `weights` is `torchaudio:BUNDLE` (such as `torchaudio:HUBERT_BASE`; downloaded once) or a
        Hugging Face HuBERT directory, or its URL. Raises ValueError if it is neither.
        """
        prefix, _, bundle = weights.partition(":")
        if prefix == "torchaudio":
            architecture, state, normalize = _from_bundle(bundle)
        else:
            architecture, state, normalize = _from_huggingface(local(weights))
        last = architecture["encoder_num_layers"]
        encoder = cls(architecture, last if layer is None else layer, normalize)
        encoder.model.load_state_dict(state)
        return encoder

    @classmethod
    def load(cls, directory: Location | str) -> HubertEncoder:
        """Read what `save` wrote."""
        directory = local(directory)
        encoder = cls(**json.loads((directory / "hubert.json").read_text()))
        state = load_file(directory / "hubert.safetensors")
        spelling = {name: state.pop(name) for name in list(state) if name.startswith(SPELLER)}
        encoder.model.load_state_dict(state)
        if encoder.speller is not None:
            named = {name.removeprefix(SPELLER): value for name, value in spelling.items()}
            encoder.speller.load_state_dict(named)
        return encoder

    def save(self, directory: Path | str, stored: torch.dtype = torch.float32) -> None:
        """Write `hubert.safetensors`, its weights as `stored`, and `hubert.json` into `directory`,
        making it if need be."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        stacked = {"stack": self.stack} if self.stack else {}
        stacked |= {"convolved": True} if self.convolved else {}
        stacked |= {"alphabet": self.alphabet} if self.alphabet else {}
        state = dict(self.model.state_dict())
        if self.speller is not None:
            state |= {SPELLER + name: own for name, own in self.speller.state_dict().items()}
        state = {
            name: value.to(stored if value.is_floating_point() else value.dtype).contiguous()
            for name, value in state.items()
        }
        save_file(state, directory / "hubert.safetensors")
        write_json(
            directory / "hubert.json",
            {
                "architecture": self.architecture,
                "layer": self.layer,
                "normalize": self.normalize,
                "mel": self.mel,
                **stacked,
            },
        )

    def compile_layers(self) -> None:
        """From now on the transformer's layers run compiled, for clips of any length."""
        for layer in self.model.encoder.transformer.layers:
            layer.compile(dynamic=True)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def frame_seconds(self) -> float:
        """Seconds from one frame to the next."""
        return self.hop / SAMPLE_RATE

    def frames(self, samples: int) -> int:
        """Frames in a clip of so many samples; 0 if it is shorter than one frame."""
        return max(0, (samples - self.field) // self.hop + 1)

    def prepare(self, wave: Tensor) -> Tensor:
        """A waveform (T,) as the convolutions expect it, on the encoder's device.

        Raises ValueError if it is too short for a single frame.
        """
        if wave.ndim != 1 or self.frames(len(wave)) == 0:
            raise ValueError(
                f"a clip is a waveform of at least {self.field} samples, not {list(wave.shape)}"
            )
        wave = wave.to(self.device, torch.float32)
        if not self.normalize:
            return wave
        return (wave - wave.mean()) / (wave.var(correction=0) + 1e-7).sqrt()

    @torch.inference_mode()
    def features(self, waves: Sequence[Tensor], layer: int | None = None) -> list[Tensor]:
        """Output (F_i, D) of transformer layer `layer` for each of `waves` (T_i,), as one batch.

        Later layers are not computed; `layer` defaults to the encoder's own. The features are the
        layer's residual stream, before any final norm. A clip's features do not depend on what
        else is in the batch. Raises ValueError if a clip is shorter than a frame, naming its
        samples.
        """
        prepared = [self.prepare(wave) for wave in waves]
        if not prepared:
            return []
        lengths = torch.tensor([len(wave) for wave in prepared])
        frames = torch.tensor([self.frames(len(wave)) for wave in prepared])
        projected = self.project(pad_sequence(prepared, batch_first=True), lengths)
        output = self.contextualize(projected, frames, self.layer if layer is None else layer)
        return [row[:count] for row, count in zip(output, frames.tolist(), strict=True)]

    def spell(self, features: Tensor, frames: Tensor | None = None) -> Tensor:
        """Log-probabilities (F, 1 + A) of the blank and of each letter of the alphabet, from the
        `features` (F, D) of a clip; or (B, F, 1 + A) of several (B, F, D), `frames` (B,) of them
        real. Raises ValueError for an encoder without a CTC head."""
        if self.speller is None:
            raise ValueError("this encoder has no CTC head")
        if features.is_inference() and not torch.is_inference_mode_enabled():
            with torch.inference_mode():  # nothing is to be learned from what `features` gave
                return self.spell(features, frames)
        if features.ndim == 2:
            return self.spell(features[None])[0]
        beyond = None
        if frames is not None:
            beyond = torch.arange(features.shape[1]) >= frames[:, None]
            beyond = beyond.to(features.device)
        return self.speller(features.float(), beyond).log_softmax(-1)

    @torch.inference_mode()
    def letters(self, features: Sequence[Tensor]) -> list[Letters | None]:
        """What the CTC head hears in each clip's `features` (F_i, D); None without a head."""
        if self.speller is None or not features:
            return [None] * len(features)
        frames = torch.tensor([len(one) for one in features])
        logp = self.spell(pad_sequence(list(features), batch_first=True), frames).cpu().numpy()
        each = zip(logp, frames.tolist(), strict=True)
        return [Letters.of(self.alphabet, own[:count]) for own, count in each]

    @property
    def bands(self) -> int:
        """Log-mel bands of a window; 0 where convolutions hear the wave."""
        return self.model.feature_extractor.bands if self.mel else 0

    def project(
        self,
        waves: Tensor,
        lengths: Tensor,
        hidden: Tensor | None = None,
        warps: Tensor | None = None,
    ) -> Tensor:
        """Prepared waves (B, T) of `lengths` (B,) samples to transformer inputs (B, F, D).

        Rows beyond a clip's own frames are arbitrary. `hidden` (B, bands) bool are log-mel bands
        that the transformer is not shown, `warps` (B,) what the bands' places are multiplied by.
        """
        if self.mel:
            frames = torch.tensor([self.frames(length) for length in lengths.tolist()])
            output = self.model.feature_extractor(waves, frames.to(waves.device), hidden, warps)
            if self.convolved:
                return self.model.encoder.feature_projection(output, frames.to(waves.device))
        elif self.architecture["extractor_mode"] == "group_norm":
            # The norm's statistics run over time: a clip has to be alone to be without padding.
            clips = zip(waves, lengths.tolist(), strict=True)
            convolved = [self._convolve(wave[None, :length])[0] for wave, length in clips]
            output = pad_sequence(convolved, batch_first=True)
        else:
            output = self._convolve(waves)
        return self.model.encoder.feature_projection(output)

    def contextualize(self, inputs: Tensor, frames: Tensor, layer: int | None = None) -> Tensor:
        """Transformer inputs (B, F, D), `frames` (B,) of them real, to the output of `layer`.

        Without a layer: the whole transformer and its final norm, if it has one.
        """
        inputs, mask = self._masked(inputs, frames)
        transformer = self.model.encoder.transformer
        if layer is None:
            return transformer(inputs, attention_mask=mask)
        return transformer.get_intermediate_outputs(inputs, mask, layer)[-1]

    def contextualize_twice(
        self, inputs: Tensor, frames: Tensor, dropped: Collection[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """As `contextualize`: the output of the encoder's own layer, and the whole transformer's,
        (B, F, D) both. Layers that are `dropped` (0 = first) hand on what they are given."""
        inputs, mask = self._masked(inputs, frames)
        transformer = self.model.encoder.transformer
        last = inputs + transformer.pos_conv_embed(inputs)
        if transformer.layer_norm_first:  # torchaudio's name for a norm that is not at the end
            last = transformer.layer_norm(last)
        outputs = []
        for number, layer in enumerate(transformer.layers):
            if number not in dropped:
                last, _ = layer(last, mask)
            outputs.append(last)
        if not transformer.layer_norm_first:
            last = transformer.layer_norm(last)
        return outputs[self.layer - 1], last

    @staticmethod
    def _masked(inputs: Tensor, frames: Tensor) -> tuple[Tensor, Tensor | None]:
        """Inputs without what is beyond a clip's own frames, and the mask that keeps it out of
        attention; None where there is nothing beyond."""
        mask = None
        inside = torch.arange(inputs.shape[1]) < frames[:, None]
        if not inside.all():
            inside = inside.to(inputs.device)
            inputs = inputs * inside[..., None]
            mask = inside[:, None, None, :].expand(-1, 1, inputs.shape[1], -1)
        return inputs, mask

    def _convolve(self, waves: Tensor) -> Tensor:
        """Waves (B, T) through torchaudio's convolution blocks, kept as (B, T', C) throughout.

        Norm and GELU then read memory in order, and convolutions need no transposed copies.
        """
        output = waves[..., None]
        for block in self.model.feature_extractor.conv_layers:
            convolution, norm = block.conv, block.layer_norm
            if convolution.in_channels == 1:
                frames = output[..., 0].unfold(1, block.kernel_size, block.stride)
                output = F.linear(frames, convolution.weight[:, 0], convolution.bias)
            else:
                weight = convolution.weight[:, :, None].contiguous(
                    memory_format=torch.channels_last
                )
                image = output.transpose(1, 2)[:, :, None]
                image = F.conv2d(image, weight, convolution.bias, (1, block.stride))
                output = image[:, :, 0].transpose(1, 2)
            if isinstance(norm, nn.LayerNorm):
                output = F.layer_norm(
                    output, norm.normalized_shape, norm.weight, norm.bias, norm.eps
                )
            elif norm is not None:
                output = norm(output.transpose(1, 2)).transpose(1, 2)
            output = F.gelu(output)
        return output


def spells(directory: Location | str) -> bool:
    """Whether the encoder that `HubertEncoder.save` wrote there has a CTC head."""
    return "alphabet" in json.loads((local(directory) / "hubert.json").read_text())


def _from_bundle(name: str) -> tuple[dict[str, Any], dict[str, Tensor], bool]:
    """Architecture, weights and whether waveforms are normalised, of a torchaudio bundle."""
    bundle = getattr(torchaudio.pipelines, name, None)
    if not isinstance(bundle, torchaudio.pipelines.Wav2Vec2Bundle) or "HUBERT" not in name:
        raise ValueError(f"torchaudio has no HuBERT bundle {name!r}")
    # A bundle publishes its weights, and says only in private how they are arranged.
    normalize = bundle._normalize_waveform
    model = bundle.get_model()
    state = (model.model if normalize else model).state_dict()
    state = {key: value for key, value in state.items() if not key.startswith("aux.")}
    return bundle._params, state, normalize


def _from_huggingface(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor], bool]:
    """Architecture, weights and whether waveforms are normalised, of a Hugging Face directory."""
    if not (directory / "config.json").is_file():
        raise ValueError(
            f"HuBERT weights {str(directory)!r}: neither torchaudio:BUNDLE nor a directory "
            "with a config.json"
        )
    kind = json.loads((directory / "config.json").read_text()).get("model_type")
    if kind != "hubert":
        raise ValueError(f"{directory} holds a {kind} model, not a hubert")
    from transformers import HubertModel

    original, report = HubertModel.from_pretrained(
        directory, local_files_only=True, output_loading_info=True
    )
    if missing := set(report["missing_keys"]) - {"masked_spec_embed"}:
        raise ValueError(f"{directory} lacks weights: {', '.join(sorted(missing))}")
    shape = original.config
    architecture = {
        "extractor_mode": f"{shape.feat_extract_norm}_norm",
        "extractor_conv_layer_config": [
            list(layer)
            for layer in zip(shape.conv_dim, shape.conv_kernel, shape.conv_stride, strict=True)
        ],
        "extractor_conv_bias": shape.conv_bias,
        "encoder_embed_dim": shape.hidden_size,
        "encoder_projection_dropout": 0.0,
        "encoder_pos_conv_kernel": shape.num_conv_pos_embeddings,
        "encoder_pos_conv_groups": shape.num_conv_pos_embedding_groups,
        "encoder_num_layers": shape.num_hidden_layers,
        "encoder_num_heads": shape.num_attention_heads,
        "encoder_attention_dropout": 0.0,
        "encoder_ff_interm_features": shape.intermediate_size,
        "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.0,
        "encoder_layer_norm_first": shape.do_stable_layer_norm,
        "encoder_layer_drop": 0.0,
    }
    processor = directory / "preprocessor_config.json"
    fields = json.loads(processor.read_text()) if processor.is_file() else {}
    normalize = fields.get("do_normalize", shape.feat_extract_norm == "layer")
    return architecture, import_huggingface_model(original).state_dict(), normalize


def generator_at(*place: int) -> torch.Generator:
    """Random numbers that are a function of a place: seed, round, step."""
    seed = int(np.random.SeedSequence(place).generate_state(1)[0])
    return torch.Generator().manual_seed(seed)


@contextmanager
def seeded_at(*place: int) -> Iterator[None]:
    """Random weights made inside are a function of `place`; torch's own state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator_at(*place).get_state())
        yield
