"""A worker's pipeline hears what an encoder hears that is given every clip in order."""

import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from cluster import tokenizing
from cluster.clips import open_ahead, open_clips
from cluster.parts import Part, parts
from cluster.rejections import read_rejections
from cluster.tokenizing import (
    GATHERED,
    NOT_COMPARED,
    DecodeClips,
    EncodeClips,
    EncodeFeatures,
    EncodeUnits,
    FindWritten,
    Frames,
    UnitEncoder,
    WriteUnits,
    operators,
    separate,
    whole_frames,
)
from mmrag.config import Hubert, Tokenize, Workers
from mmrag.recogniser import SpeechTokenizer
from mmrag.records import Timed, Utterance
from mmrag.speech import audio, tokenized
from mmrag.speech.hubert import HubertEncoder
from mmrag.speech.targets import Phones
from mmrag.speech.tokenized import Count, Tokenized, count_part
from mmrag.speech.units import Codebook, expand

UNITS = 12
SHAPE = Hubert(
    front="mel",
    conv_channels=20,
    norm="layer_norm",
    width=16,
    layers=2,
    heads=2,
    feed_forward=24,
    layer=2,
)


ALPHABET = " 'abc"
FRAME = HubertEncoder.create(SHAPE, seed=0)
SHAPE_FIELD, SHAPE_HOP = FRAME.field, FRAME.hop


def limits(**changes) -> Tokenize:
    fields = {
        "units": UNITS,
        "sample_seconds": 1,
        "min_seconds": 0.1,
        "max_seconds": 4,
        "batch_seconds": 3,
        "part_seconds": 60,
        "require_text": False,
        "workers": Workers(count=1, num_cpus=1),
    }
    return Tokenize(**{**fields, **changes})


@pytest.fixture(scope="module")
def encoder() -> HubertEncoder:
    return HubertEncoder.create(SHAPE, seed=0).eval()


