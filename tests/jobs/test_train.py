"""An adapter that is trained for the workspace's language model, and for no other."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from jobs import stage, train
from mmrag import artifact
from mmrag.artifact import ArtifactError
from mmrag.config import ConfigError, Dev, Experiment, Phase
from mmrag.model import pretrained
from mmrag.model.vocabulary import Vocabulary
from mmrag.recogniser import Recogniser

INPUTS = {
    "lm": ("lm", "lm"),
    "tokens": ("tokens", "tokens"),
    "datastore phrases": ("datastores/phrases", "datastore"),
    "datastore multimodal": ("datastores/multimodal", "datastore"),
    "datastore wrong": ("datastores/wrong", "datastore"),
    "neighbours multimodal": ("neighbours/multimodal", "neighbours"),
    "neighbours wrong": ("neighbours/wrong", "neighbours"),
}
"""Role of each input of an adapter -> the artifact that plays it, and its kind."""
OTHER = "0123456789abcdef"


def with_train(experiment: Experiment, **changes) -> Experiment:
    settings = experiment.train.model_copy(update=changes)
    return experiment.model_copy(update={"train": settings})


def disguise(experiment: Experiment, directory: str, kind: str) -> str:
    """Make an artifact another one, by fingerprint; return the true one."""
    path = experiment.workspace / directory
    true = artifact.load(path, kind).fingerprint
    file = path / artifact.FILE
    file.write_text(
        file.read_text().replace(f'"fingerprint": "{true}"', f'"fingerprint": "{OTHER}"')
    )
    return true


@pytest.mark.ray
def test_an_adapter_is_chained_to_what_it_was_trained_on_and_for(adapted):
    made = artifact.load(adapted.path / "adapter", "adapter")
    loaded = {role: artifact.load(adapted.path / path, k) for role, (path, k) in INPUTS.items()}
    assert made.inputs == {role: one.fingerprint for role, one in loaded.items()}
    made.require("lm", loaded["lm"])
    weights = load_file(made.path / pretrained.ADAPTER_WEIGHTS)
    assert made.summary["parameters"] == sum(weight.numel() for weight in weights.values())
    assert made.summary["steps"] == adapted.experiment.train.steps


@pytest.mark.ray
def test_the_language_model_stays_as_it_was(workspace, adapted):
    before, after = workspace.path / "lm", adapted.path / "lm"
    names = sorted(file.name for file in before.iterdir())
    assert names == sorted(file.name for file in after.iterdir())
    for name in names:
        assert (before / name).read_bytes() == (after / name).read_bytes(), name
    found = {file.name for file in (adapted.path / "adapter").iterdir()}
    assert found == {"artifact.json", "metrics.jsonl", "adapter.safetensors", "adapter.json"}


@pytest.mark.ray
def test_a_recogniser_has_the_adapter_that_was_trained_for_its_language_model(workspace, adapted):
    plain, reading = Recogniser.load(workspace.path), Recogniser.load(adapted.path)
    assert plain.adapter is None
    assert plain.identity == reading.identity
    weights = load_file(adapted.path / "adapter" / pretrained.ADAPTER_WEIGHTS)
    loaded = dict(reading.adapter.named_parameters())
    assert loaded.keys() == weights.keys()
    for name, weight in loaded.items():
        assert torch.equal(weight, weights[name]), name
    assert all(block.gate.weight.item() != 0 for block in reading.adapter.blocks)


@pytest.mark.ray
def test_an_adapter_of_another_language_model_is_not_loaded(adapted, borrow):
    experiment = borrow("hubert", "codebook", "lm", "adapter", of=adapted)
    true = disguise(experiment, "lm", "lm")
    with pytest.raises(ArtifactError, match=f"adapter was made with lm {true}.*lm {OTHER}"):
        Recogniser.load(experiment.workspace)


@pytest.mark.ray
def test_a_finished_adapter_is_not_trained_again(adapted):
    before = (adapted.path / "adapter" / "artifact.json").stat()
    made = train.run(adapted.experiment)
    assert made.path == adapted.path / "adapter"
    assert (made.path / "artifact.json").stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.ray
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"ctc_weight": 0.5}, "train.ctc_weight"),
        ({"phases": (Phase(name="a", steps=2, mixture={"text": 1.0}),)}, "speech_first: 1"),
        ({"dev": Dev(wer_steps=5)}, r"train\.dev\.wer_steps: .*jobs\.tune"),
        (
            {
                "phases": (
                    Phase(name="a", steps=2, mixture={"speech_first": 1.0}),
                    Phase(name="b", steps=2, mixture={"speech_first": 1.0, "text_first": 0.1}),
                )
            },
            "speech_first: 1",
        ),
    ],
    ids=["ctc", "text", "word errors", "one phase of two"],
)
def test_an_adapter_learns_from_transcription_alone(adapted, borrow, changes, named):
    experiment = with_train(borrow(of=adapted), **changes)
    with pytest.raises(ConfigError, match=named):
        train.run(experiment)
    assert not experiment.workspace.exists()


@pytest.mark.ray
@pytest.mark.parametrize(
    ("absent", "by"),
    [
        ("datastores/phrases", "build_datastore"),
        ("datastores/wrong", "build_datastore"),
        ("neighbours/multimodal", "retrieve"),
        ("neighbours/wrong", "retrieve"),
    ],
)
def test_what_an_adapter_lacks_is_named_with_the_job_that_makes_it(adapted, borrow, absent, by):
    experiment = borrow("codebook", "tokens", "lm", "datastores", "neighbours", of=adapted)
    (experiment.workspace / absent).rename(experiment.workspace / "elsewhere")
    with pytest.raises(ArtifactError, match=rf"{absent} .*\(made by: python -m jobs\.{by}\)"):
        train.run(experiment)


@pytest.mark.ray
def test_windows_keyed_by_another_language_model_are_refused(adapted, borrow):
    experiment = borrow("codebook", "tokens", "lm", "datastores", "neighbours", of=adapted)
    true = disguise(experiment, "lm", "lm")
    with pytest.raises(ArtifactError, match=f"datastores/phrases was made with lm {true}"):
        train.run(experiment)


@pytest.mark.ray
@pytest.mark.parametrize("name", ["multimodal", "wrong"])
def test_neighbours_in_a_datastore_that_was_made_again_are_refused(adapted, borrow, name):
    experiment = borrow("codebook", "tokens", "lm", "datastores", "neighbours", of=adapted)
    true = disguise(experiment, f"datastores/{name}", "datastore")
    with pytest.raises(ArtifactError, match=f"neighbours/{name} was made with datastore {true}"):
        train.run(experiment)


def test_a_line_says_what_was_measured_and_mlflow_gets_every_figure(experiment):
    told = []
    tracked = SimpleNamespace(log=lambda figures, step: told.append((figures, step)))
    log = train._log(with_train(experiment, log_steps=10).train, tracked)
    figures = {
        **{"loss": 1.0, "ctc_loss": 2.0, "gradient_norm": 0.5, "learning_rate": 0.01},
        **{"tokens_per_second": 4000.0, "tokens_per_second_per_gpu": 2000.0, "mfu": 0.41},
        **{"data_wait": 0.03, "padding": 0.125, "peak_gpu_bytes": 3 * 2**30},
    }
    dev = {"dev_loss": 1.5, "dev_text_loss": 2.5, "dev_wer": 0.5}
    record = {"phase": "text", "tokens": 4096}
    with stage.console.capture() as said:
        log({**record, "step": 9, **figures})
        log({**record, "step": 10, **figures})
        log({**record, "step": 11, **figures, **dev})
    assert told == [(figures, 10), (figures | dev, 12)]
    first, second, third = said.get().splitlines()
    assert first.split("step 10/40  ")[1] == (
        "loss 1.000  ctc 2.000  |g| 0.50  lr 1.0e-02  4,000 tokens/s  (2,000 a worker)  MFU 41.0%  "
        "data 3%  padding 12%  GPU 3.0 GiB"
    )
    assert "step 12/40" in second
    assert third.split("step 12/40  ")[1] == "dev loss 1.500  as text 2.500  dev WER 50.0%"


@pytest.mark.ray
def test_without_a_dev_split_word_errors_are_refused_and_a_loss_is_not_told(workspace, borrow):
    experiment = borrow("codebook", "tokens")
    (experiment.workspace / "tokens" / "dev").rename(experiment.workspace / "elsewhere")
    tokens = artifact.load(experiment.workspace / "tokens", "tokens")
    with pytest.raises(ConfigError, match=r"train\.dev\.wer_steps: there is no split dev in"):
        train._dev(experiment.train, tokens)
    without = with_train(experiment, dev=Dev())
    with stage.console.capture() as said:
        assert train._dev(without.train, tokens) is None
    assert "no dev loss: there is no split dev" in said.get()
    other = with_train(experiment, dev=Dev(split="test"))
    assert train._dev(other.train, tokens) == experiment.workspace / "tokens" / "test"
    assert train._dev(with_train(experiment, dev=Dev(loss_steps=0)).train, tokens) is None


@pytest.mark.ray
def test_a_language_model_is_trained_further_from_that_of_another_workspace(workspace, borrow):
    experiment = with_train(
        borrow("codebook", "tokens"),
        base=str(workspace.path / "lm"),
        learning_rate=1e-9,
        phases=(Phase(name="again", steps=1, mixture={"speech_first": 1.0}),),
    )
    made = train.run(experiment)
    base = artifact.load(workspace.path / "lm", "lm")
    assert made.inputs["base"] == base.fingerprint
    before, after = (load_file(one.path / pretrained.WEIGHTS) for one in (base, made))
    for name, weight in before.items():
        assert torch.allclose(after[name], weight, atol=1e-6), name
    words = Vocabulary.load(made.path), Vocabulary.load(base.path)
    assert words[0].written == words[1].written


@pytest.mark.ray
def test_a_base_of_other_units_is_refused(workspace, borrow):
    experiment = with_train(borrow("codebook", "tokens"), base=str(workspace.path / "lm"))
    true = disguise(experiment, "codebook", "codebook")
    file = experiment.workspace / "tokens" / artifact.FILE
    file.write_text(file.read_text().replace(true, OTHER))
    with pytest.raises(ArtifactError, match=f"lm was made with codebook {true}.*{OTHER}"):
        train.run(experiment)
    assert not (experiment.workspace / "lm").exists()


@pytest.mark.ray
def test_word_pieces_beside_a_base_that_has_its_own_are_refused(workspace, borrow):
    experiment = with_train(borrow("codebook", "tokens"), base=str(workspace.path / "lm"))
    vocabulary = experiment.vocabulary.model_copy(update={"tokenizer": "tokenizer.json"})
    with pytest.raises(ConfigError, match=r"its own word pieces: vocabulary\.tokenizer=null"):
        train.run(experiment.model_copy(update={"vocabulary": vocabulary}))
