"""Whisper behind the decoding contract, against transformers' own generate; random weights."""

import json

import numpy as np
import pytest
import torch
from one_answer import Insistent
from random_models import perturb
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

from mmrag.config import KNN, Decode, WhisperShape
from mmrag.decoding.align import align
from mmrag.decoding.decode import Batch, Clip, decode
from mmrag.model.states import read_states
from mmrag.model.whisper import Whisper, WhisperError, fingerprint, locate
from mmrag.model.whisper_training import create
from mmrag.retrieval.interpolation import Retrieval

SHAPE = WhisperShape(
    width=32,
    heads=2,
    encoder_layers=1,
    decoder_layers=2,
    feed_forward=48,
    mel_bands=20,
    window_seconds=2,
    tokens=40,
    pieces=280,
    dropout=0.0,
)
TEXTS = ["turn on the light", "call maria lopez now", "the red door"]
OPTIONS = Decode(beams=1, length_penalty=0.0, tokens_per_second=10, max_seconds=2, speech=0)
LIMIT = 24


def write(directory, seed=0):
    """An untrained checkpoint whose every weight matters."""
    create(directory, SHAPE, TEXTS, seed)
    model = WhisperForConditionalGeneration.from_pretrained(directory)
    torch.manual_seed(seed)
    perturb(model)
    with torch.no_grad():  # it would end at once, or never
        model.model.decoder.embed_tokens.weight[model.config.eos_token_id] *= 2
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def whisper(directory):
    return Whisper.load(directory)


def noise(count, samples=20_000):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(samples - 3000 * n, generator=draw) / 10 for n in range(count)]


