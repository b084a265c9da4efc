"""A workspace in a bucket holds what one in a directory holds, made of a corpus in a bucket."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from s3 import serving
from safetensors.torch import load_file
from tones import encoded

from cluster import train as distributed
from cluster.progress import records
from cluster.rejections import REJECTED, read_rejections
from cluster.train import CHECKPOINTS, held
from jobs import build_datastore, pretrain_hubert, retrieve, stage, tokenize, train
from mmrag import artifact, cached, cli
from mmrag.config import ConfigError, Experiment, read
from mmrag.model import pretrained
from mmrag.model.curriculum import TrainingError
from mmrag.retrieval.datastore import Datastore
from mmrag.speech import tokenized
from mmrag.storage import Location, Url

pytestmark = pytest.mark.ray
CONFIG = Path(tokenize.__file__).parent / "configs" / "tiny.yaml"
PROBE = Path(tokenize.__file__).parents[1] / "serve" / "probe.flac"
SENTENCES = ("call bhavika ruto", "port darnby is closed")


@pytest.fixture(scope="module")
def bucket(ray_cluster):
    with serving("bucket") as served:
        yield served


def write(place: Location, content: bytes) -> None:
    if isinstance(place, Path):
        place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)


def corpus(root: Location) -> str:
    """A manifest in a directory or a bucket, one of whose recordings is not there."""
    draw = np.random.default_rng(0)
    rows = [{"audio_filepath": "audio/missing.flac", "text": "nobody"}]
    for number, text in enumerate(SENTENCES):
        noise = 0.1 * draw.standard_normal((16_000 * (number + 1), 1))
        write(root / f"audio/{number}.flac", encoded(noise.astype(np.float32), format="FLAC"))
        rows.append({"audio_filepath": f"audio/{number}.flac", "text": text})
    write(root / "lm.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    write(root / "texts.txt", "".join(f"{text}\n" for text in SENTENCES).encode())
    return str(root)


def experiment(root: Location, source: str, *more: str) -> Experiment:
    return read(
        CONFIG,
        [
            f"workspace={root}",
            f"tokenize.source={source}",
            "tokenize.workers={count: 1, num_cpus: 0.8}",
            f"datastore={{name: texts, source: {source}/texts.txt, audio: none}}",
            "datastore.workers={count: 1, num_cpus: 0.8}",
            *more,
        ],
    )


def make(experiment: Experiment) -> tuple[artifact.Artifact, artifact.Artifact]:
    pretrain_hubert.run(experiment)
    tokens = tokenize.run(experiment)
    return tokens, build_datastore.run(experiment)


def units(tokens: artifact.Artifact) -> list[tuple[str, bytes]]:
    read = tokenized.read(tokens.place / "lm")
    return [(one.utterance.text, one.units.ids.tobytes()) for one in read]


@pytest.mark.slow
def test_it_is_made_in_a_bucket_as_in_a_directory(bucket, tmp_path, capsys, monkeypatch):
    there = experiment(bucket / "runs/a", corpus(bucket / "corpus"))
    tokens, store = make(there)
    here = make(experiment(tmp_path / "a", corpus(tmp_path / "corpus")))
    assert units(tokens) == units(here[0]) and store.fingerprint == here[1].fingerprint
    assert tokens.place == bucket / "runs/a/tokens"
    [rejected] = read_rejections(tokens.path / REJECTED)
    assert rejected.source == f"{bucket}/corpus/audio/missing.flac"
    assert rejected.reason.endswith("missing.flac: no such object")

    monkeypatch.setenv(cached.CACHE, str(tmp_path / "another machine's"))
    capsys.readouterr()
    make(there)
    said = capsys.readouterr().out
    for name in ("tokens", "datastores/texts"):
        assert f"{name}: nothing to do, {bucket}/runs/a/{name} is finished" in said
    assert Datastore.open(store.place).entries == store.summary["entries"]

    heard = []
    for root, clips in ((bucket / "runs/a", bucket), (tmp_path / "a", tmp_path)):
        (clips / "probe.flac").write_bytes(PROBE.read_bytes())
        clip = str(clips / "probe.flac")
        given = ["transcribe", "--json", "--models", str(root), "--datastore", "texts", clip]
        with pytest.raises(SystemExit, match="0"):
            cli.main(given)
        lines = map(json.loads, capsys.readouterr().out.splitlines())
        heard.append([line for line in lines if line.pop("file") == clip])
    assert heard[0] == heard[1] and any(line["text"] for line in heard[0])


FEW_STEPS = (
    "adapter=null",
    "train.phases=[{name: few, steps: 6, mixture: {speech_first: 1}}]",
    "train.precision=fp32",
    "train.checkpoint_steps=2",
    "train.workers={count: 1, num_cpus: 0.8}",
)


def giving_up(at: int):
    """A worker that gives up before that step."""

    def worker(config: dict) -> None:
        from cluster import train

        chosen = train.learning_rate

        def rate(step, settings):
            if step == at:
                raise TrainingError("enough")
            return chosen(step, settings)

        train.learning_rate = rate
        try:
            train._worker(config)
        finally:
            train.learning_rate = chosen

    return worker


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_in_a_bucket_goes_on_from_its_checkpoints_on_another_machine(
    bucket, tmp_path, monkeypatch
):
    """They lie among the drafts, which all machines see, and never in the bucket."""
    there = experiment(bucket / "runs/t", corpus(bucket / "heard"), *FEW_STEPS)
    here = experiment(tmp_path / "t", corpus(tmp_path / "heard"), *FEW_STEPS)
    for one in (there, here):
        pretrain_hubert.run(one)
        tokenize.run(one)
    expected = train.run(here)

    monkeypatch.setenv(cached.DRAFTS, str(tmp_path / "shared"))
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "_worker", giving_up(5))
        with pytest.raises(TrainingError, match="enough"):
            train.run(there)
    draft = cached.draft_place(there.workspace / "lm").with_name(".lm.partial")
    assert draft.is_relative_to(tmp_path / "shared")
    assert held(draft).what == "2 checkpoints up to step 4"
    assert not (there.workspace / "lm").exists()

    monkeypatch.setenv(cached.CACHE, str(tmp_path / "another machine's"))
    with stage.console.capture() as said:
        made = train.run(there)
    assert "going on where a stopped run left off" in said.get()
    assert made.place == there.workspace / "lm" and not draft.exists()
    assert not (made.place / CHECKPOINTS).exists()
    assert [one["step"] for one in records(made.path)] == list(range(6))
    weights = load_file(expected.path / pretrained.WEIGHTS)
    for name, weight in load_file(made.path / pretrained.WEIGHTS).items():
        assert torch.equal(weight, weights[name]), name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_adapter_made_in_a_bucket_is_the_one_made_in_a_directory(
    bucket, adapted, tmp_path, monkeypatch
):
    """Its datastores, what is retrieved from them, and the training, on another machine."""
    monkeypatch.setenv(cached.CACHE, str(tmp_path / "another machine's"))
    there = adapted.experiment.model_copy(update={"workspace": bucket / "runs/adapted"})
    for name in ("hubert", "codebook", "tokens", "lm", "datastores/multimodal"):
        for file in (adapted.path / name).rglob("*"):
            if file.is_file():
                write(there.workspace / str(file.relative_to(adapted.path)), file.read_bytes())

    def of(**changes) -> Experiment:
        changed = there.datastore.model_copy(update=changes)
        return there.model_copy(update={"datastore": changed})

    wrong = of(name="wrong", splits=("lm",))
    for one in (of(name="phrases", entries="entities"), wrong):
        build_datastore.run(one)
    for one in (there, wrong):
        retrieve.run(one)
    made = train.run(there)
    assert made.place == there.workspace / "adapter"
    assert made.fingerprint == artifact.load(adapted.path / "adapter", "adapter").fingerprint
    weights = load_file(adapted.path / "adapter" / pretrained.ADAPTER_WEIGHTS)
    for name, weight in load_file(made.path / pretrained.ADAPTER_WEIGHTS).items():
        assert torch.equal(weight, weights[name]), name


def test_drafts_that_other_machines_cannot_see_are_refused_at_once(monkeypatch, ray_cluster):
    nodes = stage.ray.nodes()
    monkeypatch.setattr(stage.ray, "nodes", lambda: nodes * 3)
    there = experiment(Url("s3://bucket/runs/b"), "nowhere")
    made = ("thing", "thing", {}, {}, lambda draft, run: None)
    with pytest.raises(ConfigError, match=r"3 machines: set MMRAG_DRAFTS to a directory that all"):
        stage.make(there, *made)
