"""When each word was said: where the language model looked while it wrote it, made one way.

A finished transcript is read once more beside its speech. The position that chooses a token looks
at the units that speak of it, in some heads more than in others, and mostly where the token is
over, since only then is it known. Dynamic programming divides the units among the tokens, in
order, so that each gets what was looked at and about the time that its letters need. (Word times
from attention are openai/whisper's idea, `timing.py`.)

This module knows neither the decoder nor the encoder: units are ids with a start and an end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mmrag.model.lm import LM
from mmrag.model.vocabulary import Vocabulary
from mmrag.speech.audio import SAMPLE_RATE

PEAKED = 4
"""Power by which a head counts more the more it looks at one unit at a time."""
BLUR_SECONDS = 0.05
"""A look at one unit is a look at what lies around it, by a Gaussian of this deviation."""
FLOOR = 1e-3
"""Share of attention that nobody needs to have got: what a token did not look at may be its."""
PACE = 6.0
"""Weight of (log(length / expected length))² beside the log-shares of the units."""

FRAME = SAMPLE_RATE // 50
"""Samples whose loudness is measured at a time: 20 ms."""
QUIET_DECIBELS = 25.0
"""A frame this far below the loud ones (the 95th percentile) is quiet."""
PAUSE_FRAMES = 8
"""Quiet frames in a row that make a pause: 160 ms; stops inside words are shorter."""


@torch.inference_mode()
def align(
    lm: LM,
    vocabulary: Vocabulary,
    speech: Sequence[int],
    seconds: np.ndarray,
    tokens: Sequence[int],
    audible: np.ndarray | None = None,
) -> np.ndarray:
    """Start and end (W, 2) float64, in seconds, of the words that `vocabulary.word_ends` finds.

    `speech` are a clip's units (T vocabulary ids), `seconds` (T, 2) when each is said, `tokens` a
    transcript without its end token. Units that are not `audible` (T,) are no word's, unless none
    is. Starts and ends never fall, and no word starts before the last one has ended. Without a
    unit, all times are 0. Raises ValueError if T differs.
    """
    seconds = np.asarray(seconds, np.float64)
    heard = np.ones(len(speech), bool) if audible is None else np.asarray(audible, bool)
    if seconds.shape != (len(speech), 2) or heard.shape != (len(speech),):
        raise ValueError(f"{len(speech)} units, times {seconds.shape}, audible {heard.shape}")
    word_ends = np.array([end for _, end in vocabulary.word_ends(tokens)], int)
    if not len(word_ends) or not len(speech):
        return np.zeros((len(word_ends), 2))
    if not heard.any():
        heard = np.ones(len(speech), bool)
    shares = attention(lm, vocabulary, speech, tokens, heard)
    shares, seconds = _cut(shares, seconds[heard])
    scores = np.log(_blur(shares, seconds) + FLOOR)
    letters = [len(vocabulary.decode([token]).replace(" ", "")) for token in tokens]
    bounds = divide(scores, seconds[:, 1] - seconds[:, 0], np.maximum(letters, 0.5))
    starts, ends = seconds[bounds[:-1], 0], seconds[bounds[1:] - 1, 1]
    first = np.concatenate([[0], word_ends[:-1]])
    starts = np.append(starts, ends[-1])[first]
    # A word within another word's token has no token of its own, and no time.
    return np.stack([starts, np.where(word_ends > first, ends[word_ends - 1], starts)], axis=1)


def attention(
    lm: LM,
    vocabulary: Vocabulary,
    speech: Sequence[int],
    tokens: Sequence[int],
    heard: np.ndarray,
) -> np.ndarray:
    """Where the language model looks as it chooses each token: (N, K) float64, rows sum to 1.

    The K units are those that are `heard` (T,) bool. Heads of all layers are added up, weighted
    by how much more of their attention a token gives to one unit than other tokens do, to the
    power of PEAKED: most heads look at text, nowhere in particular, or always at the same place.
    """
    looks = lm.speech_attention(speech, vocabulary.prompt(speech), tokens)
    looks = looks[..., torch.from_numpy(heard).to(looks.device)]
    weights = (looks - looks.mean(1, keepdim=True)).amax(-1).mean(-1) ** PEAKED
    shares = torch.einsum("h,hnk->nk", weights, looks).double().cpu().numpy() + 1e-30
    return shares / shares.sum(axis=1, keepdims=True)


def divide(scores: np.ndarray, lengths: np.ndarray, letters: np.ndarray) -> np.ndarray:
    """The best way to deal K units out to N tokens in order, at least one each.

    `scores` (N, K) of a unit as a token's, `lengths` (K,) of the units, `letters` (N,) that the
    tokens' lengths are expected to be proportional to. Returns (N + 1,) bounds: token n has the
    units from bounds[n] to bounds[n + 1]. The best way has the largest sum of scores, less PACE
    times each token's squared log-ratio of its length to the expected one. Needs K >= N >= 1.
    """
    tokens, units = scores.shape
    before = np.concatenate([np.zeros((tokens, 1)), np.cumsum(scores, axis=1)], axis=1)
    times = np.concatenate([[0.0], np.cumsum(lengths)])
    expected = np.log(letters / letters.sum() * times[-1])
    # Up to each bound (row) from each earlier one (column); from itself or on is infinitely long.
    earlier = np.tri(units + 1, k=-1, dtype=bool)
    length = np.log(times[:, None] - times, where=earlier, out=np.full(earlier.shape, np.inf))
    best = np.where(np.arange(units + 1) == 0, 0.0, -np.inf)
    came_from = []
    for token in range(tokens):
        ways = best - before[token] - PACE * (length - expected[token]) ** 2
        came_from.append(ways.argmax(axis=1))
        best = ways.max(axis=1) + before[token]
    bounds = [units]
    for came in reversed(came_from):
        bounds.append(int(came[bounds[-1]]))
    return np.array(bounds[::-1])


def audible(wave: Tensor, seconds: np.ndarray) -> np.ndarray:
    """Which units (T,) bool are not in a pause, by the loudness of a wave (samples,) at 16 kHz.

    A unit is in a pause if more than half of its time, `seconds` (T, 2), is. In loud noise there
    are no pauses.
    """
    frames = functional.pad(wave.float().cpu(), (0, -len(wave) % FRAME)).view(-1, FRAME)
    if not len(frames):
        return np.ones(len(seconds), bool)
    decibels = 10 * np.log10(frames.square().mean(1).numpy() + 1e-10)
    quiet = decibels < np.percentile(decibels, 95) - QUIET_DECIBELS
    changes = np.flatnonzero(np.diff(quiet, prepend=False, append=False)).reshape(-1, 2)
    paused = np.zeros(len(quiet))
    for start, end in changes:
        if end - start >= PAUSE_FRAMES:
            paused[start:end] = 1
    edges = np.arange(len(quiet) + 1) * FRAME / SAMPLE_RATE
    until = np.interp(seconds, edges, np.concatenate([[0], np.cumsum(paused)]) * edges[1])
    return until[:, 1] - until[:, 0] <= (seconds[:, 1] - seconds[:, 0]) / 2


def _cut(shares: np.ndarray, seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares (N, K) and times (K, 2) of units, cut into equal parts where N tokens are more."""
    tokens, units = shares.shape
    parts = -(-tokens // units)
    steps = np.linspace(seconds[:, 0], seconds[:, 1], parts + 1, axis=1)
    cut = np.stack([steps[:, :-1], steps[:, 1:]], axis=2).reshape(-1, 2)
    return np.repeat(shares / parts, parts, axis=1), cut


def _blur(shares: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Each unit's shares (N, K) spread over the units around it, by how long those are."""
    middles, lengths = seconds.mean(axis=1), seconds[:, 1] - seconds[:, 0]
    near = np.exp(-(((middles - middles[:, None]) / BLUR_SECONDS) ** 2) / 2) * lengths
    return shares @ (near / near.sum(axis=1, keepdims=True))
