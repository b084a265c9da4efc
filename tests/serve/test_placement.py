"""Deployments that no cluster has room for are named at once."""

import pytest

from serve.placement import PlacementError, demands, require
from serve.settings import read

SMALL = {"CPU": 2.0, "memory": 1e9}


def refusal(machines, **given):
    with pytest.raises(PlacementError) as wrong:
        require(demands(read(given)), machines)
    return str(wrong.value)


def test_two_cores_have_room_for_the_settings_as_they_come():
    require(demands(read({})), [SMALL])


def test_a_gpu_that_is_not_there_is_missed_by_its_setting():
    message = refusal([SMALL], **{"decoder.num_gpus": 1})
    assert "decoder.num_gpus=1" in message and "GPUs, the largest has 0" in message
    require(demands(read({"decoder.num_gpus": 1})), [SMALL, SMALL | {"GPU": 1.0}])


def test_a_replica_has_to_fit_on_one_machine():
    message = refusal([SMALL] * 4, **{"decoder.num_cpus": 3})
    assert "decoder.num_cpus=3" in message and "the largest has 2" in message
    require(demands(read({"decoder.num_cpus": 3})), [SMALL, {"CPU": 4.0}])


def test_all_replicas_together_have_to_fit_into_the_cluster():
    given = {"decoder.num_cpus": 1, "decoder.min": 2}
    message = refusal([SMALL], **given)
    assert "reserves 2.4 CPUs" in message and "decoder 2)" in message and "has 2" in message
    assert "decoder.num_cpus" in message and ".min" in message
    require(demands(read(given)), [SMALL] * 2)


def test_a_share_of_a_gpu_is_enough_for_as_many_as_fit():
    given = {"decoder.num_gpus": 0.5, "encoder.num_gpus": 0.5}
    require(demands(read(given)), [SMALL | {"GPU": 1.0}])
    message = refusal([SMALL | {"GPU": 1.0}], **given, **{"decoder.min": 2})
    assert "reserves 1.5 GPUs (encoder 0.5, decoder 1)" in message


def test_a_cluster_without_machines_has_no_room():
    assert "the largest has 0" in refusal([])
