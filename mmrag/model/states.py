"""Hidden states of whole transcripts: the keys of a datastore and the queries that meet them.

Knows ids; neither audio nor what the states are kept for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmrag.model.contract import Speech, SpeechDecoder, TextVocabulary

AT_ONCE = 2048
"""Tokens whose surprisals are asked for at once."""
PADDING = 0
"""An id that every vocabulary has; what it says is never looked at."""


@torch.inference_mode()
def read_states(
    lm: SpeechDecoder,
    vocabulary: TextVocabulary,
    texts: Sequence[Sequence[int]],
    speech: Sequence[Speech | None],
    *,
    logits: bool,
) -> tuple[Tensor, np.ndarray, list[slice], Tensor]:
    """Read whole transcripts at once: the state before each token of `[text, end]`.

    Returns the keys (N, D) float32, the tokens that follow them (N,), each clip's slice of the N,
    and the next-token log-probabilities (N, V) over transcript ids, (0, V) unless asked for.
    """
    device = lm.device
    prompts = [vocabulary.prompt(units) for units in speech]
    ids, _ = pad_ids([[*p, *text] for p, text in zip(prompts, texts, strict=True)], device)
    at = torch.zeros_like(ids, dtype=torch.bool)
    slices, start = [], 0
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        at[row, len(prompt) - 1 : len(prompt) + len(text)] = True
        slices.append(slice(start, start := start + len(text) + 1))
    output = lm.read(ids, speech, at if logits else torch.zeros_like(at))
    allowed = torch.from_numpy(vocabulary.transcript_ids()).to(device)
    logp = output.logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)
    tokens = np.array([token for text in texts for token in (*text, vocabulary.eos)], np.int32)
    return output.keys[at].float(), tokens, slices, logp


def surprisals(
    lm: SpeechDecoder, vocabulary: TextVocabulary, texts: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """How little a model expects each token of `[text, end]` from the text before it, with no
    speech: (T + 1,) float32 a text, nats."""
    found: list[np.ndarray] = []
    each = max(1, AT_ONCE // (1 + max(map(len, texts), default=0)))
    for start in range(0, len(texts), each):
        some = texts[start : start + each]
        _, tokens, slices, logp = read_states(lm, vocabulary, some, [None] * len(some), logits=True)
        costs = -logp.float().cpu().numpy()[np.arange(len(tokens)), tokens]
        found += [costs[part] for part in slices]
    return found


def pad_ids(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids padded on the right (B, T), and their lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), PADDING)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    return ids.to(device), lengths.to(device)
