"""Keys as short codes in inverted lists, by FAISS: which of them may be near a query.

A key is in the list of the centroid next to it, and its code is the key itself or what it differs
by from the centroid. IVF-SQ: a few bits a dimension (`scalar`). IVF-PQ (arXiv 1702.08734):
product-quantized, in less memory; a query looks up tables, which for differences FAISS could hold
for all lists, in more memory than the codes, and computes for the few that are visited. Where such
a code has few bytes for the key's width, the key is turned first (OPQ, arXiv 1311.4055), into fewer
dimensions; and what it proposes may be compared again by longer codes, of some bits a dimension, so
that fewer keys have to be read.

A saved index is mapped, not read: its codes are the page cache's, and belong to all processes of a
machine. What is added after that lies in memory beside it. On a GPU, and where codes are compared
in registers (fast-scan, arXiv 1812.09162), the whole index is read, and grows in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np

from mmrag.config import Index
from mmrag.retrieval import gpu, scalar

CODES, SCALARS = "index.faiss", "scalar.faiss"
"""Files of a saved index: lists and codes, and the longer codes."""
CODE_CENTROIDS = 256
"""Centroids of one byte of a code."""
LIST_POINTS = 64
"""Keys that each centroid is trained on, if there are as many."""
OPQ_POINTS = 65_536
"""Keys that a rotation is trained on, at most."""
NO_TABLES = -1
"""Of FAISS: do not compute tables beforehand."""
MAPPED = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE
NO_PREFETCH = 0
"""Threads that FAISS starts at every search of mapped lists, to read them beforehand: starting its
32 takes longer than to search lists that are in memory."""
TURNED_DIMENSIONS = 8
"""Dimensions that are left for each byte of a code where keys are turned."""


class IVF:
    """Candidates among many keys, numbered from 0 as they were added."""

    def __init__(
        self,
        index: faiss.Index,
        scalars: faiss.Index | None = None,
        file: Path | None = None,
        on_gpu: bool = False,
    ) -> None:
        """`index` as `create` makes it, and the longer codes of the same keys, if there are any;
        with `file` both are mapped, `index` from there, and not to be added to."""
        self._saved = _Part(index, scalars)
        self._file = file
        self._fresh: _Part | None = None
        self._on_gpu = on_gpu

    @classmethod
    def create(
        cls, width: int, by_product: bool, settings: Index, seed: int, on_gpu: bool = False
    ) -> IVF:
        """Untrained, for keys (N, width) compared by inner product or else by L2.

        ValueError where a code's bytes do not divide what they stand for, or there are none, or the
        GPU has no such codes.
        """
        metric = faiss.METRIC_INNER_PRODUCT if by_product else faiss.METRIC_L2
        if settings.kind == "ivfsq":
            index = _scalar_lists(width, metric, settings, seed)
            return cls(gpu.to_gpu(index) if on_gpu else index, on_gpu=on_gpu)
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
        whole = index = _product_lists(turned, metric, settings, seed)
        if settings.turned:
            rotation = faiss.OPQMatrix(width, settings.code_bytes, turned)
            rotation.max_train_points = OPQ_POINTS
            whole = faiss.IndexPreTransform(rotation, index)
            whole.own_fields = True
            for part in (index, rotation):
                part.this.disown()
        scalars = scalar.create(width, metric, settings.scalar_bits)
        return cls(gpu.to_gpu(whole) if on_gpu else whole, scalars, on_gpu=on_gpu)

    @classmethod
    def load(cls, directory: Path, settings: Index, on_gpu: bool = False) -> IVF:
        """What `save` wrote; RuntimeError for a file that is damaged or missing."""
        in_registers = settings.fast_scan and settings.kind == "ivfpq"
        file, mapped = directory / CODES, not (on_gpu or in_registers)
        index = faiss.read_index(str(file), MAPPED if mapped else 0)
        if mapped:
            lists = faiss.extract_index_ivf(index).invlists
            faiss.downcast_InvertedLists(lists).prefetch_nthread = NO_PREFETCH
        longer = settings.scalar_bits and settings.kind == "ivfpq"
        scalars = scalar.load(directory / SCALARS, mapped) if longer else None
        if scalars is not None and scalars.ntotal != index.ntotal:
            raise RuntimeError(f"{scalars.ntotal} and {index.ntotal} codes")
        return cls(
            gpu.to_gpu(index) if on_gpu else index, scalars, file if mapped else None, on_gpu
        )

    @property
    def ntotal(self) -> int:
        """How many keys there are."""
        return sum(part.ntotal for part in self._parts)

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
            self._fresh = _Part(_emptied(self._file), self._saved.emptied_scalars())
        self._fresh.add(keys)

    def search(self, queries: np.ndarray, fetch: int, settings: Index) -> np.ndarray:
        """The keys whose codes are nearest, in the `settings.probes` lists next to each query:
        (B, fetch), -1 where there are no more."""
        if self._fresh is None:
            return self._saved.search(queries, fetch, settings, self._on_gpu)[1]
        parts, shift = [], 0
        for part in self._parts:
            distances, found = part.search(queries, fetch, settings, self._on_gpu)
            if part.by_product:
                distances = -distances
            distances[found < 0] = np.inf
            found[found >= 0] += shift
            parts.append((distances, found))
            shift += part.ntotal
        distances, found = (np.concatenate(each, axis=1) for each in zip(*parts, strict=True))
        nearest = np.argsort(distances, axis=1, kind="stable")[:, :fetch]
        return np.take_along_axis(found, nearest, axis=1)

    def save(self, directory: Path) -> None:
        """Write everything into files of a directory that is there."""
        index, scalars = self._saved.index, self._saved.scalars
        if self._fresh is not None:
            index = faiss.read_index(str(self._file), faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)
            index.merge_from(faiss.clone_index(self._fresh.index), index.ntotal)
            if scalars is not None:
                scalars = scalar.load(self._file.with_name(SCALARS), mapped=False)
                scalars.merge_from(faiss.clone_index(self._fresh.scalars), 0)
        faiss.write_index(gpu.to_cpu(index) if self._on_gpu else index, str(directory / CODES))
        if scalars is not None:
            faiss.write_index(scalars, str(directory / SCALARS))

    @property
    def _parts(self) -> list[_Part]:
        return [self._saved] if self._fresh is None else [self._saved, self._fresh]


class _Part:
    """Lists and codes, and the longer codes of the same keys."""

    def __init__(self, index: faiss.Index, scalars: faiss.Index | None) -> None:
        self.index = index
        self.scalars = scalars

    @property
    def ntotal(self) -> int:
        return self.index.ntotal

    @property
    def is_trained(self) -> bool:
        return self.index.is_trained

    @property
    def by_product(self) -> bool:
        return self.index.metric_type == faiss.METRIC_INNER_PRODUCT

    def train(self, keys: np.ndarray) -> None:
        self.index.train(keys)
        if self.scalars is not None:
            self.scalars.train(keys)

    def add(self, keys: np.ndarray) -> None:
        self.index.add(keys)
        if self.scalars is not None:
            self.scalars.add(keys)

    def emptied_scalars(self) -> faiss.Index | None:
        return None if self.scalars is None else scalar.emptied(self.scalars)

    def search(
        self, queries: np.ndarray, fetch: int, settings: Index, on_gpu: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """FAISS's distances and numbers (B, fetch); number -1 where there are no more."""
        lists = faiss.SearchParametersIVF(nprobe=settings.probes)
        if isinstance(self.index, faiss.IndexPreTransform):
            lists = faiss.SearchParametersPreTransform(index_params=lists)
        factor = max(1.0, settings.refine / settings.rerank) if self.scalars is not None else 1.0
        most = int(gpu.MOST_FOUND / factor) if on_gpu else fetch
        asked = min(fetch, most)
        if self.scalars is None or not self.ntotal:
            distances, found = self.index.search(queries, asked, params=lists)
        else:
            refined = faiss.IndexRefineSearchParameters(k_factor=factor, base_index_params=lists)
            both = faiss.IndexRefine(self.index, self.scalars)
            distances, found = both.search(queries, asked, params=refined)
        if asked == fetch:
            return distances, found
        missing = (0, 0), (0, fetch - asked)
        return np.pad(distances, missing), np.pad(found, missing, constant_values=-1)


