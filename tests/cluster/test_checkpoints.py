"""A checkpoint is put together from whatever shares it was cut in, and is whole or not there."""

import json
import threading
import time
from concurrent.futures import Future
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray.train
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow.fs import LocalFileSystem
from ray.train import Checkpoint, CheckpointUploadMode
from safetensors.torch import load_file

from cluster import checkpoints
from cluster.checkpoints import (
    COPY,
    FIELDS,
    LAYOUT,
    LISTED,
    Bookkeeping,
    CheckpointError,
    Saved,
    Share,
    StorageError,
    Uploads,
    listed,
    mend,
    part_file,
)

SIZES = {"embedding": 40, "norm": 3, "head": 17}
WHOLE = {
    f"{kind}/{name}": torch.arange(size, dtype=torch.float32) + 100 * place + 10 * len(name)
    for place, kind in enumerate(("weight", "exp_avg", "exp_avg_sq"))
    for name, size in SIZES.items()
}


def shares(cuts: list[dict[str, int]]) -> list[Share]:
    """Shares of the parameters of SIZES, cut at these places."""
    edges = [dict.fromkeys(SIZES, 0), *cuts, SIZES]
    made = []
    for before, after in pairwise(edges):
        share = Share(steps=dict.fromkeys(SIZES, 7))
        for name in SIZES:
            start, stop = before[name], after[name]
            if start < stop:
                share.ranges[name] = (start, stop)
                for kind in ("weight", "exp_avg", "exp_avg_sq"):
                    share.tensors[f"{kind}/{name}"] = WHOLE[f"{kind}/{name}"][start:stop].clone()
        made.append(share)
    return made


def store(directory: Path, parts: list[Share], **fields) -> Saved:
    directory.mkdir(exist_ok=True)
    for number, share in enumerate(parts):
        share.write(directory / part_file(number))
    about = {"layout": LAYOUT, "workers": len(parts), "step": 7, **fields}
    (directory / FIELDS).write_text(json.dumps(about))
    return Saved(LocalFileSystem(), str(directory))


@st.composite
def cut(draw):
    """Any number of workers up to five, each parameter cut wherever it may be."""
    workers = draw(st.integers(0, 4))
    places = {
        name: sorted(draw(st.lists(st.integers(0, size), min_size=workers, max_size=workers)))
        for name, size in SIZES.items()
    }
    return [{name: places[name][one] for name in SIZES} for one in range(workers)]


@settings(deadline=None, max_examples=40)
@given(cut(), cut())
def test_any_worker_reads_its_range_whatever_shares_were_stored(tmp_path_factory, made, read):
    saved = store(tmp_path_factory.mktemp("cut"), shares(made))
    assert saved.names == set(SIZES) and saved.steps == dict.fromkeys(SIZES, 7)
    for mine in shares(read):
        for key, values in mine.tensors.items():
            start, stop = mine.ranges[key.split("/")[1]]
            assert torch.equal(saved.read(key, start, stop), values)
    saved.close()


def test_a_share_is_a_safetensors_file(tmp_path):
    [share] = shares([])
    share.write(tmp_path / "part.safetensors")
    loaded = load_file(tmp_path / "part.safetensors")
    assert loaded.keys() == WHOLE.keys()
    assert all(torch.equal(loaded[key], values) for key, values in WHOLE.items())


