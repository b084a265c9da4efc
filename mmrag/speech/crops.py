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
from mmrag.speech.targets import LetterSequences, Phones, Targets

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
    letters: Sequence[Tensor | None] = ()
    """What is spelled in each crop, (N,); None in one that is not a whole clip. Nothing where
    nobody spells."""
    dealt: Sequence[Sequence[int]] = ()
    """The clips of every process's crops, where several share the step; it holds those of one."""

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
                [self.letters[row] for row in rows] if self.letters else (),
            )

    def shares(self, frames: Callable[[int], int], count: int) -> list[list[Batch]]:
        """Its groups, dealt to at most `count`, so that each has about as many frames."""
        shares: list[list[Batch]] = [[] for _ in range(count)]
        held = [0] * count
        for group in sorted(self.groups(frames), key=lambda group: -group.targets.numel()):
            least = min(range(count), key=held.__getitem__)
            shares[least].append(group)
            held[least] += group.targets.numel()
        return [share for share in shares if share]

    def suspects(self, losses: Tensor) -> list[int]:
        """The clips of the processes whose `losses` (P,) are no numbers; of all, where those of all
        are or of none: then it is a gradient that is no number."""
        if not self.dealt:
            return self.clips
        each = zip(self.dealt, losses.isfinite().tolist(), strict=True)
        wrong = [clips for clips, finite in each if not finite]
        return [clip for clips in wrong or self.dealt for clip in clips]


class Share(NamedTuple):
    """One process of several that each compute some of a step's crops."""

    rank: int
    count: int
    samples: dict[int, int]
    """Clip -> its length, of those that were read: what another process is to hear is not read
    again. A process keeps its own from step to step."""


class _Crop(NamedTuple):
    """Where a crop is, before anything is computed of it."""

    clip: int
    sequence: Tensor | None
    first: int
    """Its first frame."""
    samples: int
    whole: bool
    """Whether it is all of its clip."""
    elsewhere: int | None
    """Seed by which it is recorded anew; None where it stays as it is."""
    wave: Tensor | None
    """Its clip, prepared; None where another process may need it."""


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
    share: Share | None = None,
    spelling: LetterSequences | None = None,
) -> Batch:
    """Random crops of random clips, `batch_seconds` in all, and masks over their frames and bands.

    A clip that is left out is passed over where it is drawn, and so is one that is not aligned,
    unless `unaligned`: such a one is whole. `spelling` has the letters of whole clips. `chances`
    (N,) has those of each clip, all alike without. `record` makes the share `settings.rough` of the
    crops sound otherwise. A clip that cannot be read, or holds no frame, is told to `reject` and
    passed over. ValueError where none
    is left.

    With a `share`, all its processes draw the same crops, and each computes its own, as many frames
    as the others within a crop. RuntimeError for a clip that was read before and cannot be again.
    """
    drawn = _crops(
        *(encoder, waves, targets, settings, generator, left_out, reject, unaligned, chances),
        recorded=record is not None,
        spelled=spelling is not None,
        share=share,
    )
    crops = list(drawn)
    frames = torch.tensor([encoder.frames(crop.samples) for crop in crops])
    mask = mask_spans(frames, settings.mask_probability, settings.mask_length, generator)
    masks, width = settings.band_masks, min(settings.band_width, encoder.bands)
    bands = mask_bands(len(crops), encoder.bands, masks, width, generator) if masks else None
    warp = settings.band_warp
    warps = 1 + warp * (2 * torch.rand(len(crops), generator=generator) - 1) if warp else None
    dealt = _deal(frames.tolist(), share.count) if share else [list(range(len(crops)))]
    rows = dealt[share.rank if share else 0]
    own = [crops[row] for row in rows]
    heard = [_cut(encoder, waves, crop, record) for crop in own]
    labels = [_labels(targets, crop, encoder.frames(crop.samples)) for crop in own]
    return Batch(
        waves=pad_sequence(heard, batch_first=True) if own else torch.zeros(0, 0),
        lengths=torch.tensor([crop.samples for crop in own], dtype=torch.long),
        targets=pad_sequence(labels, batch_first=True) if own else torch.zeros(0, 0).long(),
        mask=mask[rows],
        clips=[crop.clip for crop in own],
        sequences=[crop.sequence for crop in own],
        bands=None if bands is None else bands[rows],
        warps=None if warps is None else warps[rows],
        letters=[spelling[crop.clip] if crop.whole else None for crop in own]
        if spelling is not None
        else (),
        dealt=[[crops[row].clip for row in each] for each in dealt] if share else (),
    )


