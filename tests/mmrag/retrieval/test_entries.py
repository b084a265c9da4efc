"""Utterances become entries: every token of them, or their entities' own tokens alone."""

import numpy as np
import pytest
import torch
from random_models import perturb

from mmrag.config import LanguageModel
from mmrag.model.lm import LM
from mmrag.model.vocabulary import EOS, SentencePieces, Vocabulary
from mmrag.records import Units, Utterance
from mmrag.retrieval import datastore
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.entries import read_entries
from mmrag.retrieval.segment import Description, join, windows_of
from mmrag.speech.tokenized import Tokenized

WIDTH, WINDOW = 16, 4
SHAPE = LanguageModel(width=WIDTH, layers=2, heads=2, kv_heads=2, feed_forward=24, tied=True)
TEXTS = ["call maria lopez now", "rome", "maria lopez is in rome today", "nobody at all"]
VOCABULARY = Vocabulary(SentencePieces.train(TEXTS, 60), units=6)
ENTITIES = [("maria lopez",), (), ("rome", "maria lopez", "oslo", "rome"), ()]


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    return perturb(LM(SHAPE, VOCABULARY.size)).eval().requires_grad_(False)


def said(spoken=True):
    """The second is a document of its own; with `spoken`, every other one has units."""
    random = np.random.default_rng(0)
    batch = []
    for number, (text, entities) in enumerate(zip(TEXTS, ENTITIES, strict=True)):
        units = Units(random.integers(0, 6, 5).astype(np.int32), np.ones(5, np.int32))
        document = "" if number == 1 else f"book {number % 2}"
        utterance = Utterance(id=f"u{number}", text=text, document=document, entities=entities)
        batch.append(Tokenized(utterance, units if spoken and number % 2 == 0 else None))
    return batch


def states(lm, one):
    """Keys (T, D) before each token of the text and its end, and those tokens; one by one."""
    tokens = [*VOCABULARY.encode(one.utterance.text), EOS]
    prompt = VOCABULARY.prompt(one.units and VOCABULARY.encode_units(one.units))
    rows = [
        lm(torch.tensor([[*prompt, *tokens[:place]]])).keys[0, -1] for place in range(len(tokens))
    ]
    return torch.stack(rows).numpy(), np.array(tokens)


def test_every_token_and_the_end_become_an_entry_with_the_state_before_it(lm):
    batch = said()
    segment = read_entries(lm, VOCABULARY, batch, WINDOW, "all")
    assert segment.names == [("u0", "book 0"), ("u1", "u1"), ("u2", "book 0"), ("u3", "book 1")]
    for number, one in enumerate(batch):
        rows = segment.utterances == number
        keys, tokens = states(lm, one)
        np.testing.assert_allclose(segment.keys[rows], keys, atol=1e-4, rtol=1e-3)
        np.testing.assert_array_equal(segment.tokens[rows], tokens)
        np.testing.assert_array_equal(segment.windows[rows], windows_of(tokens, WINDOW))
        np.testing.assert_array_equal(segment.positions[rows], np.arange(len(tokens)))


def test_of_entities_their_own_tokens_alone_become_entries(lm):
    batch = said()
    segment = read_entries(lm, VOCABULARY, batch, WINDOW, "entities")
    mentions = [(0, "maria lopez"), (2, "rome"), (2, "maria lopez")]
    assert segment.names == [(f"u{number}", entity) for number, entity in mentions]
    for stretch, (number, entity) in enumerate(mentions):
        rows = segment.utterances == stretch
        keys, tokens = states(lm, batch[number])
        place = VOCABULARY.find(entity, tokens.tolist())
        assert VOCABULARY.decode(segment.tokens[rows]) == entity
        np.testing.assert_allclose(segment.keys[rows], keys[place], atol=1e-4, rtol=1e-3)
        np.testing.assert_array_equal(segment.tokens[rows], tokens[place])
        np.testing.assert_array_equal(segment.windows[rows], windows_of(tokens[place], WINDOW))
        np.testing.assert_array_equal(
            segment.positions[rows], np.arange(place.start, place.stop), "their place in the text"
        )
    assert len(segment.tokens) == sum(np.bincount(segment.utterances))
    assert EOS not in segment.tokens


