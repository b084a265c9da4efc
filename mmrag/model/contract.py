"""What decoding and retrieval ask of a model that writes text about speech, whatever its family.

mmrag's own language model reads speech as ids in its prompt (`lm`, `vocabulary`); Whisper attends
to what its encoder made of it (`whisper`). The engine, the batch and the datastore ask for nothing
beyond these protocols.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mmrag.model.lm import LMOutput
from mmrag.model.pages import PagePool
from mmrag.records import Letters

Speech = Any
"""A clip as `TextVocabulary.speech_input` gives it: only the model looks inside."""


class DecoderCache(Protocol):
    """What a model keeps of B rows between two steps."""

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens read."""
        ...

    def select(self, rows: Tensor | Sequence[int]) -> DecoderCache:
        """The cache of `rows` (R,), which may repeat; this one's rows end here."""
        ...

    def join(self, other: DecoderCache) -> DecoderCache:
        """The rows of both, which are of one pool and end here."""
        ...

    def release(self) -> None:
        """All rows end: what they took is free."""
        ...


class SpeechDecoder(Protocol):
    """Ids to hidden states and next-token logits, a step at a time or a transcript at once."""

    width: int
    """D of a key."""

    @property
    def device(self) -> torch.device: ...

    def pool(self, tokens: int, growing: bool = False) -> PagePool:
        """Room for `tokens` of all rows together, for as many caches as share it."""
        ...

    def cache(
        self, speech: Sequence[Speech | None], capacity: int, pool: PagePool | None = None
    ) -> DecoderCache:
        """An empty cache of a row a clip, of at most `capacity` tokens each; None for no speech."""
        ...

    def __call__(
        self,
        ids: Tensor,
        cache: DecoderCache | None = None,
        lengths: Tensor | None = None,
        at: Tensor | None = None,
    ) -> LMOutput:
        """Read `ids` (B, T) where each row stands, as `LM.forward` says."""
        ...

    def read(self, ids: Tensor, speech: Sequence[Speech | None], at: Tensor) -> LMOutput:
        """Read whole transcripts, prompt included: `ids` (B, T), logits at `at` (B, T)."""
        ...

    def speech_attention(
        self, speech: Speech, prompt: Sequence[int], tokens: Sequence[int]
    ) -> Tensor:
        """Where the positions that choose `tokens` (N) look: (heads, N, T) over the clip's T."""
        ...


class TextVocabulary(Protocol):
    """Text to ids and back."""

    size: int
    eos: int
    """The id that ends a transcript."""
    written: Sequence[str]
    """What each id writes behind a letter of the same text (V,), "" where that is nothing; only
    asked of a vocabulary whose clips have `letters`."""

    def spoken(self, text: str) -> str:
        """A text as a synthesizer is to say it and the model is to write it."""
        ...

    def refusal(self, text: str) -> str | None:
        """Why a text cannot be listened for; None if it can."""
        ...

    def unspeakable(self, text: str) -> list[str]:
        """Letters of a text that no piece writes."""
        ...

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def spellings(self, phrase: str) -> list[list[int]]: ...
    def find(self, phrase: str, text: Sequence[int]) -> slice | None: ...
    def word_starts(self) -> np.ndarray: ...
    def word_ends(self, ids: Sequence[int]) -> list[tuple[str, int]]: ...

    def transcript_ids(self) -> np.ndarray:
        """Ids that may stand in a transcript, the end among them: (V,) bool."""
        ...

    def first_ids(self) -> np.ndarray:
        """Those that may begin one: (V,) bool."""
        ...

    def speech_input(self, encoded: Any) -> Speech:
        """An encoded clip as the model takes it."""
        ...

    def letters(self, speech: Speech) -> Letters | None:
        """What a CTC head hears in a clip; None where there was none."""
        ...

    def prompt(self, speech: Speech | None, context: Sequence[int] = ()) -> list[int]:
        """The ids before a transcript; None for text that nobody spoke."""
        ...
