"""The plan's memory against fake tensors of the real shapes, its arithmetic against examples."""

import math
from pathlib import Path

import pytest
import torch
from fake_memory import Live, saved_bytes
from torch._subclasses.fake_tensor import FakeTensorMode

from mmrag import config
from mmrag.config import Experiment, LanguageModel
from mmrag.model import plan
from mmrag.model.lm import LM, parameter_count
from mmrag.model.loss import Objective
from mmrag.model.plan import CARDS, Cluster, Partition
from mmrag.model.vocabulary import SPECIALS

ROOT = Path(__file__).parents[3]
CONTEXT = 512
SMALL = LanguageModel(
    width=64, layers=3, heads=4, kv_heads=2, feed_forward=96, tied=True, qkv_bias=True
)


def experiment(name: str, *overrides: str) -> Experiment:
    return config.read(ROOT / "jobs" / "configs" / f"{name}.yaml", overrides)


def vocabulary_of(read: Experiment) -> int:
    return len(SPECIALS) + read.vocabulary.pieces + read.tokenize.units


def objective(read: Experiment, dtype=torch.bfloat16) -> Objective:
    """As DeepSpeed trains it; under a fake mode it takes no memory."""
    return Objective(built(read.lm, vocabulary_of(read), dtype), 30, 0.0).trained_by(read.train)


