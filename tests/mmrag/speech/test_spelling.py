"""A CTC head that spells, and an encoder that is trained further."""

import pytest
import torch

from mmrag.config import Hubert, Pretrain
from mmrag.records import Timed
from mmrag.speech.crops import draw
from mmrag.speech.held_out import HeldOut, letter_error_rate
from mmrag.speech.hubert import HubertEncoder
from mmrag.speech.masked import MaskedPrediction
from mmrag.speech.pretraining import pretrain
from mmrag.speech.targets import LetterSequences, Phones
from mmrag.speech.units import Codebook, kmeans

RATE = 16_000
LETTERS = "abc"
TEXTS = ("ab", "ba", "abc", "cab", "bca", "cb", "ac", "bcb")


def shape(**changes):
    fields = {
        "front": "mel",
        "conv_channels": 20,
        "norm": "layer_norm",
        "width": 16,
        "layers": 2,
        "heads": 2,
        "feed_forward": 32,
        "layer": 2,
    }
    return Hubert(**{**fields, **changes})


def plan(steps=2, **changes):
    fields = {
        "rounds": [{"target": "phones", "steps": steps}],
        "batch_seconds": 4,
        "crop_seconds": 4,
        "learning_rate": 3e-3,
        "mask_probability": 0.01,
        "mask_length": 2,
        "seen_weight": 1,
        "sample_seconds": 2,
        "spelling_weight": 1,
        "alphabet": LETTERS,
        "checkpoint_steps": 1000,
        "num_cpus": 1,
    }
    return Pretrain(**{**fields, **changes})


def spoken():
    """Clips of a tone a letter, each aligned, and what is spelled in each."""
    tones = {
        letter: torch.sin(2 * torch.pi * hertz * torch.arange(3200) / RATE)
        for letter, hertz in zip(LETTERS, (200, 800, 2600), strict=True)
    }
    waves = [torch.cat([tones[letter] for letter in text]) for text in TEXTS]
    aligned = [
        [Timed(letter, n * 0.2, (n + 1) * 0.2) for n, letter in enumerate(text)] for text in TEXTS
    ]
    return waves, aligned, LetterSequences(TEXTS, LETTERS)


def train(directory, settings, base=None, aligned=None, held_out=None):
    log = []
    waves, phones, spelling = spoken()
    encoder = pretrain(
        shape(),
        settings,
        waves,
        0,
        directory,
        kmeans,
        lambda step, metrics: log.append(metrics),
        phones=aligned or Phones(phones),
        spelling=spelling if settings.spelling_weight else None,
        base=base,
        held_out=held_out,
    )
    return encoder, log


def test_letters_that_the_alphabet_lacks_are_left_out_and_a_clip_without_text_has_none():
    spelling = LetterSequences(["cab!", None, "xyz"], LETTERS)
    assert spelling[0].tolist() == [3, 1, 2]
    assert spelling[1] is None
    assert spelling[2].tolist() == []


