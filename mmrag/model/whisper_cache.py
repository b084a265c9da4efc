"""What Whisper's decoder keeps of its rows between two steps: tokens in pages, and the speech."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mmrag.model.pages import PagedCache


class WhisperCache:
    """The tokens of B rows in pages, and the speech of the clips that they are of, projected once.

    A clip's speech stays where it is while its rows change places or become more; it is laid out
    anew where clips join, and where the last row of one has left.
    """

    def __init__(
        self, own: PagedCache, keys: Tensor, values: Tensor, heard: Tensor, clips: np.ndarray
    ) -> None:
        """`keys`, `values` (L, C, H, F, width) of the encoder's states of C clips; `heard` (C, F)
        bool; `clips` (B,) the clip that each row is of, in ascending order."""
        self.own = own
        self.keys, self.values, self.heard = keys, values, heard
        self.clips = clips
        if len(heard) and set(range(len(heard))) - set(clips.tolist()):
            kept, self.clips = np.unique(clips, return_inverse=True)
            index = torch.from_numpy(kept).to(heard.device)
            self.keys, self.values, self.heard = keys[:, index], values[:, index], heard[index]

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens read."""
        return self.own.lengths

    def select(self, rows: Tensor | Sequence[int]) -> WhisperCache:
        """The cache of `rows` (R,), which may repeat and keep the clips' order."""
        clips = self.clips[np.asarray(rows, np.int64)]
        return WhisperCache(self.own.select(rows), self.keys, self.values, self.heard, clips)

    def join(self, other: WhisperCache) -> WhisperCache:
        """The rows of both; speech of different length is padded."""
        frames = max(self.heard.shape[1], other.heard.shape[1])

        def padded(cache: WhisperCache) -> tuple[Tensor, Tensor, Tensor]:
            missing = frames - cache.heard.shape[1]
            keys, values = (
                functional.pad(one, (0, 0, 0, missing)) for one in (cache.keys, cache.values)
            )
            return keys, values, functional.pad(cache.heard, (0, missing))

        keys, values, heard = zip(padded(self), padded(other), strict=True)
        clips = np.concatenate((self.clips, other.clips + len(self.heard)))
        own = self.own.join(other.own)
        speech = torch.cat(keys, 1), torch.cat(values, 1), torch.cat(heard)
        return WhisperCache(own, *speech, clips)

    def release(self) -> None:
        """Give the tokens' pages back: the rows end."""
        self.own.release()