def generated(directory, waves):
    """What transformers' own generate writes: ids without prompt and end, and whether it ended."""
    model = WhisperForConditionalGeneration.from_pretrained(directory)
    extractor = WhisperFeatureExtractor.from_pretrained(directory)
    features = extractor([w.numpy() for w in waves], sampling_rate=16_000, return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(features.input_features, max_new_tokens=LIMIT, return_timestamps=False)
    eos = model.config.eos_token_id
    rows = [[token for token in row.tolist() if token <= eos] for row in ids]  # without the prompt
    return [row[: row.index(eos)] if eos in row else row for row in rows]


def test_without_retrieval_it_writes_what_transformers_writes_token_for_token(directory, whisper):
    waves = noise(4)
    expected = generated(directory, waves)
    assert len({tuple(one) for one in expected}) > 1 and max(map(len, expected)) > 5
    speech = whisper.encode(waves)
    together = decode(whisper, whisper.vocabulary, speech, [LIMIT] * 4, OPTIONS)
    assert [one.tokens for one in together] == expected
    for clip, tokens in zip(speech, expected, strict=True):
        [alone] = decode(whisper, whisper.vocabulary, [clip], [LIMIT], OPTIONS)
        assert alone.tokens == tokens


def test_a_clip_that_joins_a_running_batch_is_decoded_as_if_alone(directory, whisper):
    waves = noise(3)
    expected = generated(directory, waves)
    clips = [Clip(one, LIMIT) for one in whisper.encode(waves)]
    batch = Batch(whisper, whisper.vocabulary)
    searches = batch.join(clips[:1])
    batch.step()
    batch.step()
    searches += batch.join(clips[1:])
    while batch.searches:
        batch.step()
    assert [one.best().tokens for one in searches] == expected


def test_a_transcript_goes_on_from_the_words_that_it_begins_with(whisper):
    """Greedy, as reading everything from the start for every token has it."""
    vocabulary, speech = whisper.vocabulary, whisper.encode(noise(3))
    begun = [vocabulary.encode(text) for text in ("the red door", "", "call")]
    heard = decode(whisper, vocabulary, speech, [LIMIT] * 3, OPTIONS, beginnings=begun)
    allowed, first, starts = (
        torch.from_numpy(ids)
        for ids in (vocabulary.transcript_ids(), vocabulary.first_ids(), vocabulary.word_starts())
    )
    for clip, beginning, one in zip(speech, begun, heard, strict=True):
        tokens = list(beginning)
        while len(tokens) < LIMIT and vocabulary.eos not in tokens:
            ids = torch.tensor([[*vocabulary.prompt(clip), *tokens]])
            logits = whisper(ids, whisper.cache([clip], ids.shape[1])).logits[-1]
            behind = allowed & starts if len(tokens) == len(beginning) else allowed
            logits[~(behind if tokens else first)] = -torch.inf
            tokens.append(int(logits.argmax()))
        assert [choice.token for choice in one.choices] == tokens
    words = vocabulary.decode(heard[0].tokens).split()
    assert words[:3] == ["the", "red", "door"], "and whatever follows is another word"


@pytest.mark.parametrize("beams", [2, 3])
def test_every_hypothesis_begins_with_what_is_given(whisper, beams):
    given = whisper.vocabulary.encode("turn on")
    clip = Clip(whisper.encode(noise(1))[0], LIMIT, beams, beginning=given)
    [search] = (batch := Batch(whisper, whisper.vocabulary)).join([clip])
    while batch.searches:
        batch.step()
    found = search.nbest(beams)
    assert len(found) == beams
    assert all(one.tokens[: len(given)] == given for one in found)


def test_weight_zero_is_the_plain_model_and_weight_one_says_what_the_neighbours_say(whisper):
    [clip] = whisper.encode(noise(1))
    [plain] = decode(whisper, whisper.vocabulary, [clip], [LIMIT], OPTIONS)
    token = whisper.vocabulary.encode("door")[-1]
    for weight, expected in ((0.0, plain.tokens), (1.0, [token] * LIMIT)):
        retrieval = Retrieval(
            Insistent(token, distance=0.5), KNN(k=2, weight=weight, temperature=1)
        )
        [heard] = decode(whisper, whisper.vocabulary, [clip], [LIMIT], OPTIONS, retrieval)
        assert heard.tokens == expected


def test_states_read_at_once_are_those_of_decoding_step_by_step(whisper):
    """What a datastore stores is what a query asks with."""
    [clip] = whisper.encode(noise(1))
    text = whisper.vocabulary.encode("turn on the light")
    keys, tokens, [span], _ = read_states(whisper, whisper.vocabulary, [text], [clip], logits=False)
    assert tokens.tolist() == [*text, whisper.vocabulary.eos] and span == slice(0, len(text) + 1)
    prompt = whisper.vocabulary.prompt(clip)
    cache = whisper.cache([clip], 40)
    steps = [whisper(torch.tensor([prompt]), cache).keys[:, -1]]
    steps += [whisper(torch.tensor([[token]]), cache).keys[:, -1] for token in text]
    torch.testing.assert_close(keys, torch.cat(steps), atol=1e-5, rtol=1e-4)


def test_text_that_nobody_spoke_is_read_beside_an_empty_encoder_output(whisper):
    vocabulary = whisper.vocabulary
    text = vocabulary.encode("the red door")
    [clip] = whisper.encode(noise(1))
    silent, *_ = read_states(whisper, vocabulary, [text], [None], logits=False)
    mixed, _, spans, _ = read_states(whisper, vocabulary, [text, text], [None, clip], logits=False)
    torch.testing.assert_close(mixed[spans[0]], silent, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(mixed[spans[1]], silent, atol=1e-2)


def test_words_get_times_within_the_clip_in_order(whisper):
    [clip] = whisper.encode(noise(1, 24_000))
    tokens = whisper.vocabulary.encode("call maria lopez now")
    edges = np.arange(clip.frames + 1) * clip.frame_seconds
    times = np.stack([edges[:-1], edges[1:]], axis=1)
    spans = align(whisper, whisper.vocabulary, clip, times, tokens)
    assert spans.shape == (4, 2)
    assert (np.diff(spans.ravel()) >= 0).all() and spans.max() <= 1.5 + 1e-6


def test_suppressed_tokens_are_never_written(whisper):
    vocabulary = whisper.vocabulary
    allowed, first = vocabulary.transcript_ids(), vocabulary.first_ids()
    assert allowed[vocabulary.eos] and not first[vocabulary.eos]
    assert not allowed[vocabulary.eos + 1 :].any()


def test_text_comes_back_as_it_was_written(whisper):
    vocabulary = whisper.vocabulary
    ids = vocabulary.encode("Call Zoë, now!")
    assert vocabulary.decode([*ids, vocabulary.eos]) == "Call Zoë, now!"
    assert [word for word, _ in vocabulary.word_ends(ids)] == ["Call", "Zoë,", "now!"]
    found = vocabulary.find("maria lopez", vocabulary.encode("call maria lopez now"))
    assert vocabulary.decode(vocabulary.encode("call maria lopez now")[found]) == "maria lopez"


@pytest.mark.parametrize(
    ("removed", "what"),
    [
        ("tokenizer.json", "a tokenizer"),
        ("config.json", "its shape"),
        ("model.safetensors", "weights in safetensors"),
        ("preprocessor_config.json", "a feature extractor"),
    ],
)
def test_a_directory_that_lacks_a_part_is_named_with_it(tmp_path, removed, what):
    write(tmp_path)
    (tmp_path / removed).unlink()
    with pytest.raises(WhisperError, match=rf"{tmp_path} lacks {what}"):
        Whisper.load(tmp_path)


def test_a_model_of_another_family_is_named(tmp_path):
    write(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"model_type": "bart"}))
    with pytest.raises(WhisperError, match="holds a bart model, not a whisper"):
        locate(f"whisper:{tmp_path}")


def test_a_language_that_it_does_not_know_is_refused(directory):
    with pytest.raises(WhisperError, match="knows English alone"):
        Whisper.load(directory, language="es")


def test_a_clip_longer_than_the_window_is_refused(whisper):
    with pytest.raises(ValueError, match=r"2\.5 s of audio in one window of 2 s"):
        whisper.encode([torch.zeros(40_000)])


def test_another_checkpoint_has_another_fingerprint(directory, tmp_path):
    assert fingerprint(directory) == fingerprint(directory)
    assert fingerprint(write(tmp_path, seed=1)) != fingerprint(directory)


def test_of_a_long_context_the_last_tokens_count(whisper):
    """As many as leave half of the positions to the transcript."""
    vocabulary = whisper.vocabulary
    whole, end = list(range(30)), SHAPE.tokens // 2 - 1
    prompt = vocabulary.prompt(None, whole)
    assert prompt[1 : 1 + end] == whole[-end:]
    assert len(prompt) == 1 + end + len(vocabulary.prompt(None))
