"""What a CTC head says of transcripts while they are made: the probability of their letters so far.

Prefix scores (Hori, Watanabe and Hershey, "Joint CTC/attention decoding for end-to-end speech
recognition", ACL 2017, section 3.2; Watanabe et al., IEEE JSTSP 2017), a letter at a time for any
number of prefixes of any clips at once. Frame by frame, a prefix ends in its last letter or in a
blank behind it; over frames, either probability is a sum of products, and its logarithm one
`logcumsumexp`. Knows letters' numbers; neither tokens nor text.
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
LEAST = -1e300
"""As good as impossible, and yet a number."""


@dataclass(frozen=True, eq=False)
class Frames:
    """What was heard of C clips of at most F frames, in A letters; float64.

    `cumulative` (C, 1 + A, F + 1): the log-probability that a letter is all that is heard of the
    first frames, constant behind a clip's end. `likelihood` (C, 1 + A, F), 0 behind it. `ended`
    (C, F + 1): -inf where that many frames leave none to hear, else 0.
    """

    cumulative: Tensor
    likelihood: Tensor
    ended: Tensor

    @classmethod
    def of(cls, clips: Sequence[Letters], device: torch.device) -> Frames:
        """The frames of clips that were heard in one alphabet.

        Each is made whole again: what was lost or gained where costs were rounded would add up.
        """
        most = max(1, *(len(one) for one in clips))
        shape = len(clips), 1 + len(clips[0].alphabet), most
        logp, there = np.zeros(shape), np.zeros((len(clips), 1, most + 1), bool)
        for number, one in enumerate(clips):
            own = one.logp().astype(np.float64)
            logp[number, :, : len(one)] = (own - np.logaddexp.reduce(own, 1, keepdims=True)).T
            there[number, :, : len(one)] = True
        logp, there = (torch.from_numpy(values).to(device) for values in (logp, there))
        ended = torch.zeros(there.shape, dtype=logp.dtype, device=device)
        ended = ended.masked_fill(~there, -torch.inf)[:, 0]
        cumulative = functional.pad(logp.cumsum(2), (1, 0))
        return cls(cumulative, logp.exp() * there[..., :-1], ended)

    @property
    def size(self) -> int:
        """F."""
        return self.likelihood.shape[2]

    @property
    def letters(self) -> int:
        """1 + A."""
        return self.likelihood.shape[1]

    def select(self, clips: Tensor, size: int) -> Frames:
        """These clips (C,), none of which is longer than `size`."""
        cumulative, ended = self.cumulative[clips, :, : size + 1], self.ended[clips, : size + 1]
        return Frames(cumulative, self.likelihood[clips, :, :size], ended)

    def join(self, other: Frames) -> Frames:
        """The clips of both."""
        size = max(self.size, other.size)
        mine, theirs = self._longer(size), other._longer(size)
        return Frames(*(torch.cat(both) for both in zip(mine, theirs, strict=True)))

    def _longer(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        more = 0, size - self.size
        ended = functional.pad(self.ended, more, value=-torch.inf)
        return longer(self.cumulative, size), functional.pad(self.likelihood, more), ended


def longer(values: Tensor, size: int) -> Tensor:
    """`values` (…, F + 1) that go on as they end, to (…, size + 1)."""
    more = values[..., -1:].expand(*values.shape[:-1], size + 1 - values.shape[-1])
    return torch.cat((values, more), -1)


@dataclass(frozen=True, eq=False)
class Prefixes:
    """N beginnings of transcripts: each of a `clip` (N,), with its `last` letter (N,).

    `states` (N, 2, F + 1) float64: the log-probability that a prefix is what is heard of so many
    frames, and its last letter, or a blank, the last of them. Behind its clip's end they stay.
    """

    frames: Frames
    clip: Tensor
    last: Tensor
    states: Tensor

    @classmethod
    def empty(cls, frames: Frames, clip: Tensor) -> Prefixes:
        """Nothing yet: blanks alone."""
        blank = frames.cumulative[clip, BLANK]
        states = torch.stack((torch.full_like(blank, -torch.inf), blank), 1)
        return cls(frames, clip, torch.full_like(clip, NO_LETTER), states)

    def take(self, places: Tensor) -> Prefixes:
        """Those at these places (M,), which may repeat."""
        return Prefixes(self.frames, self.clip[places], self.last[places], self.states[places])

    def put(self, places: Tensor, others: Prefixes) -> Prefixes:
        """With `others` (M,) at these places (M,)."""
        last = self.last.index_copy(0, places, others.last)
        return Prefixes(
            self.frames, self.clip, last, self.states.index_copy(0, places, others.states)
        )

    def then(self, places: Tensor, letters: Tensor) -> Prefixes:
        """The prefixes at `places` (M,), each with one of `letters` (M,) more."""
        clip, repeated = self.clip[places], letters == self.last[places]
        spelt, rested = self.states[places].unbind(1)
        # A letter is heard twice only where a blank was heard between.
        before = torch.where(repeated[:, None], rested, torch.logaddexp(spelt, rested))
        ended = self.frames.ended[clip]
        spelt = _goes_on(before + ended, self.frames.cumulative[clip, letters])
        rested = _goes_on(spelt + ended, self.frames.cumulative[clip, BLANK])
        return Prefixes(self.frames, clip, letters, torch.stack((spelt, rested), 1))

    def logp_then(self, places: Tensor, letters: Tensor) -> Tensor:
        """Log-probability (M,) that what is said begins with the prefixes at `places` (M,) and one
        of `letters` (M,) more."""
        most, shares = self._shares
        repeated = (letters == self.last[places]).long()
        own = shares.flatten(0, 1)[2 * places + repeated]
        heard = self.frames.likelihood[self.clip[places], letters]
        return most[places] + (own * heard).sum(1).log()

    def logp_of_each(self) -> Tensor:
        """Log-probability (N, 1 + A) that what is said begins with each prefix and any letter more;
        that of the blank means nothing."""
        most, shares = self._shares
        heard = self.frames.likelihood[self.clip] @ shares.transpose(1, 2)
        each, again = heard.unbind(2)
        repeated = self.last[:, None]
        each = each.scatter(1, repeated, again.gather(1, repeated))
        return most[:, None] + each.log()

    def logp_whole(self) -> Tensor:
        """Log-probability (N,) that each prefix is all that is said."""
        return torch.logaddexp(*self.states[:, :, -1].unbind(1))

    @cached_property
    def _shares(self) -> tuple[Tensor, Tensor]:
        """The most that a prefix is in any frame (N,), and the shares of it (N, 2, F) before which
        another letter, and the same once more, may be heard."""
        spelt, rested = self.states[:, :, :-1].unbind(1)
        either = torch.logaddexp(spelt, rested)
        most = either.amax(1).clamp(min=LEAST)
        return most, (torch.stack((either, rested), 1) - most[:, None, None]).exp()


def _goes_on(before: Tensor, cumulative: Tensor) -> Tensor:
    """Log-probabilities (N, F + 1) that a letter is heard last after so many frames.

    r[t] = x[t] + log(exp r[t - 1] + exp before[t - 1]), with `before` (N, F + 1) that the letter
    may follow, and x whose sums are `cumulative` (N, F + 1).
    """
    found = (before - cumulative)[:, :-1].logcumsumexp(1) + cumulative[:, 1:]
    return functional.pad(found, (1, 0), value=-torch.inf)
