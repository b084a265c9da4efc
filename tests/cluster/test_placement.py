"""Workers that do not fit are refused, or waited for aloud."""

import time
from dataclasses import replace

import pytest
import ray

from cluster import placement
from cluster.parts import Part, work_off
from cluster.placement import Demand, PlacementError, placing, require
from cluster.shards import serve_shards
from mmrag.config import Workers
from mmrag.retrieval.index import saved_shards

pytestmark = pytest.mark.ray


class Echo:
    def __call__(self, part: Part) -> str:
        return part.name


@pytest.mark.parametrize(
    ("demands", "said"),
    [
        (
            [Demand("tokenize.workers", 1, 8)],
            "tokenize.workers: 1 worker of 8 CPUs cannot be placed: this cluster's largest node "
            "has 2 CPUs and 0 GPUs. Lower tokenize.workers.num_cpus, or use a larger cluster "
            "(RAY_ADDRESS).",
        ),
        (
            [Demand("train.workers", 2, 0.5, 1)],
            "train.workers: 2 workers of 0.5 CPUs and 1 GPU each cannot be placed: this cluster's "
            "largest node has 2 CPUs and 0 GPUs. Lower train.workers.num_gpus, or use a larger "
            "cluster (RAY_ADDRESS).",
        ),
        (
            [Demand("train.workers", 3, 1)],
            "train.workers: 3 workers of 1 CPU each cannot be placed: this cluster has room for 2 "
            "of them. Lower train.workers.count, or use a larger cluster (RAY_ADDRESS).",
        ),
        (
            [Demand("evaluate.shard_cpus", 3, 1, lower="evaluate.shard_cpus or evaluate.replicas")],
            "Lower evaluate.shard_cpus or evaluate.replicas, or use",
        ),
        (
            [Demand("decoder", 1, 1.5), Demand("encoder", 1, 0.6), Demand("ingress", 1, 0)],
            "decoder: 1 worker of 1.5 CPUs; encoder: 1 worker of 0.6 CPUs; ingress: 1 worker of 0 "
            "CPUs: together 2.1 CPUs cannot be placed: this cluster has 2 CPUs and 0 GPUs. Lower "
            "decoder.num_cpus or encoder.num_cpus, or use",
        ),
    ],
)
def test_what_no_node_can_hold_is_refused_and_the_setting_named(ray_cluster, demands, said):
    with pytest.raises(PlacementError) as raised:
        require(*demands)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    "demands",
    [
        [Demand("a", 2, 1)],
        [Demand("a", 20, 0.1)],
        [Demand("a", 3, 0.1), Demand("b", 17, 0.1)],
        [Demand("a", 1, 2), Demand("b", 5, 0)],
    ],
)
def test_what_just_fits_is_not_refused(ray_cluster, demands):
    require(*demands)


@pytest.mark.parametrize("workers", [{"num_cpus": 8}, {"num_cpus": 1, "num_gpus": 1}])
def test_work_that_no_worker_can_do_ends_at_once_instead_of_waiting(ray_cluster, workers):
    started = time.monotonic()
    with pytest.raises(PlacementError, match=r"^tokenize\.workers: 1 worker of .* 0 GPUs\. Lower"):
        list(
            work_off(
                [(Echo, {})], [Part("p", [1])], Workers(count=4, **workers), "w", "tokenize.workers"
            )
        )
    assert time.monotonic() - started < 15


def test_fewer_workers_than_asked_for_do_where_one_fits(ray_cluster):
    parts = [Part(f"p{number}", [number]) for number in range(4)]
    answers = work_off([(Echo, {})], parts, Workers(count=4, num_cpus=1.5), "w", "tokenize.workers")
    assert sorted(answers) == ["p0", "p1", "p2", "p3"]


def test_index_shards_that_find_no_room_are_refused(ray_cluster, tmp_path, monkeypatch):
    directories = [tmp_path / "index" / f"shard-{number:05d}" for number in range(3)]
    for directory in directories:
        directory.mkdir(parents=True)
    assert saved_shards(tmp_path) == directories
    with pytest.raises(
        PlacementError, match=r"^retriever\.shard_cpus: 6 workers of 0\.5 CPUs each"
    ):
        serve_shards(tmp_path, replicas=2, num_cpus=0.5, key="retriever.shard_cpus")
    with pytest.raises(
        PlacementError, match=r"1 GPU each .* Lower retriever\.shard_cpus or retriever\.shard_gpus"
    ):
        serve_shards(tmp_path, 1, 0.1, num_gpus=1, key="retriever.shard_cpus")


@ray.remote(num_cpus=2)
class Hog:
    def ready(self) -> bool:
        return True


def test_who_waits_for_others_to_end_is_told_what_is_not_free(ray_cluster, monkeypatch, capsys):
    monkeypatch.setattr(placement, "NOTICE_SECONDS", 0.2)
    hog = Hog.remote()
    ray.get(hog.ready.remote())
    while ray.available_resources().get("CPU", 0) > 1.5:
        time.sleep(0.1)
    try:
        with placing(Demand("tokenize.workers", 1, 1.5)):
            time.sleep(1)
        said = capsys.readouterr().err
        assert said == (
            "waiting: tokenize.workers: 1 worker of 1.5 CPUs: none has answered yet; 0 of this "
            "cluster's 2 CPUs were free at the start, so it may be waiting for other work on the "
            "cluster to end\n"
        )
        with placing(Demand("tokenize.workers", 1, 1.5)) as answered:
            answered()
            time.sleep(0.5)
        assert capsys.readouterr().err == ""
    finally:
        ray.kill(hog)


def test_a_cluster_that_may_grow_is_waited_for_aloud(ray_cluster, monkeypatch, capsys):
    monkeypatch.setattr(placement, "NOTICE_SECONDS", 0.2)
    own = f'{{"node_{ray.nodes()[0]["NodeID"]}": 1}}'
    reports = {
        b"": False,
        b"{}": False,
        b'{"autoscaler_report": null}': False,
        f'{{"autoscaler_report": {{"active_nodes": {own}, "idle_nodes": null}}}}'.encode(): False,
        b'{"autoscaler_report": {"active_nodes": {"head": 1}, "idle_nodes": null}}': True,
        b'{"autoscaler_report": {"active_nodes": {}, "idle_nodes": {"head": 1}}}': True,
    }
    demand = Demand("train.workers", 2, 1, 1)
    for report, grows in reports.items():
        monkeypatch.setattr(placement, "_internal_kv_get", lambda key, report=report: report)
        assert placement.may_grow() == grows, report
        if not grows:
            with pytest.raises(PlacementError), placing(demand):
                raise AssertionError("started where nothing fits")
            continue
        with placing(demand):
            time.sleep(1)
        said = capsys.readouterr().err
        assert said.startswith("waiting: train.workers: 2 workers of 1 CPU and 1 GPU each cannot")
        assert "autoscaler" in said
    monkeypatch.undo()
    status = placement.get_cluster_status(ray.get_runtime_context().gcs_address)
    [node] = [*status.active_nodes, *status.idle_nodes]
    grown = replace(status, active_nodes=[replace(node, ray_node_type_name="gpu")], idle_nodes=[])
    monkeypatch.setattr(placement, "get_cluster_status", lambda *_, **__: grown)
    assert placement.may_grow()
    monkeypatch.undo()
    assert not placement.may_grow(), "a cluster of `ray.init` has no autoscaler"