def built(shape: LanguageModel, vocabulary: int, dtype: torch.dtype) -> LM:
    """Fake weights cannot be converted after they are made."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return LM(shape, vocabulary)
    finally:
        torch.set_default_dtype(usual)


def forward(lm: LM, tokens: int):
    """A micro-batch of text: what comes next is asked for at every position."""
    ids = torch.zeros(tokens // CONTEXT, CONTEXT, dtype=torch.long)
    return lm(ids, targets=torch.zeros(ids.numel(), dtype=torch.long)).loss


def planned(read: Experiment, gpus: int | None = None) -> plan.Plan:
    cluster = Cluster(CARDS["H100-80GB"], gpus or read.train.workers.count, 8)
    partition = Partition(read.train.zero_stage)
    return plan.plan(read.lm, vocabulary_of(read), read.train, partition, cluster, CONTEXT)


def part(made: plan.Plan, name: str) -> float:
    return sum(one.bytes for one in (*made.resident, *made.passing) if one.name == name)


@pytest.mark.parametrize("every", [None, 1, 3])
@pytest.mark.parametrize("name", ["330m", "6.8b"])
def test_parameters_and_saved_activations_are_those_of_fake_tensors(name, every):
    read = experiment(
        name, f"train.activation_checkpointing={every or 'null'}", "train.micro_batch_tokens=4096"
    )
    with FakeTensorMode():
        made = objective(read)
        weights = sum(one.numel() * one.element_size() for one in made.lm.parameters())
        saved = saved_bytes(lambda: forward(made.lm, 4096), made)
    expected = planned(read, gpus=read.train.workers.count)
    assert 2 * expected.parameters == weights
    kept, _ = plan.loss_bytes(read.lm, vocabulary_of(read), 4096, read.train.loss_chunk)
    assert part(expected, "activations") + kept == pytest.approx(saved, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["330m", "6.8b"])
@pytest.mark.parametrize("every", [None, 1, 4])
def test_the_most_that_a_micro_batch_holds_is_planned(name, every):
    """Of one process without partitions: whole gradients beside it, and no buffers."""
    read = experiment(
        name, f"train.activation_checkpointing={every or 'null'}", "train.micro_batch_tokens=4096"
    )
    with FakeTensorMode():
        made = objective(read)
        # What DeepSpeed takes away as soon as it is there.
        for one in made.parameters():
            one.register_post_accumulate_grad_hook(lambda one: setattr(one, "grad", None))
        with Live(made) as counted:
            forward(made.lm, 4096).backward()
    expected = planned(read)
    held = expected.micro_batch - part(expected, "gathered parameters")
    assert counted.most <= held <= 1.25 * counted.most


def test_activation_checkpointing_keeps_at_most_20_kb_a_token_and_layer():
    """Of 203 KB; the 6.8B shape in bf16."""
    saved, tokens = {}, 1024
    for every in (None, 1):
        read = experiment("6.8b", f"train.activation_checkpointing={every or 'null'}")
        with FakeTensorMode():
            lm = objective(read).lm
            ids = torch.zeros(2, tokens // 2, dtype=torch.long)
            saved[every] = saved_bytes(lambda lm=lm, ids=ids: lm(ids).states, lm)
    layers = experiment("6.8b").lm.layers
    a_layer = {every: size / tokens / layers for every, size in saved.items()}
    assert a_layer[None] == pytest.approx(203e3, rel=0.02)
    assert a_layer[1] <= 20e3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_of_grouped_heads_saves_what_is_planned(dtype):
    with FakeTensorMode():
        deep, shallow = (
            built(SMALL.model_copy(update={"layers": layers}), 100, dtype) for layers in (3, 2)
        )
        ids = torch.zeros(2, 32, dtype=torch.long)
        sizes = [saved_bytes(lambda lm=lm: lm(ids).states, lm) for lm in (deep, shallow)]
    measured = (sizes[0] - sizes[1]) / ids.numel()
    assert plan.saved_of_layer(SMALL, dtype.itemsize) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted(tied):
    shape = SMALL.model_copy(update={"tied": tied})
    assert plan.parameters_of(shape, 100) == parameter_count(shape, 100)


def test_the_states_of_a_partitioned_model_take_18_bytes_a_parameter_over_all_gpus():
    """arXiv 1910.02054, section 3.1, and gradients that are summed in float32."""
    made = planned(experiment("6.8b"))
    names = ("parameters", "fp32 master weights", "optimizer states", "gradients")
    states = sum(part(made, name) for name in names)
    assert states == pytest.approx(18 * made.parameters / 32)
    assert made.checkpoint == pytest.approx(81e9, rel=0.01)


def test_the_big_model_fits_a_card_of_80_gb_and_a_smaller_card_only_by_computing_again():
    read = experiment("6.8b")
    made = planned(read)
    assert made.fits and 34 <= made.needed / plan.GIB <= 40
    again = planned(experiment("6.8b", "train.activation_checkpointing=1"))
    assert again.needed < made.needed / 2
    assert again.compute / made.compute == pytest.approx(4 / 3, rel=0.02)


def test_a_second_copy_in_each_node_leaves_one_gathering_between_nodes():
    read = experiment("6.8b")
    cluster = Cluster(CARDS["H100-80GB"], 32, 8)
    flat, nodes = (
        plan.plan(
            read.lm, vocabulary_of(read), read.train, Partition(3, secondary), cluster, CONTEXT
        )
        for secondary in (1, 8)
    )
    weights, passes = 2 * flat.parameters, read.train.micro_batches // 32
    gathered = [sum(one.between for one in made.transfers[:-1]) for made in (flat, nodes)]
    assert gathered[0] == pytest.approx(2 * passes * weights * 31 / 32)
    assert gathered[1] == pytest.approx(weights * 31 / 32)
    assert flat.transfers[-1] == nodes.transfers[-1], "gradients are reduced over all of them"
    assert nodes.used - flat.used == pytest.approx(weights / 8)


def test_one_node_sends_nothing_to_others():
    read = experiment("330m")
    cluster = Cluster(CARDS["H100-80GB"], 8, 8)
    for stage in (0, 1, 2, 3):
        made = plan.plan(
            read.lm, vocabulary_of(read), read.train, Partition(stage), cluster, CONTEXT
        )
        assert all(one.inside and not one.between for one in made.transfers), stage


def test_transfers_hide_behind_computing_or_computing_behind_them():
    read, vocabulary = experiment("6.8b"), vocabulary_of(experiment("6.8b"))
    slow = CARDS["H100-80GB"].__class__("NVIDIA H100 80GB HBM3", 80e9, 450e9, 12.5e9 / 8)
    for card, bound in ((CARDS["H100-80GB"], "compute"), (slow, "traffic")):
        cluster = Cluster(card, 32, 8)
        made = plan.plan(read.lm, vocabulary, read.train, Partition(3), cluster, CONTEXT)
        assert made.step == getattr(made, bound) < made.step_at_worst
        assert made.mfu == pytest.approx(0.4 * made.compute / made.step)


def test_deepspeeds_settings_are_read_by_their_names():
    settings = {
        "overlap_comm": True,
        "zero_hpz_partition_size": 8,
        "reduce_bucket_size": 7,
        "stage3_max_live_parameters": 9,
        "offload_optimizer": {"device": "cpu"},
    }
    made = Partition.of(3, settings)
    assert (made.secondary, made.reduce_bucket, made.live) == (8, 7, 9)
    assert made.optimizer_offloaded and not made.parameters_offloaded
    assert Partition.of(2, {}) == Partition(2)


def test_hours_of_speech_follow_from_the_tokens_of_a_phase():
    phases = {phase.name: phase for phase in experiment("6.8b").train.phases}
    assert plan.hours_heard(phases["text"], 1000) == 0
    read = phases["transcription"].steps * 1000
    assert plan.hours_heard(phases["transcription"], 1000) == pytest.approx(read / 31 / 3600)
    assert not math.isnan(plan.hours_heard(phases["speech"], 1000))