def _scalar_lists(width: int, metric: int, settings: Index, seed: int) -> faiss.Index:
    """Empty lists of codes of some bits a dimension."""
    if not settings.scalar_bits:
        raise ValueError("index.kind ivfsq needs index.scalar_bits: 4, 6 or 8 a dimension")
    coarse, codes = faiss.IndexFlat(width, metric), scalar.TYPES[settings.scalar_bits]
    index = faiss.IndexIVFScalarQuantizer(
        coarse, width, settings.lists, codes, metric, settings.residual
    )
    return _trained_by(index, coarse, [index.cp], seed)


def _product_lists(width: int, metric: int, settings: Index, seed: int) -> faiss.Index:
    """Empty lists of product-quantized codes."""
    coarse = faiss.IndexFlat(width, metric)
    if settings.fast_scan:
        halves = 2 * settings.code_bytes
        if width % halves:
            raise ValueError(
                f"index.fast_scan: {halves} codes of half a byte do not divide width {width}"
            )
        index = faiss.IndexIVFPQFastScan(coarse, width, settings.lists, halves, 4, metric)
    else:
        index = faiss.IndexIVFPQ(coarse, width, settings.lists, settings.code_bytes, 8, metric)
        index.use_precomputed_table = NO_TABLES
    index.by_residual = settings.residual
    return _trained_by(index, coarse, [index.cp, index.pq.cp], seed)


def _trained_by(
    index: faiss.Index,
    coarse: faiss.Index,
    clusterings: Sequence[faiss.ClusteringParameters],
    seed: int,
) -> faiss.Index:
    """`index`, which now owns the centroids of its lists, and finds the same ones every time."""
    for clustering in clusterings:
        clustering.seed = seed % 2**31
        clustering.max_points_per_centroid = LIST_POINTS
        clustering.min_points_per_centroid = 1  # no warning
    index.own_fields = True
    coarse.this.disown()
    return index


def _emptied(file: Path) -> faiss.Index:
    """The index of a file, trained as it is and without a key."""
    index = faiss.read_index(str(file), MAPPED)
    inverted = faiss.extract_index_ivf(index)
    lists = faiss.ArrayInvertedLists(inverted.nlist, inverted.code_size)
    inverted.replace_invlists(lists, True)
    lists.this.disown()
    inverted.ntotal = index.ntotal = 0
    return index
