"""Waves are encoded to units that know what a CTC head hears in their frames."""

import numpy as np
import pytest
import torch

from mmrag.recogniser import SpeechTokenizer
from mmrag.speech.hubert import HubertEncoder
from mmrag.speech.units import Codebook
from tests.support.random_models import ENCODER

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
