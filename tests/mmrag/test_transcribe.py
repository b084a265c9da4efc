import io
from itertools import pairwise

import numpy as np
import pytest
import soundfile
import torch

from mmrag import artifact, audio, datastore, pretrained
from mmrag.artifact import ArtifactError
from mmrag.audio import SAMPLE_RATE, AudioError
from mmrag.config import KNN, Decode, Hubert, Index, LanguageModel
from mmrag.datastore import Datastore, Description, Segment, windows_of
from mmrag.decode import Choice, Hypothesis, Retrieval, read_states
from mmrag.hubert import HubertEncoder
from mmrag.index import LocalRetriever
from mmrag.lm import LM
from mmrag.records import Neighbours, Units
from mmrag.transcribe import Recogniser, recognise, transcribe, words
from mmrag.units import Codebook
from mmrag.vocabulary import EOS, SentencePieces, Vocabulary

ENCODER = Hubert(
    conv_channels=8,
    norm="layer_norm",
    width=16,
    layers=1,
    heads=2,
    feed_forward=16,
    layer=1,
)
SHAPE = LanguageModel(width=16, layers=1, heads=2, kv_heads=2, feed_forward=24, tied=True)
TEXTS = ["turn on the light", "call maria now", "the red door"]
OPTIONS = Decode(beams=1, length_penalty=0.6, tokens_per_second=1, batch_seconds=20, max_seconds=20)


def random_vocabulary():
    return Vocabulary(SentencePieces.train(TEXTS, 60), units=12)


def write_models(directory):
    """hubert, codebook and lm artifacts with random weights, each made from the one before."""
    torch.manual_seed(0)
    with artifact.create(directory / "hubert", "hubert", {}, {}) as draft:
        HubertEncoder.create(ENCODER, seed=0).save(draft.path)
    hubert = artifact.load(directory / "hubert", "hubert")
    with artifact.create(directory / "codebook", "codebook", {}, {"hubert": hubert}) as draft:
        centroids = np.random.default_rng(0).standard_normal((12, 16))
        Codebook(centroids, frame_seconds=0.02).save(draft.path)
    codebook = artifact.load(directory / "codebook", "codebook")
    with artifact.create(directory / "lm", "lm", {}, {"codebook": codebook}) as draft:
        lm, vocabulary = LM(SHAPE, random_vocabulary().size), random_vocabulary()
        tensors = [(name, t + torch.randn_like(t) / 3) for name, t in lm.state_dict().items()]
        pretrained.save(draft.path, SHAPE, vocabulary, tensors)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    write_models(directory)
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
    write_models(tmp_path)
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


def test_a_transcript_is_what_its_stretch_alone_would_give(recogniser):
    whole = list(transcribe(noise(25), recogniser, OPTIONS))
    for segment, transcript in zip(audio.segments(noise(25), 20), whole, strict=True):
        [heard] = recognise(recogniser, recogniser.listen([segment.wave]), OPTIONS)
        assert recogniser.vocabulary.decode(heard.tokens) == transcript.text
        assert heard.stopped == transcript.stopped


def test_clips_recognised_together_are_recognised_as_if_alone(recogniser, store):
    waves = [
        torch.randn(samples, generator=torch.Generator().manual_seed(samples)) / 10
        for samples in (4000, 20000, 9000)
    ]
    units = recogniser.listen(waves)
    retrieval = retrieval_from(store)
    together = recognise(recogniser, units, OPTIONS, retrieval)
    for wave, heard in zip(waves, together, strict=True):
        [alone] = recognise(recogniser, recogniser.listen([wave]), OPTIONS, retrieval)
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
    class Insistent:
        def search(self, queries, k, exclude_documents=None):
            found = Neighbours.none(len(queries), k)
            found.distances[:, 0], found.tokens[:, 0], found.entries[:, 0] = 1.0, token, 0
            return found

    return Retrieval(Insistent(), KNN(k=1, weight=1.0, temperature=1.0))


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
        assert store.utterance_name(source.entry) == source.utterance
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


def test_a_transcript_without_words_has_none(recogniser):
    silent = Hypothesis((Choice(EOS, -0.1, -0.1, EOS),), -0.1, stopped=True)
    assert words(silent, recogniser.vocabulary) == ()
