"""A Whisper's datastores, what is tuned and evaluated with it, and one trained from nothing."""

import json

import numpy as np
import pytest
import soundfile
import torch
from whisper_checkpoint import random_whisper, training

from jobs import build_datastore, clips, evaluate, models, train_whisper, tune
from mmrag.artifact import ArtifactError
from mmrag.config import ConfigError, Experiment
from mmrag.corpora import manifest
from mmrag.model.whisper import WhisperError
from mmrag.recogniser import load_decoder
from mmrag.records import Utterance
from mmrag.retrieval.datastore import Datastore
from mmrag.speech import audio

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return random_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def heard(workspace, checkpoint, tmp_path_factory) -> Experiment:
    """An experiment whose speech a Whisper hears, with a corpus and nothing else."""
    path = tmp_path_factory.mktemp("heard")
    (path / "corpus").symlink_to(workspace.path / "corpus")
    return workspace.experiment.model_copy(update={"workspace": path, "models": checkpoint})


def about(experiment: Experiment, section: str = "datastore", **changes) -> Experiment:
    settings = getattr(experiment, section).model_copy(update=changes)
    return experiment.model_copy(update={section: settings})


@pytest.fixture(scope="module")
def paired(heard) -> Datastore:
    made = build_datastore.run(about(heard, name="multimodal", audio="paired"))
    return Datastore.open(made.path)


def test_keys_over_recordings_are_the_states_of_the_checkpoint(heard, paired):
    """Read one by one, without parts, batches or files between."""
    loaded = load_decoder(heard.models)
    lines = manifest.read(heard.workspace / "corpus" / "datastore.jsonl")
    said = {one.id: one for one in lines}
    names = [utterance for _, utterance in paired.origins(np.arange(paired.entries))]
    assert set(names) == set(said)
    for name in dict.fromkeys(names[:40]):
        entries = [entry for entry, each in enumerate(names) if each == name]
        tokens = loaded.vocabulary.encode(said[name].text)
        [speech] = loaded.encode([audio.read(said[name].audio)])
        ids = torch.tensor([[*loaded.vocabulary.prompt(speech), *tokens]])
        keys = loaded.lm.read(ids, [speech], torch.zeros_like(ids, dtype=torch.bool)).keys[0]
        assert paired.tokens[entries].tolist() == [*tokens, loaded.vocabulary.eos]
        expected = keys[-len(entries) :].numpy()
        np.testing.assert_allclose(
            paired.keys_of(np.array(entries)), expected, atol=2e-3, rtol=1e-2
        )


def test_a_datastore_says_which_checkpoint_keyed_it(heard, paired, tmp_path):
    identity = paired.description.identity
    assert set(identity) == {"whisper"} and paired.description.width == 16
    other = heard.model_copy(update={"models": random_whisper(tmp_path, width=32)})
    with pytest.raises(ArtifactError, match=r"multimodal was made with whisper .* but"):
        evaluate.run(about(about(other, name="multimodal"), "evaluate", retriever="local"))


def test_text_is_keyed_alone_or_spoken_by_a_synthesizer(heard, paired):
    silent = build_datastore.run(about(heard, name="text", audio="none"))
    spoken = build_datastore.run(about(heard, name="spoken", audio="spoken"))
    assert not (spoken.path / ".spoken").exists()
    stores = [paired, *(Datastore.open(made.path) for made in (silent, spoken))]
    assert len({store.entries for store in stores}) == 1
    a, b, c = (store.keys_of(np.arange(8)) for store in stores)
    assert not np.allclose(a, b) and not np.allclose(b, c) and not np.allclose(a, c)


def test_a_text_that_takes_too_long_to_say_is_listed_and_the_others_read(heard, tmp_path):
    (tmp_path / "lines.txt").write_text("turn on the light\n" + "and then " * 40 + "\n")
    lines = about(heard, name="lines", source=str(tmp_path / "lines.txt"), audio="spoken")
    made = build_datastore.run(lines)
    [told] = [json.loads(line) for line in (made.path / "rejected.jsonl").open()]
    assert told["source"] == "lines.txt:2"
    assert "s to say, and 6 s are heard at once" in told["reason"]
    assert made.summary["utterances"] == 1


