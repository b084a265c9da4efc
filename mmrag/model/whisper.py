"""Whisper (arXiv 2212.04356) behind the decoding contract: transformers' weights, our own cache.

transformers reads the checkpoint and runs the encoder. The decoder's pass is written here, so that
rows of different length share a batch which they join and leave between two steps; the key of a
position is the decoder's final state, from which the next token is chosen (arXiv 2410.18850). It
knows checkpoints, waves and ids; no datastores.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mmrag.artifact import local
from mmrag.config import LanguageModel
from mmrag.model.lm import LMOutput
from mmrag.model.pages import PagedCache, PagePool, ReadPlan, attend_causally
from mmrag.model.vocabulary import Vocabulary
from mmrag.model.whisper_cache import WhisperCache
from mmrag.speech.audio import SAMPLE_RATE

PREFIX = "whisper:"
"""Begins the name of a model that is a Whisper checkpoint."""
NEEDED = {
    "its shape": ("config.json",),
    "weights in safetensors": ("model.safetensors", "model.safetensors.index.json"),
    "a tokenizer": ("tokenizer.json", "vocab.json"),
    "a feature extractor": ("preprocessor_config.json", "processor_config.json"),
}
"""What a checkpoint's directory holds -> the files of which one has to be there."""
SAMPLES, SAMPLE_BYTES = 64, 1 << 16
"""Evenly spaced blocks of a file that enter its fingerprint."""


class WhisperError(ValueError):
    """A checkpoint is missing, incomplete or of another family; the message names what."""


def locate(name: str) -> Path:
    """The directory of `whisper:DIRECTORY` or `whisper:HUB_ID`; a hub's is fetched.

    Raises WhisperError, in one line, if there is none or it lacks something.
    """
    given = name.removeprefix(PREFIX)
    directory = local(given).expanduser()
    if not directory.is_dir():
        directory = _download(given)
    for what, files in NEEDED.items():
        if not any((directory / file).is_file() for file in files):
            raise WhisperError(f"{directory} lacks {what} ({' or '.join(files)})")
    try:
        kind = json.loads((directory / "config.json").read_text()).get("model_type")
    except ValueError as error:
        raise WhisperError(f"{directory / 'config.json'} is not JSON: {error}") from None
    if kind != "whisper":
        raise WhisperError(f"{directory} holds a {kind} model, not a whisper")
    return directory


