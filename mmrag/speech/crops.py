"""What one step of pretraining works on: random crops of random clips, and which frames are hidden.

Knows clips and their classes; what is computed of them is none of its business."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmrag.config import Pretrain
from mmrag.speech.audio import SAMPLE_RATE
from mmrag.speech.hubert import HubertEncoder
from mmrag.speech.targets import Phones, Targets

PADDING = 0.15
"""How much shorter than the longest of a group a crop may be that is computed with it."""
MISSES = 100
"""Draws of clips that are of no use, for each clip there is, after which there is none of use."""


def mask_spans(
    frames: Tensor, probability: float, length: int, generator: torch.Generator
) -> Tensor:
    """Frames to hide: bool (B, F) for clips of `frames` (B,), F being the longest.

    Each frame starts a span of `length` with `probability`, one more starts somewhere in each
    clip, spans may overlap, and a clip's end cuts them off.
    """
    clips, longest = len(frames), int(frames.max())
    starts = torch.rand(clips, longest, generator=generator) < probability
    sure = torch.rand(clips, generator=generator) * frames
    starts[torch.arange(clips), sure.long()] = True
    spans = F.pad(starts, (length - 1, 0)).unfold(1, length, 1).any(-1)
    return spans & (torch.arange(longest) < frames[:, None])


def mask_bands(
    clips: int, bands: int, masks: int, width: int, generator: torch.Generator
) -> Tensor:
    """Bands to hide: bool (clips, bands), `masks` runs of at most `width` that may overlap."""
    widths = torch.randint(width + 1, (clips, masks, 1), generator=generator)
    starts = torch.rand(clips, masks, 1, generator=generator) * (bands - widths + 1)
    band = torch.arange(bands)
    return ((band >= starts.long()) & (band < starts.long() + widths)).any(1)


Reject = Callable[[int, str], None]
"""Told the number of a clip that cannot be used, and why."""


def rejected(reject: Reject | None, clip: int, error: ValueError) -> None:
    """Tell `reject` of a clip that cannot be used; raise `error` where nobody wants to know."""
    if reject is None:
        raise error
    reject(clip, str(error))


Recorder = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""A waveform (T,) float32 as it sounds where it is recorded anew, as long as it was."""


class Batch(NamedTuple):
    """Crops for one step: what `MaskedPrediction.forward` takes, and the clips they are from."""

    waves: Tensor
    lengths: Tensor
    targets: Tensor
    mask: Tensor
    clips: list[int]
    sequences: list[Tensor | None]
    """Of each clip whose phones are known and not when they are said."""
    bands: Tensor | None = None
    """Log-mel bands that are hidden, (B, M) bool."""
    warps: Tensor | None = None
    """What the places of a crop's bands are multiplied by, (B,)."""

    def groups(self, frames: Callable[[int], int]) -> Iterator[Batch]:
        """Its crops, those of like length together: little is computed for padding. `frames` says
        how many a clip of so many samples has."""
        order = self.lengths.argsort(descending=True).tolist()
        while order:
            longest = int(self.lengths[order[0]])
            rows = [row for row in order if self.lengths[row] >= (1 - PADDING) * longest]
            order = order[len(rows) :]
            yield Batch(
                self.waves[rows, :longest],
                self.lengths[rows],
                self.targets[rows, : frames(longest)],
                self.mask[rows, : frames(longest)],
                [self.clips[row] for row in rows],
                [self.sequences[row] for row in rows],
                None if self.bands is None else self.bands[rows],
                None if self.warps is None else self.warps[rows],
            )


def draw(
    encoder: HubertEncoder,
    waves: Sequence[Tensor],
    targets: Targets | Phones,
    settings: Pretrain,
    generator: torch.Generator,
    left_out: Collection[int] = (),
    reject: Reject | None = None,
    unaligned: bool = True,
    chances: Tensor | None = None,
    record: Recorder | None = None,
) -> Batch:
    """Random crops of random clips, `batch_seconds` in all, and masks over their frames and bands.

    A clip that is left out is passed over where it is drawn, and so is one that is not aligned,
    unless `unaligned`: such a one is whole. `chances` (N,) has those of each clip, all alike
    without. `record` makes the share `settings.rough` of the crops sound otherwise. A clip that
    cannot be read, or holds no frame, is told to `reject` and passed over. ValueError where none
    is left.
    """
    longest = round(settings.crop_seconds * SAMPLE_RATE)
    missing, missed = settings.batch_seconds * SAMPLE_RATE, 0
    crops, labels, clips, sequences = [], [], [], []
    while missing > 0:
        clip = _one_of(len(waves), chances, generator)
        sequence = targets.sequence(clip) if isinstance(targets, Phones) else None
        if clip in left_out or (sequence is not None and not unaligned):
            missed += 1
            if missed > MISSES * len(waves):
                raise ValueError("no clip is left to draw")
            continue
        try:
            wave = encoder.prepare(waves[clip])
        except ValueError as error:
            rejected(reject, clip, error)
            continue
        clips.append(clip)
        sequences.append(sequence)
        most = longest if sequence is None else len(wave)
        spare = max(0, encoder.frames(len(wave)) - encoder.frames(most))
        first = _below(spare + 1, generator)
        crop = wave[first * encoder.hop :][:most]
        if record and sequence is None and _happens(settings.rough, generator):
            elsewhere = np.random.default_rng(_below(2**62, generator))
            crop = encoder.prepare(torch.from_numpy(record(crop.cpu().numpy(), elsewhere)))
        crops.append(crop)
        label = targets[clip][first:][: encoder.frames(len(crop))]
        labels.append(F.pad(label, (0, encoder.frames(len(crop)) - len(label))))
        missing -= len(crop)
    frames = torch.tensor([len(label) for label in labels])
    mask = mask_spans(frames, settings.mask_probability, settings.mask_length, generator)
    masks, width = settings.band_masks, min(settings.band_width, encoder.bands)
    warp = settings.band_warp
    return Batch(
        waves=pad_sequence(crops, batch_first=True),
        lengths=torch.tensor([len(crop) for crop in crops]),
        targets=pad_sequence(labels, batch_first=True),
        mask=mask,
        clips=clips,
        sequences=sequences,
        bands=mask_bands(len(crops), encoder.bands, masks, width, generator) if masks else None,
        warps=1 + warp * (2 * torch.rand(len(crops), generator=generator) - 1) if warp else None,
    )


def balanced(speakers: Sequence[str], balance: float) -> Tensor:
    """The chance of each clip (N,) float64, where a speaker's are as the number of his clips to the
    power of `balance`."""
    counts = Counter(speakers)
    chances = torch.tensor([counts[one] ** (balance - 1) for one in speakers], dtype=torch.float64)
    return chances / chances.sum()


def _one_of(count: int, chances: Tensor | None, generator: torch.Generator) -> int:
    if chances is None:
        return _below(count, generator)
    return int(torch.multinomial(chances, 1, generator=generator))


def _happens(chance: float, generator: torch.Generator) -> bool:
    return chance > 0 and float(torch.rand(1, generator=generator)) < chance


def _below(bound: int, generator: torch.Generator) -> int:
    return int(torch.randint(bound, (1,), generator=generator))
