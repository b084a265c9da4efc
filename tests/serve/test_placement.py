"""Deployments that no cluster has room for are named at once."""

import pytest

from cluster.placement import problem_with
from mmrag.config import ConfigError
from serve.operations.startup import demands
from serve.settings import read

SMALL = {"CPU": 2.0, "memory": 1e9}


def problem(machines, **given):
    return problem_with(demands(read(given)), machines)


def test_two_cores_have_room_for_the_settings_as_they_come():
    assert problem([SMALL]) is None


def test_a_gpu_that_is_not_there_is_missed_by_its_setting():
    message = problem([SMALL], **{"decoder.num_gpus": 1})
    assert "largest node has 2 CPUs and 0 GPUs. Lower decoder.num_gpus" in message
    assert problem([SMALL, SMALL | {"GPU": 1.0}], **{"decoder.num_gpus": 1}) is None


def test_a_replica_has_to_fit_on_one_machine():
    message = problem([SMALL] * 4, **{"decoder.num_cpus": 3})
    assert message.startswith("decoder: 1 worker of 3 CPUs cannot be placed")
    assert "Lower decoder.num_cpus" in message
    assert problem([SMALL, {"CPU": 4.0}], **{"decoder.num_cpus": 3}) is None


def test_more_replicas_than_fit_are_lowered_by_their_number():
    message = problem([SMALL], **{"decoder.num_cpus": 1, "decoder.min": 3, "decoder.max": 3})
    assert "room for 2 of them. Lower decoder.min" in message


def test_all_replicas_together_have_to_fit_into_the_cluster():
    given = {"decoder.num_cpus": 1, "decoder.min": 2}
    message = problem([SMALL], **given)
    assert "together 2.4 CPUs cannot be placed: this cluster has 2 CPUs" in message
    assert "decoder.num_cpus" in message
    assert problem([SMALL] * 2, **given) is None


def test_a_share_of_a_gpu_is_enough_for_as_many_as_fit():
    given = {"decoder.num_gpus": 0.5, "encoder.num_gpus": 0.5}
    assert problem([SMALL | {"GPU": 1.0}], **given) is None
    message = problem([SMALL | {"GPU": 1.0}], **given, **{"decoder.min": 2})
    assert "1.5 GPUs cannot be placed" in message


def test_a_cluster_without_machines_has_no_room():
    assert "largest node has 0 CPUs" in problem([])


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_replica_that_is_told_to_use_a_gpu_reserves_one(part):
    given = {"device": "cuda", "encoder.num_gpus": 0.3, "decoder.num_gpus": 0.7}
    assert read(given).device == "cuda"
    with pytest.raises(
        ConfigError, match=rf"{part}.num_gpus is 0 with device cuda: name the share"
    ):
        read(given | {f"{part}.num_gpus": 0})
