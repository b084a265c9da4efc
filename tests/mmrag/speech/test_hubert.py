import json
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import HubertConfig, HubertModel

from mmrag.config import Hubert, Pretrain
from mmrag.finite import NonFiniteLoss
from mmrag.records import Timed
from mmrag.speech.crops import PADDING, balanced, draw, drawing_chances, mask_bands, mask_spans
from mmrag.speech.ends import LogMel
from mmrag.speech.held_out import HeldOut, phone_error_rate
from mmrag.speech.hubert import HubertEncoder
from mmrag.speech.masked import MaskedPrediction
from mmrag.speech.pretraining import STATE, pretrain, schedule
from mmrag.speech.targets import Phones, Targets, align, evidence, loud, mfcc
from mmrag.speech.units import kmeans

NORMS = ("layer_norm", "group_norm")
LENGTHS = (4000, 400, 9137)


def shape(norm="layer_norm", **changes):
    fields = {
        "conv_channels": 8,
        "norm": norm,
        "width": 16,
        "layers": 3,
        "heads": 2,
        "feed_forward": 24,
        "layer": 2,
    }
    return Hubert(**{**fields, **changes})


def plan(**changes):
    fields = {
        "rounds": [
            {"target": "mfcc", "classes": 5, "steps": 3},
            {"target": "hubert", "classes": 7, "steps": 3},
        ],
        "batch_seconds": 0.6,
        "crop_seconds": 0.3,
        "learning_rate": 1e-3,
        "mask_probability": 0.1,
        "mask_length": 3,
        "sample_seconds": 2,
        "num_cpus": 1,
    }
    return Pretrain(**{**fields, **changes})


def noise(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, generator=generator) * 0.1 for length in lengths]


@pytest.fixture(params=[*NORMS, "mel"])
def encoder(request):
    if request.param == "mel":
        return HubertEncoder.create(shape(front="mel"), seed=0)
    return HubertEncoder.create(shape(request.param), seed=0)


@pytest.fixture(params=["group", "layer"])
def published(request, tmp_path):
    """A small transformers HuBERT with random weights, and its directory."""
    torch.manual_seed(0)
    large = request.param == "layer"
    model = HubertModel(
        HubertConfig(
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=24,
            conv_dim=(8,) * 7,
            feat_extract_norm=request.param,
            conv_bias=large,
            do_stable_layer_norm=large,
            num_conv_pos_embeddings=6,
            num_conv_pos_embedding_groups=4,
        )
    ).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": large}))
    return model, tmp_path


def test_frame_rate_follows_from_the_strides(encoder):
    assert encoder.hop == 5 * 2**6
    assert encoder.frame_seconds == 0.02
    stacked = HubertEncoder.create(shape(front="mel", stack=3), seed=0)
    assert (stacked.frame_seconds, stacked.field) == (0.03, 720)


@given(samples=st.integers(400, 4000))
@settings(max_examples=25, deadline=None)
def test_frames_are_as_many_as_the_convolutions_the_bands_and_the_mfccs_make(samples):
    wave = noise([samples])[0]
    for front in ("waveform", "mel"):
        encoder = HubertEncoder.create(shape(front=front, layers=1, layer=1), seed=0)
        assert len(encoder.features([wave])[0]) == encoder.frames(samples)
    assert mfcc(wave).shape == (encoder.frames(samples), 39)
    stacked = HubertEncoder.create(shape(front="mel", stack=2, layers=1, layer=1), seed=0)
    if samples < stacked.field:
        assert stacked.frames(samples) == 0
    else:
        assert len(stacked.features([wave])[0]) == stacked.frames(samples) > 0
        made = mfcc(wave, stacked.field, stacked.hop)
        assert made.shape == (stacked.frames(samples), 39)


