"""A worker that is asked to leave tells the others after its step."""

import os
import signal
from collections.abc import Iterator

import pytest
import ray.train
import torch

from cluster import preemption
from cluster.preemption import NOTICE_SECONDS, STOP, ListeningConfig, Notice, listen, stopping


@pytest.fixture
def notice(tmp_path, monkeypatch) -> Iterator[Notice]:
    """That of the one worker of a group, with Ray's notices none, and SIGTERM's handler put back
    in the end."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: None)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    listen()
    yield Notice(0, torch.device("cpu"), tmp_path)
    torch.distributed.destroy_process_group()
    signal.signal(signal.SIGTERM, before)
    preemption._asked.clear()


def test_a_worker_stays_until_it_is_asked_and_sigterm_asks_it(notice):
    assert not notice.agreed()
    os.kill(os.getpid(), signal.SIGTERM)
    assert notice.agreed() and notice.agreed()


def test_sigterm_to_whoever_runs_the_training_asks_all_workers_once(notice, tmp_path, capfd):
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append("as before"))
    (tmp_path / STOP).touch()  # of a run that was killed
    with stopping(tmp_path) as asked:
        assert not asked() and not notice.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked() and notice.agreed() and not told
        assert "after its step, with a checkpoint" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGTERM)
        assert told == ["as before"]
    assert not (tmp_path / STOP).exists()
    os.kill(os.getpid(), signal.SIGTERM)
    assert len(told) == 2, "outside of the block nothing is changed"


def test_rays_notice_is_looked_at_now_and_then(notice, tmp_path, monkeypatch):
    now, looks = [1000.0], []
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: looks.append(now[0]) or "soon")
    notice = Notice(0, torch.device("cpu"), tmp_path)
    for _ in range(5):
        assert not notice.agreed()
    now[0] += NOTICE_SECONDS
    assert notice.agreed() and len(looks) == 1
    assert not notice.agreed(), "the next look is later"
    assert len(looks) == 1


def test_a_process_group_is_set_up_as_ray_train_does_it():
    ours, theirs = ListeningConfig(backend="gloo"), ray.train.torch.TorchConfig(backend="gloo")
    assert ours.to_dict() == theirs.to_dict()
    assert issubclass(ours.backend_cls, theirs.backend_cls)
