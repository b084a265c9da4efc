"""Frame features to units: k-means ids, runs of equal ids collapsed, their durations kept.

Durations are what turns a unit's place in a sequence back into seconds. This module knows neither
the encoder that made the features nor the vocabulary that the units become part of. It leaves
FAISS's thread count as it finds it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import faiss
import numpy as np
import torch
from torch import Tensor

from mmrag.artifact import local, write_json
from mmrag.records import Units
from mmrag.storage import Location

ITERATIONS = 25
"""Lloyd iterations of k-means."""
ROWS = 8192
"""Frames that are searched at once on an accelerator."""


def collapse(ids: np.ndarray) -> Units:
    """Frame ids (F,) integer to units: each run of one id becomes that id and its length."""
    ids = np.asarray(ids, np.int32)
    if ids.ndim != 1:
        raise ValueError(f"frame ids have shape (F,), not {ids.shape}")
    starts = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]]))[: len(ids)]
    durations = np.diff(starts, append=len(ids))
    return Units(ids=ids[starts], durations=durations.astype(np.int32))


def expand(units: Units) -> np.ndarray:
    """The frame ids (F,) int32 that `units` were collapsed from."""
    return np.repeat(units.ids, units.durations)


def information(ids: np.ndarray, classes: np.ndarray) -> float:
    """How much of what `classes` (N,) are do `ids` (N,) of the same frames tell, 0 to 1.

    Mutual information over the classes' entropy: with phones, the PNMI of arXiv 2106.07447. nan for
    classes that are all alike.
    """
    told, known = _entropy(ids), _entropy(classes)
    together = _entropy(np.stack([ids, classes], axis=1))
    return (told + known - together) / known if known else math.nan


def information_of(counts: np.ndarray) -> float:
    """`information` of frames that were counted: `counts` (K, C) of those with id k and class c."""
    told, known = (_spread(counts.sum(axis)) for axis in (1, 0))
    return (told + known - _spread(counts.ravel())) / known if known else math.nan


def _entropy(ids: np.ndarray) -> float:
    """Of rows (N,) or (N, D) as they are found, nats."""
    return _spread(np.unique(ids, axis=0, return_counts=True)[1])


def _spread(counts: np.ndarray) -> float:
    """Entropy of `counts` (N,), nats."""
    shares = counts[counts > 0] / max(1, counts.sum())
    return float(-(shares * np.log(shares)).sum())


def kmeans(features: np.ndarray, size: int, seed: int) -> np.ndarray:
    """`size` centroids (K, D) float32 of `features` (N, D); the same seed gives the same ones.

    Raises ValueError if there are fewer features than clusters.
    """
    features = np.ascontiguousarray(features, np.float32)
    if len(features) < size:
        raise ValueError(f"{len(features)} features cannot make {size} clusters")
    clusters = faiss.Kmeans(
        features.shape[1], size, niter=ITERATIONS, seed=seed, min_points_per_centroid=1
    )
    clusters.train(features)
    return clusters.centroids


class Codebook:
    """K centroids of an encoder's features. A unit's id is the row of its centroid."""

    def __init__(self, centroids: np.ndarray, frame_seconds: float) -> None:
        """`centroids` (K, D); `frame_seconds` from one frame of the encoder to the next."""
        if centroids.ndim != 2:
            raise ValueError(f"centroids have shape (K, D), not {centroids.shape}")
        self.centroids = np.ascontiguousarray(centroids, np.float32)
        self.frame_seconds = frame_seconds
        self._there: tuple[Tensor, Tensor] | None = None
        """On an accelerator: the centroids and half their squared lengths."""

    def __len__(self) -> int:
        return len(self.centroids)

    @classmethod
    def fit(cls, features: np.ndarray, size: int, seed: int, frame_seconds: float) -> Codebook:
        """k-means over `features` (N, D). Raises ValueError if N < size."""
        return cls(kmeans(features, size, seed), frame_seconds)

    def moved(self, ids: np.ndarray, features: np.ndarray) -> Codebook:
        """A codebook whose ids go on meaning what they meant to another encoder: each centroid is
        the mean of that one's `features` (N, D) of the frames that had its id, of `ids` (N,); one
        without any stays."""
        counts = np.bincount(ids, minlength=len(self))[:, None]
        sums = np.zeros(self.centroids.shape, np.float64)
        np.add.at(sums, ids, features)
        moved = np.where(counts > 0, sums / np.maximum(counts, 1), self.centroids)
        return Codebook(moved, self.frame_seconds)

    def assign(self, features: np.ndarray | Tensor) -> np.ndarray:
        """The nearest centroid (F,) int32, by L2, to each of `features` (F, D).

        A tensor on an accelerator is searched there, and only the ids come back. Raises ValueError
        if the features are not as wide as the centroids.
        """
        width = self.centroids.shape[1]
        if features.ndim != 2 or features.shape[1] != width:
            shape = tuple(features.shape)
            raise ValueError(f"this codebook takes features (F, {width}), not {shape}")
        if isinstance(features, Tensor) and features.device.type != "cpu":
            return self.nearest(features).cpu().numpy()
        _, nearest = faiss.knn(np.ascontiguousarray(features, np.float32), self.centroids, 1)
        return nearest[:, 0].astype(np.int32)

    def nearest(self, features: Tensor) -> Tensor:
        """As `assign`, by torch on the device where `features` (F, D) are: (F,) int32."""
        if self._there is None or self._there[0].device != features.device:
            centroids = torch.from_numpy(self.centroids).to(features.device)
            self._there = centroids, centroids.square().sum(1) / 2
        centroids, halves = self._there
        # At most as many products at once as an encoder's own batch takes.
        rows = features.float().split(ROWS)
        found = [(one @ centroids.T - halves).argmax(1).to(torch.int32) for one in rows]
        return torch.cat(found) if found else torch.empty(0, dtype=torch.int32)

    def encode(self, features: np.ndarray) -> Units:
        """Features (F, D) of one clip to its units."""
        return collapse(self.assign(features))

    def seconds(self, units: Units) -> np.ndarray:
        """Start and end (T, 2) float64 of each run, in seconds from the clip's start."""
        ends = np.cumsum(units.durations)
        return np.stack([ends - units.durations, ends], axis=1) * self.frame_seconds

    def save(self, directory: Path | str) -> None:
        """Write `centroids.npy` and `codebook.json` into `directory`, making it if need be."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        np.save(directory / "centroids.npy", self.centroids, allow_pickle=False)
        write_json(
            directory / "codebook.json",
            {"units": len(self), "frame_seconds": self.frame_seconds},
        )

    @classmethod
    def load(cls, directory: Location | str) -> Codebook:
        """Read what `save` wrote. Raises ValueError if the two files disagree."""
        directory = local(directory)
        fields = json.loads((directory / "codebook.json").read_text())
        centroids = np.load(directory / "centroids.npy", allow_pickle=False)
        if len(centroids) != fields["units"]:
            raise ValueError(
                f"{directory}: codebook.json says {fields['units']} units, "
                f"centroids.npy holds {len(centroids)}"
            )
        return cls(centroids, fields["frame_seconds"])
