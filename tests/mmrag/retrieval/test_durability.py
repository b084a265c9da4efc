"""What an acknowledged write leaves on disk when the power goes at any moment."""

import errno
import os
import random
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from lossy_disk import LossyDisk, PowerCutError

from mmrag.config import Index
from mmrag.retrieval.compaction import compact
from mmrag.retrieval.datastore import Datastore, create, delete, publish, write_segment
from mmrag.retrieval.index import IndexShard, save_index, saved_shards, shard_directory
from mmrag.retrieval.segment import Description, Segment, windows_of
from mmrag.retrieval.verify import verify

DESCRIPTION = Description(width=4, window=3, metric="l2", audio="none", identity={"lm": "aaaa"})
LIST = "segments.json"


class Disk:
    """Watches what is flushed and what is renamed, and cuts the power before step `cut`."""

    def __init__(self, patch: pytest.MonkeyPatch, cut: int | None = None) -> None:
        self.steps: list[tuple[str, Path]] = []
        self.flushed: dict[int, int] = {}
        """Inode -> modification time of the contents, or entries, that are safe."""
        self.lost: list[str] = []
        """What a list named before it was safe."""
        self._cut = cut
        rename, replace = os.rename, os.replace

        def watched_flush(real):
            def flush(descriptor: int) -> None:
                self._step("flush", Path(os.readlink(f"/proc/self/fd/{descriptor}")))
                real(descriptor)
                status = os.fstat(descriptor)
                self.flushed[status.st_ino] = status.st_mtime_ns

            return flush

        def watched(real):
            def move(source, target, **options) -> None:
                self._step("rename", Path(target))
                self.check(Path(source), Path(target))
                real(source, target, **options)

            return move

        patch.setattr(os, "fsync", watched_flush(os.fsync))
        patch.setattr(os, "fdatasync", watched_flush(os.fdatasync))
        patch.setattr(os, "rename", watched(rename))
        patch.setattr(os, "replace", watched(replace))

    def _step(self, kind: str, path: Path) -> None:
        if self._cut is not None and len(self.steps) >= self._cut:
            raise PowerCutError
        self.steps.append((kind, path))

    def safe(self, path: Path) -> bool:
        """Whether contents or entries are flushed as they are now."""
        status = path.stat()
        return self.flushed.get(status.st_ino) == status.st_mtime_ns

    def check(self, source: Path, target: Path) -> None:
        """What moves into place is flushed; what a list names is too, with all that leads there."""
        moved = [source, *source.rglob("*")] if source.is_dir() else [source]
        named = list(target.parent.glob("segments/*")) if target.name == LIST else []
        leading = [target.parent / "segments"] if named else []
        self.lost += [str(one) for one in (*moved, *named, *leading) if not self.safe(one)]


def segment(first: int) -> Segment:
    tokens = first + np.arange(4)
    return Segment(
        keys=np.random.default_rng(first).standard_normal((4, 4)),
        tokens=tokens,
        windows=windows_of(tokens, 3),
        positions=np.arange(4),
        utterances=np.zeros(4, int),
        names=[(f"u{first}", f"d{first}")],
    )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    create(tmp_path / "store", DESCRIPTION)
    write_segment(tmp_path / "store", "first", segment(10))
    publish(tmp_path / "store", ["first"])
    return tmp_path / "store"


def add(directory: Path) -> None:
    write_segment(directory, "second", segment(20))
    publish(directory, ["second"])


def compact_all(directory: Path) -> None:
    compact(directory, everything=True)


def test_every_file_is_flushed_before_the_list_names_it(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    directory = tmp_path / "deep" / "store"
    create(directory, DESCRIPTION)
    add(directory)
    delete(directory, [1, 2])
    compact_all(directory)
    assert disk.lost == []
    flushed = {path for kind, path in disk.steps if kind == "flush"}
    for place in (tmp_path, tmp_path / "deep", directory, directory / "segments"):
        assert place in flushed and disk.safe(place), place
    assert disk.steps[-1] == ("flush", directory)
    locks = (".lock", ".compacting")
    assert all(disk.safe(file) for file in directory.rglob("*") if file.name not in locks)


def test_an_unflushed_file_would_be_noticed(directory, monkeypatch):
    disk = Disk(monkeypatch)
    for flush in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, flush, lambda descriptor: None)
    add(directory)
    segments = directory / "segments"
    assert {str(segments), str(segments / "second.safetensors")} <= set(disk.lost)


