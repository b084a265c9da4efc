"""A small Whisper trained from nothing: tokenizer, features, and the steps that get it there.

The checkpoint is transformers' own format, so that whatever reads a Whisper reads it. Knows waves
and sentences; neither corpora nor files of speech.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional

from mmrag.config import WhisperShape, WhisperTraining
from mmrag.model.train import precision
from mmrag.speech.audio import SAMPLE_RATE

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration

SPECIALS = (
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|en|>",
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nocaptions|>",
    "<|notimestamps|>",
)
"""Behind the word pieces, in Whisper's own order."""
IGNORE = -100
WARMUP_SHARE = 0.05
CLIP = 1.0
"""Largest gradient norm."""
STATE = ".training.pt"
WHOLE = 0.25
"""Share of steps that hear the whole window, most of it silence, as a transcriber does; the others
hear as much as their clips need, which is faster."""
ALIKE = 4
"""Times as many clips are drawn as are taken, those of about one length."""
PROMPT = 2
"""Ids before a text: the start, and that there are no timestamps."""


@dataclass(frozen=True)
class Clip:
    """Something said, to learn from."""

    name: str
    features: Tensor
    """(M, F) log-mel, as `extractor` gives them."""
    text: str
    phones: Tensor | None = None
    """(F,) the phone said in each encoder frame, by number; None where there is no alignment."""


def create(directory: Path, shape: WhisperShape, texts: Iterable[str], seed: int) -> None:
    """Write an untrained checkpoint whose pieces are those of `texts`."""
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizer,
    )
    from transformers.utils import logging

    logging.disable_progress_bar()
    vocab, merges = _pieces(texts, shape.pieces)
    tokenizer = WhisperTokenizer(vocab=vocab, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIALS[1:])})
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIALS}
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=shape.mel_bands,
        d_model=shape.width,
        encoder_layers=shape.encoder_layers,
        decoder_layers=shape.decoder_layers,
        encoder_attention_heads=shape.heads,
        decoder_attention_heads=shape.heads,
        encoder_ffn_dim=shape.feed_forward,
        decoder_ffn_dim=shape.feed_forward,
        max_source_positions=round(shape.window_seconds * 50),
        max_target_positions=shape.tokens,
        dropout=shape.dropout,
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|endoftext|>"],
        pad_token_id=ids["<|endoftext|>"],
        decoder_start_token_id=ids["<|startoftranscript|>"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
        max_length=shape.tokens,
        is_multilingual=False,
        no_timestamps_token_id=ids["<|notimestamps|>"],
        return_timestamps=False,
        suppress_tokens=[number for token, number in ids.items() if token != SPECIALS[0]],
        begin_suppress_tokens=[ids["<|endoftext|>"]],
    )
    extractor = WhisperFeatureExtractor(
        feature_size=shape.mel_bands, chunk_length=round(shape.window_seconds)
    )
    for part in (model, tokenizer, extractor):
        part.save_pretrained(directory)


