"""How little a model expects each token of a text."""

import numpy as np
import pytest
import torch
from random_models import perturb

from mmrag.config import LanguageModel
from mmrag.model import states
from mmrag.model.lm import LM
from mmrag.model.vocabulary import SentencePieces, Vocabulary

TEXTS = ["call maria lopez now", "rome", "", "maria lopez is in rome today", "nobody at all"]
VOCABULARY = Vocabulary(SentencePieces.train(TEXTS, 60), units=6)
SHAPE = LanguageModel(width=16, layers=2, heads=2, kv_heads=2, feed_forward=24, tied=True)


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    return perturb(LM(SHAPE, VOCABULARY.size)).eval().requires_grad_(False)


@pytest.mark.parametrize("at_once", [1, 10, 25])
def test_what_surprises_is_the_same_however_many_texts_are_asked_about_at_once(
    lm, monkeypatch, at_once
):
    texts = [VOCABULARY.encode(text) for text in TEXTS]
    whole = states.surprisals(lm, VOCABULARY, texts)
    asked, read = [], states.read_states

    def watched(lm, vocabulary, some, *more, **how):
        asked.append(len(some))
        return read(lm, vocabulary, some, *more, **how)

    monkeypatch.setattr(states, "read_states", watched)
    monkeypatch.setattr(states, "AT_ONCE", at_once)
    parts = states.surprisals(lm, VOCABULARY, texts)
    assert [len(one) for one in parts] == [len(text) + 1 for text in texts]
    assert sum(asked) == len(texts) and len(asked) > 1
    longest = 1 + max(map(len, texts))
    assert all(some == 1 or some * longest <= at_once for some in asked)
    for one, other in zip(whole, parts, strict=True):
        assert one.dtype == np.float32 and (one >= 0).all()
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)


def test_of_no_texts_nothing_is_asked(lm):
    assert states.surprisals(lm, VOCABULARY, []) == []