CHANGES = pytest.mark.parametrize(
    ("change", "before", "after"),
    [
        (add, [10, 11, 12, 13], [10, 11, 12, 13, 20, 21, 22, 23]),
        (lambda directory: delete(directory, [1]), [10, 11, 12, 13], [10, 12, 13]),
        (compact_all, [10, 11, 12, 13], [10, 11, 12, 13]),
    ],
    ids=["add", "delete", "compact"],
)


def living(directory: Path) -> list[int]:
    """Tokens of the entries that are not deleted."""
    store = Datastore.open(directory)
    return np.delete(store.tokens, store.deleted).tolist()


def scatter(directory: Path) -> None:
    """Small segments to merge, and deleted entries to erase."""
    for first in (30, 40):
        write_segment(directory, f"more-{first}", segment(first))
        publish(directory, [f"more-{first}"])
    delete(directory, range(4, 12))


@CHANGES
def test_a_disk_that_is_full_loses_nothing_and_the_change_is_made_once_there_is_room(
    directory, change, before, after
):
    """No file may grow beyond a limit: the write that would fails, as on a full disk."""
    if change is compact_all:
        scatter(directory)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    failures = []
    for limit in range(0, 6000, 200):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        try:
            change(directory)
        except OSError as error:
            failures.append(error.errno)
            continue
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            assert living(directory) in (before, after)
        break
    assert set(failures) == {errno.EFBIG} and living(directory) == after
    assert list(verify(directory)) == []


@CHANGES
def test_power_lost_at_any_step_leaves_the_old_list_or_the_new_one(
    directory, monkeypatch, change, before, after
):
    if change is compact_all:
        scatter(directory)
    for cut in range(100):
        with monkeypatch.context() as patch:
            disk = Disk(patch, cut)
            try:
                change(directory)
            except PowerCutError:
                listed = ("rename", directory / LIST) in disk.steps
                assert living(directory) == (after if listed else before), disk.steps
                if not listed:
                    continue
            break
    assert cut > 3
    assert living(directory) == after


Living = dict[int, tuple[int, str, int]]
"""Entry -> its token, its document, the number of that."""


def seen(directory: Path) -> Living:
    """The entries that are not deleted, of a datastore that is whole."""
    assert list(verify(directory)) == []
    store = Datastore.open(directory)
    entries = np.setdiff1d(np.arange(store.entries), store.deleted)
    documents = [document for document, _ in store.origins(entries)]
    numbers = store.documents[entries].tolist()
    assert (
        len(set(documents)) == len(set(numbers)) == len(set(zip(documents, numbers, strict=True)))
    )
    told = zip(store.tokens[entries].tolist(), documents, numbers, strict=True)
    return dict(zip(entries.tolist(), told, strict=True))


