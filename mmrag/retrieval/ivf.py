"""Keys as short codes in inverted lists, by FAISS: which of them may be near a query.

IVF-PQ (arXiv 1702.08734): a key is in the list of the centroid next to it, and its code is the key
itself, product-quantized, or what it differs by from the centroid. For the latter FAISS can hold
tables of the centroids' distances to all codes, which would take more memory than the codes; they
are computed for the few lists that are visited. Where a code has few bytes for the key's width, the
key is turned first (OPQ, arXiv 1311.4055), into fewer dimensions.

A saved index is mapped, not read: its codes are the page cache's, and belong to all processes of a
machine. What is added after that lies in memory beside it.
"""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np

from mmrag.config import Index

CODE_CENTROIDS = 256
"""Centroids of one byte of a code."""
LIST_POINTS = 64
"""Keys that each centroid is trained on, if there are as many."""
OPQ_POINTS = 65_536
"""Keys that a rotation is trained on, at most."""
NO_TABLES = -1
"""Of FAISS: do not compute tables beforehand."""
MAPPED = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE
TURNED_DIMENSIONS = 8
"""Dimensions that are left for each byte of a code where keys are turned."""


class IVFPQ:
    """Candidates among many keys, numbered from 0 as they were added."""

    def __init__(self, index: faiss.Index, file: Path | None = None) -> None:
        """`index` as `create` makes it; with `file` mapped from there, and not to be added to."""
        self._saved = index
        self._file = file
        self._fresh: faiss.Index | None = None

    @classmethod
    def create(cls, width: int, by_product: bool, settings: Index, seed: int) -> IVFPQ:
        """Untrained, for keys (N, width) compared by inner product or else by L2.

        ValueError where a code's bytes do not divide what they stand for.
        """
        metric = faiss.METRIC_INNER_PRODUCT if by_product else faiss.METRIC_L2
        turned = TURNED_DIMENSIONS * settings.code_bytes if settings.turned else width
        if turned % settings.code_bytes:
            raise ValueError(
                f"index.code_bytes {settings.code_bytes} does not divide width {width}"
            )
        if turned > width:
            raise ValueError(
                f"index.turned: codes of {settings.code_bytes} bytes stand for {turned} "
                f"dimensions, and keys have {width}"
            )
        coarse = faiss.IndexFlat(turned, metric)
        index = faiss.IndexIVFPQ(coarse, turned, settings.lists, settings.code_bytes, 8, metric)
        index.use_precomputed_table = NO_TABLES
        index.by_residual = settings.residual
        index.cp.seed = index.pq.cp.seed = seed % 2**31
        index.cp.max_points_per_centroid = index.pq.cp.max_points_per_centroid = LIST_POINTS
        index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1  # no warning
        if not settings.turned:
            return cls(index)
        rotation = faiss.OPQMatrix(width, settings.code_bytes, turned)
        rotation.max_train_points = OPQ_POINTS
        whole = faiss.IndexPreTransform(rotation, index)
        for part in (coarse, index, rotation):
            part.this.disown()
        index.own_fields = whole.own_fields = True
        return cls(whole)

    @classmethod
    def load(cls, file: Path) -> IVFPQ:
        """What `save` wrote; RuntimeError for a file that is damaged."""
        return cls(faiss.read_index(str(file), MAPPED), file)

    @property
    def ntotal(self) -> int:
        """How many keys there are."""
        return self._saved.ntotal + (self._fresh.ntotal if self._fresh else 0)

    @property
    def is_trained(self) -> bool:
        """Whether keys can be added."""
        return self._saved.is_trained

    def train(self, keys: np.ndarray) -> None:
        """Learn centroids, codes and rotation of keys (M, width) float32."""
        self._saved.train(keys)

    def add(self, keys: np.ndarray) -> None:
        """Take in keys (M, width) float32."""
        if self._file is None:
            self._saved.add(keys)
            return
        if self._fresh is None:
            self._fresh = _emptied(self._file)
        self._fresh.add(keys)

    def search(self, queries: np.ndarray, fetch: int, probes: int) -> np.ndarray:
        """The keys whose codes are nearest, in the `probes` lists next to each query: (B, fetch),
        -1 where there are no more."""
        distances, found = _search(self._saved, queries, fetch, probes)
        if self._fresh is None:
            return found
        others, newer = _search(self._fresh, queries, fetch, probes)
        newer[newer >= 0] += self._saved.ntotal
        distances = np.concatenate([distances, others], axis=1)
        if self._saved.metric_type == faiss.METRIC_INNER_PRODUCT:
            distances = -distances
        found = np.concatenate([found, newer], axis=1)
        distances[found < 0] = np.inf
        nearest = np.argsort(distances, axis=1, kind="stable")[:, :fetch]
        return np.take_along_axis(found, nearest, axis=1)

    def save(self, file: Path) -> None:
        """Write everything into `file`."""
        if self._fresh is None:
            faiss.write_index(self._saved, str(file))
            return
        whole = faiss.read_index(str(self._file), faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)
        fresh = faiss.clone_index(self._fresh)
        whole.merge_from(fresh, whole.ntotal)
        faiss.write_index(whole, str(file))


def _search(
    index: faiss.Index, queries: np.ndarray, fetch: int, probes: int
) -> tuple[np.ndarray, np.ndarray]:
    lists = faiss.SearchParametersIVF(nprobe=probes)
    if isinstance(index, faiss.IndexPreTransform):
        turned = faiss.SearchParametersPreTransform(index_params=lists)
        return index.search(queries, fetch, params=turned)
    return index.search(queries, fetch, params=lists)


def _emptied(file: Path) -> faiss.Index:
    """The index of a file, trained as it is and without a key."""
    index = faiss.read_index(str(file), MAPPED)
    inverted = faiss.extract_index_ivf(index)
    lists = faiss.ArrayInvertedLists(inverted.nlist, inverted.code_size)
    inverted.replace_invlists(lists, True)
    lists.this.disown()
    inverted.ntotal = index.ntotal = 0
    return index