@pytest.fixture(scope="module")
def models(encoder, tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    encoder.save(directory / "hubert")
    noise = torch.randn(60_000, generator=torch.Generator().manual_seed(0))
    [features] = encoder.features([0.1 * noise])
    book = Codebook.fit(features.numpy(), UNITS, seed=0, frame_seconds=encoder.frame_seconds)
    book.save(directory / "codebook")
    return directory


@pytest.fixture(scope="module")
def spelling(models, tmp_path_factory):
    """The same, of an encoder that spells."""
    directory = tmp_path_factory.mktemp("spelling")
    encoder = HubertEncoder.create(SHAPE, seed=0, alphabet=ALPHABET)
    with torch.no_grad():
        encoder.speller.letters.weight.mul_(9)  # frames differ in what they spell
    encoder.save(directory / "hubert")
    (directory / "codebook").symlink_to(models / "codebook")
    return directory


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> list[Utterance]:
    """Recordings of many lengths, one of them broken, one with two utterances in it."""
    directory, random = tmp_path_factory.mktemp("audio"), np.random.default_rng(0)
    utterances = [Utterance(id="written", text="nobody said this")]
    for number, seconds in enumerate((1.3, 0.4, 2.9, 0.4, 0.7, 5.5, 1.1, 0.9, 3.7, 2.2, 1.8)):
        path = directory / f"{number}.flac"
        soundfile.write(path, random.normal(0, 0.1, round(seconds * 16_000)), 16_000)
        stated = seconds if number % 2 else None
        utterances.append(Utterance(id=f"{number}", audio=path, duration=stated))
    whole = utterances[3].audio.read_bytes()
    broken = directory / "broken.flac"
    broken.write_bytes(whole[: len(whole) // 2])
    two = [
        Utterance(id=f"half {n}", text="x", audio=utterances[3].audio, offset=n, duration=1.0)
        for n in (0, 1)
    ]
    gone = Utterance(id="gone", audio=directory / "gone.flac")
    return [*utterances, Utterance(id="broken", audio=broken), gone, *two]


def one_after_the_other(encoder, book, said, settings):
    """The slow twin: everything is decoded, then everything encoded, then each clip assigned."""
    heard, rejected = open_clips([one for one in said if one.audio], settings)
    heard.sort(key=lambda pair: len(pair[1]))
    found = [Tokenized(one, None) for one in said if one.audio is None]
    limit = settings.batch_seconds * audio.SAMPLE_RATE
    for batch in parts(heard, lambda pair: len(pair[1]), limit):
        features = encoder.features([wave for _, wave in batch.work])
        for (one, wave), own in zip(batch.work, features, strict=True):
            one = replace(one, duration=len(wave) / audio.SAMPLE_RATE)
            found.append(Tokenized(one, book.encode(own.numpy())))
    return found, rejected


def tokenize(models, said, settings, directory):
    stage = EncodeUnits(models / "hubert", models / "codebook", settings, directory)
    assert stage(Part("part", said)).name == "part"
    path = directory / "part.parquet"
    rejected = read_rejections(directory / ".part.rejected.jsonl")
    return list(tokenized.read_part(path)), rejected, count_part(path)


def test_units_order_and_rejections_are_those_of_one_step_after_the_other(
    encoder, models, said, tmp_path
):
    settings = limits(batch_seconds=60 / GATHERED)  # gathered whole: the same batches
    book = Codebook.load(models / "codebook")
    expected, unread = one_after_the_other(encoder, book, said, settings)
    found, rejected, _ = tokenize(models, said, settings, tmp_path)
    assert [one.utterance.id for one in found] == [one.utterance.id for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.utterance.duration == other.utterance.duration
        if other.units is None:
            assert one.units is None
        else:
            assert expand(one.units).tolist() == expand(other.units).tolist()
    assert list(rejected) == unread and len(unread) == 2


def test_units_do_not_depend_on_how_clips_are_batched(encoder, models, said, tmp_path):
    book = Codebook.load(models / "codebook")
    expected, _ = one_after_the_other(encoder, book, said, limits())
    for seconds in (0.5, 3):
        found, _, _ = tokenize(models, said, limits(batch_seconds=seconds), tmp_path)
        assert [one.utterance.id for one in found] == [one.utterance.id for one in expected]
        ids = [
            np.concatenate([expand(one.units) for one in each if one.units is not None])
            for each in (found, expected)
        ]
        # A frame on the border of two units may fall on either side of it.
        assert np.mean(ids[0] == ids[1]) > 0.99


@pytest.mark.parametrize("seconds", [0.5, 3])
def test_clips_have_the_letters_that_the_encoder_hears_in_each_by_itself(
    spelling, said, tmp_path, seconds
):
    """Those of a long recording that was split, too; what nobody said has none."""
    settings = limits(batch_seconds=seconds)
    encoder = HubertEncoder.load(spelling / "hubert").eval()
    book = Codebook.load(spelling / "codebook")
    direct = SpeechTokenizer(book, encoder, {})
    clips, _ = open_clips([one for one in said if one.audio], settings)
    waves = {one.id: wave for one, wave in clips}
    found, *_ = tokenize(spelling, said, settings, tmp_path)
    assert len(waves) > len(said) - 3 and len(found) == len(waves) + 1
    for one in found:
        if one.units is None:
            continue
        [alone] = direct.encode([waves[one.utterance.id]])
        assert one.units.letters.alphabet == alone.letters.alphabet == ALPHABET
        apart = np.abs(one.units.letters.costs.astype(int) - alone.letters.costs)
        assert apart.max() <= 1, "tenths of a nat"


def test_bf16_keeps_nearly_every_unit(models, said, tmp_path):
    exact, _, _ = tokenize(models, said, limits(), tmp_path)
    rough, _, _ = tokenize(models, said, limits(precision="bf16"), tmp_path)
    ids = [
        np.concatenate([expand(one.units) for one in each if one.units is not None])
        for each in (rough, exact)
    ]
    assert np.mean(ids[0] == ids[1]) > 0.9


def separately(models, said, settings, directory):
    """Each operator after the other, packed between them as between processes."""
    frames = Frames(SHAPE_FIELD, SHAPE_HOP)
    decoded = DecodeClips(whole_frames(settings, frames))(Part("part", said))
    encode = EncodeClips(models / "hubert", models / "codebook", settings)
    encoded = encode(pickle.loads(pickle.dumps(decoded)))
    return WriteUnits(directory, frames)(pickle.loads(pickle.dumps(encoded)))


@pytest.mark.parametrize(
    ("kind", "precision"), [("models", "fp32"), ("models", "bf16"), ("spelling", "bf16")]
)
def test_separate_operators_write_what_one_process_writes(request, said, tmp_path, kind, precision):
    models = request.getfixturevalue(kind)
    settings = limits(precision=precision)
    for name in ("fused", "separate"):
        (tmp_path / name).mkdir()
    encode = EncodeUnits(models / "hubert", models / "codebook", settings, tmp_path / "fused")
    fused = encode(Part("part", said))
    separate = separately(models, said, settings, tmp_path / "separate")
    assert separate == fused
    for name in ("part.parquet", ".part.rejected.jsonl"):
        written = [(tmp_path / way / name).read_bytes() for way in ("fused", "separate")]
        assert written[0] == written[1]
    assert (fused.agreement.frames > 0) == (precision == "bf16")


@pytest.mark.parametrize("way", [tokenize, separately])
def test_a_clip_shorter_than_a_frame_is_rejected_by_its_name(models, said, tmp_path, way):
    one = replace(said[1], offset=0.5, duration=0.015, text="x")
    way(models, [one, *said[-2:]], limits(min_seconds=0.01), tmp_path)
    [rejected] = read_rejections(tmp_path / ".part.rejected.jsonl")
    assert rejected.source == str(one.audio)
    assert "0.015 s, shorter than 0.025 s" in rejected.reason
    assert count_part(tmp_path / "part.parquet").utterances == 2
    features = EncodeFeatures(models / "hubert", limits(min_seconds=0.01))
    assert len(features(Part("part", [one]))) == 0


def test_a_part_without_any_clip_passes_through_separate_operators(models, said, tmp_path):
    written = separately(models, said[:1], limits(), tmp_path)
    assert written.count == Count(1, 0.0, 0)


def test_what_bf16_changes_is_told_of_a_minute_a_worker(models, said, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, "COMPARED_SECONDS", 1.0)
    settings = limits(precision="bf16", batch_seconds=3)
    encode = EncodeUnits(models / "hubert", models / "codebook", settings, tmp_path)
    first, second = (encode(Part(name, said)).agreement for name in ("a", "b"))
    assert 0.9 * first.frames < first.alike <= first.frames
    assert 1.0 < first.frames * 0.02 < 4.0
    assert second == NOT_COMPARED


def test_operators_are_separate_where_the_encoder_has_a_gpu_or_they_are_asked_for():
    gpu = Workers(count=2, num_cpus=1, num_gpus=1)
    assert not separate(limits()) and separate(limits(workers=gpu))
    assert separate(limits(operators="separate"))
    assert not separate(limits(workers=gpu, operators="fused"))
    made = operators(limits(workers=gpu), *[None] * 3, Frames(400, 320))
    assert [stage for stage, *_ in made] == [DecodeClips, EncodeClips, WriteUnits]
    [decoding, encoding, _] = [pool for *_, pool in made]
    assert decoding.workers == Workers(count=8, num_cpus=1) and encoding.workers == gpu


def test_a_part_that_is_there_is_known_as_when_it_was_written(models, said, tmp_path):
    """Phones count for the clips that keep their names, and are not in the part itself."""
    phones = tuple(Timed(name, n / 10, (n + 1) / 10) for n, name in enumerate("abcab"))
    told = [replace(one, phones=phones, text="x") for one in said]
    encode = EncodeUnits(models / "hubert", models / "codebook", limits(), tmp_path)
    written = encode(Part("part", told))
    find = FindWritten(tmp_path, Frames(SHAPE_FIELD, SHAPE_HOP))
    assert find(Part("part", told)) == written
    assert find(Part("part", said)) == replace(written, phones=Counter())
    assert find(Part("other", said)) is None
    heard = [one for one in tokenized.read_part(tmp_path / "part.parquet") if one.units is not None]
    ids = np.concatenate([expand(one.units) for one in heard])
    framed = Phones([phones]).framed(SHAPE_FIELD, SHAPE_HOP)
    classes = [np.pad(framed[0].numpy(), (0, 999))[: one.units.durations.sum()] for one in heard]
    expected = Counter(zip(ids.tolist(), np.concatenate(classes).tolist(), strict=True))
    names = ["", *framed.names]
    assert written.phones == {(unit, names[n]): count for (unit, n), count in expected.items()}


def test_a_part_is_counted_without_being_read(models, said, tmp_path):
    found, _, count = tokenize(models, said, limits(), tmp_path)
    spoken = [one for one in found if one.units is not None]
    assert count.utterances == len(found) == len(spoken) + 1
    assert count.units == sum(len(one.units) for one in spoken)
    assert count.seconds == pytest.approx(sum(one.utterance.duration for one in spoken))


def test_a_part_of_text_alone_has_neither_seconds_nor_units(models, said, tmp_path):
    _, _, count = tokenize(models, said[:1], limits(), tmp_path)
    assert (count.utterances, count.seconds, count.units) == (1, 0.0, 0)


@pytest.mark.parametrize("readers", [1, 3])
def test_recordings_read_ahead_are_those_opened_in_order(said, readers):
    recorded = [one for one in said if one.audio]
    expected, unread = open_clips(recorded, limits())
    ahead = sorted(open_ahead(recorded, limits(), readers), key=lambda one: one[0])
    clips = [clip for _, own, _ in ahead for clip in own]
    assert [one.id for one, _ in clips] == [one.id for one, _ in expected]
    for (_, wave), (_, other) in zip(clips, expected, strict=True):
        assert torch.equal(wave, other)
    assert [one for _, _, own in ahead for one in own] == unread


@pytest.mark.parametrize(("compiled", "eager"), [(1.0, 2.0), (2.0, 1.0), (None, 1.0)])
def test_an_encoder_on_an_accelerator_is_compiled_if_that_is_faster(
    models, said, monkeypatch, compiled, eager
):
    """Tried on the first batch, here by a clock that says so; one that cannot be compiled works."""
    monkeypatch.setattr(HubertEncoder, "compile_layers", lambda self: None)
    encoder = UnitEncoder(models / "hubert", models / "codebook", limits())
    wave = 0.1 * torch.randn(9_000, generator=torch.Generator().manual_seed(1))
    [expected] = encoder.features([wave])
    assert not encoder._compiled

    def seconds(waves, told: bool) -> float:
        if told and compiled is None:
            raise RuntimeError("no compiler")
        return compiled if told else eager

    monkeypatch.setattr(encoder, "_seconds", seconds)
    encoder._try = True
    [found] = encoder.features([wave])
    assert torch.equal(found, expected)
    assert encoder._compiled == (compiled == 1.0)


@pytest.mark.slow
def test_compiled_layers_give_the_features_of_layers_that_are_not(encoder):
    draw = torch.Generator().manual_seed(2)
    waves = [0.1 * torch.randn(samples, generator=draw) for samples in (9_000, 20_000)]
    expected = encoder.features(waves)
    compiled = HubertEncoder.create(SHAPE, seed=0).eval()
    compiled.compile_layers()
    for batch in (waves, waves[:1]):
        for one, other in zip(compiled.features(batch), expected, strict=False):
            assert torch.allclose(one, other, atol=1e-5)
