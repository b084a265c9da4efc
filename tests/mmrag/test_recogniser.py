"""Waves are encoded to units that know what a CTC head hears in their frames."""

import io

import numpy as np
import pytest
import soundfile
import torch

from mmrag.config import Decode, LanguageModel
from mmrag.model.vocabulary import SentencePieces, Vocabulary
from mmrag.recogniser import Recogniser, SpeechTokenizer
from mmrag.speech.hubert import HubertEncoder
from mmrag.speech.units import Codebook
from mmrag.transcribe import transcribe
from tests.support.random_models import ENCODER, write_models

ALPHABET = " 'abcdefghijklmnopqrstuvwxyz"


def tokenizer(alphabet: str | None) -> SpeechTokenizer:
    encoder = HubertEncoder.create(ENCODER, seed=0, alphabet=alphabet).eval()
    centroids = np.random.default_rng(0).standard_normal((20, encoder.width))
    return SpeechTokenizer(Codebook(centroids, encoder.frame_seconds), encoder, {})


def waves(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, generator=generator) * 0.1 for length in lengths]


@pytest.mark.parametrize("lengths", [(400,), (9000, 400, 4321)])
def test_units_carry_what_the_encoders_head_spells_in_each_of_their_frames(lengths):
    spelling, clips = tokenizer(ALPHABET), waves(*lengths)
    for wave, units in zip(clips, spelling.encode(clips), strict=True):
        assert units.letters.alphabet == ALPHABET
        assert len(units.letters) == units.durations.sum() == spelling.encoder.frames(len(wave))
        [alone] = spelling.encoder.features([wave])
        expected = spelling.encoder.spell(alone).numpy().clip(-25.5)
        np.testing.assert_allclose(units.letters.logp(), expected, atol=0.051, rtol=0)


def test_an_encoder_without_a_head_leaves_units_without_letters():
    clips = waves(4000, 9000)
    plain = tokenizer(None).encode(clips)
    assert [one.letters for one in plain] == [None, None]
    assert tokenizer(None).encode([]) == tokenizer(ALPHABET).encode([]) == []


def test_the_letters_of_every_segment_reach_the_decoders_vocabulary(tmp_path, monkeypatch):
    shape = LanguageModel(width=16, layers=1, heads=2, kv_heads=2, feed_forward=24, tied=True)
    pieces = SentencePieces.train(["turn on the light", "call maria now"], 60)
    write_models(tmp_path, shape, Vocabulary(pieces, units=12), alphabet=ALPHABET)
    recogniser, met = Recogniser.load(tmp_path), []
    speech_input = Vocabulary.speech_input

    def watched(self, units):
        met.append(units)
        return speech_input(self, units)

    monkeypatch.setattr(Vocabulary, "speech_input", watched)
    settings = Decode(beams=1, length_penalty=0.6, tokens_per_second=1, max_seconds=4, speech=0)
    [wave] = waves(160_000)
    stream = io.BytesIO()
    soundfile.write(stream, wave.numpy(), 16_000, format="WAV")
    heard = list(transcribe(stream.getvalue(), recogniser, settings))
    assert all(len(one.letters) == one.durations.sum() for one in met)
    assert len({one.letters.costs.tobytes() for one in met}) == len(heard) > 1