def _crops(
    encoder: HubertEncoder,
    waves: Sequence[Tensor],
    targets: Targets | Phones,
    settings: Pretrain,
    generator: torch.Generator,
    left_out: Collection[int],
    reject: Reject | None,
    unaligned: bool,
    chances: Tensor | None,
    recorded: bool,
    spelled: bool,
    share: Share | None,
) -> Iterator[_Crop]:
    """The crops of a step, in the order in which they are drawn."""
    longest = round(settings.crop_seconds * SAMPLE_RATE)
    missing, missed = settings.batch_seconds * SAMPLE_RATE, 0
    while missing > 0:
        clip = _one_of(len(waves), chances, generator)
        sequence = targets.sequence(clip) if isinstance(targets, Phones) else None
        if clip in left_out or (sequence is not None and not unaligned):
            missed += 1
            if missed > MISSES * len(waves):
                raise ValueError("no clip is left to draw")
            continue
        wave = None
        try:
            if share is None:
                wave = encoder.prepare(waves[clip])
                whole = len(wave)
            else:
                whole = _length(encoder, waves, clip, share.samples)
        except ValueError as error:
            rejected(reject, clip, error)
            continue
        most = longest if sequence is None else whole
        spare = max(0, encoder.frames(whole) - encoder.frames(most))
        first = _below(spare + 1, generator)
        samples = min(most, whole - first * encoder.hop)
        elsewhere = None
        plain = sequence is not None and not spelled  # guesses align what is clear
        if recorded and not plain and _happens(settings.rough, generator):
            elsewhere = _below(2**62, generator)
        yield _Crop(clip, sequence, first, samples, not spare, elsewhere, wave)
        missing -= samples


def _length(
    encoder: HubertEncoder, waves: Sequence[Tensor], clip: int, known: dict[int, int]
) -> int:
    """Samples of a clip, which is read when it is first drawn; ValueError if it cannot be used."""
    if clip not in known:
        known[clip] = len(encoder.prepare(waves[clip]))
    return known[clip]


def _cut(
    encoder: HubertEncoder, waves: Sequence[Tensor], crop: _Crop, record: Recorder | None
) -> Tensor:
    """What is heard of a crop (T,)."""
    wave = crop.wave
    if wave is None:
        try:
            wave = encoder.prepare(waves[crop.clip])
        except ValueError as error:  # the other processes count on it
            gone = f"a clip that could be read before cannot be now: {error}"
            raise RuntimeError(gone) from error
    heard = wave[crop.first * encoder.hop :][: crop.samples]
    if crop.elsewhere is None:
        return heard
    elsewhere = np.random.default_rng(crop.elsewhere)
    return encoder.prepare(torch.from_numpy(record(heard.cpu().numpy(), elsewhere)))


def _labels(targets: Targets | Phones, crop: _Crop, frames: int) -> Tensor:
    label = targets[crop.clip][crop.first :][:frames]
    return F.pad(label, (0, frames - len(label)))


def _deal(frames: Sequence[int], count: int) -> list[list[int]]:
    """Crops of so many frames, dealt to `count` processes: the longest first, each to whoever has
    the least; a process's are in the order in which they were drawn."""
    dealt: list[list[int]] = [[] for _ in range(count)]
    held = [0] * count
    for row in sorted(range(len(frames)), key=lambda row: -frames[row]):
        least = min(range(count), key=held.__getitem__)
        dealt[least].append(row)
        held[least] += frames[row]
    return [sorted(rows) for rows in dealt]


def drawing_chances(
    settings: Pretrain, speakers: Sequence[str] | None, domains: Sequence[str] | None
) -> Tensor | None:
    """The chance of each clip (N,), by who says it and what `domains` it is of; None where all are
    as likely. ValueError if a domain weighs something, and no clip is of it."""
    if missing := sorted(set(settings.domain_weights) - set(domains or ())):
        raise ValueError(f"pretrain.domain_weights: no clip of {', '.join(missing)}")
    weights = [settings.domain_weights.get(one, 1.0) for one in domains or ()]
    if speakers and settings.balance < 1:
        return balanced(speakers, settings.balance, weights or None)
    return balanced(domains, 1, weights) if len(set(weights)) > 1 else None


def balanced(
    speakers: Sequence[str], balance: float, weights: Sequence[float] | None = None
) -> Tensor:
    """The chance of each clip (N,) float64, where a speaker's are as the number of his clips to the
    power of `balance`, times the `weights` (N,)."""
    counts = Counter(speakers)
    chances = torch.tensor([counts[one] ** (balance - 1) for one in speakers], dtype=torch.float64)
    if weights is not None:
        chances *= torch.tensor(weights, dtype=torch.float64)
    return chances / chances.sum()


def _one_of(count: int, chances: Tensor | None, generator: torch.Generator) -> int:
    if chances is None:
        return _below(count, generator)
    return int(torch.multinomial(chances, 1, generator=generator))


def _happens(chance: float, generator: torch.Generator) -> bool:
    return chance > 0 and float(torch.rand(1, generator=generator)) < chance


def _below(bound: int, generator: torch.Generator) -> int:
    return int(torch.randint(bound, (1,), generator=generator))
