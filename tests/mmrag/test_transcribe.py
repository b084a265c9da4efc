import io
import math
from collections import deque
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import soundfile
import torch
from one_answer import Insistent
from random_models import ENCODER, perturb, write_models

from mmrag import artifact, shipped
from mmrag.artifact import ArtifactError
from mmrag.config import (
    KNN,
    CrossAttention,
    Decode,
    Index,
    LanguageModel,
    RetrievedAttention,
)
from mmrag.corpora import synthetic
from mmrag.corpora.voices.espeak import Synthesizer
from mmrag.decoding.decode import Choice, Hypothesis
from mmrag.decoding.guard import LOOPS, credible, loops
from mmrag.decoding.stitch import Stitcher
from mmrag.model import pretrained
from mmrag.model.cross_attention import Adapter
from mmrag.model.lm import LM
from mmrag.model.states import read_states
from mmrag.model.vocabulary import EOS, SentencePieces, Vocabulary
from mmrag.recogniser import Recogniser
from mmrag.records import Timed, Units
from mmrag.retrieval import datastore
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.interpolation import Retrieval
from mmrag.retrieval.memory import AttentionSource
from mmrag.retrieval.retrievers import LocalRetriever
from mmrag.retrieval.segment import Description, Segment, windows_of
from mmrag.speech import cutting, vad
from mmrag.speech.audio import SAMPLE_RATE, AudioError
from mmrag.speech.hubert import HubertEncoder
from mmrag.speech.units import Codebook
from mmrag.transcribe import recognise, transcribe, words

SHAPE = LanguageModel(width=16, layers=1, heads=2, kv_heads=2, feed_forward=24, tied=True)
TEXTS = ["turn on the light", "call maria now", "the red door"]
OPTIONS = Decode(
    beams=1,
    length_penalty=0.6,
    tokens_per_second=1,
    max_seconds=20,
    speech=0,  # noise is transcribed here
)
READS = CrossAttention(
    every=1,
    heads=2,
    head_width=8,
    window=6,
    encoder_layers=1,
    encoder_heads=2,
    encoder_feed_forward=16,
)


def random_vocabulary():
    return Vocabulary(SentencePieces.train(TEXTS, 60), units=12)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    write_models(directory, SHAPE, random_vocabulary())
    return directory


@pytest.fixture(scope="module")
def recogniser(models):
    return Recogniser.load(models)


@pytest.fixture(scope="module")
def store(recogniser, tmp_path_factory):
    """A text-only datastore over the words of `TEXTS` (not their ends), each text a document."""
    directory = tmp_path_factory.mktemp("store")
    description = Description(
        width=16, window=6, metric="l2", audio="none", identity=recogniser.identity
    )
    texts = [recogniser.vocabulary.encode(text) for text in TEXTS]
    keys, tokens, slices, _ = read_states(
        recogniser.lm, recogniser.vocabulary, texts, [None] * 3, logits=False
    )
    counts = [stretch.stop - stretch.start - 1 for stretch in slices]
    datastore.create(directory, description)
    segment = Segment(
        keys=keys.numpy()[tokens != EOS],
        tokens=tokens[tokens != EOS],
        windows=np.concatenate([windows_of(tokens[stretch], 6)[:-1] for stretch in slices]),
        positions=np.concatenate([np.arange(count) for count in counts]),
        utterances=np.repeat(np.arange(3), counts),
        names=[(f"u{number}", f"document {number}") for number in range(3)],
    )
    datastore.write_segment(directory, "only", segment)
    datastore.publish(directory, ["only"])
    return Datastore.open(directory)


def retrieval_from(store, **changes):
    retriever = LocalRetriever.build(store, Index(kind="flat", shards=2), seed=0)
    return Retrieval(retriever, KNN(**{"k": 4, "weight": 0.5, "temperature": 1.0, **changes}))


def noise(seconds, seed=0):
    """A clip as the bytes of a WAV file."""
    wave = np.random.default_rng(seed).standard_normal(round(seconds * SAMPLE_RATE)) * 0.1
    stream = io.BytesIO()
    soundfile.write(stream, wave.astype(np.float32), SAMPLE_RATE, format="WAV", subtype="FLOAT")
    return stream.getvalue()


