"""A small Whisper trained from nothing: tokenizer, features, and the steps that get it there.

The checkpoint is transformers' own format, so that whatever reads a Whisper reads it. Knows waves
and sentences; neither corpora nor files of speech.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
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
LEFT_OUT_FRAMES, LEFT_OUT_BANDS, MASKS = 40, 20, 2
"""Longest run of frames and of bands that are masked, and how many of each (SpecAugment, arXiv
1904.08779)."""


def create(directory: Path, shape: WhisperShape, texts: Iterable[str], seed: int) -> None:
    """Write an untrained checkpoint whose pieces are those of `texts`."""
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizer,
    )

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


def train(
    directory: Path,
    waves: Sequence[Tensor],
    texts: Sequence[str],
    settings: WhisperTraining,
    seed: int,
    log: Callable[[int, dict[str, Any]], None],
) -> None:
    """Train the checkpoint in `directory` on waves (T_i,) at 16 kHz and what is said in them.

    `log` is called with the number of steps done and metrics. A stopped training goes on from the
    state that it saves every `checkpoint_steps`. Raises ValueError for a clip longer than the
    window, without text, or a loss that is not finite, naming the clips.
    """
    from transformers import (
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizer,
    )

    model = WhisperForConditionalGeneration.from_pretrained(directory, use_safetensors=True)
    tokenizer = WhisperTokenizer.from_pretrained(directory)
    extractor = WhisperFeatureExtractor.from_pretrained(directory)
    _check(waves, texts, extractor.n_samples)
    labels = [_labels(text, tokenizer, model.config) for text in texts]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    path, first = directory / STATE, 0
    if path.exists():
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    model.train()
    for step in range(first, settings.steps):
        draw = np.random.default_rng([seed, step])
        chosen = draw.choice(len(waves), settings.batch, replace=len(waves) < settings.batch)
        features = extractor(
            [waves[one].numpy() for one in chosen], sampling_rate=SAMPLE_RATE, return_tensors="pt"
        ).input_features
        torch.manual_seed(int(draw.integers(2**31)))  # of dropout
        loss = _loss(model, masked(features, draw), [labels[one] for one in chosen])
        if not torch.isfinite(loss):
            raise ValueError(
                f"step {step + 1}: the loss is {loss.item()} on clips {chosen.tolist()}"
            )
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate(step, settings.steps)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        done = step + 1
        log(done, {"loss": loss.item(), "gradient_norm": norm.item()})
        if done % settings.checkpoint_steps == 0 or done == settings.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
            aside = path.with_name(f"{STATE}.new")
            torch.save(state, aside)
            aside.replace(path)
    model.save_pretrained(directory)


def rate(step: int, steps: int) -> float:
    """Share of the learning rate at `step` (0 = first): a linear rise, then half a cosine."""
    warmup = max(1, math.ceil(steps * WARMUP_SHARE))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def masked(features: Tensor, draw: np.random.Generator) -> Tensor:
    """Log-mel features (B, M, F) with runs of frames and of bands at the clip's mean."""
    features = features.clone()
    bands, frames = features.shape[1:]
    for clip in features:
        mean = clip.mean()
        for _ in range(MASKS):
            width, height = draw.integers(LEFT_OUT_FRAMES + 1), draw.integers(LEFT_OUT_BANDS + 1)
            start = draw.integers(max(1, frames - width))
            clip[:, start : start + width] = mean
            low = draw.integers(max(1, bands - height))
            clip[low : low + height] = mean
    return features


def _loss(
    model: WhisperForConditionalGeneration, features: Tensor, labels: Sequence[Sequence[int]]
) -> Tensor:
    """Cross-entropy a token of the text and its end; the prompt is given."""
    longest = max(map(len, labels))
    ids = torch.full((len(labels), longest), model.config.pad_token_id)
    targets = torch.full((len(labels), longest), IGNORE)
    for row, own in enumerate(labels):
        ids[row, : len(own)] = torch.tensor(own)
        targets[row, 1 : len(own) - 1] = torch.tensor(own[2:])
    dtype = precision("auto", model.device)
    half = torch.autocast(model.device.type, dtype) if dtype != torch.float32 else nullcontext()
    with half:
        logits = model(input_features=features, decoder_input_ids=ids).logits
    return functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, label_smoothing=0.1
    )


def _labels(text: str, tokenizer: Any, config: Any) -> list[int]:
    """Prompt, text, end."""
    untimed = tokenizer.convert_tokens_to_ids("<|notimestamps|>")
    pieces = tokenizer.encode(f" {' '.join(text.split())}", add_special_tokens=False)
    most = config.max_target_positions - 3
    return [config.decoder_start_token_id, untimed, *pieces[:most], config.eos_token_id]


def _check(waves: Sequence[Tensor], texts: Sequence[str], samples: int) -> None:
    if len(waves) != len(texts) or not len(waves):
        raise ValueError(f"{len(waves)} clips with {len(texts)} texts to train on")
    for number, text in enumerate(texts):
        if len(waves[number]) > samples:
            seconds = len(waves[number]) / SAMPLE_RATE
            raise ValueError(
                f"clip {number} has {seconds:.1f} s, the window {samples / SAMPLE_RATE:g} s"
            )
        if not text.strip():
            raise ValueError(f"clip {number} has no text")


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