def test_it_is_tuned_and_evaluated_with_a_datastore(heard, paired):
    local = about(about(heard, name="multimodal"), "evaluate", retriever="local")
    chosen = tune.run(local)
    assert (chosen.path / "knn.json").exists() and not (chosen.path / "attention.json").exists()
    made = evaluate.run(about(local, "evaluate", modes=("none", "knn")))
    rows = json.loads((made.path / "results.json").read_text())["rows"]
    assert [row["mode"] for row in rows] == ["none", "knn"]
    assert rows[0]["utterances"] == rows[1]["utterances"] > 0
    assert rows[1]["recall_at_k"] is not None


def test_what_needs_an_adapter_is_refused(heard, paired):
    with pytest.raises(ConfigError, match=r"cross_attention needs an adapter, which belongs to"):
        evaluate.run(about(heard, "evaluate", modes=("none", "cross_attention")))
    with pytest.raises(ConfigError, match="adapters belong to mmrag's own language model"):
        models.adaptable(heard)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": "whisper:/nowhere"}, "/nowhere"),
        ({"models": "mmrag:tiny"}, "models mmrag:tiny: whisper:DIRECTORY or whisper:HUB_ID"),
        ({"models": None, "language": "es"}, "only a multilingual Whisper is told one"),
        ({"language": "es"}, "this checkpoint knows English alone"),
    ],
)
def test_models_that_cannot_be_had_are_named(heard, changes, message):
    with pytest.raises((ConfigError, WhisperError), match=message):
        models.named(heard.model_copy(update=changes))


def test_recordings_that_cannot_be_heard_are_listed_and_the_others_kept(heard, tmp_path):
    """A recording that is gone, one that is too long for the window, a span past the end."""
    wave = 0.1 * np.random.default_rng(0).standard_normal(16_000 * 9)
    for name, seconds in (("short", 2), ("long", 9)):
        soundfile.write(tmp_path / f"{name}.wav", wave[: 16_000 * seconds], 16_000)
    said = [
        Utterance("kept", "turn on the light", tmp_path / "short.wav"),
        Utterance("part", "the light", tmp_path / "long.wav", duration=2.0, offset=5.0),
        Utterance("gone", "turn on the light", tmp_path / "gone.wav"),
        Utterance("long", "turn on the light", tmp_path / "long.wav"),
        Utterance("past", "turn", tmp_path / "short.wav", duration=1.0, offset=3.0),
        Utterance("mute", "", tmp_path / "short.wav"),
    ]
    manifest.write(tmp_path / "all.jsonl", said)
    source = about(heard, "tokenize", source=str(tmp_path / "all.jsonl"), name="listed")
    made = clips.run(source, window_seconds=6.0)
    kept = list(manifest.read(made.path / "all.jsonl"))
    assert [(one.id, one.offset, one.duration) for one in kept] == [
        ("kept", None, 2.0),
        ("part", 5.0, 2.0),
    ]
    told = [json.loads(line) for line in (made.path / "rejected.jsonl").open()]
    reasons = " ".join(one["reason"] for one in told)
    assert len(told) == made.summary["rejected"] == 4
    for each in (
        *("gone.wav", "long.wav: 9.0 s, longer than 6.0 s", "no transcript"),
        "3.00 s to 4.00 s is wanted of it, but it ends after 2.00 s",
    ):
        assert each in reasons


def test_a_corpus_of_which_nothing_can_be_heard_is_an_error(heard, tmp_path):
    manifest.write(tmp_path / "all.jsonl", [Utterance("gone", "turn", tmp_path / "gone.wav")])
    source = about(heard, "tokenize", source=str(tmp_path / "all.jsonl"), name="nothing")
    with pytest.raises(ValueError, match=r"nothing of 'all' can be used: 1 rejected:\n.*gone\.wav"):
        clips.run(source, window_seconds=6.0)
    assert (heard.workspace / "nothing.rejected.jsonl").exists()


def test_a_small_whisper_is_trained(heard, tmp_path):
    (tmp_path / "corpus").symlink_to(heard.workspace / "corpus")
    settings = {"workspace": tmp_path, "whisper": training(steps=3), "models": None}
    made = train_whisper.run(heard.model_copy(update=settings))
    assert made.summary["steps"] == 3 and made.summary["clips"] > 0
    steps = [json.loads(line) for line in (made.path / "metrics.jsonl").open()]
    assert [one["step"] for one in steps] == [1, 2, 3]
    assert all({"loss", "ctc_loss"} <= one.keys() for one in steps)
    loaded = load_decoder(f"whisper:{made.path}")
    assert loaded.vocabulary.decode(loaded.vocabulary.encode("turn on the light"))


def test_a_training_without_its_section_is_refused(heard):
    with pytest.raises(ConfigError, match="no section `whisper`"):
        train_whisper.run(heard)