def test_what_is_missing_or_cut_short_is_named(tmp_path):
    half = shares([{name: size // 2 for name, size in SIZES.items()}])
    saved = store(tmp_path / "half", half[:1])
    assert torch.equal(saved.read("weight/head", 0, 8), WHOLE["weight/head"][:8])
    with pytest.raises(StorageError, match=r"half is damaged: weight/head is missing from 8 to 17"):
        saved.read("weight/head", 0, 17)
    saved = store(tmp_path / "short", half)
    file = tmp_path / "short" / part_file(1)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(
        StorageError, match="short is damaged: exp_avg_sq/head is missing from 8 to 17"
    ):
        saved.read("exp_avg_sq/head", 0, 17)


@pytest.mark.parametrize("fields", [{"layout": 2}, {"layout": None}])
def test_a_checkpoint_of_another_version_is_refused_by_name(tmp_path, fields):
    with pytest.raises(CheckpointError, match=r"was written by another version .* --force"):
        store(tmp_path / "other", shares([]), **fields)
    (tmp_path / "other" / FIELDS).unlink()
    with pytest.raises(CheckpointError, match="another version"):
        Saved(LocalFileSystem(), str(tmp_path / "other"))


class Storage:
    """Ray Train's storage and its one upload thread, with a lock that an upload waits for."""

    def __init__(self, root: Path) -> None:
        self.experiment_fs_path, self.reported, self.running, self.most = str(root), [], 0, 0
        self.open = threading.Event()

    def persist_current_checkpoint(self, staged: Checkpoint, name: str) -> Checkpoint:
        self.running += 1
        self.most = max(self.most, self.running)
        self.open.wait(20)
        target = Path(self.experiment_fs_path) / name
        target.mkdir(parents=True)
        for file in Path(staged.path).iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        self.running -= 1
        return Checkpoint.from_directory(target)

    def report(self, metrics, checkpoint, checkpoint_upload_fn, **options) -> None:
        assert options["checkpoint_upload_mode"] == CheckpointUploadMode.ASYNC
        self.reported.append(metrics["step"])
        name = f"checkpoint_{metrics['step']}"
        threading.Thread(target=checkpoint_upload_fn, args=(checkpoint, name), daemon=True).start()


@pytest.fixture
def storage(tmp_path, monkeypatch) -> Storage:
    storage = Storage(tmp_path / "stored")
    context = SimpleNamespace(get_storage=lambda: storage)
    monkeypatch.setattr(ray.train, "report", storage.report)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(Share, "of", classmethod(lambda cls, engine: shares([])[0]))
    return storage


def test_a_checkpoint_is_stored_while_training_goes_on_and_never_two_at_a_time(storage, tmp_path):
    uploads = Uploads(tmp_path, str(tmp_path / "disk"), 0, 1)
    uploads.send(None, {"step": 10})
    assert storage.reported == [10] and not list(Path(storage.experiment_fs_path).glob("*"))
    second = threading.Thread(target=uploads.send, args=(None, {"step": 20}), daemon=True)
    second.start()
    time.sleep(0.2)
    assert storage.reported == [10], "the second waits for the first"
    storage.open.set()
    second.join(20)
    uploads.close()
    assert storage.reported == [10, 20] and storage.most == 1
    for step in (10, 20):
        saved = Saved(LocalFileSystem(), f"{storage.experiment_fs_path}/checkpoint_{step}")
        assert saved.fields["step"] == step and saved.names == set(SIZES)
    told = uploads.told()
    assert told.keys() == {"checkpoint_stall_seconds", "checkpoint_upload_seconds"}
    assert uploads.told() == {}
    assert not list((tmp_path / "disk").iterdir()), "the node's disk is left as it was"


def test_what_is_stored_is_what_was_held_when_it_was_sent(storage, tmp_path, monkeypatch):
    held = shares([])[0]
    monkeypatch.setattr(Share, "of", classmethod(lambda cls, engine: held))
    uploads = Uploads(tmp_path, str(tmp_path / "disk"), 0, 1)
    uploads.send(None, {"step": 10})
    uploads.copied()
    for values in held.tensors.values():
        values.zero_()  # the next step is taken, while the checkpoint is on its way
    storage.open.set()
    uploads.close()
    saved = Saved(LocalFileSystem(), f"{storage.experiment_fs_path}/checkpoint_10")
    for key, values in WHOLE.items():
        assert torch.equal(saved.read(key, 0, len(values)), values)


def test_an_upload_that_fails_names_its_step_and_place(storage, tmp_path):
    def full(staged: Checkpoint, name: str) -> Checkpoint:
        raise OSError("No space left on device")

    storage.persist_current_checkpoint = full
    uploads = Uploads(tmp_path, str(tmp_path / "disk"), 0, 1)
    copied = Future()
    copied.set_result(shares([])[0])
    upload = uploads._uploading(copied, {"step": 30})
    uploads._staging.mkdir(parents=True)
    named = "the checkpoint of step 30 could not be stored as .*stored/checkpoint_30: No space"
    with pytest.raises(StorageError, match=named):
        upload(Checkpoint.from_directory(uploads._staging), "checkpoint_30")


def kept(folder: Path, *names: str) -> str:
    """A run's storage with these checkpoints, all of them on Ray Train's list; the list."""
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / FIELDS).write_text("{}")
    text = json.dumps({"checkpoint_results": [{"checkpoint_dir_name": name} for name in names]})
    (folder / LISTED).write_text(text)
    return text


def test_a_list_that_a_kill_left_half_written_is_the_one_before(tmp_path):
    whole = kept(tmp_path, "checkpoint_1", "checkpoint_2")
    Bookkeeping().after_report(None, [], Checkpoint.from_directory(tmp_path / "checkpoint_2"))
    assert (tmp_path / COPY).read_text() == whole
    (tmp_path / "checkpoint_3").mkdir()
    (tmp_path / LISTED).write_text(whole[:25])
    assert listed(tmp_path) is None
    mend(tmp_path)
    assert listed(tmp_path) == ["checkpoint_1", "checkpoint_2"]
    assert sorted(one.name for one in tmp_path.glob("checkpoint_?")) == listed(tmp_path)


def test_shares_of_a_checkpoint_that_was_never_whole_are_cleared_away(tmp_path):
    mend(tmp_path / "nothing yet")
    kept(tmp_path, "checkpoint_1")
    (tmp_path / "checkpoint_2").mkdir()
    mend(tmp_path)
    assert [one.name for one in tmp_path.glob("checkpoint_?")] == ["checkpoint_1"]
    (tmp_path / LISTED).unlink()
    mend(tmp_path)
    assert not list(tmp_path.glob("checkpoint_?")), "none was on a list"


def test_half_a_list_without_a_copy_is_no_list(tmp_path):
    whole = kept(tmp_path, "checkpoint_1")
    (tmp_path / LISTED).write_text(whole[:9])
    mend(tmp_path)
    assert listed(tmp_path) is None and not (tmp_path / LISTED).exists()
    assert (tmp_path / "checkpoint_1").exists(), "what is not understood is not deleted"
    assert checkpoints.listed(tmp_path / "nowhere") is None