def costs(lm, one):
    """How little each token of the text and its end is expected, one by one (T,)."""
    tokens, allowed = [*VOCABULARY.encode(one.utterance.text), EOS], VOCABULARY.transcript_ids()
    found = []
    for place, token in enumerate(tokens):
        ids = torch.tensor([[*VOCABULARY.prompt(None), *tokens[:place]]])
        logits = lm(ids).logits.double()[-1].masked_fill(~torch.from_numpy(allowed), -torch.inf)
        found.append(float(logits.logsumexp(-1) - logits[token]))
    return np.array(found)


def test_how_little_a_token_is_expected_is_asked_of_the_text_alone(lm):
    batch = said()
    segment = read_entries(lm, VOCABULARY, batch, WINDOW, "all")
    each = [costs(lm, one) for one in batch]
    np.testing.assert_allclose(segment.surprisals, np.concatenate(each), atol=1e-4, rtol=1e-4)
    mentions = read_entries(lm, VOCABULARY, batch, WINDOW, "entities")
    for stretch, number in enumerate((0, 2, 2)):
        rows = mentions.utterances == stretch
        whole = each[number][mentions.positions[rows]]
        np.testing.assert_allclose(mentions.surprisals[rows], whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("entries", ["all", "entities"])
def test_it_is_asked_of_our_own_models_whoever_spoke(lm, entries):
    for batch in (said(), said(False), [said()[0], said()[2]]):
        segment = read_entries(lm, VOCABULARY, batch, WINDOW, entries)
        assert len(segment.surprisals) == len(segment.tokens) > 0
        assert segment.expected().all()


def test_an_utterance_without_units_is_read_as_text_that_nobody_spoke(lm):
    spoken, written = (read_entries(lm, VOCABULARY, said(s), WINDOW, "all") for s in (True, False))
    same = np.isclose(spoken.keys, written.keys, atol=1e-4).all(1)
    heard = np.isin(spoken.utterances, [0, 2])
    np.testing.assert_array_equal(same, ~heard)
    np.testing.assert_array_equal(spoken.tokens, written.tokens)


def test_a_batch_without_entities_has_no_entries(lm):
    segment = read_entries(lm, VOCABULARY, [said()[1], said()[3]], WINDOW, "entities")
    assert segment.keys.shape == (0, WIDTH)
    assert segment.windows.shape == (0, WINDOW)
    assert len(segment.tokens) == len(segment.positions) == len(segment.utterances) == 0
    assert segment.names == []


@pytest.mark.parametrize("entries", ["all", "entities"])
def test_a_batch_is_read_as_its_utterances_one_by_one(lm, entries):
    batch = said()
    together = read_entries(lm, VOCABULARY, batch, WINDOW, entries)
    alone = join([read_entries(lm, VOCABULARY, [b], WINDOW, entries) for b in batch])
    assert together.names == alone.names
    for field in ("tokens", "windows", "positions", "utterances"):
        np.testing.assert_array_equal(getattr(together, field), getattr(alone, field))
    np.testing.assert_allclose(together.keys, alone.keys, atol=1e-4, rtol=1e-3)
    silent = said(spoken=False)
    together = read_entries(lm, VOCABULARY, silent, WINDOW, entries)
    alone = join([read_entries(lm, VOCABULARY, [b], WINDOW, entries) for b in silent])
    np.testing.assert_allclose(together.surprisals, alone.surprisals, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("entries", ["all", "entities"])
def test_what_was_read_is_written_and_its_windows_are_those_of_its_sequences(lm, tmp_path, entries):
    datastore.create(tmp_path, Description(WIDTH, WINDOW, "l2", "paired", {}))
    for number, batch in enumerate((said()[:2], said()[2:])):
        segment = read_entries(lm, VOCABULARY, batch, WINDOW, entries)
        datastore.write_segment(tmp_path, f"part-{number}", segment)
    datastore.publish(tmp_path, ["part-0", "part-1"])
    store = Datastore.open(tmp_path)
    everything = np.arange(store.entries)
    found = store.passages(everything)
    for entry in everything:
        window = store.windows(everything[[entry]])[0]
        shown = found.tokens[entry][found.present[entry]]
        np.testing.assert_array_equal(shown, window[window > 0])
    if entries == "entities":
        assert set(store.document_names(store.documents)) == {"maria lopez", "rome"}
