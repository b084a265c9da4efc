"""What a CTC head says of transcripts while they are made: the probability of their letters so far.

Prefix scores (Hori, Watanabe and Hershey, "Joint CTC/attention decoding for end-to-end speech
recognition", ACL 2017, section 3.2; Watanabe et al., IEEE JSTSP 2017), a letter at a time for any
number of prefixes of any clips at once. Frame by frame, a prefix ends in its last letter or in a
blank behind it; over frames, either probability is a sum of products. Knows letters' numbers;
neither tokens nor text.

Such sums are one `cumsum` of what begins at each frame, over the product of likelihoods until
then: of a BLOCK of frames at a time, in which no product is too small for a number. No logarithms
are taken but of a prefix as a whole, and frames are likelier or less likely ends of it by shares:
what is e^-700 times as likely as the others is impossible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mmrag.records import Letters

BLANK = 0
NO_LETTER = 0
"""The last letter of a prefix that has none."""
BLOCK = 24
"""Frames, each of whose likelihoods is e^-25.6 at least (`Letters`): e^-614 at least together, and
what is smaller than e^-708 is no normal float64."""
LEAST = 1e-300
"""As good as impossible, and yet a number."""


@dataclass(frozen=True, eq=False)
class Frames:
    """What was heard of C clips of at most F frames, whole blocks, in A letters; float64.

    `likelihood` (C, 1 + A, F), 0 behind a clip's end. `runs` (C, 1 + A, 2, F): second, the product
    of likelihoods since the block's beginning, which stays behind a clip's end; first, by how much
    more a label counts that begins here, before it is multiplied with that. `started`
    (C, 1 + A, F / BLOCK + 1): the logarithm of the product until each block, and until the end.
    """

    likelihood: Tensor
    runs: Tensor
    started: Tensor

    @classmethod
    def of(cls, clips: Sequence[Letters], device: torch.device) -> Frames:
        """The frames of clips that were heard in one alphabet.

        Each is made whole again: what was lost or gained where costs were rounded would add up.
        """
        most = _whole_blocks(max(map(len, clips)))
        shape = len(clips), 1 + len(clips[0].alphabet), most
        logp, there = np.zeros(shape), np.zeros((len(clips), 1, most), bool)
        for number, one in enumerate(clips):
            own = one.logp().astype(np.float64)
            logp[number, :, : len(one)] = (own - np.logaddexp.reduce(own, 1, keepdims=True)).T
            there[number, :, : len(one)] = True
        logp, there = (torch.from_numpy(values).to(device) for values in (logp, there))
        likelihood = logp.exp() * there
        products = logp.unflatten(2, (-1, BLOCK)).cumsum(3)
        started = functional.pad(products[..., -1].cumsum(2), (1, 0))
        run = products.exp().flatten(2)
        return cls(likelihood, torch.stack((likelihood / run, run), 2), started)

    @property
    def size(self) -> int:
        """F."""
        return self.likelihood.shape[2]

    @property
    def letters(self) -> int:
        """1 + A."""
        return self.likelihood.shape[1]

    def select(self, clips: Tensor, most: int) -> Frames:
        """These clips (C,), none of which has more than `most` frames."""
        size = _whole_blocks(most)
        likelihood, runs = self.likelihood[clips, :, :size], self.runs[clips, :, :, :size]
        return Frames(likelihood, runs, self.started[clips, :, : size // BLOCK + 1])

    def join(self, other: Frames) -> Frames:
        """The clips of both."""
        size = max(self.size, other.size)
        mine, theirs = self._longer(size), other._longer(size)
        return Frames(*(torch.cat(both) for both in zip(mine, theirs, strict=True)))

    def _longer(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        more = 0, size - self.size
        began, run = self.runs.split(1, 2)
        runs = functional.pad(began, more), functional.pad(run, more, value=1.0)
        started = longer(self.started, size // BLOCK)
        return functional.pad(self.likelihood, more), torch.cat(runs, 2), started

    def heard_next(self, before: Tensor, labels: Tensor) -> Tensor:
        """How likely each of `labels` (N,), one of a clip, begins to be heard in some frame (N,),
        behind what is as likely as `before` (N, F) until the frame before.

        The labels of all clips are numbered through, 1 + A of each.
        """
        return (before * self.likelihood.flatten(0, 1).index_select(0, labels)).sum(1)

    def heard_last(self, before: Tensor, labels: Tensor) -> Tensor:
        """The same, for how likely it is the last that is heard until each frame (N, F):
        r[t] = x[t] (r[t - 1] + before[t])."""
        runs, carried = self._of_labels
        begun, run = runs.index_select(0, labels).unbind(1)
        sums = (before * begun).view(before.shape[0], -1, BLOCK).cumsum(2)
        sums += torch.bmm(carried.index_select(0, labels), sums[:, :, -1:])
        return sums.view(before.shape).mul_(run)

    def logp_alone(self, letter: int) -> Tensor:
        """Log-probability (C, F) that a label is all that is heard until each frame."""
        begun = self.started[:, letter, :-1].repeat_interleave(BLOCK, 1)
        return begun + self.runs[:, letter, 1].log()

    @cached_property
    def _of_labels(self) -> tuple[Tensor, Tensor]:
        """The `runs` of each label, and how much of the sum of a block counts in each later one
        (C (1 + A), blocks, blocks)."""
        started = self.started[..., :-1].flatten(0, 1)
        carried = (started[..., :, None] - started[..., None, :]).exp().tril(-1)
        return self.runs.flatten(0, 1), carried


def longer(values: Tensor, size: int) -> Tensor:
    """`values` (…, F + 1) that go on as they end, to (…, size + 1)."""
    more = values[..., -1:].expand(*values.shape[:-1], size + 1 - values.shape[-1])
    return torch.cat((values, more), -1)


def _whole_blocks(frames: int) -> int:
    return BLOCK * max(1, -(-frames // BLOCK))


@dataclass(frozen=True, eq=False)
class Prefixes:
    """N beginnings of transcripts: each of a `clip` (N,), with its `last` letter (N,).

    `logp` (N,) float64: the log-probability that what is said begins with it. `states`
    (N, 2, F + 1) float64, of that: how likely a prefix is what is heard of so many frames, and,
    second, a blank the last of them. Behind its clip's end they stay.
    """

    frames: Frames
    clip: Tensor
    last: Tensor
    logp: Tensor
    states: Tensor

    @classmethod
    def empty(cls, frames: Frames, clip: Tensor) -> Prefixes:
        """Nothing yet: blanks alone."""
        alone = torch.cat((frames.started[:, BLANK, :1], frames.logp_alone(BLANK)), 1).exp()
        return cls(
            frames,
            clip,
            torch.full_like(clip, NO_LETTER),
            torch.zeros_like(clip, dtype=alone.dtype),
            alone[clip, None].expand(-1, 2, -1),
        )

    def take(self, places: Tensor) -> Prefixes:
        """Those at these places (M,), which may repeat."""
        parts = self.clip, self.last, self.logp, self.states
        return Prefixes(self.frames, *(one.index_select(0, places) for one in parts))

    def put(self, places: Tensor, others: Prefixes) -> Prefixes:
        """With `others` (M,) at these places (M,)."""
        last, logp, states = (
            getattr(self, name).index_copy(0, places, getattr(others, name))
            for name in ("last", "logp", "states")
        )
        return Prefixes(self.frames, self.clip, last, logp, states)

    def join(self, others: Prefixes) -> Prefixes:
        """These, then `others` of the same frames."""
        names = "clip", "last", "logp", "states"
        both = (torch.cat((getattr(self, name), getattr(others, name))) for name in names)
        return Prefixes(self.frames, *both)

    def then(self, places: Tensor, letters: Tensor) -> Prefixes:
        """The prefixes at `places` (M,), each with one of `letters` (M,) more."""
        clip, frames = self.clip.index_select(0, places), self.frames
        before, blank = self._before(places, letters), clip * frames.letters + BLANK
        share = frames.heard_next(before, blank + letters)
        spelt = frames.heard_last(before, blank + letters).div_(share.clamp(min=LEAST)[:, None])
        states = spelt.new_zeros(len(spelt), 2, frames.size + 1)
        either, rested = states.unbind(1)
        either[:, 1:] = spelt
        rested[:, 1:] = frames.heard_last(either[:, :-1], blank)
        either += rested
        logp = self.logp.index_select(0, places) + share.log_()
        return Prefixes(frames, clip, letters, logp, states)

    def logp_then(self, places: Tensor, letters: Tensor) -> Tensor:
        """Log-probability (M,) that what is said begins with the prefixes at `places` (M,) and one
        of `letters` (M,) more."""
        labels = self.clip.index_select(0, places) * self.frames.letters + letters
        share = self.frames.heard_next(self._before(places, letters), labels)
        return self.logp.index_select(0, places) + share.log_()

    def logp_of_each(self, places: Tensor) -> Tensor:
        """Log-probability (C, M, 1 + A) that what is said begins with the prefixes of each clip at
        `places` (C, M), and any letter more; that of the blank means nothing."""
        before = self.states[places.flatten(), 0, :-1].view(*places.shape, -1)
        heard = before @ self.frames.likelihood.transpose(1, 2)
        each = self.logp[places][..., None] + heard.log()
        # The last letter once more is another matter.
        last = self.last[places]
        again = self.logp_then(places.flatten(), last.flatten()).view(*places.shape, 1)
        return each.scatter(2, last[..., None], again)

    def logp_whole(self) -> Tensor:
        """Log-probability (N,) that each prefix is all that is said."""
        return self.logp + self.states[:, 0, -1].log()

    def _before(self, places: Tensor, letters: Tensor) -> Tensor:
        """How likely the prefixes at `places` (M,) are until the frame before each (M, F), if one
        of `letters` (M,) is heard in it: once more only behind a blank."""
        again = letters == self.last.index_select(0, places)
        return self.states.flatten(0, 1).index_select(0, 2 * places + again)[:, :-1]
