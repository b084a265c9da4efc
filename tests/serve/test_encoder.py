"""The encoder by itself: units come with what a CTC head hears, and the health check minds both."""

import asyncio
import pickle

import numpy as np
import pytest
import torch

from mmrag.config import ESPEAK, ConfigError, LanguageModel, Speaking
from mmrag.corpora.voices import kokoro
from mmrag.model.vocabulary import SentencePieces, Vocabulary
from mmrag.recogniser import SpeechTokenizer
from mmrag.records import Letters, Line, Units
from mmrag.speech import vad
from serve import probe
from serve.encoder import Encoder
from serve.messages import DecodeRequest, EncodedSegment, weight
from serve.settings import read
from tests.support.random_models import write_models

ALPHABET = " abc"
SHAPE = LanguageModel(width=16, layers=1, heads=2, kv_heads=2, feed_forward=24, tied=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    vocabulary = Vocabulary(SentencePieces.train(["turn the light on", "call me"], 40), units=12)
    write_models(directory, SHAPE, vocabulary, alphabet=ALPHABET)
    return directory


def encoder(models) -> Encoder:
    return Encoder(read({"model": str(models), "decode": {"speech": 0}}))


def test_the_probe_is_encoded_with_its_letters_and_is_unwell_once_those_change(models):
    serving = encoder(models)
    told = serving._expected.units
    assert told.letters.alphabet == ALPHABET and len(told.letters) == told.durations.sum()
    asyncio.run(serving.check_health())
    with torch.no_grad():
        serving._models.encoder.speller.letters.bias[1] += 5
    with pytest.raises(RuntimeError, match="no longer encodes the probe"):
        asyncio.run(serving.check_health())


def test_segments_carry_the_letters_of_their_own_clip_whatever_came_with_it(models):
    direct = SpeechTokenizer.load(models)
    waves = [probe.wave(), probe.wave()[8000:30_000]]
    found = encoder(models)._encode(waves)
    for wave, segment in zip(waves, found, strict=True):
        [alone] = direct.encode([vad.trim(torch.from_numpy(wave))[0]])
        apart = segment.units.letters.costs.astype(int) - alone.letters.costs
        assert np.abs(apart).max() <= 1, "tenths of a nat"


@pytest.fixture(scope="module")
def voices(tmp_path_factory):
    for library in ("onnx", "kokoro_onnx", "espeakng_loader"):
        pytest.importorskip(library)
    from tests.support.kokoro_stand_in import write_kokoro

    packs = dict.fromkeys((*kokoro.PACKS["train"], *kokoro.ACCENTED), 0.1)
    return write_kokoro(tmp_path_factory.mktemp("kokoro"), packs)


def test_texts_are_said_by_the_voices_that_are_set_and_in_a_hurry_by_espeak(models, voices):
    """As the models' own synthesizer says them, apart from the clips that are encoded."""
    speaking = {"voices": {"kokoro": 1}, "kokoro": str(voices)}
    given = {"model": str(models), "decode": {"speech": 0}, "speaking": speaking}
    serving, direct = Encoder(read(given)), SpeechTokenizer.load(models)
    texts = ["call me", Line("call me", take=1), Line("/kɔl/", phonetic=True)]
    own = Speaking(voices={"kokoro": 1.0}, kokoro=str(voices))
    for hurried, wanted in ((False, own), (True, ESPEAK)):
        made = asyncio.run(serving.synthesize(texts, hurried))
        told = list(direct.synthesizer(speaking=wanted)(texts))
        assert [one.ids.tolist() for one in made] == [one.ids.tolist() for one in told]


def test_an_encoder_whose_voices_are_not_there_does_not_start(models, tmp_path):
    speaking = {"voices": {"kokoro": 1}, "kokoro": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"speaking\.voices: .*(jobs\.fetch_voices|pip install)"):
        Encoder(read({"model": str(models), "speaking": speaking}))


def test_messages_hold_letters_and_count_their_bytes():
    ids = np.arange(4, dtype=np.int32)
    letters = Letters.of(ALPHABET, np.full((4, 5), -1.0))
    plain, spelled = Units(ids, ids // ids.clip(1)), Units(ids, np.ones_like(ids), letters)
    assert weight(spelled) == weight(plain) + 20
    segment = EncodedSegment(spelled, np.ones(4, bool), 0.0)
    request = DecodeRequest(pickle.loads(pickle.dumps(segment)).units)
    assert request.size == weight(spelled)
    np.testing.assert_array_equal(request.units.letters.costs, letters.costs)
