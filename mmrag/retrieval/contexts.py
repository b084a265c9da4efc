"""What an adapter is shown while it learns to read: the right words, the wrong ones, or none.

Lists of phrases with the truth among distractors, or without it; windows that a search brought,
from a datastore that knows and from one that does not. An adapter that had always been told the
truth would believe anything.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from mmrag.arrays import Growing, mapped
from mmrag.artifact import local
from mmrag.config import Contexts
from mmrag.model.cross_attention import Windows
from mmrag.model.packed import made, stamps
from mmrag.names import Lookup, Names, NamesWriter, digest
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.phrases import Phrases
from mmrag.storage import Location

FOREVER = 2**31
ALIKE = 5
"""Phrases that sound like an entity, at most, in a list that holds such."""
NeighbourEntries = Mapping[str, np.ndarray]
"""Utterance -> the entries near each of its tokens (T, K), -1 for none."""


def write_neighbours(path: Path, found: NeighbourEntries) -> None:
    """One part; `path` appears only once it is whole."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.npz")
    names = np.array(list(found), str)
    counts = np.array([len(rows) for rows in found.values()])
    entries = np.concatenate(list(found.values()))
    np.savez(aside, utterances=names, counts=counts, entries=entries)
    aside.replace(path)


def read_neighbours(directory: Location) -> NeighbourEntries:
    """All parts in `directory`; ValueError if there is none."""
    found = {}
    for part in _parts(directory):
        names, counts, entries = _read_part(part)
        found |= dict(zip(names, np.split(entries, np.cumsum(counts)[:-1]), strict=True))
    return found


def pack_neighbours(directory: Location, packed: Path) -> Path:
    """What `read_neighbours` gives, part by part into `packed`, for `PackedNeighbours`; `packed`.

    What is there already is used if it was made from just these parts.
    """
    parts = _parts(directory)

    def fill(aside: Path) -> dict[str, int]:
        writer, files, digests = NamesWriter(aside, "names"), {}, [np.zeros(0, np.uint64)]
        ends = Growing(aside / "ends.npy", np.int64)
        for part in parts:
            names, counts, entries = _read_part(part)
            if not files:
                files["entries"] = Growing(aside / "entries.npy", entries.dtype, entries.shape[1])
            ends.append(len(files["entries"]) + np.cumsum(counts))
            files["entries"].append(entries)
            writer.append(Names.of(names))
            digests.append(np.array([digest(name) for name in names], np.uint64))
        for file in (writer, ends, *files.values()):
            file.close()
        Lookup.write(aside, np.concatenate(digests))
        return {"utterances": len(ends)}

    return made(packed, {"neighbours": stamps(parts)}, fill)


def _parts(directory: Location) -> list[Path]:
    directory = local(directory)
    parts = sorted(directory.glob("part-*.npz"))
    if not parts:
        raise ValueError(f"no neighbours in {directory} (made by: python -m jobs.retrieve)")
    return parts


