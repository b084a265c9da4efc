"""A worker's pipeline hears what an encoder hears that is given every clip in order."""

from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from cluster.clips import open_ahead, open_clips
from cluster.parts import Part, parts
from cluster.rejections import read_rejections
from cluster.tokenizing import GATHERED, EncodeUnits
from mmrag.config import Hubert, Tokenize, Workers
from mmrag.records import Utterance
from mmrag.speech import audio, tokenized
from mmrag.speech.hubert import HubertEncoder
from mmrag.speech.tokenized import Tokenized, count_part
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
    assert stage(Part("part", said)) == "part"
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


def test_bf16_keeps_nearly_every_unit(models, said, tmp_path):
    exact, _, _ = tokenize(models, said, limits(), tmp_path)
    rough, _, _ = tokenize(models, said, limits(precision="bf16"), tmp_path)
    ids = [
        np.concatenate([expand(one.units) for one in each if one.units is not None])
        for each in (rough, exact)
    ]
    assert np.mean(ids[0] == ids[1]) > 0.9


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