def test_models_that_belong_together_are_loaded_with_their_fingerprints(models, recogniser):
    for role, fingerprint in recogniser.identity.items():
        assert artifact.load(models / role, role).fingerprint == fingerprint
    assert recogniser.identity.keys() == {"hubert", "codebook", "lm"}
    assert not recogniser.lm.training
    assert not recogniser.encoder.training


@pytest.mark.parametrize(("replaced", "made_from_it"), [("hubert", "codebook"), ("codebook", "lm")])
def test_models_that_do_not_belong_together_are_refused_naming_both(
    tmp_path, replaced, made_from_it
):
    write_models(tmp_path, SHAPE, random_vocabulary())
    old = artifact.load(tmp_path / replaced, replaced)
    inputs = {}
    if replaced == "codebook":
        inputs["hubert"] = artifact.load(tmp_path / "hubert", "hubert")
    config = {"seed": 2}
    with artifact.create(tmp_path / replaced, replaced, config, inputs, force=True) as draft:
        if replaced == "hubert":
            HubertEncoder.create(ENCODER, seed=2).save(draft.path)
        else:
            Codebook(np.zeros((12, 16)), 0.02).save(draft.path)
    new = artifact.load(tmp_path / replaced, replaced)
    with pytest.raises(
        ArtifactError,
        match=f"{made_from_it} was made with {replaced} {old.fingerprint}.*{new.fingerprint}",
    ):
        Recogniser.load(tmp_path)


def test_a_model_that_is_missing_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=f"{tmp_path}/hubert is not a finished hubert"):
        Recogniser.load(tmp_path)


def test_a_long_recording_gives_several_transcripts_that_cover_it(recogniser):
    transcripts = list(transcribe(noise(70), recogniser, OPTIONS))
    assert len(transcripts) >= 4
    assert any(one.text for one in transcripts)
    assert transcripts[0].start == 0
    assert transcripts[-1].end == pytest.approx(70)
    for one, following in pairwise(transcripts):
        assert one.end == following.start
    for one in transcripts:
        assert 0 < one.end - one.start <= 20
        assert [word.text for word in one.words] == one.text.split()


def spoken_in_parts(seconds, pause=0.5, seed=0):
    """Noise that pauses every three seconds, as the bytes of a WAV file."""
    wave = np.random.default_rng(seed).standard_normal(round(seconds * SAMPLE_RATE)) * 0.1
    wave[np.arange(len(wave)) % (3 * SAMPLE_RATE) >= (3 - pause) * SAMPLE_RATE] = 0
    stream = io.BytesIO()
    soundfile.write(stream, wave.astype(np.float32), SAMPLE_RATE, format="WAV", subtype="FLOAT")
    return stream.getvalue()


def test_a_transcript_is_what_its_segment_alone_would_give(recogniser):
    data, options = spoken_in_parts(25), OPTIONS.model_copy(update={"max_seconds": 5})
    whole = list(transcribe(data, recogniser, options))
    assert len(whole) > 5
    for segment, transcript in zip(cutting.segments(data, 5, overlap=1), whole, strict=True):
        wave, _ = vad.trim(segment.wave)
        [heard] = recognise(recogniser, recogniser.encode([wave]), OPTIONS)
        assert recogniser.vocabulary.decode(heard.tokens) == transcript.text
        assert heard.stopped == transcript.stopped


@pytest.mark.parametrize("make", [spoken_in_parts, noise])
def test_segments_transcribed_together_are_transcribed_as_if_one_by_one(recogniser, store, make):
    """In pauses as where nobody pauses, with retrieval."""
    options = OPTIONS.model_copy(update={"max_seconds": 2})
    retrieval = retrieval_from(store)

    def made(batch_seconds):
        found = transcribe(
            make(14), recogniser, options, retrieval, store, batch_seconds=batch_seconds
        )
        return [
            (one.text, one.start, one.end, one.stopped, [w.source.entry for w in one.words])
            for one in found
        ]

    assert made(0.1) == made(5.0) == made(1e6)


class Noting:
    """A recogniser's encoder that notes how many seconds it is given at once."""

    def __init__(self, monkeypatch, recogniser):
        self.seconds = []
        encode = type(recogniser).encode

        def noting(own, waves):
            self.seconds.append(sum(map(len, waves)) / SAMPLE_RATE)
            return encode(own, waves)

        monkeypatch.setattr(type(recogniser), "encode", noting)