def fingerprint(directory: Path) -> str:
    """16 hex digits over a checkpoint's files, of large ones over evenly spaced blocks.

    A fine-tuned checkpoint differs from its base in every weight, and so in every block.
    """
    digest = hashlib.sha256()
    kept = ("*.json", "*.safetensors", "merges.txt")
    for file in sorted(file for pattern in kept for file in directory.glob(pattern)):
        size = file.stat().st_size
        digest.update(f"\0{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            for place in np.linspace(0, max(0, size - SAMPLE_BYTES), SAMPLES, dtype=np.int64):
                stream.seek(int(place))
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def description(directory: Path) -> tuple[int, float]:
    """Of a checkpoint, read without its weights: D of a key, and seconds of the longest clip."""
    from transformers import WhisperFeatureExtractor

    fields = json.loads((directory / "config.json").read_text())
    try:
        extractor = WhisperFeatureExtractor.from_pretrained(directory, local_files_only=True)
        return int(fields["d_model"]), extractor.n_samples / SAMPLE_RATE
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(directory, error) from None


@dataclass(frozen=True, eq=False)
class EncodedAudio:
    """A clip as Whisper's encoder hears it: `states` (F, D) of the whole window."""

    states: Tensor
    seconds: float
    """Length of the clip; the window's rest is silence."""
    frame_seconds: float
    language: str | None = None
    """What is spoken, by ISO 639-1; None where the checkpoint knows one language alone."""

    @property
    def frames(self) -> int:
        """Frames of the clip itself."""
        return max(1, min(len(self.states), round(self.seconds / self.frame_seconds)))

    def __len__(self) -> int:
        """What word times are made of: the clip's frames."""
        return self.frames


class WhisperVocabulary:
    """A checkpoint's own ids. Text keeps its case and its punctuation."""

    def __init__(self, tokenizer, generation: dict, shape: dict, language: str | None) -> None:  # noqa: ANN001
        """`tokenizer` is transformers' WhisperTokenizer, `generation` its generation config and
        `shape` the fields of its config.

        Raises WhisperError for a language that the checkpoint does not know.
        """
        self._tokenizer = tokenizer
        self.size: int = shape["vocab_size"]
        self._most_context = shape["max_target_positions"] // 2 - 1
        self.eos: int = tokenizer.eos_token_id
        self._suppressed = generation.get("suppress_tokens") or []
        self._suppressed_first = generation.get("begin_suppress_tokens") or []
        marks = ("<|startoftranscript|>", "<|startofprev|>", "<|transcribe|>", "<|notimestamps|>")
        known = tokenizer.get_vocab()
        if missing := [mark for mark in marks if mark not in known]:
            raise WhisperError(f"the tokenizer lacks {', '.join(missing)}")
        self.start, self._before, self._task, self._untimed = (known[mark] for mark in marks)
        self.languages = {
            token[2:-2]: number
            for token, number in known.items()
            if token[:2] == "<|" and token[-2:] == "|>" and 2 <= len(token[2:-2]) <= 3
        }
        self.multilingual = bool(generation.get("is_multilingual", self.languages))
        if language and (not self.multilingual and language != "en"):
            raise WhisperError(f"language {language!r}: this checkpoint knows English alone")
        if language and self.multilingual and language not in self.languages:
            raise WhisperError(
                f"language {language!r}: this checkpoint knows {', '.join(sorted(self.languages))}"
            )
        self.language = language if self.multilingual else None

    @property
    def spoken_languages(self) -> tuple[str, ...]:
        """What it understands, as it is told (ISO 639-1)."""
        if not self.multilingual:
            return ("en",)
        return (self.language,) if self.language else tuple(self.languages)

    @classmethod
    def load(cls, directory: Path, language: str | None = None) -> WhisperVocabulary:
        """Read a checkpoint's tokenizer; WhisperError if it is damaged or lacks something."""
        from transformers import GenerationConfig, WhisperConfig, WhisperTokenizer

        try:
            tokenizer = WhisperTokenizer.from_pretrained(directory, local_files_only=True)
            shape = WhisperConfig.from_pretrained(directory, local_files_only=True).to_dict()
        except (OSError, ValueError, KeyError) as error:
            raise _unreadable(directory, error) from None
        generation = {}
        if (directory / "generation_config.json").exists():
            generation = GenerationConfig.from_pretrained(directory).to_dict()
        return cls(tokenizer, generation, shape, language)

    def encode(self, text: str) -> list[int]:
        """Text to ids, as it stands behind the prompt: with a blank before it."""
        text = " ".join(text.split())
        return self._tokenizer.encode(f" {text}", add_special_tokens=False) if text else []

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text; special tokens among them are passed over."""
        kept = [int(i) for i in ids if i < self.eos]
        return self._tokenizer.decode(kept, clean_up_tokenization_spaces=False).strip()

    def spellings(self, phrase: str) -> list[list[int]]:
        """A phrase as ids: as it is written, and with capitals where it has none."""
        ways = [self.encode(phrase)]
        if phrase == phrase.lower():
            ways.append(self.encode(phrase.title()))
        return [way for n, way in enumerate(ways) if way and way not in ways[:n]]

    def spoken(self, text: str) -> str:
        """`text` as it stands: a checkpoint writes numbers, capitals and accents itself."""
        return " ".join(text.split())

    def unspeakable(self, text: str) -> list[str]:
        """Letters that no piece writes: none, for pieces are of bytes."""
        return []

    def refusal(self, text: str) -> str | None:
        """Why a text cannot be listened for; None if it can."""
        return None if any(map(str.isalnum, text)) else f"nothing to listen for in {text!r}"

    find = Vocabulary.find
    _stands_alone = Vocabulary._stands_alone
    word_ends = Vocabulary.word_ends

    def word_starts(self) -> np.ndarray:
        """Ids after which an earlier word has ended: (V,) bool, the end token among them."""
        starts = np.zeros(self.size, bool)
        starts[self.eos] = True
        for token, number in self._tokenizer.get_vocab().items():
            if number < self.eos and token.startswith("Ġ"):
                starts[number] = True
        return starts

    def transcript_ids(self) -> np.ndarray:
        """Text that the checkpoint does not suppress, and the end: (V,) bool."""
        allowed = np.zeros(self.size, bool)
        allowed[: self.eos + 1] = True
        allowed[[one for one in self._suppressed if one < self.size and one != self.eos]] = False
        return allowed

    def first_ids(self) -> np.ndarray:
        """Ids that may begin a transcript: (V,) bool."""
        allowed = self.transcript_ids()
        allowed[[one for one in self._suppressed_first if one < self.size]] = False
        return allowed

    def speech_input(self, encoded: EncodedAudio) -> EncodedAudio:
        """A clip as the decoder takes it: as it is."""
        return encoded

    def letters(self, speech: EncodedAudio) -> None:
        """None: its encoder spells nothing."""

    def prompt(self, speech: EncodedAudio | None, context: Sequence[int] = ()) -> list[int]:
        """Start of transcript, language, task, no timestamps; `context` as the text before, of
        which the last counts where it is too long."""
        before = [self._before, *context[-self._most_context :]] if context else []
        if not self.multilingual:
            return [*before, self.start, self._untimed]
        language = self.language or (speech.language if speech is not None else None) or "en"
        return [*before, self.start, self.languages[language], self._task, self._untimed]


class Whisper(nn.Module):
    """A checkpoint: waves to encoder states, and the decoder as `SpeechDecoder` wants it."""

    def __init__(self, model, extractor, vocabulary: WhisperVocabulary) -> None:  # noqa: ANN001
        """`model` is transformers' WhisperForConditionalGeneration, `extractor` its features'."""
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.vocabulary = vocabulary
        self._extractor = extractor
        self._encoder, self._decoder = model.model.encoder, model.model.decoder
        shape = model.config
        self.width: int = shape.d_model
        self.heads: int = shape.decoder_attention_heads
        self.window_seconds: float = extractor.n_samples / SAMPLE_RATE
        """Longest clip that is heard at once."""
        self.frame_seconds = self.window_seconds / shape.max_source_positions
        self.longest: int = shape.max_target_positions
        """Tokens of prompt and transcript together."""
        self._shape = LanguageModel(
            width=self.width,
            layers=shape.decoder_layers,
            heads=self.heads,
            kv_heads=self.heads,
            feed_forward=shape.decoder_ffn_dim,
            tied=True,
        )

    @classmethod
    def load(cls, directory: Path, language: str | None = None, device: str = "cpu") -> Whisper:
        """Read a checkpoint's directory; WhisperError if it is damaged or lacks something."""
        from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration
        from transformers.utils import logging

        logging.disable_progress_bar()
        directory = locate(str(directory))
        try:
            model = WhisperForConditionalGeneration.from_pretrained(
                directory, local_files_only=True, use_safetensors=True
            )
            extractor = WhisperFeatureExtractor.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise _unreadable(directory, error) from None
        vocabulary = WhisperVocabulary.load(directory, language)
        return cls(model.to(device), extractor, vocabulary)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._decoder.embed_tokens.weight.device

    @torch.inference_mode()
    def encode(self, waves: Sequence[Tensor]) -> list[EncodedAudio]:
        """Waves (T,) at 16 kHz of at most `window_seconds` to encoder states.

        Raises ValueError for a longer one.
        """
        if not waves:
            return []
        lengths = [len(wave) / SAMPLE_RATE for wave in waves]
        if max(lengths) > self.window_seconds + 1e-6:
            raise ValueError(
                f"{max(lengths):.1f} s of audio in one window of {self.window_seconds:g} s"
            )
        features = self._extractor(
            [wave.cpu().numpy() for wave in waves], sampling_rate=SAMPLE_RATE, return_tensors="pt"
        ).input_features
        weight = self._encoder.conv1.weight
        states = self._encoder(features.to(weight)).last_hidden_state
        languages = self._languages(states)
        return [
            EncodedAudio(own.clone(), seconds, self.frame_seconds, language)  # travels alone
            for own, seconds, language in zip(states, lengths, languages, strict=True)
        ]

    def pool(self, tokens: int, growing: bool = False) -> PagePool:
        """Pages for `tokens` of this model, all rows together; speech is kept beside them."""
        shape, weight = self._shape, self._decoder.embed_tokens.weight
        width = self.width // self.heads
        return PagePool(shape.layers, self.heads, width, tokens, weight, growing)

    def cache(
        self,
        speech: Sequence[EncodedAudio | None],
        capacity: int,
        pool: PagePool | None = None,
    ) -> WhisperCache:
        """An empty cache of a row a clip, its speech projected once; None for no speech. Without a
        pool it gets its own, which grows."""
        weight = self._decoder.embed_tokens.weight
        frames = max((len(one.states) for one in speech if one is not None), default=0)
        states = weight.new_zeros(len(speech), frames, self.width)
        heard = torch.zeros(len(speech), frames, dtype=torch.bool, device=weight.device)
        for row, one in enumerate(speech):
            if one is not None:
                states[row, : len(one.states)] = one.states.to(weight)
                heard[row, : len(one.states)] = True
        projected = [
            tuple(
                self._split(project(states))
                for project in (layer.encoder_attn.k_proj, layer.encoder_attn.v_proj)
            )
            for layer in self._decoder.layers
        ]
        keys, values = (torch.stack(one) for one in zip(*projected, strict=True))
        rows = len(speech)
        own = PagedCache(pool or self.pool(rows * capacity, growing=True), rows, capacity)
        return WhisperCache(own, keys, values, heard, np.arange(rows))

    def forward(
        self,
        ids: Tensor,
        cache: WhisperCache,
        lengths: Tensor | None = None,
        at: Tensor | None = None,
    ) -> LMOutput:
        """Read `ids` (B, T) where each row stands, padded on the right as `lengths` (B,) says."""
        x = self._run(ids, cache, lengths)
        hidden = self._decoder.layer_norm(x)
        wanted = hidden.flatten(0, 1) if at is None else hidden[at]
        logits = self.model.proj_out(wanted).float()
        return LMOutput(logits, hidden, x, hidden)

    def _run(
        self,
        ids: Tensor,
        cache: WhisperCache,
        lengths: Tensor | None = None,
        looked: list[Tensor] | None = None,
    ) -> Tensor:
        """The last layer's output (B, T, D); `looked` gets each layer's attention to speech."""
        plan = cache.own.plan(ids.shape[1], lengths)
        known = self._decoder.embed_positions.weight
        # Padding may reach beyond the last position; nobody looks at what is read there.
        x = self._decoder.embed_tokens(ids) * self._decoder.embed_scale
        x = x + known[plan.positions.clamp(max=len(known) - 1)]
        for number, layer in enumerate(self._decoder.layers):
            read = layer.self_attn_layer_norm(x)
            x = x + self._attend(layer, read, cache.own.pool.layers[number], plan)
            asking = layer.encoder_attn_layer_norm(x)
            if looked is not None:
                looked.append(self._weights(layer, asking, cache.keys[number]))
            x = x + self._listen(layer, number, asking, cache)
            inner = layer.activation_fn(layer.fc1(layer.final_layer_norm(x)))
            x = x + layer.fc2(inner)
        return x

    def read(self, ids: Tensor, speech: Sequence[EncodedAudio | None], at: Tensor) -> LMOutput:
        """Whole transcripts, prompt included, each beside its speech."""
        return self(ids, self.cache(speech, ids.shape[1]), at=at)

    @torch.inference_mode()
    def speech_attention(
        self, speech: EncodedAudio, prompt: Sequence[int], tokens: Sequence[int]
    ) -> Tensor:
        """Where each choice of `tokens` (N) looks among the clip's frames (L H, N, T)."""
        ids = torch.tensor([[*prompt, *tokens[:-1]]], device=self.device)
        cache = self.cache([speech], ids.shape[1])
        looked: list[Tensor] = []
        self._run(ids, cache, looked=looked)
        weights = torch.cat(looked, 1)[0, :, -len(tokens) :, : speech.frames]
        return weights / weights.sum(-1, keepdim=True)

    def _weights(self, layer: nn.Module, x: Tensor, keys: Tensor) -> Tensor:
        """Cross-attention weights (B, H, T, F) float32 of the normalised input x (B, T, D)."""
        queries = self._split(layer.encoder_attn.q_proj(x))
        scores = queries @ keys.transpose(2, 3) / queries.shape[-1] ** 0.5
        return scores.float().softmax(-1)

    def _attend(
        self, layer: nn.Module, x: Tensor, pages: tuple[Tensor, Tensor], plan: ReadPlan
    ) -> Tensor:
        """Self-attention over what each row has read."""
        attention = layer.self_attn
        queries, keys, values = (
            self._split(project(x))
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        mixed = attend_causally(queries, keys, values, pages, plan)
        return attention.out_proj(mixed.transpose(1, 2).flatten(2))

    def _listen(self, layer: nn.Module, number: int, x: Tensor, cache: WhisperCache) -> Tensor:
        """Attention to the speech, of all rows of a clip at once; a row without any gets nothing
        from it."""
        attention = layer.encoder_attn
        if not cache.heard.shape[1]:
            return attention.out_proj(torch.zeros_like(x))
        clips, heard = cache.clips, cache.heard
        rows, time = len(x), x.shape[1]
        beams = int(np.bincount(clips).max())
        first = np.searchsorted(clips, np.arange(len(heard)))
        inside = torch.from_numpy(clips * beams + np.arange(rows) - first[clips]).to(x.device)
        queries = self._split(attention.q_proj(x))  # (B, H, T, width)
        asked = queries.new_zeros(len(heard) * beams, *queries.shape[1:])
        asked = asked.index_copy(0, inside, queries).unflatten(0, (-1, beams))
        asked = asked.transpose(1, 2).flatten(2, 3)  # (C, H, beams x T, width)
        spoken = heard.any(1)
        mask = (heard | ~spoken[:, None])[:, None, None, :]
        mixed = functional.scaled_dot_product_attention(
            asked, cache.keys[number], cache.values[number], attn_mask=mask
        )
        mixed = (mixed * spoken[:, None, None, None]).unflatten(2, (beams, time))
        mixed = mixed.transpose(1, 2).flatten(0, 1)[inside]
        return attention.out_proj(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, H, T, width)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _languages(self, states: Tensor) -> list[str | None]:
        """What is spoken in each clip: the likeliest language token after the start."""
        vocabulary = self.vocabulary
        if not vocabulary.multilingual or vocabulary.language:
            return [vocabulary.language] * len(states)
        clips = [EncodedAudio(own, 0.0, self.frame_seconds) for own in states]
        ids = torch.full((len(clips), 1), vocabulary.start, device=self.device)
        logits = self(ids, self.cache(clips, 1)).logits
        names, numbers = zip(*sorted(vocabulary.languages.items()), strict=True)
        return [names[best] for best in logits[:, list(numbers)].argmax(1).tolist()]


def _unreadable(directory: Path, error: Exception) -> WhisperError:
    """What is said of a checkpoint that transformers gives up."""
    message = " ".join(str(error).split())
    return WhisperError(f"{directory} cannot be read as a Whisper: {message}")


def _download(name: str) -> Path:
    """A hub's checkpoint on this machine; WhisperError where it cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "merges.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except HFValidationError:
        raise WhisperError(f"no such directory: {name}") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise WhisperError(
            f"{name} is no directory here, and the hub does not give it ({reason}). "
            f"Fetch it where there is a network and name its directory: {PREFIX}DIRECTORY"
        ) from None
