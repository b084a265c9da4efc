"""A workspace's text is counted, and what was counted goes where its language model goes."""

import shutil
import sys
from contextlib import nullcontext

import numpy as np
import pytest
from random_models import write_models

from cluster.registry import fetch
from jobs import models, ngram, publish, register, stage
from mmrag import artifact, shipped
from mmrag.artifact import ArtifactError
from mmrag.config import ConfigError, LanguageModel, NGramCounts, Tracking
from mmrag.model.ngram import NGram
from mmrag.model.vocabulary import SentencePieces, Vocabulary
from mmrag.recogniser import NGRAM, Recogniser, SpeechLM
from mmrag.records import Utterance
from mmrag.speech.tokenized import Tokenized, write_part

SHAPE = LanguageModel(width=16, layers=1, heads=2, kv_heads=2, feed_forward=24, tied=False)
SPLITS = {
    "lm": ["Turn on the light!", "turn on the light", "Call 2 people.", "mind the gap"],
    "text": ["play the song", "Call two people", "café"],
    "datastore": ["a name in the datastore"],
    "dev": ["Lights off."],
    "test": ["Mind the gap."],
}
COUNTED = ["turn on the light", "call two people", "play the song", "cafe"]
VOCABULARY = Vocabulary(SentencePieces.train([*COUNTED, "lights off"], 60), units=12)
LEAST = (1, 1, 2)


@pytest.fixture
def own(experiment, tmp_path):
    """The experiment with random models and a few tokens in a workspace of this test's own."""
    place = tmp_path / "workspace"
    write_models(place, SHAPE, VOCABULARY)
    write_tokens(place, SPLITS)
    tracking = Tracking(uri=experiment.tracking.uri, experiment=tmp_path.name)
    changes = {"workspace": place, "tracking": tracking, "ngram": NGramCounts(least=LEAST)}
    return experiment.model_copy(update=changes)


@pytest.fixture
def package(monkeypatch, tmp_path):
    """A package whose models are elsewhere."""
    monkeypatch.setattr(shipped, "DIRECTORY", tmp_path / "models")
    return tmp_path / "models" / "tiny"


def write_tokens(place, splits):
    made = {"codebook": artifact.load(place / "codebook", "codebook")}
    with artifact.create(place / "tokens", "tokens", {}, made, force=True) as draft:
        for split, texts in splits.items():
            (draft.path / split).mkdir()
            said = [Utterance(f"{split}-{n}", text) for n, text in enumerate(texts)]
            silent = Tokenized(Utterance(f"{split}-silent"), None)
            part = draft.path / split / "part-00000.parquet"
            write_part(part, [*(Tokenized(one, None) for one in said), silent])


def reading(experiment, *files, **changes):
    settings = NGramCounts(least=LEAST, files=tuple(map(str, files)), **changes)
    return experiment.model_copy(update={"ngram": settings})


def another_lm(experiment):
    """Let the workspace's language model be another one."""
    file = experiment.workspace / "lm" / artifact.FILE
    true = artifact.load(file.parent, "lm").fingerprint
    file.write_text(file.read_text().replace(true, "0123456789abcdef"))