def test_segments_are_batched_by_their_seconds(recogniser, monkeypatch):
    noting = Noting(monkeypatch, recogniser)
    options = OPTIONS.model_copy(update={"max_seconds": 4})
    segments = len(list(cutting.segments(spoken_in_parts(30), 4, overlap=1)))
    for most, batches in ((0.1, [segments]), (7.0, range(5, 8)), (60.0, [1])):
        noting.seconds.clear()
        assert list(transcribe(spoken_in_parts(30), recogniser, options, batch_seconds=most))
        assert len(noting.seconds) in batches
        assert max(noting.seconds) <= max(most, 4.0)


def test_no_more_than_a_batch_is_read_ahead_of_what_is_given(recogniser, monkeypatch, tmp_path):
    read = 0.0

    def segments(*arguments, cut=cutting.segments, **more):
        nonlocal read
        for segment in cut(*arguments, **more):
            read = segment.end
            yield segment

    monkeypatch.setattr(cutting, "segments", segments)
    options = OPTIONS.model_copy(update={"max_seconds": 4, "speech": 0.75})
    for minutes in (1, 4):
        path = tmp_path / "long.flac"
        soundfile.write(path, np.zeros(minutes * 60 * SAMPLE_RATE, np.float32), SAMPLE_RATE)
        ends, ahead = [0.0], 0.0
        for transcript in transcribe(path, recogniser, options, batch_seconds=10.0):
            assert transcript.start == ends[-1]
            ends.append(transcript.end)
            ahead = max(ahead, read - transcript.start)
        assert ends[-1] == 60 * minutes
        assert 8 <= ahead <= 10 + 4


def test_what_was_said_before_a_recording_breaks_off_is_given(recogniser, tmp_path):
    path, wave = tmp_path / "broken.flac", np.zeros(40 * SAMPLE_RATE, np.float32)
    wave[:] = np.random.default_rng(0).standard_normal(len(wave)) / 10
    soundfile.write(path, wave, SAMPLE_RATE)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    given, options = [], OPTIONS.model_copy(update={"max_seconds": 4})
    made = transcribe(path, recogniser, options)
    with pytest.raises(AudioError, match="breaks off after"):
        deque(map(given.append, made))
    assert given[-1].end > 10 and all(one.end == after.start for one, after in pairwise(given))


def test_clips_recognised_together_are_recognised_as_if_alone(recogniser, store):
    waves = [
        torch.randn(samples, generator=torch.Generator().manual_seed(samples)) / 10
        for samples in (4000, 20000, 9000)
    ]
    units = recogniser.encode(waves)
    retrieval = retrieval_from(store)
    together = recognise(recogniser, units, OPTIONS, retrieval)
    for wave, heard in zip(waves, together, strict=True):
        [alone] = recognise(recogniser, recogniser.encode([wave]), OPTIONS, retrieval)
        assert alone.tokens == heard.tokens