def test_only_whole_clips_are_spelled():
    waves, phones, spelling = spoken()
    encoder = HubertEncoder.create(shape(), 0, LETTERS)
    generator = torch.Generator().manual_seed(0)
    settings = plan(crop_seconds=0.5, batch_seconds=20)
    batch = draw(encoder, waves, Phones(phones), settings, generator, spelling=spelling)
    whole = {clip: len(waves[clip]) <= RATE // 2 for clip in range(len(waves))}
    assert {True, False} == {whole[clip] for clip in batch.clips}
    for clip, letters in zip(batch.clips, batch.letters, strict=True):
        assert (letters is not None) == whole[clip]
    groups = [one for group in batch.groups(encoder.frames) for one in group.letters]
    assert sum(one is not None for one in groups) == sum(whole[clip] for clip in batch.clips)


def test_the_loss_of_letters_does_not_depend_on_what_else_is_in_the_batch():
    waves, _, spelling = spoken()
    model = MaskedPrediction(HubertEncoder.create(shape(), 0, LETTERS), 4, spelling_weight=0.5)
    prepared = [model.encoder.prepare(wave) for wave in waves[:3]]
    lengths = torch.tensor([len(wave) for wave in prepared])
    padded = torch.nn.utils.rnn.pad_sequence(prepared, batch_first=True)
    frames = model.encoder.frames(int(lengths.max()))
    targets, mask = torch.zeros(3, frames).long(), torch.zeros(3, frames).bool()
    with torch.no_grad():
        together = model(*(padded, lengths, targets, mask), letters=[spelling[n] for n in range(3)])
        alone = [
            model(
                wave[None],
                lengths[n : n + 1],
                targets[n : n + 1, : model.encoder.frames(len(wave))],
                mask[n : n + 1, : model.encoder.frames(len(wave))],
                letters=[spelling[n]],
            )
            for n, wave in enumerate(prepared)
        ]
    torch.testing.assert_close(together.letter_loss, sum(one.letter_loss for one in alone))
    assert together.letters == sum(map(len, TEXTS[:3]))
    torch.testing.assert_close(together.loss, 0.5 * together.letter_loss)  # nothing else counts


def test_an_encoder_learns_to_spell_and_keeps_its_head(tmp_path):
    waves, _, _ = spoken()
    held_out = {"dev": HeldOut(waves, [list(text) for text in TEXTS], TEXTS)}
    encoder, log = train(
        tmp_path, plan(200, batch_seconds=8, learning_rate=1e-2), held_out=held_out
    )
    assert log[0]["letter_loss"] > 5 * log[-1]["letter_loss"]
    assert log[-1]["letter_errors_dev"] <= 0.5
    assert log[-1]["phone_errors_dev"] <= 0.5
    encoder.save(tmp_path / "made")
    again = HubertEncoder.load(tmp_path / "made")
    assert again.alphabet == LETTERS
    [features] = again.features(waves[:1])
    torch.testing.assert_close(again.spell(features), encoder.spell(features))
    model = MaskedPrediction(again, 4)
    assert letter_error_rate(model, held_out["dev"]) == log[-1]["letter_errors_dev"]


def test_without_a_head_nothing_is_spelled(tmp_path):
    encoder, log = train(tmp_path, plan(spelling_weight=0))
    assert encoder.alphabet is None and "letter_loss" not in log[-1]
    with pytest.raises(ValueError, match="no CTC head"):
        encoder.spell(torch.zeros(3, 16))


def test_training_further_begins_with_the_weights_of_the_base(tmp_path):
    base = HubertEncoder.create(shape(), 7)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    encoder, _ = train(tmp_path, plan(1, learning_rate=1e-9), base)
    for name, value in before.items():
        torch.testing.assert_close(encoder.state_dict()[name], value, atol=1e-6, rtol=0)
        torch.testing.assert_close(base.state_dict()[name], value, atol=0, rtol=0)
    spelling = HubertEncoder.create(shape(), 8, LETTERS)
    (tmp_path / "again").mkdir()
    further, _ = train(tmp_path / "again", plan(1, learning_rate=1e-9), spelling)
    for name, value in spelling.state_dict().items():
        torch.testing.assert_close(further.state_dict()[name], value, atol=1e-6, rtol=0)


def test_what_comes_of_it_is_averaged_with_the_base(tmp_path):
    base = HubertEncoder.create(shape(), 8, LETTERS)
    made = {}
    for share in (0, 0.25):
        (tmp_path / str(share)).mkdir()
        made[share] = train(tmp_path / str(share), plan(3, base_share=share, base="one"), base)
    after, averaged = (encoder.state_dict() for encoder, _ in made.values())
    for name, value in base.state_dict().items():
        wanted = 0.75 * after[name] + 0.25 * value
        torch.testing.assert_close(averaged[name], wanted, atol=1e-6, rtol=1e-5)
    assert made[0][1][-1]["letter_loss"] == made[0.25][1][-1]["letter_loss"], "trained alike"
    again, log = train(tmp_path / "0.25", plan(3, base_share=0.25, base="one"), base)
    assert not log, "it had been stopped after its last step"
    for name, value in averaged.items():
        torch.testing.assert_close(again.state_dict()[name], value, atol=1e-6, rtol=1e-5)


def test_a_new_head_is_not_averaged_with_a_base_that_has_none(tmp_path):
    base = HubertEncoder.create(shape(), 8)
    encoder, _ = train(tmp_path, plan(1, base_share=0.5, base="one"), base)
    assert encoder.alphabet == LETTERS


def test_an_average_needs_a_base():
    with pytest.raises(ValueError, match="base_share: there is no base"):
        plan(base_share=0.5)


def test_an_anchored_encoder_stays_nearer_to_its_base_where_clips_are_aligned(tmp_path):
    waves, phones, _ = spoken()
    base = HubertEncoder.create(shape(), 7)
    unaligned = {n: list(TEXTS[n]) for n in range(4, 8)}
    halves = Phones([*phones[:4], *[[]] * 4], unaligned)
    away = {}
    for weight in (0, 10):
        directory = tmp_path / str(weight)
        directory.mkdir()
        encoder, _ = train(directory, plan(30, anchor_weight=weight, base="one"), base, halves)
        with torch.no_grad():
            moved = [
                float((own - theirs).square().mean())
                for own, theirs in zip(encoder.features(waves), base.features(waves), strict=True)
            ]
        away[weight] = sum(moved[:4])
    assert away[10] < 0.5 * away[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"width": 24, "heads": 3}, "architecture"), ({"layer": 1}, "layer 1")],
)
def test_a_base_of_another_shape_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=rf"pretrain\.base: {message}"):
        train(tmp_path, plan(1), HubertEncoder.create(shape(**changes), 0))


def test_an_anchor_needs_a_base():
    with pytest.raises(ValueError, match="anchor_weight: there is no base"):
        plan(anchor_weight=1)


def test_a_codebook_that_moves_to_another_encoder_keeps_what_its_ids_mean():
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(6, 4, generator=generator).numpy() * 10
    codebook = Codebook(before, 0.02)
    ids = torch.randint(5, (400,), generator=generator).numpy()  # the last is never heard
    features = 0.1 * torch.randn(400, 4, generator=generator).numpy() - before[ids]  # turned over
    after = codebook.moved(ids, features)
    assert after.assign(features).tolist() == ids.tolist()
    torch.testing.assert_close(
        torch.from_numpy(after.centroids[:5]),
        torch.from_numpy(-before[:5]).float(),
        atol=0.1,
        rtol=0,
    )
    assert (after.centroids[5] == codebook.centroids[5]).all()
    assert (codebook.centroids == before.astype("float32")).all(), "the original is as it was"
