"""What Ray Train workers add up goes in bucketfuls, each number once."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster import pretraining
from cluster.pretraining import Workers, buckets


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 60))
def test_buckets_hold_every_tensor_in_order_and_no_more_than_fits(sizes, most):
    tensors = [torch.zeros(size) for size in sizes]
    made = buckets(tensors, most)
    assert [id(one) for bucket in made for one in bucket] == [id(one) for one in tensors]
    for bucket in made:
        assert len(bucket) == 1 or sum(one.numel() for one in bucket) <= most


def test_sums_go_back_where_they_came_from(monkeypatch):
    group = torch.distributed
    monkeypatch.setattr(group, "get_rank", lambda: 0)
    monkeypatch.setattr(group, "get_world_size", lambda: 2)
    monkeypatch.setattr(group, "all_reduce", lambda flat: flat.mul_(2))
    monkeypatch.setattr(pretraining, "BUCKET", 5)
    tensors = [torch.full((2, 2), 1.0), torch.tensor(3.0), torch.arange(7.0)]
    expected = [2 * one for one in tensors]
    Workers(torch.device("cpu")).add(tensors)
    for one, other in zip(tensors, expected, strict=True):
        assert torch.equal(one, other)