def test_a_stacked_frame_holds_its_windows_in_order():
    encoder = HubertEncoder.create(shape(front="mel", stack=3), seed=0)
    [wave] = noise([4000])
    bands = encoder.model.feature_extractor
    frames = torch.tensor([encoder.frames(len(wave))])
    stacked = bands(wave[None], frames)
    single = LogMel(stacked.shape[-1] // 3, 400, 160)
    one_by_one = single(wave[: 400 + (3 * int(frames) - 1) * 160][None], 3 * frames)
    torch.testing.assert_close(stacked.reshape(one_by_one.shape), one_by_one)
    with pytest.raises(ValueError, match="stack 3: front waveform"):
        shape(stack=3)


@pytest.mark.parametrize(("stack", "convolved"), [(3, False), (3, True), (7, True)])
def test_stacked_features_do_not_depend_on_the_batch_and_survive_a_file(tmp_path, stack, convolved):
    encoder = HubertEncoder.create(shape(front="mel", stack=stack, convolved=convolved), seed=0)
    waves = noise([1400, 9000, 4321])
    batched = encoder.features(waves)
    encoder.save(tmp_path)
    loaded = HubertEncoder.load(tmp_path)
    for wave, features in zip(waves, batched, strict=True):
        torch.testing.assert_close(features, encoder.features([wave])[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(features, loaded.features([wave])[0], atol=1e-4, rtol=0)


def test_a_convolved_frame_hears_its_windows_and_three_around_them():
    encoder = HubertEncoder.create(shape(front="mel", stack=3, convolved=True), seed=0)
    project, frames = encoder.model.encoder.feature_projection, torch.tensor([9])
    windows = torch.zeros(27, encoder.bands)
    silent = project(windows.reshape(1, 9, -1), frames)
    for window in range(27):
        heard = windows.clone()
        heard[window] = 1
        changed = (project(heard.reshape(1, 9, -1), frames) != silent).any(-1)[0]
        frame = torch.arange(9)
        hears = (frame * 3 - 3 <= window) & (window <= frame * 3 + 5)
        torch.testing.assert_close(changed, hears)
    with pytest.raises(ValueError, match="convolved: without stack"):
        shape(front="mel", convolved=True)


@pytest.mark.parametrize("norm", NORMS)
def test_our_forward_pass_is_torchaudios(norm):
    encoder = HubertEncoder.create(shape(norm), seed=0)
    wave = encoder.prepare(noise()[0])
    theirs, _ = encoder.model.extract_features(wave[None], num_layers=2)
    ours = encoder.features([wave])[0]
    torch.testing.assert_close(ours, theirs[-1][0], atol=1e-4, rtol=0)


def test_batched_features_equal_one_by_one(encoder):
    waves = noise()
    batched = encoder.features(waves)
    for wave, features in zip(waves, batched, strict=True):
        assert features.shape == (encoder.frames(len(wave)), encoder.width)
        torch.testing.assert_close(features, encoder.features([wave])[0], atol=1e-4, rtol=0)


def test_layers_past_the_wanted_one_are_not_computed(encoder):
    waves = noise()
    expected = encoder.features(waves)
    encoder.model.encoder.transformer.layers[2] = torch.nn.Identity()  # takes no mask: would raise
    torch.testing.assert_close(encoder.features(waves), expected)
    with pytest.raises(TypeError):
        encoder.features(waves, layer=3)


@pytest.mark.parametrize("front", ["waveform", "mel"])
def test_loudness_does_not_matter_where_waveforms_are_normalised(front):
    encoder = HubertEncoder.create(shape("layer_norm", front=front), seed=0)
    wave = noise()[0]
    quiet, loud = encoder.features([wave * 0.1 + 0.01, wave])
    torch.testing.assert_close(quiet, loud, atol=1e-2, rtol=0)


def test_a_clip_shorter_than_a_frame_is_refused(encoder):
    with pytest.raises(ValueError, match="at least 400 samples, not \\[399\\]"):
        encoder.features([*noise(), torch.zeros(399)])
    with pytest.raises(ValueError, match="at least 400 samples long, not 399"):
        mfcc(torch.zeros(399))
    assert encoder.frames(399) == 0


def test_no_clips_have_no_features(encoder):
    assert encoder.features([]) == []


def test_a_saved_encoder_comes_back_the_same(tmp_path, encoder):
    encoder.save(tmp_path / "hubert")
    loaded = HubertEncoder.load(tmp_path / "hubert")
    torch.testing.assert_close(loaded.features(noise()), encoder.features(noise()), atol=0, rtol=0)
    assert (loaded.layer, loaded.normalize) == (encoder.layer, encoder.normalize)


def test_an_encoder_that_spells_comes_back_the_same_and_its_weights_are_stored_as_without(tmp_path):
    spelling = HubertEncoder.create(shape(), seed=0, alphabet=" ab")
    spelling.save(tmp_path / "spelling")
    loaded = HubertEncoder.load(tmp_path / "spelling")
    [features, *_] = spelling.features(noise())
    logp = spelling.spell(features)
    torch.testing.assert_close(loaded.spell(features), logp, atol=0, rtol=0)
    torch.testing.assert_close(logp.exp().sum(-1), torch.ones(len(features)))
    assert logp.shape == (len(features), 4) and loaded.alphabet == " ab"
    plain = HubertEncoder.create(shape(), seed=0)
    plain.save(tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "hubert.safetensors").keys()
    with_head = load_file(tmp_path / "spelling" / "hubert.safetensors")
    assert all(torch.equal(with_head[name], spelling.model.state_dict()[name]) for name in plain)
    assert all(name.startswith("speller.") for name in with_head.keys() - plain)
    assert "alphabet" not in json.loads((tmp_path / "plain" / "hubert.json").read_text())


def test_a_clips_letters_are_its_own_whatever_it_is_encoded_with():
    spelling = HubertEncoder.create(shape(), seed=0, alphabet=" ab")
    with torch.no_grad():
        spelling.speller.letters.weight.mul_(9)
    features = spelling.features(noise())
    together = spelling.letters(features)
    for wave, own, letters in zip(noise(), features, together, strict=True):
        [alone] = spelling.letters(spelling.features([wave]))
        assert letters.alphabet == alone.alphabet == " ab"
        apart = np.abs(letters.costs.astype(int) - alone.costs)
        assert apart.max() <= 1, "tenths of a nat"
        np.testing.assert_allclose(letters.logp(), spelling.spell(own), atol=0.0501, rtol=0)
    assert spelling.letters([]) == []


def test_an_encoder_without_a_head_says_that_it_cannot_spell(encoder):
    assert encoder.alphabet is None
    assert encoder.letters(encoder.features(noise())) == [None] * len(LENGTHS)
    with pytest.raises(ValueError, match="has no CTC head"):
        encoder.spell(encoder.features(noise())[0])


def test_the_seed_decides_the_weights_and_leaves_torchs_own_state_alone():
    state = torch.get_rng_state()
    one, same, other = (HubertEncoder.create(shape(), seed).features(noise()) for seed in (1, 1, 2))
    torch.testing.assert_close(one, same, atol=0, rtol=0)
    assert not torch.allclose(one[0], other[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_published_weights_give_transformers_hidden_states(published):
    model, directory = published
    wave = noise()[0]
    encoder = HubertEncoder.from_published(str(directory), layer=2)
    with torch.inference_mode():
        theirs = model(encoder.prepare(wave)[None], output_hidden_states=True).hidden_states
    for layer in (1, 2):
        ours = encoder.features([wave], layer)[0]
        torch.testing.assert_close(ours, theirs[layer][0], atol=1e-4, rtol=0)


def test_published_weights_say_whether_waveforms_are_normalised(published):
    model, directory = published
    large = model.config.feat_extract_norm == "layer"
    encoder = HubertEncoder.from_published(str(directory))
    assert encoder.normalize is large
    assert encoder.layer == 3
    wave = noise()[0] * 0.2 + 0.3
    scaled = (wave - wave.mean()) / wave.std(correction=0)
    expected = scaled if large else wave
    torch.testing.assert_close(encoder.prepare(wave), expected, atol=1e-3, rtol=0)


def test_published_weights_survive_save_and_load(tmp_path, published):
    encoder = HubertEncoder.from_published(str(published[1]), layer=2)
    encoder.save(tmp_path / "ours")
    loaded = HubertEncoder.load(tmp_path / "ours")
    torch.testing.assert_close(loaded.features(noise()), encoder.features(noise()), atol=0, rtol=0)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_torchaudio_bundle_gives_its_own_features(monkeypatch, normalize):
    source = HubertEncoder.create(shape(), seed=3)
    bundle = torchaudio.pipelines.Wav2Vec2Bundle(
        _path="",
        _params=source.architecture,
        _sample_rate=16_000,
        _normalize_waveform=normalize,
        _model_type="Wav2Vec2",
    )
    monkeypatch.setattr(bundle, "_get_state_dict", lambda _: source.model.state_dict())
    monkeypatch.setattr(torchaudio.pipelines, "HUBERT_BASE", bundle)
    encoder = HubertEncoder.from_published("torchaudio:HUBERT_BASE", layer=2)
    wave = noise()[0] * 30
    theirs, _ = bundle.get_model().extract_features(wave[None], num_layers=2)
    torch.testing.assert_close(encoder.features([wave])[0], theirs[-1][0], atol=1e-4, rtol=0)


def test_weights_that_are_not_hubert_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        HubertEncoder.from_published("nowhere")
    for bundle in ("HUBERT_TINY", "WAV2VEC2_BASE", "__file__"):
        with pytest.raises(ValueError, match=bundle):
            HubertEncoder.from_published(f"torchaudio:{bundle}")
    (tmp_path / "config.json").write_text('{"model_type": "wav2vec2"}')
    with pytest.raises(ValueError, match="wav2vec2"):
        HubertEncoder.from_published(str(tmp_path))


def test_published_weights_with_a_hole_are_refused(published):
    model, directory = published
    state = model.state_dict()
    del state["encoder.layers.1.attention.q_proj.bias"]
    model.save_pretrained(directory, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks weights: encoder\.layers\.1\.attention\.q_proj"):
        HubertEncoder.from_published(str(directory))


def test_a_layer_that_the_encoder_lacks_is_refused(published):
    with pytest.raises(ValueError, match="layer 4 of an encoder with 3 layers"):
        HubertEncoder.from_published(str(published[1]), layer=4)


@given(
    frames=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    probability=st.floats(0, 1),
    length=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_masks_are_whole_spans_inside_the_clip(frames, probability, length, seed):
    counts = torch.tensor(frames)
    mask = mask_spans(counts, probability, length, torch.Generator().manual_seed(seed))
    assert mask.shape == (len(frames), max(frames))
    for row, count in zip(mask.tolist(), frames, strict=True):
        assert any(row)
        assert not any(row[count:])
        runs = "".join("x" if hidden else " " for hidden in row[:count])
        assert all(len(run) >= length for run in runs.split()[:-1])
        assert len(runs.split()[-1]) >= length or runs.endswith("x")


def test_masks_hide_the_expected_share():
    mask = mask_spans(torch.tensor([20_000]), 0.08, 10, torch.Generator().manual_seed(0))
    assert mask.float().mean().item() == pytest.approx(1 - 0.92**10, abs=0.03)


@given(
    masks=st.integers(1, 3),
    bands=st.integers(1, 20),
    width=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_hidden_bands_are_runs_of_at_most_the_width(masks, bands, width, seed):
    width = min(width, bands)
    hidden = mask_bands(50, bands, masks, width, torch.Generator().manual_seed(seed))
    assert hidden.shape == (50, bands)
    runs = ["".join("x" if one else " " for one in row).split() for row in hidden.tolist()]
    assert all(len(row) <= masks and sum(map(len, row)) <= masks * width for row in runs)
    if masks == 1:
        assert max(len(run) for row in runs for run in row) <= width


def test_every_band_is_hidden_somewhere_and_most_are_shown():
    hidden = mask_bands(2000, 20, 2, 4, torch.Generator().manual_seed(0)).float().mean(0)
    assert hidden.min() > 0.05 and hidden.max() < 0.5


def test_warped_bands_are_read_between_the_bands_and_not_beyond_the_last():
    bands, frames = LogMel(20, 400, 160, stack=2), torch.tensor([11, 11])
    waves, factors = torch.stack(noise([4000, 4000])), torch.tensor([0.87, 1.15])
    plain = bands(waves, frames)
    torch.testing.assert_close(bands(waves, frames, None, torch.ones(2)), plain)
    warped = bands(waves, frames, None, factors).view(2, 22, 20)
    for clip, factor in enumerate(factors.tolist()):
        for heard, window in zip(warped[clip], plain.view(2, 22, 20)[clip], strict=True):
            wanted = np.interp(np.arange(20) * factor, np.arange(20), window.numpy())
            assert heard.numpy() == pytest.approx(wanted, abs=1e-5)


def test_hidden_bands_are_at_their_mean_in_every_window_and_the_others_as_they_are():
    bands = LogMel(20, 400, 160, stack=2)
    waves = torch.stack(noise([4000, 4000]))
    hidden = torch.zeros(2, 20, dtype=torch.bool)
    hidden[0, 3:8] = True
    frames = torch.tensor([11, 11])
    shown, masked = (bands(waves, frames, one).view(2, 11, 2, 20) for one in (None, hidden))
    assert (masked[0, ..., 3:8] == 0).all()
    hidden = hidden[:, None, None].expand_as(shown)
    assert torch.equal(masked[~hidden], shown[~hidden])


def masked_batch(encoder):
    lengths = torch.tensor(LENGTHS)
    waves = torch.nn.utils.rnn.pad_sequence(
        [encoder.prepare(wave) for wave in noise()], batch_first=True
    )
    frames = torch.tensor([encoder.frames(length) for length in LENGTHS])
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(5, (len(frames), int(frames.max())), generator=generator)
    return waves, lengths, targets, mask_spans(frames, 0.1, 3, generator)


def test_the_loss_is_cross_entropy_of_cosines_over_a_tenth(encoder):
    model = MaskedPrediction(encoder, classes=5)
    waves, lengths, targets, mask = masked_batch(encoder)
    with torch.no_grad():
        loss, count, correct, guessed, *_ = model(waves, lengths, targets, mask)
        inputs = encoder.project(waves, lengths)
        inputs[mask] = model.mask_embedding
        frames = torch.tensor([encoder.frames(length) for length in LENGTHS])
        hidden = model.projection(encoder.contextualize(inputs, frames))
        logits = torch.cosine_similarity(hidden[..., None, :], model.class_embeddings, dim=-1) / 0.1
        with_seen, seen_count, same, *_ = model(waves, lengths, targets, mask, seen_weight=0.5)
    terms = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    inside = torch.arange(mask.shape[1]) < frames[:, None]
    assert count == mask.sum()
    torch.testing.assert_close(loss, terms[mask].sum(), atol=1e-3, rtol=0)
    assert correct == same == (logits.argmax(-1) == targets)[mask].sum()
    assert guessed == mask.sum()
    assert seen_count == mask.sum() + (inside & ~mask).sum() / 2
    expected = terms[mask].sum() + terms[inside & ~mask].sum() / 2
    torch.testing.assert_close(with_seen, expected, atol=1e-3, rtol=0)


def test_the_loss_of_a_batch_is_the_sum_over_its_clips(encoder):
    model = MaskedPrediction(encoder, classes=5)
    waves, lengths, targets, mask = masked_batch(encoder)
    with torch.no_grad():
        together, *_ = model(waves, lengths, targets, mask)
        apart = 0.0
        for row, length in enumerate(LENGTHS):
            frames = encoder.frames(length)
            loss, *_ = model(
                waves[row : row + 1, :length],
                lengths[row : row + 1],
                targets[row : row + 1, :frames],
                mask[row : row + 1, :frames],
            )
            apart += loss
    torch.testing.assert_close(together, apart, atol=1e-3, rtol=0)


def test_hidden_frames_are_not_seen():
    """With every frame masked, the audio makes no difference."""
    encoder = HubertEncoder.create(shape(), seed=0)
    model = MaskedPrediction(encoder, classes=5)
    waves, lengths, targets, mask = masked_batch(encoder)
    frames = torch.tensor([encoder.frames(length) for length in LENGTHS])
    every = torch.arange(mask.shape[1]) < frames[:, None]
    with torch.no_grad():
        heard = model(waves, lengths, targets, every)[0]
        torch.testing.assert_close(heard, model(-3 * waves, lengths, targets, every)[0])
        shown = model(waves, lengths, targets, mask)[0]
        assert not torch.isclose(shown, model(-3 * waves, lengths, targets, mask)[0])


def test_targets_are_the_nearest_centroids():
    waves = noise()
    centroids = torch.from_numpy(kmeans(torch.cat([mfcc(w) for w in waves]).numpy(), 5, seed=0))
    targets = Targets(waves, mfcc, centroids)
    for clip, wave in enumerate(waves):
        expected = torch.cdist(mfcc(wave), centroids).argmin(1)
        assert targets[clip].tolist() == expected.tolist()


def test_a_crop_has_the_targets_of_its_place_in_the_clip():
    """Silence turns to noise in mid-clip; so do the drawn crops, and their targets with them."""
    encoder = HubertEncoder.create(shape("group_norm"), seed=0)
    wave = torch.cat([torch.zeros(8000), torch.ones(8000)])
    centroids = torch.tensor([[0.0], [1.0]])
    seen = Targets([wave], lambda wave: wave.unfold(0, 400, 320)[:, -1:], centroids)
    batch = draw(encoder, [wave], seen, plan(batch_seconds=3), torch.Generator().manual_seed(0))
    ends = batch.waves.unfold(1, 400, 320)[:, :, -1]
    assert batch.waves.shape == (10, 4800)
    assert ends.unique().tolist() == [0, 1]
    assert torch.equal(batch.targets, ends.long())


def test_the_schedule_rises_then_falls_to_the_end():
    rates = [schedule(step, 100) for step in range(100)]
    assert max(rates) == 1
    assert rates[:8] == sorted(rates[:8]) and rates[8:] == sorted(rates[8:], reverse=True)
    assert 0 < rates[-1] < 0.02
    assert 0 < schedule(0, 1) <= 1


class Stopped(Exception):
    pass


def run(
    directory: Path,
    stop_at: int | None = None,
    seed: int = 0,
    norm: str = "layer_norm",
    threads: int = 1,
):
    log = []

    def record(step, metrics):
        log.append((step, metrics))
        if step == stop_at:
            raise Stopped

    waves = noise((9000, 4000, 7000, 12_000))
    settings = plan(checkpoint_steps=2)
    how = {"threads": threads}
    encoder = pretrain(shape(norm), settings, waves, seed, directory, kmeans, record, **how)
    return encoder, log


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("stop_at", [1, 2, 3, 5])
def test_resumed_pretraining_equals_uninterrupted(tmp_path, uninterrupted, stop_at):
    with pytest.raises(Stopped):
        run(tmp_path, stop_at)
    resumed, log = run(tmp_path)
    whole, whole_log = uninterrupted
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), atol=0, rtol=0)
    assert log == whole_log[-len(log) :]
    assert log[0][0] <= stop_at + 1


def test_threads_share_the_crops_of_a_step_and_learn_the_same(tmp_path, uninterrupted):
    shared, log = run(tmp_path, threads=2)
    losses = [metrics["loss"] for _, metrics in uninterrupted[1]]
    assert [metrics["loss"] for _, metrics in log] == pytest.approx(losses, rel=1e-3)
    theirs = shared.state_dict()
    for name, value in uninterrupted[0].state_dict().items():
        torch.testing.assert_close(value, theirs[name], atol=1e-3, rtol=1e-3)


def test_pretraining_logs_every_step_of_every_round(uninterrupted):
    _, log = uninterrupted
    assert [step for step, _ in log] == [1, 2, 3, 4, 5, 6]
    assert [metrics["round"] for _, metrics in log] == [1, 1, 1, 2, 2, 2]


def test_finished_pretraining_is_not_repeated(tmp_path, uninterrupted):
    run(tmp_path)
    encoder, log = run(tmp_path)
    assert log == []
    torch.testing.assert_close(encoder.state_dict(), uninterrupted[0].state_dict(), atol=0, rtol=0)


def test_another_seed_pretrains_another_encoder(tmp_path, uninterrupted):
    other, _ = run(tmp_path, seed=1)
    assert not np.allclose(other.features(noise())[0], uninterrupted[0].features(noise())[0])


def test_pretraining_learns_what_can_be_told_from_context(tmp_path):
    """Clips of one steady tone each: what is hidden is what is heard around it."""
    time = torch.arange(6400) / 16_000
    tones = [torch.sin(2 * torch.pi * pitch * time) for pitch in (200, 500, 1200, 2600)]
    rounds = [{"target": "mfcc", "classes": 4, "steps": 40}]
    settings = plan(rounds=rounds, learning_rate=2e-2, batch_seconds=2.4)
    accuracy = []
    pretrain(
        shape(), settings, tones, 0, tmp_path, kmeans, lambda _, m: accuracy.append(m["accuracy"])
    )
    assert np.mean(accuracy[:3]) < 0.6
    assert np.mean(accuracy[-10:]) > 0.85


def spoilt(directory: Path, **changes) -> list[int]:
    """Pretrain on phones where the last of the clips is no sound at all; the steps logged."""
    waves, phones = steady_phones()
    broken = [*waves, *waves, torch.full_like(waves[0], torch.nan)]
    aligned = Phones([*phones._aligned, *phones._aligned, phones._aligned[0]])
    settings = plan(
        rounds=[{"target": "phones", "steps": 60}],
        batch_seconds=0.4,
        crop_seconds=0.4,
        checkpoint_steps=1,
        **changes,
    )
    steps = []
    pretrain(
        shape(),
        settings,
        broken,
        0,
        directory,
        kmeans,
        lambda step, _: steps.append(step),
        phones=aligned,
        names=[f"clip-{number}" for number in range(len(broken))],
    )
    return steps


def test_pretraining_stops_before_a_step_on_a_loss_that_is_no_number_and_names_the_clip(tmp_path):
    with pytest.raises(NonFiniteLoss, match=r"round 1, step \d+: the loss .*clip-8") as raised:
        spoilt(tmp_path)
    step = int(str(raised.value).split("step ")[1].split(":")[0])
    assert step > 1, "the first clips were sound"
    saved = torch.load(tmp_path / STATE, weights_only=True)
    assert saved["step"] == step - 1
    assert all(weight.isfinite().all() for weight in saved["model"].values())

    steps = spoilt(tmp_path, leave_out=["clip-8"])
    assert steps == list(range(step, 61)), "it goes on where it stopped"


def test_a_clip_to_leave_out_that_there_is_not_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"pretrain\.leave_out: no utterance clip-9"):
        spoilt(tmp_path, leave_out=["clip-9"])
    with pytest.raises(ValueError, match="leaves no audio"):
        spoilt(tmp_path, leave_out=[f"clip-{number}" for number in range(9)])


def test_pretraining_needs_audio_and_crops_with_a_frame(tmp_path):
    with pytest.raises(ValueError, match="no audio"):
        pretrain(shape(), plan(), [], 0, tmp_path, kmeans, print)
    with pytest.raises(ValueError, match=r"crop_seconds 0\.01"):
        pretrain(shape(), plan(crop_seconds=0.01), noise(), 0, tmp_path, kmeans, print)


MIDDLE, HOP, RATE = 200, 320, 16_000
"""Frame f's middle is sample `MIDDLE + f * HOP`."""


def aligned(*stretches):
    """Phones (name, first sample, last sample) of a clip."""
    return [Timed(name, start / RATE, end / RATE) for name, start, end in stretches]


def test_a_frames_class_is_the_phone_said_at_its_middle():
    clip = aligned(("b", 150, 830), ("a", 830, 850), ("c", 1161, 1500))
    phones = Phones([clip, [], aligned(("d", 0, 100))])
    assert phones.names == ["a", "b", "c", "d"] and phones.classes == 5
    # Middles lie at 200, 520, 840, 1160, 1480.
    assert phones[0].tolist()[:5] == [2, 2, 1, 0, 3]
    assert set(phones[0].tolist()[5:]) <= {0}
    assert phones[0].dtype == torch.int64
    assert phones[1].tolist() == []
    assert set(phones[2].tolist()) <= {0}, "over before the first middle"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc_"), st.integers(1, 900)), max_size=8))
def test_phones_are_as_looked_up_frame_by_frame(stretches):
    """Edges lie between two samples, so that no rounding decides. `_` is a pause."""
    edges = np.cumsum([0, *(length for _, length in stretches)]) + 0.5
    clip = [
        Timed(name, start / RATE, end / RATE)
        for (name, _), start, end in zip(stretches, edges[:-1], edges[1:], strict=True)
        if name != "_"
    ]
    other = aligned(("a", 0, 400), ("b", 400, 800), ("c", 800, 1200))
    labels = Phones([other, clip])[1].tolist()
    for frame in range(len(labels) + 20):
        middle = (MIDDLE + frame * HOP) / RATE
        said = [one.text for one in clip if one.start <= middle < one.end]
        expected = 1 + "abc".index(said[0]) if said else 0
        assert (labels[frame] if frame < len(labels) else 0) == expected


def test_a_crop_has_the_phones_of_its_place_and_silence_behind_the_last():
    """Each stretch of the clip has a level of its own; the alignment ends before the clip does."""
    encoder = HubertEncoder.create(shape("group_norm"), seed=0)
    edges = [0, 3000, 7100, 12_000, 16_000]
    clip = aligned(*zip("abc", edges, edges[1:], strict=False))
    levels = torch.tensor([1.0, 2.0, 3.0, 0.0])
    wave = levels.repeat_interleave(torch.tensor(edges).diff())
    batch = draw(
        encoder,
        [wave],
        Phones([clip]),
        plan(batch_seconds=6),
        torch.Generator().manual_seed(0),
    )
    middles = batch.waves.unfold(1, 400, 320)[:, :, MIDDLE]
    assert middles.unique().tolist() == [0, 1, 2, 3]
    assert torch.equal(batch.targets, middles.long())


def test_phones_of_other_frames_are_those_at_their_middles():
    clip = aligned(("a", 0, 3000), ("b", 3000, 7100), ("c", 7100, 12_000))
    phones = Phones([clip])
    framed = phones.framed(720, 480)[0].tolist()
    ends = [3000, 7100, 12_000]
    middles = [360 + 480 * frame for frame in range(len(framed))]
    assert framed == [next((n for n, end in enumerate(ends, 1) if m < end), 0) for m in middles]
    assert len(phones[0]) > len(framed), "the original is as it was"


def test_a_share_of_the_crops_is_recorded_anew_and_normalised_again():
    encoder = HubertEncoder.create(shape("layer_norm"), seed=0)
    waves = noise([4000] * 3)
    phones = Phones([aligned(("a", 0, 4000))] * 2 + [[]], {2: ["a"]})

    def drawn(rough, seed=0):
        made = plan(batch_seconds=60, rough=rough)
        generator = torch.Generator().manual_seed(seed)
        return draw(encoder, waves, phones, made, generator, record=lambda wave, _: wave**3)

    every, some, none = drawn(1), drawn(0.25), drawn(0)
    prepared = [encoder.prepare(wave) for wave in waves]
    changed = [encoder.prepare(prepared[clip] ** 3) for clip in (0, 1)]
    for clip, crop in zip(every.clips, every.waves, strict=True):
        torch.testing.assert_close(crop, changed[clip] if clip < 2 else prepared[2])
    for clip, crop in zip(none.clips, none.waves, strict=True):
        torch.testing.assert_close(crop, prepared[clip])
    of_aligned = [
        not torch.allclose(crop, prepared[clip])
        for clip, crop in zip(some.clips, some.waves, strict=True)
        if clip < 2
    ]
    assert np.mean(of_aligned) == pytest.approx(0.25, abs=0.1)
    assert torch.equal(drawn(0.25).waves, some.waves), "the same each time"


def test_where_no_clip_can_be_drawn_it_ends_with_an_error():
    encoder = HubertEncoder.create(shape("group_norm"), seed=0)
    waves, generator = noise([3000, 3000]), torch.Generator().manual_seed(1)
    phones = Phones([aligned(("a", 0, 3000)), []], {1: ["a"]})
    with pytest.raises(ValueError, match="no clip is left to draw"):
        draw(encoder, waves, phones, plan(), generator, left_out={0}, unaligned=False)
    assert set(draw(encoder, waves, phones, plan(), generator, left_out={0}).clips) == {1}


def test_a_speaker_is_drawn_as_the_number_of_his_clips_to_the_power_of_the_balance():
    speakers = ["many"] * 16 + ["few"] * 4 + ["one"]
    for balance, shares in ((1, [16, 4, 1]), (0.5, [4, 2, 1]), (0, [1, 1, 1])):
        chances = balanced(speakers, balance)
        found = [float(chances[first:last].sum()) for first, last in ((0, 16), (16, 20), (20, 21))]
        assert found == pytest.approx([share / sum(shares) for share in shares])
    encoder = HubertEncoder.create(shape("group_norm"), seed=0)
    waves, clips = noise([4000] * 3), [aligned(("a", 0, 4000))] * 3
    chances = torch.tensor([0.9, 0.1, 0.0], dtype=torch.float64)
    settings, generator = plan(batch_seconds=100), torch.Generator().manual_seed(0)
    drawn = draw(encoder, waves, Phones(clips), settings, generator, chances=chances).clips
    assert np.mean(np.array(drawn) == 0) == pytest.approx(0.9, abs=0.05) and 2 not in drawn


def test_a_domain_is_drawn_as_often_as_it_weighs():
    speakers, domains = ["one", "one", "two", "two"], ["people", "news", "people", "news"]
    assert drawing_chances(plan(balance=1), speakers, domains) is None
    weighed = drawing_chances(plan(balance=1, domain_weights={"people": 3}), speakers, domains)
    assert weighed.tolist() == pytest.approx([3 / 8, 1 / 8, 3 / 8, 1 / 8])
    every = plan(balance=1, domain_weights={"people": 3, "news": 2})
    for said_by in (speakers, None):
        weighed = drawing_chances(every, said_by, domains)
        assert weighed.tolist() == pytest.approx([3 / 10, 2 / 10, 3 / 10, 2 / 10])
    both = drawing_chances(
        plan(balance=0, domain_weights={"people": 3}), ["a", "b", "b", "b"], domains
    )
    assert both.tolist() == pytest.approx([9 / 14, 1 / 14, 3 / 14, 1 / 14])
    with pytest.raises(ValueError, match=r"pretrain\.domain_weights: no clip of peple"):
        drawing_chances(plan(domain_weights={"peple": 3}), speakers, domains)


def test_crops_of_like_length_are_computed_together_and_all_of_them_once():
    encoder = HubertEncoder.create(shape("group_norm"), seed=0)
    waves = noise([3000, 16_000, 9000, 15_500, 2900, 400])
    clips = [aligned(("a", 0, len(wave))) for wave in waves]
    settings = plan(batch_seconds=8, crop_seconds=0.8)
    batch = draw(encoder, waves, Phones(clips), settings, torch.Generator().manual_seed(1))
    groups = list(batch.groups(encoder.frames))
    assert len(groups) > 1
    assert sorted(clip for group in groups for clip in group.clips) == sorted(batch.clips)
    for group in groups:
        longest = int(group.lengths.max())
        assert int(group.lengths.min()) >= (1 - PADDING) * longest
        assert group.waves.shape[1] == longest
        assert (
            group.targets.shape == group.mask.shape == (len(group.clips), encoder.frames(longest))
        )
    assert sum(int(group.mask.sum()) for group in groups) == int(batch.mask.sum())


def test_a_group_hides_and_warps_the_bands_of_its_own_crops():
    encoder = HubertEncoder.create(shape(front="mel", conv_channels=20), seed=0)
    waves = noise([3000, 16_000, 9000, 15_500, 2900, 800])
    phones = Phones([aligned(("a", 0, len(wave))) for wave in waves])
    settings = plan(batch_seconds=8, crop_seconds=0.8, band_masks=2, band_width=5, band_warp=0.1)
    batch = draw(encoder, waves, phones, settings, torch.Generator().manual_seed(1))
    assert batch.bands.shape == (len(batch.clips), encoder.bands) and batch.bands.any()
    assert len(set(batch.warps.tolist())) == len(batch.clips)
    assert 0.9 <= batch.warps.min() < 1 < batch.warps.max() <= 1.1

    def told(one):
        told = (one.lengths, one.bands, one.warps)
        return zip(one.clips, *(each.tolist() for each in told), strict=True)

    groups = list(batch.groups(encoder.frames))
    assert len(groups) > 1
    assert sorted(one for group in groups for one in told(group)) == sorted(told(batch))


def test_crops_are_not_recorded_anew_where_nobody_records(tmp_path):
    with pytest.raises(ValueError, match=r"pretrain\.rough: nobody records anything anew"):
        train_on_phones(tmp_path, [PHONES], rough=0.5)


@pytest.mark.parametrize("name", ["band_masks", "band_warp"])
def test_bands_can_only_be_hidden_or_warped_where_there_are_some(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name}: an encoder without log-mel bands"):
        train_on_phones(tmp_path, [PHONES], **{name: 1 if name == "band_masks" else 0.1})


def steady_phones():
    """Clips of one steady tone each, and an alignment in which each tone is a phone."""
    time = torch.arange(6400) / RATE
    tones = [torch.sin(2 * torch.pi * hertz * time) for hertz in (200, 500, 1200, 2600)]
    return tones, Phones([aligned((name, 0, 6400)) for name in "abcd"])


PHONES = {"target": "phones", "steps": 3}
CLUSTERS = {"target": "mfcc", "classes": 5, "steps": 3}


def train_on_phones(directory, rounds, stop_at=None, **changes):
    log = []

    def record(step, metrics):
        log.append((step, metrics))
        if step == stop_at:
            raise Stopped

    waves, phones = steady_phones()
    settings = plan(rounds=rounds, checkpoint_steps=2, **changes)
    encoder = pretrain(shape(), settings, waves, 0, directory, kmeans, record, phones=phones)
    return encoder, log


@pytest.mark.parametrize("rounds", [[PHONES], [CLUSTERS, PHONES], [PHONES, CLUSTERS]])
def test_resumed_pretraining_on_phones_equals_uninterrupted(tmp_path, rounds):
    whole, whole_log = train_on_phones(tmp_path, rounds)
    for stop_at in {1, 3 * len(rounds) - 1}:
        directory = tmp_path / f"{stop_at}"
        directory.mkdir()
        with pytest.raises(Stopped):
            train_on_phones(directory, rounds, stop_at)
        resumed, log = train_on_phones(directory, rounds)
        torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), atol=0, rtol=0)
        assert log == whole_log[len(whole_log) - len(log) :]
    assert [metrics["round"] for _, metrics in whole_log] == [
        number for number in range(1, len(rounds) + 1) for _ in range(3)
    ]


def test_pretraining_on_phones_learns_them(tmp_path):
    _, log = train_on_phones(
        tmp_path,
        [{"target": "phones", "steps": 40}],
        learning_rate=2e-2,
        batch_seconds=2.4,
    )
    accuracy = [metrics["accuracy"] for _, metrics in log]
    assert np.mean(accuracy[:3]) < 0.6
    assert np.mean(accuracy[-10:]) > 0.85


def test_phones_as_targets_need_an_alignment(tmp_path):
    with pytest.raises(ValueError, match="target is phones, and the corpus has no alignment"):
        pretrain(shape(), plan(rounds=[PHONES]), noise(), 0, tmp_path, kmeans, print)


def sequences_of_tones():
    """Clips of two or three of four steady tones. The first half is aligned and never holds the
    tone d; of the others, all of which hold it, the order of the tones is known."""
    tones, _ = steady_phones()
    draw = np.random.default_rng(0)
    orders = [draw.permutation(3)[: draw.integers(2, 4)].tolist() for _ in range(20)]
    orders += [draw.permutation([3, *draw.permutation(3)[:2]]).tolist() for _ in range(20)]
    waves = [torch.cat([tones[tone] for tone in order]) for order in orders]
    times = [
        aligned(*(("abcd"[tone], 6400 * at, 6400 * (at + 1)) for at, tone in enumerate(order)))
        for order in orders[:20]
    ]
    unaligned = {clip: ["abcd"[tone] for tone in orders[clip]] for clip in range(20, 40)}
    return waves, Phones(times + [()] * 20, unaligned), orders


def test_of_a_clip_that_nobody_aligned_the_likeliest_alignment_is_its_target():
    waves, phones, orders = sequences_of_tones()
    assert phones.sequence(0) is None
    assert (phones.sequence(25) - 1).tolist() == orders[25]
    settings = plan(rounds=[PHONES], crop_seconds=0.1, batch_seconds=8)
    model = MaskedPrediction(HubertEncoder.create(shape(), 0), phones.classes)
    generator = torch.Generator().manual_seed(0)
    batch = draw(model.encoder, waves, phones, settings, generator, unaligned=False)
    assert batch.sequences == [None] * len(batch.clips) and max(batch.clips) < 20
    batch = draw(model.encoder, waves, phones, settings, generator)
    for clip, length, sequence in zip(batch.clips, batch.lengths, batch.sequences, strict=True):
        assert length == (1600 if clip < 20 else len(waves[clip])), "whole, where not aligned"
        assert (sequence is None) == (clip < 20)
    rows = [row for row, one in enumerate(batch.sequences) if one is not None]
    assert 0 < len(rows) < len(batch.clips)
    frames = [model.encoder.frames(length) for length in batch.lengths.tolist()]

    def loss_of(targets, sequences):
        with torch.no_grad():
            return model(batch.waves, batch.lengths, targets, batch.mask, 1.0, sequences)

    targets = batch.targets.clone()
    loss, count, _, guessed, *_ = loss_of(targets, batch.sequences)
    assert count == sum(frames) and guessed == batch.mask.sum()
    for row in rows:
        path = targets[row, : frames[row]].unique_consecutive()
        assert path[path > 0].tolist() == batch.sequences[row].tolist()
    torch.testing.assert_close(loss_of(targets, None)[0], loss)

    impossible = [None if one is None else one.repeat(99) for one in batch.sequences]
    _, count, _, guessed, *_ = loss_of(batch.targets.clone(), impossible)
    alone = [row for row in range(len(frames)) if row not in rows]
    assert count == sum(frames[row] for row in alone) and guessed == batch.mask[alone].sum()


def test_pretraining_learns_a_phone_that_nobody_aligned(tmp_path):
    waves, phones, _ = sequences_of_tones()
    tones, _ = steady_phones()
    held_out = HeldOut(
        [torch.cat([tones[0], tones[3], tones[2]]), torch.cat([tones[1], tones[0]])],
        [["a", "d", "c"], ["b", "unheard"]],
    )
    log = []
    pretrain(
        shape(),
        plan(
            rounds=[{"target": "phones", "steps": 200}],
            learning_rate=1e-2,
            batch_seconds=4,
            crop_seconds=1.2,
            checkpoint_steps=100,
            mask_probability=0.01,
            seen_weight=1,
        ),
        waves,
        0,
        tmp_path,
        kmeans,
        lambda step, metrics: log.append((step, metrics)),
        phones=phones,
        held_out={"tones": held_out},
    )
    measured = {
        step: metrics["phone_errors_tones"]
        for step, metrics in log
        if "phone_errors_tones" in metrics
    }
    assert [*measured] == [100, 200], "at checkpoints"
    assert measured[200] == pytest.approx(1 / 5), "all but the phone that was never met"


def test_silence_does_not_spread_where_somebody_speaks():
    """An encoder guesses silence nearly everywhere, and a phone a little more in its place."""
    said = [0] * 5 + [1] * 6 + [2] * 6 + [0] * 5
    guesses = torch.full((len(said), 3), 0.02)
    guesses[:, 0] = 0.9
    for frame, phone in enumerate(said):
        guesses[frame, phone] += 0.08
    guesses = (guesses / guesses.sum(1, keepdim=True)).log()
    wave = torch.randn(len(said) * HOP + 80, generator=torch.Generator().manual_seed(0))
    for frame, phone in enumerate(said):
        wave[frame * HOP : (frame + 1) * HOP + 80] *= 1.0 if phone else 0.01
    heard = loud(wave, 400, HOP)
    assert heard[6:16].all() and not heard[:4].any() and not heard[-4:].any()
    sequence = torch.tensor([1, 0, 2])
    plain = align(guesses, sequence)
    weighed = align(evidence(guesses, heard), sequence)
    assert (plain == 0).sum() > 18, "what the encoder makes of it by itself"
    assert (weighed == torch.tensor(said)).sum() >= len(said) - 3


def test_an_alignment_is_the_likeliest_path_through_the_sequence():
    draw = torch.Generator().manual_seed(0)
    for sequence in ([1], [1, 2], [1, 0, 2], [2, 2, 1], [1, 0, 3, 1], [0, 1, 0]):
        guesses = torch.rand(6, 4, generator=draw).log()
        best = max(
            (path for path in product(range(4), repeat=6) if is_said(path, sequence)),
            key=lambda path: sum(guesses[at, one].item() for at, one in enumerate(path)),
        )
        assert align(guesses, torch.tensor(sequence)).tolist() == list(best), sequence
    assert align(guesses[:2], torch.tensor([1, 2, 3])) is None
    assert align(guesses[:3], torch.tensor([1, 2, 3])).tolist() == [1, 2, 3]
    assert align(guesses[:3], torch.tensor([], dtype=torch.long)).tolist() == [0, 0, 0]


def is_said(path, sequence) -> bool:
    """Whether the classes of a path can be read as the sequence, silence where it may be."""
    said = "".join(map(str, path))
    pattern = "0*" + "".join("0*" if one == 0 else f"{one}+" for one in sequence) + "0*"
    return re.fullmatch(pattern, said) is not None


def test_the_phone_error_rate_counts_edits_over_what_is_said():
    class Reader:
        def read(self, wave):
            return [1, 2, 2] if len(wave) else []

    phones = Phones([aligned(("a", 0, 100), ("b", 100, 200))])
    clips = HeldOut([torch.ones(3), torch.ones(0)], [["a", "b"], ["a", "a"]])
    assert phone_error_rate(Reader(), clips, phones) == (1 + 2) / 4


def test_a_clip_that_cannot_be_read_is_told_and_the_others_are_trained_on(tmp_path):
    class Waves(list):
        def __getitem__(self, clip):
            if clip == 1:
                raise ValueError("broken.wav: no audio")
            return super().__getitem__(clip)

    waves, phones = steady_phones()
    told = []
    arguments = (shape(), plan(rounds=[CLUSTERS, PHONES]), Waves(waves), 0)
    pretrain(
        *arguments,
        tmp_path,
        kmeans,
        lambda *_: None,
        phones=phones,
        reject=lambda clip, reason: told.append((clip, reason)),
    )
    assert told == [(1, "broken.wav: no audio")]
    with pytest.raises(ValueError, match=r"1: broken\.wav: no audio"):
        pretrain(*arguments, tmp_path / "other", kmeans, lambda *_: None, phones=phones)
    with pytest.raises(ValueError, match=r"no clip can be used; 0: .* at least 400 samples"):
        pretrain(
            shape(),
            plan(rounds=[PHONES]),
            [torch.ones(10)],
            0,
            tmp_path / "short",
            kmeans,
            print,
            phones=Phones([aligned(("a", 0, 10))]),
            reject=lambda clip, reason: None,
        )