class Rounds:
    """Changes to a datastore drawn at random, and what has to be in it after each."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.entries = 0
        """Those that were given an id, deleted ones included."""
        self.living: Living = {}
        self.waiting: list[int] = []
        """Segments that are written and not published."""
        self.number = 0

    def write(self, directory: Path) -> None:
        self.number += 1
        one = segment(10 * self.number)
        one = replace(one, names=[(f"u{self.number}", f"d{self.number % 7}")])
        write_segment(directory, f"s-{self.number}", one)
        self.waiting.append(self.number)

    def publish(self, directory: Path) -> None:
        publish(directory, [f"s-{number}" for number in self.waiting])

    def add(self, directory: Path) -> None:
        self.write(directory)
        self.publish(directory)

    def delete(self, directory: Path) -> None:
        delete(directory, self.gone)

    def compact(self, directory: Path) -> None:
        compact(directory, everything=self.chance.random() < 0.5)

    def draw(self) -> str:
        """What is done next."""
        gone = self.chance.sample(range(self.entries), min(self.entries, self.chance.randrange(9)))
        self.gone = gone
        return self.chance.choice(["write", "publish", "add", "add", "delete", "compact"])

    def check(self, directory: Path, change: str, done: bool) -> None:
        """All that was acknowledged is there, and of a change that was cut off all or nothing."""
        found = seen(directory)
        tokens = {entry: told[:2] for entry, told in found.items()}
        before = {entry: told[:2] for entry, told in self.living.items()}
        after = dict(before)
        if change == "delete":
            after = {entry: told for entry, told in before.items() if entry not in self.gone}
        if change in ("add", "publish"):
            for place, number in enumerate(self.waiting):
                first = self.entries + 4 * place
                new = segment(10 * number).tokens.tolist()
                after |= {first + n: (one, f"d{number % 7}") for n, one in enumerate(new)}
        assert tokens == after or (tokens == before and not done), change
        assert all(found[entry] == told for entry, told in self.living.items() if entry in found)
        if change in ("add", "publish") and tokens == after:
            self.entries += 4 * len(self.waiting)
            self.waiting = []
        self.living = found


@pytest.mark.parametrize("seed", range(4))
def test_fifty_rounds_of_changes_and_power_cuts_lose_nothing_that_was_acknowledged(
    tmp_path, monkeypatch, seed
):
    chance = random.Random(seed)
    rounds, cuts = Rounds(chance), 0
    create(tmp_path / "0", DESCRIPTION)
    for number in range(50):
        directory, left = tmp_path / str(number), tmp_path / str(number + 1)
        change, done = rounds.draw(), True
        with monkeypatch.context() as patch:
            disk = LossyDisk(patch, directory, left, chance.randrange(20), chance)
            try:
                getattr(rounds, change)(directory)
                disk.cut_power()
            except PowerCutError:
                cuts, done = cuts + 1, False
        shutil.rmtree(directory)
        rounds.check(left, change, done)
    assert 15 < cuts < 40 and rounds.entries > 40


@pytest.mark.parametrize("kind", ["flat", "ivfsq", "ivfpq"])
def test_an_index_shard_is_flushed_before_it_has_its_name(tmp_path, monkeypatch, kind):
    create(tmp_path, DESCRIPTION)
    random = np.random.default_rng(0)
    large = Segment(
        keys=random.standard_normal((300, 4)),
        tokens=np.arange(300),
        windows=np.zeros((300, 3)),
        positions=np.arange(300),
        utterances=np.zeros(300, int),
        names=[("u", "d")],
    )
    write_segment(tmp_path, "only", large)
    publish(tmp_path, ["only"])
    store = Datastore.open(tmp_path)
    codes = {"code_bytes": 2} if kind == "ivfpq" else {"scalar_bits": 8}
    settings = Index(kind=kind, shards=1, lists=2, probes=2, **codes)
    shard = IndexShard.build(store, 0, 300, settings, seed=1)
    disk = Disk(monkeypatch)
    shard.save(shard_directory(tmp_path, 0))
    assert disk.lost == []
    [saved] = saved_shards(tmp_path)
    assert all(disk.safe(one) for one in (tmp_path, tmp_path / "index", saved, *saved.iterdir()))
    before = len(disk.steps)
    again = IndexShard.load(saved, store)
    again.save(saved)
    assert disk.lost == [] and len(disk.steps) > before and disk.safe(tmp_path / "index")


def test_the_index_of_an_open_datastore_is_flushed_too(directory, monkeypatch):
    disk = Disk(monkeypatch)
    save_index(directory)
    [saved] = saved_shards(directory)
    assert disk.lost == []
    assert all(disk.safe(one) for one in (directory / "index", saved, *saved.iterdir()))
    assert ("flush", directory) in disk.steps
