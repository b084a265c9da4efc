"""The measurements of training, with a tiny model."""

from dataclasses import replace

import pytest
import torch

from jobs.benchmark import bare, train
from jobs.benchmark.bare import AUTOCAST, MASTERS, BareTraining
from mmrag.model import train as plain
from mmrag.model.examples import examples
from mmrag.model.lm import LM
from mmrag.model.loss import Objective
from mmrag.speech import tokenized

SMALL = replace(train.QUICK, utterances=12, steps=5, skipped=1)


@pytest.fixture
def prepared(tmp_path):
    vocabulary, split = train._corpus(tmp_path, SMALL)
    return vocabulary, split, train._experiment(tmp_path, SMALL), tmp_path


def order(prepared, precision):
    _, split, experiment, directory = prepared
    settings = experiment.train.model_copy(update={"precision": precision})
    told = experiment.model_copy(update={"train": settings}).model_dump(mode="json")
    return BareTraining(told, str(split), str(directory), threads=1)


def test_the_bare_loop_makes_the_steps_of_the_packages_own(prepared):
    vocabulary, split, experiment, _ = prepared
    settings = experiment.train.model_copy(update={"precision": "fp32"})
    torch.manual_seed(experiment.seed)
    lm = LM(experiment.lm, vocabulary.size)
    objective = Objective(lm, len(vocabulary.alphabet), settings.ctc_weight)
    data, logged = examples(list(tokenized.read(split)), vocabulary), []
    plain.train(objective, data, vocabulary, settings, experiment.seed, logged.append)
    found = bare.measured(order(prepared, "fp32"))
    assert list(found) == [AUTOCAST]
    assert [one["tokens"] for one in found[AUTOCAST]] == [one.tokens for one in logged]
    losses = [one["loss"] for one in found[AUTOCAST]]
    assert losses == pytest.approx([one.loss for one in logged], rel=1e-4)


def test_both_loops_in_bfloat16_learn_alike(prepared):
    found = bare.measured(order(prepared, "bf16"))
    losses = {way: [one["loss"] for one in steps] for way, steps in found.items()}
    assert list(losses) == [AUTOCAST, MASTERS]
    assert losses[MASTERS] == pytest.approx(losses[AUTOCAST], rel=0.02)
    assert losses[AUTOCAST][-1] < losses[AUTOCAST][0]


def test_a_corpus_of_nothing_is_as_long_as_it_is_asked_to_be(prepared):
    vocabulary, split, _, _ = prepared
    said = list(tokenized.read(split))
    assert len(said) == SMALL.utterances and vocabulary.units == SMALL.units
    for one in said:
        assert SMALL.unit_counts[0] <= len(one.units) < SMALL.unit_counts[1]
        assert (one.units.ids[1:] != one.units.ids[:-1]).all()
        assert not vocabulary.unspeakable(one.utterance.text)


@pytest.mark.ray
@pytest.mark.slow
def test_training_is_measured_beside_the_bare_loops(ray_cluster, tmp_path, capsys):
    results = train.measure(tmp_path, SMALL)
    speeds = results["tokens_per_second"]
    assert train.OURS in speeds and AUTOCAST in speeds
    ours = results["last_loss"].pop(train.OURS)
    for loss in results["last_loss"].values():
        assert loss == pytest.approx(ours, rel=0.02)
    assert results["train.vs_plain"]["median"] == pytest.approx(
        min(one["median"] for one in results["train.vs_plain_each"].values())
    )
    train.show({**results, "last_loss": {**results["last_loss"], train.OURS: ours}})
    assert "0.95" in capsys.readouterr().out