def extractor(directory: Path) -> Callable[[Tensor], Tensor]:
    """What turns a wave (T,) at 16 kHz into log-mel features (M, F) float16 as the checkpoint in
    `directory` takes them, without the silence that fills its window.

    What it gives raises ValueError for a wave longer than that.
    """
    from transformers import WhisperFeatureExtractor

    log_mel = WhisperFeatureExtractor.from_pretrained(directory)

    def features(wave: Tensor) -> Tensor:
        if len(wave) > log_mel.n_samples:
            seconds = len(wave) / SAMPLE_RATE
            raise ValueError(f"{seconds:.1f} s in a window of {log_mel.chunk_length} s")
        read = log_mel(wave.numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt")
        return read.input_features[0, :, : 1 + math.ceil(len(wave) / log_mel.hop_length)].half()

    return features


def train(
    directory: Path,
    clips: Sequence[Clip],
    settings: WhisperTraining,
    seed: int,
    log: Callable[[int, dict[str, Any]], None],
    device: str = "cpu",
) -> None:
    """Train the checkpoint in `directory`.

    `log` is called with the number of steps done and metrics. A stopped training goes on from the
    state that it saves every `checkpoint_steps`. While it lasts, a CTC loss over the encoder's
    frames shows where each piece is said, and where there is an alignment its phones are learned;
    what these need is no part of the checkpoint. Raises
    ValueError for a clip without text or with more of it than fits, and a loss that is not finite,
    naming the clips.
    """
    from transformers import WhisperForConditionalGeneration, WhisperTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = WhisperForConditionalGeneration.from_pretrained(directory, use_safetensors=True)
    tokenizer = WhisperTokenizer.from_pretrained(directory)
    labels = [_labels(clip, tokenizer, model.config) for clip in clips]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        learner = _Learner(model, settings, clips).to(device).train()
    optimizer = torch.optim.AdamW(
        learner.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    path, first = directory / STATE, 0
    if path.exists():
        saved = torch.load(path, map_location="cpu", weights_only=True)
        learner.load_state_dict(saved["learner"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    for step in range(first, settings.steps):
        draw = np.random.default_rng([seed, step])
        chosen = _alike(clips, settings.batch, draw)
        heard = [clips[one] for one in chosen]
        torch.manual_seed(int(draw.integers(2**31)))  # of dropout
        loss, parts = learner(heard, [labels[one] for one in chosen], draw)
        if not torch.isfinite(loss):
            names = ", ".join(clips[one].name for one in chosen)
            raise ValueError(f"step {step + 1}: the loss is {loss.item()} on {names}")
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate(step, settings.steps)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(learner.parameters(), CLIP)
        optimizer.step()
        done = step + 1
        log(done, {**parts, "gradient_norm": norm.item()})
        if done % settings.checkpoint_steps == 0 or done == settings.steps:
            state = {
                "learner": learner.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": done,
            }
            aside = path.with_name(f"{STATE}.new")
            torch.save(state, aside)
            aside.replace(path)
    model.save_pretrained(directory)
    path.unlink(missing_ok=True)


def rate(step: int, steps: int) -> float:
    """Share of the learning rate at `step` (0 = first): a linear rise, then half a cosine."""
    warmup = max(1, math.ceil(steps * WARMUP_SHARE))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class _Learner(nn.Module):
    """A Whisper and what it is only trained with: heads over the encoder's frames, of which one
    spells and one names phones."""

    def __init__(
        self,
        model: WhisperForConditionalGeneration,
        settings: WhisperTraining,
        clips: Sequence[Clip],
    ) -> None:
        super().__init__()
        self.model, self._settings = model, settings
        phones = 1 + max((int(c.phones.max()) for c in clips if c.phones is not None), default=0)
        self.spell = nn.Linear(model.config.d_model, model.config.vocab_size)
        self.name = nn.Linear(model.config.d_model, phones)

    def forward(
        self, clips: Sequence[Clip], labels: Sequence[Sequence[int]], draw: np.random.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of a batch of clips and their [prompt, text, end] ids, and its parts."""
        device = self.spell.weight.device
        config, encoder = self.model.config, self.model.model.encoder
        window = 2 * config.max_source_positions
        if draw.random() >= WHOLE:
            window = 2 * math.ceil(max(one.features.shape[1] for one in clips) / 2)
        heard = torch.stack([_windowed(one.features.float(), window) for one in clips])
        ids, targets = (one.to(device) for one in _padded(labels, config.pad_token_id))
        dtype = precision("auto", device)
        half = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
        with half:
            states = _encode(encoder, heard.to(device))
            logits = self.model(encoder_outputs=(states,), decoder_input_ids=ids).logits
            spelt, named = self.spell(states).float(), self.name(states).float()
        entropy = functional.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE
        )
        parts = {"loss": entropy}
        if self._settings.ctc_weight:
            texts = [own[PROMPT:-1] for own in labels]
            frames = torch.tensor([math.ceil(one.features.shape[1] / 2) for one in clips])
            parts["ctc_loss"] = functional.ctc_loss(
                spelt.log_softmax(-1).transpose(0, 1),
                torch.tensor([piece for text in texts for piece in text]),
                frames.clamp(max=config.max_source_positions),
                torch.tensor([len(text) for text in texts]),
                blank=config.pad_token_id,
                zero_infinity=True,
            )
        if self._settings.phone_weight and any(one.phones is not None for one in clips):
            phones = torch.full(named.shape[:2], IGNORE)
            for row, one in enumerate(clips):
                if one.phones is not None:
                    said = one.phones[: phones.shape[1]]
                    phones[row, : len(said)] = said
            parts["phone_loss"] = functional.cross_entropy(
                named.flatten(0, 1), phones.flatten().to(device), ignore_index=IGNORE
            )
        weights = {"ctc_loss": self._settings.ctc_weight, "phone_loss": self._settings.phone_weight}
        loss = sum(weights.get(name, 1.0) * part for name, part in parts.items())
        return loss, {name: part.item() for name, part in parts.items()}


def _alike(clips: Sequence[Clip], count: int, draw: np.random.Generator) -> np.ndarray:
    """`count` clips of about the same length, so that little of a batch is padding."""
    wanted = ALIKE * count
    some = draw.choice(len(clips), wanted, replace=len(clips) < wanted)
    some = some[np.argsort([clips[one].features.shape[1] for one in some], kind="stable")]
    first = int(draw.integers(wanted - count + 1))
    return some[first : first + count]


def _encode(encoder: nn.Module, features: Tensor) -> Tensor:
    """transformers' encoder over features (B, M, F) of less than its window: states (B, F/2, D)."""
    x = functional.gelu(encoder.conv1(features))
    x = functional.gelu(encoder.conv2(x)).transpose(1, 2)
    x = x + encoder.embed_positions.weight[: x.shape[1]]
    for layer in encoder.layers:
        x = layer(x, None)
    return encoder.layer_norm(x)


def _windowed(features: Tensor, frames: int) -> Tensor:
    """Features (M, F) filled up with silence, the least that they can be, to (M, frames)."""
    return functional.pad(
        features[:, :frames], (0, max(0, frames - features.shape[1])), value=features.min().item()
    )


def _padded(labels: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """What the decoder reads (B, T), and at each place what comes next, once the prompt is over."""
    longest = max(map(len, labels))
    ids = torch.full((len(labels), longest), padding)
    targets = torch.full((len(labels), longest), IGNORE)
    for row, own in enumerate(labels):
        ids[row, : len(own)] = torch.tensor(own)
        targets[row, PROMPT - 1 : len(own) - 1] = torch.tensor(own[PROMPT:])
    return ids, targets


def _labels(clip: Clip, tokenizer: Any, config: Any) -> list[int]:
    """Prompt, text, end; ValueError for a clip that cannot be learned."""
    if not clip.text.strip():
        raise ValueError(f"{clip.name} has no text")
    untimed = tokenizer.convert_tokens_to_ids("<|notimestamps|>")
    pieces = tokenizer.encode(f" {' '.join(clip.text.split())}", add_special_tokens=False)
    most = config.max_target_positions - PROMPT - 1
    if len(pieces) > most:
        raise ValueError(f"the text of {clip.name} has {len(pieces)} pieces, at most {most} fit")
    return [config.decoder_start_token_id, untimed, *pieces, config.eos_token_id]


def _pieces(texts: Iterable[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-level BPE as Whisper's: pieces with ids, and merges; the end token behind them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_lines(texts), trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    vocab = dict(learned["vocab"])
    vocab[SPECIALS[0]] = len(vocab)
    return vocab, [tuple(merge) for merge in learned["merges"]]


def _lines(texts: Iterable[str]) -> Iterator[str]:
    yield from (" ".join(text.split()) for text in texts)
