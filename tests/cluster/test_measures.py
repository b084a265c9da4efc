"""What a step was worth is the sum over the workers, and nothing is told that is not known."""

import pytest
import torch
from crew import together

from cluster import measures
from cluster.measures import Meter, peak_flops
from mmrag.config import Experiment, LanguageModel
from mmrag.model.flops import training_flops
from mmrag.model.loss import IGNORE, Batch
from mmrag.model.vocabulary import PAD

SHAPE = LanguageModel(width=8, layers=2, heads=2, kv_heads=1, feed_forward=16, tied=True)
CPU = torch.device("cpu")
VOCABULARY = 30


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def batch(*lengths: int, targets: int = 2) -> Batch:
    """Rows of so many tokens, the first `targets` of which count."""
    width = max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    aims = torch.full((len(lengths), width), IGNORE)
    for row, length in enumerate(lengths):
        ids[row, :length] = PAD + 5
        aims[row, :targets] = PAD + 5
    empty = torch.zeros(len(lengths), 2, dtype=torch.long)
    return Batch(ids, aims, empty, empty[:, :1], empty[:, 0])


def measured(shares, monkeypatch, shape=SHAPE, peak=1e6, waits=(1.0, 3.0), seconds=10.0):
    """Each worker's figures of a step of so many seconds, of which it waited for its batches."""
    clock = Clock()
    monkeypatch.setattr(measures, "time", clock)

    def work(member):
        meter = Meter(shape, VOCABULARY, member.rank, member.count, member.summed, CPU, peak)
        member.summed(torch.zeros(1))  # in step: they share the clock
        meter.begin()
        member.summed(torch.zeros(1))  # nobody begins by a clock that another has set
        for rank in range(member.count):
            if rank == member.rank:
                clock.now = 100.0 + waits[rank]
                meter.read(shares[rank])
            member.summed(torch.zeros(1))
        clock.now = 100.0 + seconds
        member.summed(torch.zeros(1))
        return meter.end()

    return together(len(shares), work)


def test_every_worker_tells_the_figures_of_all_of_them(monkeypatch):
    one, other = measured([[batch(7, 3)], [batch(5, 5), batch(2)]], monkeypatch)
    assert one == other
    assert one["tokens_per_second"] == pytest.approx((14 + 10 + 2) / 10)
    assert one["tokens_per_second_per_gpu"] == pytest.approx(26 / 10 / 2)
    assert one["data_wait"] == pytest.approx((1 + 3) / 2 / 10)
    assert one["padding"] == pytest.approx(4 / 26)
    assert one["peak_rss_bytes"] > 1 << 20


def test_mfu_is_what_the_rows_themselves_ask_for_over_the_peak(monkeypatch):
    [told, _] = measured([[batch(7, 3)], [batch(5, 5), batch(2)]], monkeypatch)
    asked = sum(training_flops(SHAPE, VOCABULARY, n, n, 2) for n in (7, 3, 5, 5, 2))
    assert told["mfu"] == pytest.approx(asked / (10 * 2 * 1e6))


@pytest.mark.parametrize("unknown", [{"peak": None}, {"shape": None}])
def test_there_is_no_mfu_where_its_parts_are_not_known(monkeypatch, unknown):
    [told] = measured([[batch(7, 3)]], monkeypatch, **unknown)
    assert "mfu" not in told and told["tokens_per_second"] > 0


def test_the_peak_is_a_setting_or_a_known_gpus_own_in_bf16(experiment: Experiment, monkeypatch):
    settings = experiment.train
    unset = settings.model_copy(update={"peak_flops": None})
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert peak_flops(settings, CPU, torch.float32) == settings.peak_flops
    assert peak_flops(settings, gpu, torch.bfloat16) == settings.peak_flops
    assert peak_flops(unset, gpu, torch.bfloat16) == pytest.approx(989.4e12)
    assert peak_flops(unset, gpu, torch.float32) is None
    assert peak_flops(unset, CPU, torch.bfloat16) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card of tomorrow")
    assert peak_flops(unset, gpu, torch.bfloat16) is None