def test_a_transcript_may_be_as_long_as_its_seconds_allow_and_at_least_16_tokens(recogniser):
    frames = np.array([500], np.int32)  # ten seconds of one unit
    short, long = (
        Units(np.array([1], np.int32), frames // 50),
        Units(np.array([1], np.int32), frames),
    )
    endless = retrieval_that_always_says(recogniser.vocabulary.encode("a")[-1])
    options = OPTIONS.model_copy(update={"tokens_per_second": 3})
    heard = recognise(recogniser, [short, long], options, endless)
    assert [len(one.choices) for one in heard] == [16, 30]
    assert not any(one.stopped for one in heard)


def retrieval_that_always_says(token):
    return Retrieval(Insistent(token), KNN(k=1, weight=1.0, temperature=1.0))


@pytest.mark.parametrize("seconds", [0.001, 0.02, 0.09])
def test_a_clip_too_short_to_hold_a_word_is_an_audio_error(recogniser, seconds):
    with pytest.raises(AudioError, match=r"uploaded audio.*shorter than 0\.1 s"):
        list(transcribe(noise(seconds), recogniser, OPTIONS))


def test_the_shortest_clip_and_silence_are_transcribed(recogniser):
    [transcript] = transcribe(noise(0.1), recogniser, OPTIONS)
    assert (transcript.start, transcript.end) == (0, pytest.approx(0.1))
    stream = io.BytesIO()
    soundfile.write(stream, np.zeros(SAMPLE_RATE), SAMPLE_RATE, format="WAV")
    [transcript] = transcribe(stream.getvalue(), recogniser, OPTIONS)
    assert transcript.end == 1.0


def test_what_is_no_audio_is_named(recogniser, tmp_path):
    with pytest.raises(AudioError, match=str(tmp_path / "missing.wav")):
        list(transcribe(tmp_path / "missing.wav", recogniser, OPTIONS))


def test_words_of_a_real_search_name_entries_documents_and_windows(recogniser, store):
    retrieval = retrieval_from(store, weight=0.95)
    [transcript] = transcribe(noise(3), recogniser, OPTIONS, retrieval, store)
    sources = [word.source for word in transcript.words if word.source]
    assert sources
    for word in transcript.words:
        assert 0 < word.probability <= 1
        assert 0 < word.lm_probability <= 1
    for source in sources:
        assert source.document == f"document {source.utterance.removeprefix('u')}"
        assert source.text in TEXTS[int(source.utterance[1:])]
        assert store.origins(np.array([source.entry])) == [(source.document, source.utterance)]
        assert source.distance >= 0
    unnamed = list(transcribe(noise(3), recogniser, OPTIONS, retrieval))
    assert all(word.source is None for word in unnamed[0].words)
    assert unnamed[0].text == transcript.text


def test_a_words_evidence_is_that_of_its_own_tokens(recogniser, store):
    vocabulary = recogniser.vocabulary
    ids = vocabulary.encode("call maria now")
    assert vocabulary.word_ends(ids) == [("call", 1), ("maria", 3), ("now", 4)]
    choices = (
        Choice(ids[0], -0.1, -1.0, ids[0], entry=7, distance=1.5),
        Choice(ids[1], -0.2, -1.0, ids[1], entry=3, distance=0.5),
        Choice(ids[2], -0.3, -1.5, ids[0], entry=5, distance=2.0),  # farther, but changed its mind
        Choice(ids[3], -0.4, -2.0, ids[3]),
        Choice(EOS, -5.0, -5.0, EOS),
    )
    call, maria, now = words(Hypothesis(choices, -6.0, stopped=True), vocabulary, store)
    assert [(one.text, one.changed) for one in (call, maria, now)] == [
        ("call", False),
        ("maria", True),
        ("now", False),
    ]
    assert (call.source.entry, call.source.distance) == (7, 1.5)
    assert (maria.source.entry, maria.source.distance) == (5, 2.0)
    assert now.source is None
    probabilities = [(one.probability, one.lm_probability) for one in (call, maria, now)]
    expected = [(-0.1, -1.0), (-0.5, -2.5), (-0.4, -2.0)]
    np.testing.assert_allclose(probabilities, np.exp(expected))


class Counting:
    """A source that counts what it is asked; what `silent` says it does not answer."""

    def __init__(self, store, silent=False):
        self._store, self._silent, self.asked = store, silent, []

    def origins(self, entries):
        self.asked.append(("origins", entries.tolist()))
        return [("", "")] * len(entries) if self._silent else self._store.origins(entries)

    def windows(self, entries):
        self.asked.append(("windows", entries.tolist()))
        return self._store.windows(np.full_like(entries, -1) if self._silent else entries)


def test_the_sources_of_all_words_are_looked_up_at_once(recogniser, store):
    vocabulary = recogniser.vocabulary
    call, mar, ia, now = vocabulary.encode("call maria now")
    heard = heard_by(
        Choice(call, -0.1, -1.0, call, entry=7, distance=1.5),
        Choice(mar, -0.2, -1.0, mar),
        Choice(ia, -0.3, -1.5, ia),
        Choice(now, -0.4, -2.0, now, entry=2, distance=0.5),
    )
    counting = Counting(store)
    found = words(heard, vocabulary, counting)
    assert sorted(counting.asked) == [("origins", [7, 2]), ("windows", [7, 2])]
    assert found == words(heard, vocabulary, store)
    assert [word.source and word.source.entry for word in found] == [7, None, 2]
    sources = [(word.source.document, word.source.utterance) for word in found[::2]]
    assert sources == store.origins(np.array([7, 2]))
    alone = heard_by(Choice(call, -0.1, -1.0, call))
    counting.asked.clear()
    assert words(alone, vocabulary, counting)[0].source is None
    assert counting.asked == []


def test_a_source_that_does_not_answer_leaves_the_words_as_they_are(recogniser, store):
    [call] = recogniser.vocabulary.encode("call")
    heard = heard_by(Choice(call, -0.1, -1.0, call, entry=7, distance=1.5))
    [word] = words(heard, recogniser.vocabulary, Counting(store, silent=True))
    assert (word.text, word.source.entry, word.source.distance) == ("call", 7, 1.5)
    assert (word.source.document, word.source.utterance, word.source.text) == ("", "", "")


def test_nobody_asked_when_the_words_were_said(recogniser):
    [call] = recogniser.vocabulary.encode("call")
    [word] = words(heard_by(Choice(call, -0.1, -1.0, call)), recogniser.vocabulary)
    assert (word.start, word.end) == (None, None)


def test_a_transcript_without_words_has_none(recogniser):
    silent = Hypothesis((Choice(EOS, -0.1, -0.1, EOS),), -0.1, stopped=True)
    assert words(silent, recogniser.vocabulary) == ()


def random_adapter(seed=0):
    """An adapter whose gate is open."""
    torch.manual_seed(seed)
    return perturb(Adapter(READS, SHAPE)).eval().requires_grad_(False)


def write_adapter(directory, seed=0):
    lm = artifact.load(directory / "lm", "lm")
    with artifact.create(directory / "adapter", "adapter", {}, {"lm": lm}) as draft:
        pretrained.save_adapter(draft.path, READS, random_adapter(seed).state_dict().items())


def test_an_adapter_is_loaded_where_there_is_one(tmp_path, recogniser):
    assert recogniser.adapter is None
    write_models(tmp_path, SHAPE, random_vocabulary())
    write_adapter(tmp_path, seed=5)
    loaded = Recogniser.load(tmp_path)
    assert loaded.identity.keys() == {"hubert", "codebook", "lm"}, "it makes no keys"
    assert loaded.adapter.config == READS
    assert not loaded.adapter.training
    for name, tensor in random_adapter(seed=5).state_dict().items():
        assert torch.equal(loaded.adapter.state_dict()[name], tensor)


def test_an_adapter_for_another_language_model_is_refused(tmp_path):
    write_models(tmp_path, SHAPE, random_vocabulary())
    write_adapter(tmp_path)
    old = artifact.load(tmp_path / "lm", "lm")
    codebook = artifact.load(tmp_path / "codebook", "codebook")
    config, inputs = {"seed": 2}, {"codebook": codebook}
    with artifact.create(tmp_path / "lm", "lm", config, inputs, force=True) as draft:
        lm = LM(SHAPE, random_vocabulary().size)
        pretrained.save(draft.path, SHAPE, random_vocabulary(), lm.state_dict().items())
    new = artifact.load(tmp_path / "lm", "lm")
    with pytest.raises(ArtifactError, match=f"adapter.*lm {old.fingerprint}.*{new.fingerprint}"):
        Recogniser.load(tmp_path)


def test_without_an_adapter_there_is_nothing_to_read_with(recogniser, store):
    with pytest.raises(ValueError, match="no cross-attention adapter"):
        recogniser.window_cache(store)


def reading_from(recogniser, store, entries=None, **settings):
    """What `recogniser` reads, and the recogniser with an adapter."""
    reader = replace(recogniser, adapter=random_adapter())
    retriever = retrieval_from(store).retriever
    read = RetrievedAttention(**{"k": 3, "stride": 2, "whole": 4, **settings})
    return reader, AttentionSource(reader.window_cache(retriever), read, retriever, entries)


def test_words_of_what_was_read_name_the_window_and_its_attention(recogniser, store):
    for entries in (None, np.array([1, 6])):
        reader, reading = reading_from(recogniser, store, entries)
        [transcript] = transcribe(noise(3), reader, OPTIONS, source=store, attention=reading)
        assert transcript.words
        for word in transcript.words:
            source = word.source
            assert 0 < source.attention <= 1
            assert source.text in TEXTS[int(source.utterance[1:])]
            assert source.document == f"document {source.utterance[1:]}"
            if entries is None:
                assert source.distance >= 0
            else:
                assert source.distance is None
                assert source.entry in entries
        unnamed = list(transcribe(noise(3), reader, OPTIONS, attention=reading))
        assert unnamed[0].text == transcript.text
        assert all(word.source is None for word in unnamed[0].words)
        plain = list(transcribe(noise(3), reader, OPTIONS))
        assert plain[0].text != transcript.text, "otherwise nothing was read"


def heard_by(*choices):
    """A hypothesis of these choices, and its end."""
    return Hypothesis((*choices, Choice(EOS, -0.1, -0.1, EOS)), -1.0, stopped=True)


def test_the_source_of_a_word_is_what_its_changed_tokens_attended_to_most(recogniser, store):
    vocabulary = recogniser.vocabulary
    call, mar, ia, now = vocabulary.encode("call maria now")
    heard = heard_by(
        Choice(call, -0.1, -1.0, call, attended=((7, 0.5, 1.5), (2, 0.3, 4.0))),
        # Alone it would have said `mar` as well: what was read for it does not count.
        Choice(mar, -0.1, -1.0, mar, attended=((9, 0.9, 0.1),)),
        Choice(ia, -0.1, -1.0, call, attended=((3, 0.4, 3.0), (5, 0.2, math.inf))),
        Choice(now, -0.1, -1.0, now),
    )
    first, second, third = (w.source for w in words(heard, vocabulary, store))
    assert (first.entry, first.attention, first.distance) == (7, 0.5, 1.5)
    assert (second.entry, second.attention, second.distance) == (3, 0.4, 3.0)
    assert third is None
    assert all(word.source is None for word in words(heard, vocabulary))


def test_attention_is_averaged_over_a_words_tokens_and_its_distance_is_the_least(recogniser, store):
    vocabulary = recogniser.vocabulary
    call, mar, ia, now = vocabulary.encode("call maria now")
    heard = heard_by(
        Choice(call, -0.1, -1.0, call, attended=((4, 0.2, math.inf),)),
        Choice(mar, -0.1, -1.0, now, attended=((9, 0.5, 2.0), (1, 0.4, 7.0))),
        Choice(ia, -0.1, -1.0, now, attended=((1, 0.3, 6.0),)),
        Choice(now, -0.1, -1.0, now),
    )
    first, second, _ = (word.source for word in words(heard, vocabulary, store))
    assert (first.entry, first.distance) == (4, None), "a list that was read whole has no distance"
    assert (second.entry, second.distance) == (1, 6.0)
    assert second.attention == pytest.approx(0.35)
    assert [(second.document, second.utterance)] == store.origins(np.array([1]))


def test_what_was_attended_to_goes_before_what_voted(recogniser, store):
    vocabulary = recogniser.vocabulary
    [call] = vocabulary.encode("call")
    choice = Choice(call, -0.1, -1.0, call, entry=7, distance=0.1, attended=((2, 0.1, 5.0),))
    [word] = words(heard_by(choice), vocabulary, store)
    assert (word.source.entry, word.source.attention, word.source.distance) == (2, 0.1, 5.0)
    [word] = words(heard_by(replace(choice, attended=())), vocabulary, store)
    assert (word.source.entry, word.source.attention) == (7, None)
    assert word.source.distance == pytest.approx(0.1)


def test_clips_that_read_are_recognised_as_if_alone(recogniser, store):
    reader, reading = reading_from(recogniser, store)
    waves = [torch.randn(n, generator=torch.Generator().manual_seed(n)) / 10 for n in (4000, 20000)]
    units = reader.encode(waves)
    together = recognise(reader, units, OPTIONS, attention_sources=[reading, reading])
    for own, heard in zip(units, together, strict=True):
        [alone] = recognise(reader, [own], OPTIONS, attention_sources=[reading])
        assert alone.tokens == heard.tokens


class Heard:
    """A shortlist that notes what it is asked for and gives the same to every clip."""

    def __init__(self, *ways):
        self.texts, self.ways = [], ways

    def given(self, text, retrieval, attention):
        self.texts.append(text)
        return self.ways


def test_a_shortlist_is_chosen_by_the_transcript_without_it(recogniser, store):
    reader, reading = reading_from(recogniser, store, np.array([1, 6]))
    voting = retrieval_from(store)
    units = reader.encode([torch.randn(n) / 10 for n in (4000, 20000)])
    plain = recognise(reader, units, OPTIONS)
    texts = [reader.vocabulary.decode(one.tokens) for one in plain]
    every = reading_from(recogniser, store)[1]
    for ways in ((voting, None), (None, reading), (voting, reading), (None, None)):
        shortlist = Heard(*ways)
        asked = {"shortlist": shortlist, "attention_sources": [every] * 2}
        heard = recognise(reader, units, OPTIONS, voting, **asked)
        read = None if ways[1] is None else [ways[1]] * 2
        wanted = recognise(reader, units, OPTIONS, ways[0], attention_sources=read)
        assert [one.tokens for one in heard] == [one.tokens for one in wanted]
        assert shortlist.texts == texts
    unasked = Heard(voting, reading)
    recognise(reader, units, OPTIONS, shortlist=unasked)
    assert not unasked.texts, "there was nothing to shorten"


def test_a_shortlist_that_nobody_believes_leaves_the_first_transcript(recogniser, store):
    reader, _ = reading_from(recogniser, store)
    endless = retrieval_that_always_says(recogniser.vocabulary.encode("a")[-1])
    careful = OPTIONS.model_copy(update={"agreement": -1e-3})
    units = reader.encode([torch.randn(20000) / 10])
    [plain] = recognise(reader, units, OPTIONS)
    [heard] = recognise(reader, units, careful, endless, Heard(endless, None))
    assert heard.tokens == plain.tokens


def test_audio_in_which_nobody_speaks_has_no_transcript(recogniser):
    careful = OPTIONS.model_copy(update={"speech": 0.75})
    transcripts = list(transcribe(noise(25), recogniser, careful))
    assert [(one.text, one.words) for one in transcripts] == [("", ())] * len(transcripts)
    whole = list(transcribe(noise(25), recogniser, OPTIONS))
    stretches = [[(one.start, one.end) for one in each] for each in (transcripts, whole)]
    assert stretches[0] == stretches[1]


@pytest.mark.parametrize("stretch", [[1], [1, 2], [1, 1, 2]])
def test_a_run_said_over_and_over_is_a_loop(stretch):
    assert loops([7, *stretch * LOOPS, 8])
    assert not loops([7, *stretch * (LOOPS - 1), 8])
    assert not loops([])


def by_hand_loops(tokens):
    return any(
        tokens[start : start + length] * LOOPS == tokens[start : start + length * LOOPS]
        for length in range(1, len(tokens) + 1)
        for start in range(len(tokens) - length * LOOPS + 1)
    )


def test_loops_are_found_as_by_hand():
    random, found = np.random.default_rng(0), set()
    for _ in range(500):
        tokens = random.integers(0, 2, random.integers(0, 14)).tolist()
        assert loops(tokens) == by_hand_loops(tokens), tokens
        found.add(loops(tokens))
    assert found == {True, False}


def test_a_transcript_is_credible_where_the_model_alone_thinks_it_likely():
    heard = heard_by(Choice(7, -9.0, -2.0, 7), Choice(8, -9.0, -3.9, 8))
    assert credible(heard, -2.0) and not credible(heard, -1.9), "the mean of -2, -3.9 and -0.1"
    assert not credible(heard_by(*[Choice(7, -0.1, -0.1, 7)] * LOOPS), -2.0)
    assert credible(Hypothesis(), -2.0)


def test_what_retrieval_made_incredible_is_made_again_without(recogniser):
    token = recogniser.vocabulary.encode("a")[-1]
    units = recogniser.encode([torch.randn(n, generator=torch.Generator().manual_seed(n)) / 10
                               for n in (4000, 20000)])  # fmt: skip
    endless, free = retrieval_that_always_says(token), [None, None]
    alone = recognise(recogniser, units, OPTIONS)
    insisting = recognise(recogniser, units, OPTIONS, endless)
    assert [one.tokens for one in insisting] != [one.tokens for one in alone]
    careful = OPTIONS.model_copy(update={"agreement": -50.0})
    assert recognise(recogniser, units, careful, endless) == alone, "it goes round in circles"
    assert recognise(recogniser, units, careful, [None, endless])[0].tokens == alone[0].tokens
    strict = OPTIONS.model_copy(update={"agreement": -1e-9})
    for nothing in (None, free):
        assert recognise(recogniser, units, strict, nothing) == alone


def test_sentences_heard_together_have_the_units_each_has_alone():
    recogniser = Recogniser.load(shipped.find(shipped.TINY))
    texts = [f"please call {name} today" for name in ("ann", "zanab kuri", "bartholomew")]
    texts += ["kuri", "about port darnby next week"]
    say = recogniser.synthesizer()
    together = list(say(texts))
    assert len(together) == len(texts)
    for text, heard in zip(texts, together, strict=True):
        [alone] = say([text])
        np.testing.assert_array_equal(heard.ids, alone.ids)
        np.testing.assert_array_equal(heard.durations, alone.durations)


def test_a_synthesizers_sentences_are_heard_in_batches_and_given_as_they_are(monkeypatch):
    recogniser = Recogniser.load(shipped.find(shipped.TINY))
    monkeypatch.setattr("mmrag.recogniser.SPOKEN", 2)
    batches, features = [], recogniser.encoder.features

    def counted(waves, *arguments):
        batches.append(len(waves))
        return features(waves, *arguments)

    monkeypatch.setattr(recogniser.encoder, "features", counted)
    said = recogniser.synthesizer()(["one", "two", "three"])
    next(said)
    assert batches == [2]
    assert len(list(said)) == 2
    assert batches == [2, 1]


JOINED = (
    "the curious rabbit ran by the window",
    "is the helmet still on the old farm",
    "we felt angry because they saw a ghost",
    "what time is it in buxbury on friday",
)


def sentences_joined(pause, seed=0):
    """Somebody saying JOINED, `pause` seconds between them: a wave (T,), and its words' times."""
    spoken, at, parts = [], 0.0, []
    for planned in synthetic.assign_voices(JOINED, seed):
        speech = synthetic.render(planned, Synthesizer())
        wave = np.concatenate([speech.wave, np.zeros(round(pause * SAMPLE_RATE), np.float32)])
        spoken += [Timed(one.text, one.start + at, one.end + at) for one in speech.words]
        parts.append(wave)
        at += len(wave) / SAMPLE_RATE
    return np.concatenate(parts), spoken


@pytest.mark.parametrize("pause", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("max_seconds", [2.5, 3.0, 4.0, 6.0])
def test_words_at_the_seams_of_speech_come_out_once(pause, max_seconds):
    """Heard by somebody who hears every whole word, and half of one as something else."""
    wave, spoken = sentences_joined(pause)
    stream = io.BytesIO()
    soundfile.write(stream, wave, SAMPLE_RATE, format="WAV", subtype="FLOAT")
    stitcher, found, in_speech = Stitcher(), [], 0
    overlap = cutting.overlap(max_seconds)
    for segment in cutting.segments(stream.getvalue(), max_seconds, overlap=overlap):

        def inside(word, begins=segment.start - segment.before, ends=segment.end + segment.after):
            return (min(word.end, ends) - max(word.start, begins)) / (word.end - word.start)

        heard = [
            replace(word, text=word.text if inside(word) > 0.7 else "uh")
            for word in spoken
            if inside(word) > 0.3
        ]
        in_speech += bool(segment.after)
        found += stitcher.add(heard, heard, segment.start, segment.before, segment.after)
    said = [word.text for heard, counted in (*found, *stitcher.rest()) for word in heard[counted]]
    assert said == " ".join(JOINED).split()
    assert in_speech or pause or max_seconds > 4, "nobody paused for long enough"


def test_a_model_hears_sentences_with_short_pauses_once_each():
    recogniser = Recogniser.load(shipped.find(shipped.TINY))
    wave, _ = sentences_joined(0.3)
    stream = io.BytesIO()
    soundfile.write(stream, wave, SAMPLE_RATE, format="WAV", subtype="FLOAT")
    options = OPTIONS.model_copy(
        update={"tokens_per_second": 16, "max_seconds": 4.0, "speech": 0.75}
    )
    heard = list(transcribe(stream.getvalue(), recogniser, options))
    assert len(heard) == len(JOINED)
    right = [one.text == text for one, text in zip(heard, JOINED, strict=True)]
    assert sum(right) >= 3, "one of them it does not get right in this voice"
