"""LayerDrop: some steps of pretraining leave layers of the transformer out."""

import pytest
import torch

from mmrag.config import Hubert, Pretrain
from mmrag.records import Timed
from mmrag.speech.hubert import HubertEncoder
from mmrag.speech.pretraining import Round, pretrain
from mmrag.speech.targets import LetterSequences, Phones
from mmrag.speech.units import kmeans

SHAPE = {"conv_channels": 8, "width": 16, "layers": 4, "heads": 2, "feed_forward": 24, "layer": 4}


def shape(**changes) -> Hubert:
    return Hubert(**{"norm": "layer_norm", **SHAPE, **changes})


def round_of(share: float) -> tuple[Round, Pretrain]:
    settings = Pretrain(
        rounds=[{"target": "mfcc", "classes": 5, "steps": 400}],
        batch_seconds=0.6,
        crop_seconds=0.3,
        learning_rate=1e-3,
        mask_probability=0.1,
        mask_length=3,
        layer_drop=share,
        sample_seconds=2,
        num_cpus=1,
    )
    encoder = HubertEncoder.create(shape(), seed=0)
    given = (encoder, settings.rounds[0], 0, 0)
    return Round(*given, seen_weight=0, classes=5, layer_drop=share), settings


@pytest.mark.parametrize("norm", ["layer_norm", "group_norm"])
def test_a_layer_that_is_dropped_might_as_well_not_be_there(norm):
    whole = HubertEncoder.create(shape(norm=norm, layer=2), seed=0)
    shorter = HubertEncoder.create(shape(norm=norm, layers=3, layer=2), seed=1)
    layers = whole.model.encoder.transformer.layers
    state = whole.model.state_dict()
    kept = [layers[number] for number in (0, 2, 3)]
    for name in list(state):
        if ".layers." in name:
            del state[name]
    for number, layer in enumerate(kept):
        for name, value in layer.state_dict().items():
            state[f"encoder.transformer.layers.{number}.{name}"] = value
    shorter.model.load_state_dict(state)

    inputs, frames = torch.randn(2, 9, 16), torch.tensor([9, 6])
    own, last = whole.contextualize_twice(inputs, frames, [1])
    for row, count in enumerate(frames.tolist()):
        expected = shorter.contextualize(inputs, frames)[row, :count]
        torch.testing.assert_close(last[row, :count], expected)
        expected = shorter.contextualize(inputs, frames, 1)[row, :count]
        torch.testing.assert_close(own[row, :count], expected)


def test_nothing_dropped_is_the_whole_encoder():
    encoder = HubertEncoder.create(shape(layer=2), seed=0)
    inputs, frames = torch.randn(2, 9, 16), torch.tensor([9, 6])
    own, last = encoder.contextualize_twice(inputs, frames)
    torch.testing.assert_close(own, encoder.contextualize(inputs, frames, 2))
    torch.testing.assert_close(last, encoder.contextualize(inputs, frames))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_each_layer_is_left_out_of_that_share_of_the_steps(share):
    current, settings = round_of(share)
    counts = torch.zeros(4)
    for current.step in range(settings.rounds[0].steps):
        counts[current._dropped()] += 1
        assert current._dropped() == current._dropped(), "a function of the step"
    assert (counts / settings.rounds[0].steps - share).abs().max() <= 0.08


WAVES = [torch.randn(9000, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
PHONES = [[Timed("a", 0.0, 0.2), Timed("b", 0.2, len(wave) / 16_000)] for wave in WAVES]


def trained(directory, share, stop_at=None):
    """The weights after six steps, and what was logged."""
    directory.mkdir(exist_ok=True)
    log = []

    def record(step, metrics):
        log.append(metrics)
        if step == stop_at:
            raise InterruptedError

    _, settings = round_of(share)
    fields = settings.model_dump() | {
        "rounds": [{"target": "phones", "steps": 6}],
        "spelling_weight": 1.0,
        "alphabet": "ab",
        "checkpoint_steps": 1,
    }

    encoder = pretrain(
        *(shape(), Pretrain(**fields), WAVES, 0, directory, kmeans, record),
        phones=Phones(PHONES),
        spelling=LetterSequences(["ab", "ba", "a", "b"], "ab"),
    )
    return encoder.state_dict(), log


def test_a_stopped_run_leaves_out_what_a_whole_one_does(tmp_path):
    whole, told = trained(tmp_path / "whole", 0.5)
    with pytest.raises(InterruptedError):
        trained(tmp_path / "stopped", 0.5, stop_at=3)
    resumed, log = trained(tmp_path / "stopped", 0.5)
    torch.testing.assert_close(resumed, whole, atol=0, rtol=0)
    assert log == told[3:]
    other, _ = trained(tmp_path / "all", 0.0)
    assert any(not torch.equal(other[name], value) for name, value in whole.items())
