"""A small Whisper trained from nothing: what it learns, and what becomes of a stopped training."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from whisper_checkpoint import random_whisper, training

from mmrag.model.whisper import Whisper
from mmrag.model.whisper_training import STATE, Clip, _encode, extractor, train

TRAINING = training(steps=6, batch=2)


def clips(directory, texts=("turn on the light", "call maria", "turn")) -> list[Clip]:
    features = extractor(directory)
    generator = torch.Generator().manual_seed(0)
    waves = [0.1 * torch.randn(16_000 + 4000 * n, generator=generator) for n in range(len(texts))]
    return [
        Clip(f"clip {n}", features(wave), text)
        for n, (wave, text) in enumerate(zip(waves, texts, strict=True))
    ]


def trained(directory, log=lambda step, record: None, **changes):
    train(directory, clips(directory), TRAINING.model_copy(update=changes), 1, log)
    return load_file(directory / "model.safetensors")


def fresh(path):
    path.mkdir()
    random_whisper(path)
    return path


def test_a_stopped_training_ends_with_the_weights_of_one_that_ran_through(tmp_path):
    """Dropout included, which is drawn for each step."""
    whole = trained(fresh(tmp_path / "whole"))

    def stop(step, record) -> None:
        if step == 5:
            raise KeyboardInterrupt

    broken = fresh(tmp_path / "broken")
    with pytest.raises(KeyboardInterrupt):
        trained(broken, stop)
    seen = []
    resumed = trained(broken, lambda step, record: seen.append(step))
    assert seen == [5, 6]
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not (broken / STATE).exists()


def test_what_it_hears_is_learned(tmp_path):
    losses = []
    trained(fresh(tmp_path / "w"), lambda _, record: losses.append(record), steps=60)
    for name in ("loss", "ctc_loss"):
        assert losses[-1][name] < 0.7 * losses[0][name]


def test_without_its_weight_there_is_no_ctc_loss(tmp_path):
    losses = []
    trained(fresh(tmp_path / "w"), lambda _, record: losses.append(record), ctc_weight=0, steps=1)
    assert set(losses[0]) == {"loss", "gradient_norm"}


@pytest.mark.parametrize(
    ("text", "message"),
    [(" ", "clip 0 has no text"), ("light " * 200, r"the text of clip 0 has \d+ pieces, at most")],
)
def test_a_clip_that_cannot_be_learned_is_named(tmp_path, text, message):
    directory = fresh(tmp_path / "w")
    with pytest.raises(ValueError, match=message):
        train(directory, clips(directory, (text,)), TRAINING, 1, lambda *_: None)


def test_a_loss_that_is_no_number_stops_it_and_names_the_clips(tmp_path):
    directory = fresh(tmp_path / "w")
    [clip] = clips(directory, ("turn",))
    clip.features[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"step 1: the loss is nan on clip 0, clip 0"):
        train(directory, [clip], TRAINING, 1, lambda *_: None)


def test_a_wave_longer_than_the_window_is_refused(tmp_path):
    directory = fresh(tmp_path / "w")
    with pytest.raises(ValueError, match=r"7\.0 s in a window of 6 s"):
        extractor(directory)(torch.zeros(7 * 16_000))


def test_a_shorter_window_is_encoded_as_transformers_does_the_whole_one(tmp_path):
    """The training's own pass over the encoder, where it may be compared."""
    directory = fresh(tmp_path / "w")
    encoder = Whisper.load(directory).model.model.encoder
    features = torch.randn(2, 20, 600, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = encoder(features).last_hidden_state
        torch.testing.assert_close(_encode(encoder, features), expected)
        assert _encode(encoder, features[..., :150]).shape == (2, 75, 16)


def test_phones_are_learned_where_there_are_any(tmp_path):
    directory, losses = fresh(tmp_path / "w"), []
    told = [replace(clip, phones=torch.arange(50) // 10) for clip in clips(directory)[:2]]
    settings = TRAINING.model_copy(update={"phone_weight": 1.0, "steps": 120})
    train(directory, [*told, clips(directory)[2]], settings, 1, lambda _, r: losses.append(r))
    named = [one["phone_loss"] for one in losses if "phone_loss" in one]
    assert named[-1] < 0.8 * named[0]
