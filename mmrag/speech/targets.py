"""What masked prediction guesses: a class for each frame of each clip."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor
from torchaudio.compliance import kaldi

from mmrag.records import Timed
from mmrag.speech.audio import SAMPLE_RATE
from mmrag.speech.hubert import CONVOLUTIONS, window

FIELD, HOP = window(CONVOLUTIONS)
LEAST_PRIOR = 0.005
"""Of a class that is hardly guessed at all."""
LOUD_SILENCE = 5.0
"""Nats by which silence is less likely where it is loud."""


def mfcc(wave: Tensor, field: int = FIELD, hop: int = HOP) -> Tensor:
    """MFCCs with first and second differences, (T,) -> (F, 39), one row a HuBERT frame.

    Kaldi's recipe over just the `field` samples that a frame sees, `hop` samples after those of the
    one before. Raises ValueError if there is no whole frame.
    """
    if len(wave) < field:
        raise ValueError(f"a clip is at least {field} samples long, not {len(wave)}")
    coefficients = kaldi.mfcc(
        wave.cpu()[None],
        sample_frequency=SAMPLE_RATE,
        frame_length=field / SAMPLE_RATE * 1000,
        frame_shift=hop / SAMPLE_RATE * 1000,
        use_energy=False,
    ).T
    deltas = torchaudio.functional.compute_deltas(coefficients)
    accelerations = torchaudio.functional.compute_deltas(deltas)
    return torch.cat([coefficients, deltas, accelerations]).T


class Targets:
    """The class of each frame of each clip: the nearest centroid to its features.

    A clip is labelled when it is first drawn, on its own, and remembered: labels do not depend
    on the order of drawing, and clips that are never drawn cost nothing.
    """

    def __init__(
        self, waves: Sequence[Tensor], describe: Callable[[Tensor], Tensor], centroids: Tensor
    ) -> None:
        self._waves = waves
        self._describe = describe
        self._centroids = centroids
        self._labels: dict[int, Tensor] = {}

    def __getitem__(self, clip: int) -> Tensor:
        """Classes (F,) int64 of clip number `clip`."""
        if clip not in self._labels:
            features = self._describe(self._waves[clip])
            centroids = self._centroids.to(features)
            nearness = features @ centroids.T - centroids.square().sum(1) / 2
            self._labels[clip] = nearness.argmax(1).to("cpu", torch.int32)
        return self._labels[clip].long()


class Phones:
    """The class of each frame of each clip: the phone that is said at the frame's middle.

    Supervision-guided targets (arXiv 2206.10125). Class 0 is silence, and whatever else the
    alignment leaves open. Of a clip that nobody aligned the phones in their order are known, and
    where there may be silence: `align` says when.
    """

    def __init__(
        self,
        aligned: Sequence[Sequence[Timed]],
        unaligned: Mapping[int, Sequence[str]] | None = None,
    ) -> None:
        """`aligned` holds the phones of each clip, in order; `unaligned` those of some clips, by
        number, as they follow each other, with "" where words meet."""
        unaligned = unaligned or {}
        self.names = sorted(
            {phone.text for clip in aligned for phone in clip}.union(*unaligned.values()) - {""}
        )
        self.classes = len(self.names) + 1
        self._aligned = aligned
        self._number = {name: number for number, name in enumerate(self.names, start=1)}
        self._sequences = {clip: self.numbered(names) for clip, names in unaligned.items()}
        self._field, self._hop = FIELD, HOP

    def framed(self, field: int, hop: int) -> Phones:
        """The same for frames of `field` samples, each `hop` after the one before."""
        framed = copy(self)
        framed._field, framed._hop = field, hop
        return framed

    def __getitem__(self, clip: int) -> Tensor:
        """Classes (F,) int64 of clip number `clip`, as far as its last phone."""
        phones = self._aligned[clip]
        count = max(0, round(phones[-1].end * SAMPLE_RATE) // self._hop + 1) if phones else 0
        classes = torch.zeros(count, dtype=torch.long)
        for phone in phones:
            first, last = (self._frame(time) for time in (phone.start, phone.end))
            classes[first:last] = self._number[phone.text]
        return classes

    def sequence(self, clip: int) -> Tensor | None:
        """Classes (N,) int64 of a clip that is not aligned, 0 where words meet; None for one that
        is."""
        return self._sequences.get(clip)

    def numbered(self, names: Iterable[str]) -> Tensor:
        """Phones as classes (N,) int64; "" is 0."""
        return torch.tensor([self._number[name] if name else 0 for name in names], dtype=torch.long)

    def _frame(self, seconds: float) -> int:
        """The first frame whose middle is not before a time."""
        return max(0, math.ceil((seconds * SAMPLE_RATE - self._field / 2) / self._hop))


def loud(wave: Tensor, field: int, hop: int) -> Tensor:
    """Which frames (F,) of a wave (T,) are nearer to its loudest, in decibels, than to its softest:
    there somebody speaks, whatever the noise."""
    decibels = 10 * torch.log10(wave.unfold(0, field, hop).square().mean(1) + 1e-10)
    return decibels > (decibels.quantile(0.95) + decibels.quantile(0.05)) / 2


class LetterSequences:
    """What a CTC head is to spell of each clip that somebody wrote down."""

    def __init__(self, texts: Sequence[str | None], alphabet: str) -> None:
        """`texts` as they are transcribed; a letter that `alphabet` lacks is left out."""
        self.alphabet = alphabet
        self._texts = texts
        self._number = {letter: number for number, letter in enumerate(alphabet, start=1)}

    def __getitem__(self, clip: int) -> Tensor | None:
        """The letters (N,) int64 of clip number `clip`, from 1; None where it has no text."""
        text = self._texts[clip]
        if text is None:
            return None
        known = (self._number.get(letter) for letter in text)
        return torch.tensor([number for number in known if number], dtype=torch.long)


def evidence(guesses: Tensor, loud: Tensor) -> Tensor:
    """What log-probabilities (F, C) of a clip say for each class, to align by.

    They are divided by their own mean over the clip, as a hybrid recogniser divides by its priors,
    and silence is less likely by LOUD_SILENCE nats in `loud` frames (F,). Otherwise what is guessed
    often is guessed ever oftener: between words any frame may be silent, and in the end all are.
    """
    weighed = guesses - guesses.exp().mean(0).clamp(min=LEAST_PRIOR).log()
    weighed[loud, 0] -= LOUD_SILENCE
    return weighed


def align(guesses: Tensor, sequence: Tensor) -> Tensor | None:
    """The likeliest class of each frame, (F,) int64, if the classes of `sequence` (N,) are said in
    their order, each for a frame or more; None if there are fewer frames than that.

    `guesses` (F, C) are log-probabilities, or `evidence`. Silence, class 0, may last for no frame
    at all, and may stand before and after the sequence.
    """
    classes = F.pad(sequence, (1, 1)).numpy()
    classes = classes[np.append(True, (classes[1:] != 0) | (classes[:-1] != 0))]
    optional = classes == 0
    scores = guesses.numpy()[:, classes]
    frames, states = scores.shape
    if frames < states - optional.sum():
        return None
    skips = np.append(np.zeros(2, bool), optional[1:-1])[:states]
    """States that may follow the one before the last, which is optional."""
    best = np.full(states, -np.inf)
    best[0] = scores[0, 0]
    best[1:2] = scores[0, 1:2]
    came = np.zeros((frames, states), np.int64)
    for frame in range(1, frames):
        from_before = np.append(-np.inf, best[:-1])
        from_skip = np.where(skips, np.append([-np.inf, -np.inf], best[:-2])[:states], -np.inf)
        ways = np.stack([best, from_before, from_skip])
        came[frame] = ways.argmax(0)
        best = ways.max(0) + scores[frame]
    state = states - 1 if states < 2 or best[-1] >= best[-2] else states - 2
    path = np.empty(frames, np.int64)
    for frame in range(frames - 1, -1, -1):
        path[frame] = classes[state]
        state -= came[frame, state]
    return torch.from_numpy(path)