def check(made, sentences):
    """It holds the counts of these sentences, each once."""
    expected = NGram.count(
        map(VOCABULARY.encode, sentences),
        LEAST,
        VOCABULARY.size,
        int(VOCABULARY.transcript_ids().sum()),
        VOCABULARY.bos,
        VOCABULARY.eos,
    )
    found = NGram.read(made.path)
    for name in ("pieces", "shares", "first"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    shapes = [(one.order, one.size, one.spoken, one.begin) for one in (found, expected)]
    assert shapes[0] == shapes[1]
    assert made.summary["sentences"] == len(sentences)
    assert made.summary["ngrams"] == len(expected)


def test_what_the_language_model_is_trained_on_is_counted_each_sentence_once(own):
    made = ngram.run(own)
    assert made.path == own.workspace / NGRAM
    check(made, COUNTED)
    lm = artifact.load(own.workspace / "lm", "lm")
    tokens = artifact.load(own.workspace / "tokens", "tokens")
    assert made.inputs == {"lm": lm.fingerprint, "tokens": tokens.fingerprint}


def test_what_was_counted_is_not_counted_again(own):
    first = ngram.run(own)
    with stage.console.capture() as said:
        again = ngram.run(own)
    assert "ngram: nothing to do" in said.get()
    assert again.fingerprint == first.fingerprint
    with pytest.raises(ArtifactError, match=r"least.*--force"):
        ngram.run(own.model_copy(update={"ngram": NGramCounts(least=(1, 1))}))


def test_a_corpus_without_text_alone_is_counted_too(own):
    write_tokens(own.workspace, {"lm": SPLITS["lm"]})
    check(ngram.run(own), ["turn on the light", "call two people", "mind the gap"])


def test_more_text_is_counted_but_for_what_is_said_in_dev_and_test(own, tmp_path):
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    lines = ["\ufeffMIND the gap", "", "  lights off!  ", "Play the song.", "Open 3 doors"]
    one.write_text("\n".join(lines), encoding="utf-8")
    other.write_text("open three doors\nΩ\n?!\nthe gap\n", encoding="utf-8")
    made = ngram.run(reading(own, one, other))
    check(made, [*COUNTED, "open three doors", "the gap"])
    assert made.summary["left_out"] == 1, "what no piece writes"
    assert made.inputs[f"text {one}"] == artifact.outside(one).fingerprint
    other.write_text("the gap\n")
    with pytest.raises(ArtifactError, match=r"other\.txt.*--force"):
        ngram.run(reading(own, one, other))
    check(
        ngram.run(reading(own, one, other), force=True), [*COUNTED, "open three doors", "the gap"]
    )


def test_a_file_that_is_not_there_or_is_no_text_is_named(own, tmp_path):
    with pytest.raises(ArtifactError, match=f"no such file or directory: {tmp_path}/gone.txt"):
        ngram.run(reading(own, tmp_path / "gone.txt"))
    strange = tmp_path / "strange.txt"
    strange.write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(ValueError, match=f"{strange}:2: not UTF-8 text"):
        ngram.run(reading(own, strange))
    assert not (own.workspace / NGRAM).exists()


def test_a_corpus_of_which_nothing_is_left_is_refused(own):
    write_tokens(own.workspace, {"lm": ["lights off"], "dev": ["Lights off."]})
    with pytest.raises(ValueError, match="needs texts to count"):
        ngram.run(own)


def test_an_experiment_that_counts_nothing_says_how_to(own):
    with pytest.raises(ConfigError, match=r"ngram: null; with ngram=\{\}"):
        ngram.run(own.model_copy(update={"ngram": None}))


def test_what_has_to_be_made_before_is_named(own):
    shutil.rmtree(own.workspace / "tokens")
    with pytest.raises(ArtifactError, match=r"made by: python -m jobs\.tokenize"):
        ngram.run(own)
    shutil.rmtree(own.workspace / "lm")
    with pytest.raises(ArtifactError, match=r"made by: python -m jobs\.train"):
        ngram.run(own)


def test_models_are_loaded_with_what_was_counted_and_without(own):
    for load in (SpeechLM.load, Recogniser.load):
        assert load(own.workspace).ngram is None
    made = ngram.run(own)
    for load in (SpeechLM.load, Recogniser.load):
        found = load(own.workspace).ngram
        assert np.array_equal(found.shares, NGram.read(made.path).shares)


def test_what_was_counted_in_the_pieces_of_another_language_model_is_refused(own, package):
    ngram.run(own)
    another_lm(own)
    refused = r"ngram was made with lm .* is lm 0123456789abcdef"
    for use in (SpeechLM.load, Recogniser.load):
        with pytest.raises(ArtifactError, match=refused):
            use(own.workspace)
    for use in (publish.run, models.named):
        with pytest.raises(ArtifactError, match=refused):
            use(own)
    with pytest.raises(ArtifactError, match=refused):
        register.run(own, own.tracking.experiment)
    assert not package.exists()


def test_it_is_published_with_its_language_model_and_goes_with_no_other(own, package):
    made = ngram.run(own)
    publish.run(own)
    assert artifact.load(package / NGRAM, NGRAM).fingerprint == made.fingerprint
    assert len(Recogniser.load(package).ngram) == made.summary["ngrams"]
    shutil.rmtree(own.workspace / NGRAM)
    publish.run(own)
    assert Recogniser.load(package).ngram is not None, "of the same language model"
    another_lm(own)
    publish.run(own)
    assert Recogniser.load(package).ngram is None


def test_it_is_registered_with_its_language_model(own, tmp_path):
    name = own.tracking.experiment
    register.run(own, name)
    made = ngram.run(own)
    register.run(own, name)
    without, directory = (
        fetch(f"models:/{name}/{version}", own.tracking, tmp_path / "cache") for version in (1, 2)
    )
    assert not (without / NGRAM).exists()
    assert artifact.load(directory / NGRAM, NGRAM).fingerprint == made.fingerprint
    assert len(Recogniser.load(directory).ngram) == made.summary["ngrams"]


def test_what_a_workspace_counted_is_among_what_its_transcripts_were_made_with(own):
    assert models.named(own).beside == {}
    made = ngram.run(own)
    heard_by = models.named(own)
    assert heard_by.beside == {NGRAM: made}
    assert NGRAM not in heard_by.inputs, "no key depends on it"


def test_a_workspace_takes_what_was_counted_with_the_packages_language_model(
    own, package, tmp_path
):
    made = ngram.run(own)
    publish.run(own)
    base = {
        "hubert": own.hubert.model_copy(update={"weights": shipped.TINY}),
        "tokenize": own.tokenize.model_copy(update={"codebook": shipped.TINY}),
        "train": own.train.model_copy(update={"base": shipped.TINY}),
    }
    fresh = own.model_copy(update={**base, "workspace": tmp_path / "fresh"})
    assert models.named(fresh).ngram.fingerprint == made.fingerprint
    assert len(SpeechLM.load(fresh.workspace).ngram) == made.summary["ngrams"]

    trained = own.model_copy(update={**base, "workspace": tmp_path / "trained"})
    for kind in ("hubert", "codebook", "lm"):
        shutil.copytree(own.workspace / kind, trained.workspace / kind)
    another_lm(trained)
    assert models.named(trained).ngram is None, "it was trained further"
    assert not (trained.workspace / NGRAM).exists()


def test_the_command_counts_and_says_how_much(own, monkeypatch):
    monkeypatch.setattr(stage, "read", lambda config, overrides: own)
    monkeypatch.setattr(stage, "connection", nullcontext)
    monkeypatch.setattr(sys, "argv", ["ngram"])
    with stage.console.capture() as said:
        stage.main(ngram.run, ngram.__doc__)
    assert "4 sentences" in said.get()