def _read_part(part: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """A part's utterances, how many tokens each has, and the entries near all of them."""
    with np.load(part, allow_pickle=False) as stored:
        return stored["utterances"].tolist(), stored["counts"], stored["entries"]


class PackedNeighbours(Mapping[str, np.ndarray]):
    """What `pack_neighbours` packed, mapped: an utterance's entries are read when it is asked for.

    Of an utterance that stands twice the later is meant, as in `read_neighbours`.
    """

    def __init__(self, packed: Path) -> None:
        self._names = Names.open(packed, "names")
        self._find = Lookup(packed, self._names)
        self._ends = mapped(packed / "ends.npy")
        self._entries = mapped(packed / "entries.npy")

    def __getitem__(self, name: str) -> np.ndarray:
        places = self._find(name)
        if not len(places):
            raise KeyError(name)
        last = int(places[-1])
        start = int(self._ends[last - 1]) if last else 0
        return np.array(self._entries[start : int(self._ends[last])])

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(self._names))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class TrainingContexts:
    """The contexts of a training run: called with examples and a random generator."""

    def __init__(
        self,
        settings: Contexts,
        names: Sequence[str],
        entities: Sequence[Sequence[str]],
        phrases: Phrases,
        retrieved: tuple[Datastore, NeighbourEntries],
        wrong: tuple[Datastore, NeighbourEntries],
    ) -> None:
        """`names` and `entities` are those of the examples, by their index."""
        self._settings = settings
        self._names = names
        self._entities = entities
        self._phrases = phrases
        self._near = {"retrieved": retrieved, "wrong": wrong}
        self._alike = phrases.alike(ALIKE) if settings.near else {}

    def __call__(self, chosen: Sequence[int], draw: np.random.Generator) -> Windows:
        """The windows of one micro-batch, all of it in one kind of context."""
        kinds = list(self._settings.mixture)
        weights = np.array(list(self._settings.mixture.values()))
        kind = kinds[draw.choice(len(kinds), p=weights / weights.sum())]
        match kind:
            case "empty":
                return self._windows(self._phrases.datastore, [[] for _ in chosen])
            case "phrases":
                return self._windows(self._phrases.datastore, self._lists(chosen, draw))
            case _:
                datastore, found = self._near[kind]
                rows = [self._searched(found[self._names[one]], draw) for one in chosen]
                return self._windows(datastore, rows)

    def _lists(
        self, chosen: Sequence[int], draw: np.random.Generator
    ) -> list[list[tuple[int, int, int]]]:
        """A list of phrases for each example; distractors are shared, which spares encoding."""
        shortest, longest = map(math.log, self._settings.list_length)
        length = round(math.exp(draw.uniform(shortest, longest)))
        own = [
            [self._mention(name, draw) for name in self._entities[one]]
            if draw.random() < self._settings.own
            else []
            for one in chosen
        ]
        alike = [
            list(dict.fromkeys(chain(*(self._alike.get(name, ()) for name in self._entities[one]))))
            if self._settings.near and draw.random() < self._settings.near
            else []
            for one in chosen
        ]
        others = draw.choice(len(self._phrases.names), min(length, len(self._phrases.names)), False)
        pool = {self._phrases.names[other]: None for other in others}
        pool |= {name: None for one in chosen for name in self._entities[one]}
        pool |= {name: None for names in alike for name in names}
        spoken = {name: self._mention(name, draw) for name in pool}
        rows = []
        for one, mine, like in zip(chosen, own, alike, strict=True):
            unsaid = [name for name in pool if name not in self._entities[one]]
            close = [spoken[name] for name in like if name in unsaid]
            distractors = [spoken[name] for name in unsaid if name not in like]
            draw.shuffle(distractors)
            every = (*mine, *close, *distractors)
            listed = [entry for entry in every if entry is not None][:length]
            rows.append([(entry, 0, FOREVER) for entry in listed])
        return rows

    def _mention(self, phrase: str, draw: np.random.Generator) -> int | None:
        mentions = self._phrases.mentions(phrase)
        return mentions[draw.integers(len(mentions))] if mentions else None

    def _searched(self, near: np.ndarray, draw: np.random.Generator) -> list[tuple[int, int, int]]:
        """What searches every few tokens of an utterance bring, each until the next."""
        stride = int(draw.choice(self._settings.strides))
        times = [0, *range(int(draw.integers(stride)) or stride, len(near), stride)]
        return [
            (int(entry), since, until)
            for since, until in zip(times, [*times[1:], FOREVER], strict=True)
            for entry in near[since, : self._settings.k]
            if entry >= 0
        ]

    def _windows(
        self, datastore: Datastore, rows: Sequence[Sequence[tuple[int, int, int]]]
    ) -> Windows:
        """Rows of (entry, since, until) as tensors; an entry that stands twice is there once."""
        entries = np.unique([entry for row in rows for entry, _, _ in row]).astype(np.int64)
        entries = entries if len(entries) else np.zeros(1, np.int64)
        found = datastore.passages(entries)
        width = int(found.present.sum(1).max())
        most = max(1, *map(len, rows))
        table = np.full((3, len(rows), most), -1, np.int64)
        for number, row in enumerate(rows):
            if row:
                table[:, number, : len(row)] = np.array(row).T
                table[0, number, : len(row)] = np.searchsorted(
                    entries, table[0, number, : len(row)]
                )
        index, since, until = torch.from_numpy(table)
        return Windows(
            tokens=torch.from_numpy(found.tokens[:, :width]).long(),
            present=torch.from_numpy(found.present[:, :width]),
            keys=torch.from_numpy(found.keys[:, :width]).float(),
            index=index,
            since=since,
            until=until,
        )
