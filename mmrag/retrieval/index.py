"""Nearest neighbours among one datastore's keys, by FAISS.

An `IndexShard` covers a contiguous range of entries. FAISS proposes candidates, with the rounding
of its own fast arithmetic; their distances are then computed again, in float32 from the stored
keys. Flat goes on proposing until no key that was not proposed could be among the k nearest, so
its answer is exact and the same however the entries are sharded; IVF re-ranks what its lists and
codes let through, and how much that is is measured when it is built. Its lists and codes may lie on
a GPU (`gpu`). Which machine a shard lives on is not known here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import faiss
import numpy as np

from mmrag import durable
from mmrag.artifact import write_json
from mmrag.config import Index, as_dict
from mmrag.records import NO_ENTRY, Neighbours
from mmrag.retrieval import gpu, sizing
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.held_out import NEAREST, HeldOutQueries
from mmrag.retrieval.ivf import CODE_CENTROIDS, CODES, IVF, LIST_POINTS, TURNED_DIMENSIONS
from mmrag.retrieval.segment import DatastoreError, distances, prepare
from mmrag.retrieval.stored import open_mapped

INDEX, POINTER = "index", "index.json"
"""Of a datastore: the directory of its shards, and the file that names another one."""
LEFT_OUT = "left_out.npy"
"""Of a saved shard: its entries, counted from its first, that its lists do not hold."""
BLOCK = 16_384
"""Keys in memory at once where all of them are walked through."""


class IndexShard:
    """The searchable entries [start, stop) of a datastore."""

    def __init__(
        self, datastore: Datastore, start: int, settings: Index, index: faiss.Index | IVF
    ) -> None:
        """`index` holds the first `index.ntotal` entries from `start`; `settings` are of a kind
        that was chosen."""
        _tune()
        self.datastore = datastore
        self.start = start
        self.stop = start + index.ntotal
        self.settings = settings
        self.asked = settings
        """What was chosen from: the settings as they were given."""
        self.why = ""
        """Why it is indexed as it is."""
        self.recall: float | None = None
        """Of its part of the NEAREST entries to held-out queries, measured when it was built; None
        where it is exact, or nothing was there to measure it on."""
        self._index = index
        self._longest = 0.0
        """Norm of the longest key: bounds FAISS's rounding errors (flat)."""
        self._deleted = np.zeros(index.ntotal, bool)
        self._deletions = 0
        self._left_out = np.zeros(0, np.int64)
        """Entries, counted from the first, that were deleted before they would have been coded."""
        self._hidden_here: set[int] = set()
        """What `delete` was told, and the datastore may not know."""
        self._hide(datastore.hidden)

    @classmethod
    def build(
        cls, datastore: Datastore, start: int, stop: int, settings: Index, seed: int
    ) -> IndexShard:
        """Index the entries [start, stop), and measure the recall of what is not exact.

        Raises ValueError if an IVF index cannot be trained on that few keys or that width, and
        for a recall below `settings.min_recall`.
        """
        wanted, why = sizing.chosen(settings, stop - start, datastore.description.width)
        shard = cls(datastore, start, wanted, _empty(datastore, wanted, seed))
        shard.asked, shard.why = settings, why
        shard.add(start, stop)
        if wanted.kind != "flat":
            shard._measure(tune=settings.kind == "auto")
        least = settings.min_recall or 0.0
        if shard.recall is not None and shard.recall < least:
            raise ValueError(
                f"entries [{start}, {stop}): recall@{NEAREST} is {shard.recall:.3f} and "
                f"index.min_recall {least}: more index.probes, index.rerank or code bytes find more"
            )
        return shard

    @classmethod
    def load(cls, directory: Path | str, datastore: Datastore) -> IndexShard:
        """The shard saved in `directory`; DatastoreError if it is not one of `datastore`."""
        directory = Path(directory)
        saved = read_shard(directory)
        description = datastore.description
        expected = (description.metric, description.width)
        if (saved["metric"], saved["width"]) != expected or saved["stop"] > datastore.entries:
            raise DatastoreError(
                f"{directory} indexes entries up to {saved['stop']} of width {saved['width']} by "
                f"{saved['metric']}; {datastore} has {datastore.entries} of width "
                f"{description.width} by {description.metric}"
            )
        settings = Index.model_validate(saved["settings"])
        if settings.kind == "flat":
            shard = cls.build(datastore, saved["start"], saved["stop"], settings, seed=0)
        else:
            here = settings.model_copy(update={"gpu": None}) if settings.gpu else settings
            try:
                index = IVF.load(directory, settings, _on_gpu(datastore, here))
            except RuntimeError as error:
                raise DatastoreError(f"{directory} is damaged: {error}") from None
            if index.ntotal != saved["stop"] - saved["start"]:
                raise DatastoreError(f"{directory / CODES} holds {index.ntotal} entries")
            shard = cls(datastore, saved["start"], settings, index)
            shard._left_out = left_out(directory)
            back = np.setdiff1d(shard._left_out + shard.start, datastore.deleted)
            if len(back):  # a snapshot was gone back to since
                shard._build_again()
        shard.asked = asked_for(saved)
        shard.why, shard.recall = chosen_index(directory)
        return shard

    def save(self, directory: Path | str) -> None:
        """Write `shard.json`, and for IVF its codes; flat is the datastore's keys alone.

        The directory is written aside, flushed and renamed: if it exists, it is whole.
        """
        directory = Path(directory)
        aside = directory.with_name(f".{directory.name}")
        shutil.rmtree(aside, ignore_errors=True)
        durable.make_directory(directory.parent)
        aside.mkdir()
        if self.settings.kind != "flat":
            self._index.save(aside)
            np.save(aside / LEFT_OUT, self._left_out, allow_pickle=False)
        fields = {
            "start": self.start,
            "stop": self.stop,
            "metric": self.datastore.description.metric,
            "width": self.datastore.description.width,
            "settings": as_dict(self.settings),
            "asked": as_dict(self.asked),
            "why": self.why,
            "recall": self.recall,
        }
        write_json(aside / "shard.json", fields)
        shutil.rmtree(directory, ignore_errors=True)
        durable.rename(aside, directory)

    def add(self, start: int, stop: int) -> None:
        """Index the newly published entries [start, stop), which go on where this shard ends.

        Refreshes the datastore if it does not know them yet.
        """
        if start != self.stop or stop < start:
            raise ValueError(f"entries [{start}, {stop}) do not go on from {self.stop}")
        if stop > self.datastore.entries:
            self.datastore.refresh()
        if stop > self.datastore.entries:
            raise ValueError(f"entry {stop - 1} of a datastore of {self.datastore.entries}")
        if stop > start and not self._index.is_trained:
            self._train(start, stop)
        for block in range(start, stop, BLOCK):
            keys = self.datastore.keys(block, min(block + BLOCK, stop))
            self._longest = max(self._longest, float(np.linalg.norm(keys, axis=1).max()))
            if self.settings.kind != "flat":
                deleted = self.datastore.deleted
                first, last = np.searchsorted(deleted, (block, block + len(keys)))
                keys[deleted[first:last] - block] = np.nan  # numbered by FAISS, and in no list
                self._left_out = np.append(self._left_out, deleted[first:last] - self.start)
            self._index.add(keys)
        self.stop = stop
        self._deleted = np.pad(self._deleted, (0, stop - start))
        self._hide(self.datastore.hidden)

    def refresh(self, last: bool) -> None:
        """Hide what the datastore says was deleted since; the `last` shard takes in what was
        published since. Where entries are there again that were deleted, the shard is built again.

        The datastore itself is refreshed beforehand, once for all of its shards.
        """
        if last:
            self.add(self.stop, self.datastore.entries)
        hidden = np.array(sorted(self._hidden_here), np.int64)
        kept = np.count_nonzero(self._deleted[self._local(self.datastore.hidden)])
        own = np.setdiff1d(hidden, self.datastore.hidden, assume_unique=True)
        if kept + len(own) < self._deletions:
            self._build_again()
            self._hide(hidden)
        self._hide(self.datastore.hidden)

    def delete(self, entries: Iterable[int]) -> None:
        """Never return these again; ids outside the shard are ignored.

        Lasts as long as this object: `datastore.delete` is what makes it permanent.
        """
        given = entries if isinstance(entries, np.ndarray) else np.fromiter(entries, np.int64)
        self._hidden_here.update((self._local(given) + self.start).tolist())
        self._hide(given)

    def _hide(self, entries: np.ndarray) -> None:
        local = self._local(entries)
        self._deletions += int(np.count_nonzero(~self._deleted[local]))
        self._deleted[local] = True

    def _local(self, entries: np.ndarray) -> np.ndarray:
        """Those of `entries` that the shard has, counted from its first, each once."""
        local = entries.astype(np.int64) - self.start
        return np.unique(local[(local >= 0) & (local < len(self._deleted))])

    def _build_again(self) -> None:
        """From the keys as they are now: those of erased entries were none."""
        stop, self.stop = self.stop, self.start
        self._index = _empty(self.datastore, self.settings, seed=0)
        self._longest = 0.0
        self._deleted, self._deletions = np.zeros(0, bool), 0
        self._left_out = np.zeros(0, np.int64)
        self.add(self.start, stop)

    @property
    def deletions(self) -> int:
        """How many of its entries are deleted; counted as they are, and not at every search."""
        return self._deletions

    def hides(self, entries: np.ndarray) -> np.ndarray:
        """Which of `entries` (M,), all of them the shard's, are deleted (M,) bool."""
        return self._deleted[entries - self.start]

    def search(
        self,
        queries: np.ndarray,
        k: int,
        exclude_documents: Sequence[int] | None = None,
        settings: Index | None = None,
    ) -> Neighbours:
        """The k nearest entries to each query, as `Retriever.search` says.

        Distances are exact float32; ties go to the lower entry id. `settings` have other
        probes, refine and rerank than the shard's own. Raises ValueError for queries of another
        width than the keys, or one exclusion too many or too few.
        """
        settings = settings or self.settings
        metric, width = self.datastore.description.metric, self.datastore.description.width
        if queries.ndim != 2 or queries.shape[1] != width:
            raise ValueError(f"queries of shape {queries.shape}: the keys have width {width}")
        if k < 1:
            raise ValueError(f"{k} neighbours asked for")
        if exclude_documents is not None and len(exclude_documents) != len(queries):
            raise ValueError(f"{len(exclude_documents)} exclusions for {len(queries)} queries")
        found = np.full((len(queries), k), np.inf, np.float32)
        entries = np.full((len(queries), k), NO_ENTRY, np.int64)
        queries = np.ascontiguousarray(prepare(queries, metric))
        excluded = None if exclude_documents is None else np.asarray(exclude_documents)
        total, deleted = self.stop - self.start, self._deletions
        pending = np.arange(len(queries) if deleted < total else 0)
        fetch = k * (2 if settings.kind == "flat" else settings.rerank)
        there = total - len(self._left_out)
        fetch = -(-fetch * there // max(total - deleted, 1))  # as if deletions lay evenly
        while len(pending):
            fetch = min(fetch, total)
            asked = queries[pending]
            proposed, candidates = self._propose(asked, fetch, settings)
            hidden = self._hidden(candidates, None if excluded is None else excluded[pending])
            exact = self._distances(asked, candidates, hidden)
            order = np.lexsort((candidates, exact), axis=1)[:, :k]
            nearest = np.take_along_axis(exact, order, axis=1)
            local = np.take_along_axis(candidates, order, axis=1)
            found[pending, : order.shape[1]] = nearest
            entries[pending, : order.shape[1]] = np.where(
                np.isfinite(nearest), local + self.start, NO_ENTRY
            )
            settled = (fetch == total) | (candidates[:, -1] < 0)
            if fetch >= k:
                settled |= nearest[:, -1] < proposed - self._rounding(asked)
            pending = pending[~settled]
            fetch *= 4
        return self._neighbours(found, entries)

    def _propose(
        self, queries: np.ndarray, fetch: int, settings: Index
    ) -> tuple[np.ndarray, np.ndarray]:
        """FAISS's nearest, ids from 0: its distance of the last (B,), candidates (B, fetch)."""
        if self.settings.kind != "flat":
            candidates = self._index.search(queries, fetch, settings)
            return np.full(len(queries), np.inf, np.float32), candidates
        proposed, candidates = self._index.search(queries, fetch)
        last = proposed[:, -1]
        return -last if self._index.metric_type == faiss.METRIC_INNER_PRODUCT else last, candidates

    def _hidden(self, candidates: np.ndarray, excluded: np.ndarray | None) -> np.ndarray:
        """Which candidates (B, fetch) may not be returned: none, deleted, or excluded."""
        hidden = (candidates < 0) | self._deleted[candidates]
        if excluded is None:
            return hidden
        documents = self.datastore.documents[self.start + np.maximum(candidates, 0)]
        return hidden | (documents == excluded[:, None])

    def _distances(
        self, queries: np.ndarray, candidates: np.ndarray, hidden: np.ndarray
    ) -> np.ndarray:
        """Exact distances (B, fetch) float32, +inf where hidden."""
        exact = np.full(candidates.shape, np.inf, np.float32)
        rows, columns = np.nonzero(~hidden)
        entries = candidates[rows, columns] + self.start
        order = np.argsort(entries, kind="stable")  # as they lie on the disk, each read once
        for block in range(0, len(order), BLOCK):
            at = order[block : block + BLOCK]
            wanted, places = np.unique(entries[at], return_inverse=True)
            keys = self.datastore.keys_of(wanted)[places]
            exact[rows[at], columns[at]] = distances(
                queries[rows[at]], keys, self.datastore.description.metric
            )
        return exact

    def _rounding(self, queries: np.ndarray) -> np.ndarray:
        """How far FAISS's distances and the exact ones may be apart at most (B,)."""
        reach = np.linalg.norm(queries, axis=1) + np.float32(self._longest)
        return (queries.shape[1] + 4) * np.finfo(np.float32).eps * reach * reach

    def _neighbours(self, found: np.ndarray, entries: np.ndarray) -> Neighbours:
        missing = Neighbours.none(*entries.shape)
        at = entries != NO_ENTRY
        missing.tokens[at], missing.documents[at] = self.datastore.said(entries[at])
        return Neighbours(found, missing.tokens, entries, missing.documents)

    def _measure(self, tune: bool) -> None:
        """Set `recall`; with `tune`, search more until it is good or costs too much."""
        # A shard has its part of the nearest of all, which are nearer than as many of its own.
        part = max(1, NEAREST // self.settings.shards)
        held_out = HeldOutQueries(self.datastore, self.start, self.stop, part)
        self.recall = held_out.recall(self.search)
        while tune and self.recall is not None and self.recall < sizing.GOOD_RECALL:
            tried = []
            for wider in sizing.wider(self.settings, self.stop - self.start):
                search = partial(self.search, settings=wider)
                tried.append((held_out.recall(search), wider))
            recall, wider = max(tried, key=lambda one: one[0], default=(-np.inf, self.settings))
            if recall - self.recall < sizing.LEAST_GAIN:
                return
            self.recall, self.settings = recall, wider

    def _train(self, start: int, stop: int) -> None:
        """Train lists and codes on evenly spaced keys, as many as k-means makes use of."""
        needed, reason = self.settings.lists, f"index.lists {self.settings.lists}"
        if self.settings.kind == "ivfpq" and needed < CODE_CENTROIDS:
            needed, reason = CODE_CENTROIDS, "index.kind ivfpq"
        if stop - start < needed:
            raise ValueError(
                f"{reason} needs at least {needed} keys to train on and this shard has "
                f"{stop - start}: use fewer index.lists, fewer index.shards, or index.kind flat"
            )
        entries = np.arange(start, stop)
        living = np.setdiff1d(entries, self.datastore.deleted, assume_unique=True)
        among = living if len(living) >= needed else entries
        wanted = min(len(among), needed * LIST_POINTS)
        places = np.linspace(0, len(among) - 1, wanted).astype(np.int64)
        self._index.train(self.datastore.keys_of(among[places]))


def shard_directory(datastore: Path, number: int) -> Path:
    """Where a datastore keeps its shard `number`."""
    return index_directory(datastore) / f"shard-{number:05d}"


def saved_shards(datastore: Path) -> list[Path]:
    """The directories of a datastore's shards, in order of their entries."""
    return sorted(index_directory(datastore).glob("shard-*"))


def index_directory(datastore: Path) -> Path:
    """`index`, or what POINTER names once it was built anew: never the same again."""
    try:
        return datastore / json.loads((datastore / POINTER).read_text())["directory"]
    except FileNotFoundError:
        return datastore / INDEX
    except (ValueError, KeyError, TypeError) as error:
        raise DatastoreError(f"{datastore / POINTER} is damaged: {error}") from None


def build_again(directory: Path | str, settings: Index, seed: int = 0) -> list[IndexShard]:
    """Index a datastore anew, in `settings.shards` shards, beside the index that there is; what
    opens the datastore from now on finds the new one.

    Whoever holds the old index may go on; it is removed when the next one is built. Raises what
    `IndexShard.build` raises, and then the old index stays. One at a time (`reindexing`).
    """
    directory = Path(directory).absolute()
    datastore, current = Datastore.open(directory), index_directory(directory)
    fresh = directory / f"{INDEX}-{uuid4().hex[:8]}"
    built = []
    try:
        for number, span in enumerate(shard_ranges(datastore.entries, settings.shards)):
            built.append(IndexShard.build(datastore, *span, settings, seed))
            built[-1].save(fresh / f"shard-{number:05d}")
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    write_json(directory / POINTER, {"directory": fresh.name})
    for old in [directory / INDEX, *directory.glob(f"{INDEX}-*")]:
        if old not in (fresh, current):
            shutil.rmtree(old, ignore_errors=True)
    return built


def chosen_index(shard: Path) -> tuple[str, float | None]:
    """Why a saved shard is indexed as it is, and the recall that was measured, if any was."""
    saved = read_shard(shard)
    return saved["why"], saved["recall"]


def read_shard(shard: Path) -> dict[str, Any]:
    """What is written of a saved shard; DatastoreError if there is none."""
    try:
        return json.loads((shard / "shard.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise DatastoreError(f"{shard} holds no index shard: {error}") from None


def asked_for(saved: Mapping[str, Any]) -> Index:
    """The settings that a saved shard was built with, `auto` where that chose."""
    return Index.model_validate(saved["asked"])


def left_out(shard: Path) -> np.ndarray:
    """The entries (M,) int64 of a saved IVF shard, counted from its first, that it does not
    hold."""
    return open_mapped(shard / LEFT_OUT)


def save_index(directory: Path | str) -> None:
    """Index what is published so far in one flat shard, unless shards are saved there already; what
    it grows to, `auto` chooses (`reindexing`).

    Makes a datastore that was just created, which may be empty, one that `LocalRetriever.load`
    opens; what is published afterwards, its last shard takes in. Safe in many processes at once.
    """
    directory = Path(directory).absolute()
    if saved_shards(directory):
        return
    datastore = Datastore.open(directory)
    aside = directory / f".index.{uuid4().hex}"
    shard = IndexShard.build(datastore, 0, datastore.entries, Index(kind="flat", shards=1), seed=0)
    shard.asked = Index(kind="auto", shards=1)
    shard.save(shard_directory(aside, 0))
    try:
        durable.rename(aside / INDEX, directory / INDEX)
    except OSError:  # another process was first
        if not saved_shards(directory):
            raise
    finally:
        shutil.rmtree(aside)


def shard_ranges(entries: int, shards: int) -> list[tuple[int, int]]:
    """[start, stop) of each of `shards` shards: contiguous, sizes differing by one at most."""
    edges = [entries * shard // shards for shard in range(shards + 1)]
    return list(pairwise(edges))


def _empty(datastore: Datastore, settings: Index, seed: int) -> faiss.Index | IVF:
    width = datastore.description.width
    by_product = datastore.description.metric == "ip"
    if settings.kind != "flat":
        on_gpu = _on_gpu(datastore, settings)
        return IVF.create(width, by_product, settings, seed, on_gpu)
    return faiss.IndexFlat(width, faiss.METRIC_INNER_PRODUCT if by_product else faiss.METRIC_L2)


def _on_gpu(datastore: Datastore, settings: Index) -> bool:
    coded = TURNED_DIMENSIONS * settings.code_bytes
    return gpu.used(settings, coded if settings.turned else datastore.description.width)


def _tune() -> None:
    """Let FAISS multiply matrices where that is faster.

    FAISS 1.15 raised its threshold (queries x width) for machines of many threads; on one thread
    a flat search of 32 queries is five times slower for it. Another value than its own stays.
    """
    if faiss.cvar.distance_compute_blas_threshold == 128_000:
        faiss.cvar.distance_compute_blas_threshold = 800 * faiss.omp_get_max_threads()
