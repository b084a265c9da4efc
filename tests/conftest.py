"""What tests share: an environment of their own, one Ray cluster, one finished workspace."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mmrag.config import Experiment, read

RECIPE = Path(__file__).parents[1] / "jobs" / "configs" / "train_tiny.yaml"

MINIATURE = [
    "synthesize.lm=24",
    "synthesize.adapter=2",
    "synthesize.mentions=1",
    "synthesize.dev=4",
    "synthesize.test=6",
    "synthesize.text=20",
    "synthesize.workers={count: 1, num_cpus: 0.8}",
    "hubert.conv_channels=16",
    "hubert.norm=layer_norm",
    "hubert.width=32",
    "hubert.layers=1",
    "hubert.heads=2",
    "hubert.feed_forward=32",
    "hubert.layer=1",
    "pretrain.rounds=[{target: mfcc, classes: 8, steps: 2}, {target: phones, steps: 2}]",
    "pretrain.batch_seconds=10",
    "pretrain.sample_seconds=20",
    "tokenize.units=16",
    "tokenize.sample_seconds=20",
    "tokenize.part_seconds=60",
    "tokenize.workers={count: 1, num_cpus: 0.8}",
    "vocabulary.pieces=60",
    "lm.width=32",
    "lm.layers=1",
    "lm.heads=2",
    "lm.kv_heads=1",
    "lm.feed_forward=32",
    "train.phases=[{name: text, steps: 4, mixture: {text: 1}},"
    " {name: speech, steps: 36, mixture: {speech_first: 2, text_first: 1, speech: 1}}]",
    "train.micro_batch_tokens=400",
    "train.micro_batches=2",
    "train.precision=fp32",
    "train.zero_stage=1",
    "train.warmup_steps=2",
    "train.checkpoint_steps=10",
    "train.log_steps=10",
    "train.dev={loss_steps: 10, loss_utterances: 3, wer_steps: 20, wer_utterances: 2}",
    "train.peak_flops=1e9",
    "train.workers={count: 2, num_cpus: 1}",
    "datastore.part_utterances=3",
    "datastore.index.shards=2",
    "datastore.workers={count: 1, num_cpus: 0.8}",
    "decode.beams=1",
    "tune.k=[2, 4]",
    "tune.weight=[0.2, 0.6]",
    "tune.temperature=[1.0]",
    "tune.finalists=1",
    "evaluate.resamples=50",
    "evaluate.datastores=[multimodal]",
    "evaluate.retriever=sharded",
    "evaluate.workers={count: 1, num_cpus: 0.8}",
]
"""Overrides of the tiny model's recipe: every stage runs in seconds and learns next to nothing."""

ADAPTER = [
    "train.phases=[{name: adapter, steps: 24, mixture: {speech_first: 1}}]",
    "train.learning_rate=0.01",
    "train.ctc_weight=0",
    "train.dev.wer_steps=0",
    "train.checkpoint_steps=6",
    "adapter.shape={every: 1, heads: 2, head_width: 16, window: 20,"
    " encoder_layers: 1, encoder_heads: 2, encoder_feed_forward: 32}",
    "adapter.contexts={split: datastore, phrases: phrases, retrieved: multimodal, wrong: wrong,"
    " mixture: {phrases: 2, retrieved: 2, wrong: 1, empty: 1}, list_length: [2, 6], own: 0.75,"
    " k: 2, strides: [2, 3]}",
    "attention={k: 4, stride: 2, whole: 20}",
    "tune.finalists=2",
    "tune.attention=[{k: 2, stride: 1, whole: 0}, {k: 4, stride: 3, whole: 0, gate: 1.5}]",
    "tune.both_weight=[0.1, 0.4]",
    "tune.decoy=wrong",
    "evaluate.modes=[none, knn, cross_attention, both]",
    "evaluate.datastores=[text, multimodal]",
]
"""Overrides besides, for an adapter that reads what the datastore split says of other sentences."""


def pytest_configure() -> None:
    """One thread a process, those that tests start too: two of them share the cores, and torch
    counts its threads when it is imported. Ray tells its metrics every second, and not every ten:
    tests wait for them."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("RAY_metrics_report_interval_ms", "1000")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whichever test is the first to need the workspace waits until it is made."""
    for item in items:
        if "workspace" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nobody's cluster, tracking server or `runs/` is touched, whatever the shell exports."""
    with pytest.MonkeyPatch.context() as patch:
        outside = [name for name in os.environ if name.startswith("AWS_")]
        for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", *outside):
            patch.delenv(name, raising=False)
        patch.setenv("MMRAG_RUNS", str(tmp_path_factory.mktemp("runs")))
        patch.setenv("MMRAG_CACHE", str(tmp_path_factory.mktemp("cache")))
        accounts = tmp_path_factory.mktemp("aws")  # empty, until a test serves S3
        patch.setenv("AWS_CONFIG_FILE", str(accounts / "config"))
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(accounts / "credentials"))
        yield


@pytest.fixture(scope="session")
def ray_cluster(environment: None) -> Iterator[str]:
    """The address of a local cluster of two CPUs, to which this process is connected."""
    import ray

    from cluster.connection import connection

    with connection(num_cpus=2):
        yield ray.get_runtime_context().gcs_address


@pytest.fixture(scope="session")
def experiment(environment: None) -> Experiment:
    """The miniature experiment, in a workspace below the session's own MMRAG_RUNS."""
    miniature = read(RECIPE, MINIATURE)
    assert miniature.workspace.is_relative_to(os.environ["MMRAG_RUNS"])
    return miniature


@dataclass(frozen=True)
class Workspace:
    """A workspace in which every stage has run."""

    experiment: Experiment
    printed: str
    """What the run said on the terminal."""

    @property
    def path(self) -> Path:
        return self.experiment.workspace


@pytest.fixture(scope="session")
def workspace(ray_cluster: str, experiment: Experiment) -> Workspace:
    """The whole demo, run once at miniature size. Look, but do not change anything in it."""
    from jobs import demo, stage

    with stage.console.capture() as captured:
        demo.run(experiment)
    return Workspace(experiment, captured.get())


@pytest.fixture(scope="session")
def adapted(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A copy of the finished workspace in which an adapter was trained, tuned and evaluated.

    Look, but do not change anything in it either.
    """
    from jobs import build_datastore, evaluate, retrieve, stage, train, tune

    path = tmp_path_factory.mktemp("adapted")
    for directory in ("hubert", "codebook", "tokens", "lm", "datastores"):
        shutil.copytree(workspace.path / directory, path / directory)
    multimodal = read(RECIPE, MINIATURE + ADAPTER).model_copy(update={"workspace": path})

    def of(**changes) -> Experiment:
        settings = multimodal.datastore.model_copy(update=changes)
        return multimodal.model_copy(update={"datastore": settings})

    phrases, wrong = of(name="phrases", entries="entities"), of(name="wrong", splits=("lm",))
    with stage.console.capture() as captured:
        for other in (phrases, wrong):
            build_datastore.run(other)
        for near in (multimodal, wrong):
            retrieve.run(near)
        for job in (train, tune, evaluate):
            job.run(multimodal)
    return Workspace(multimodal, captured.get())


@pytest.fixture
def borrow(workspace: Workspace, tmp_path: Path) -> Callable[..., Experiment]:
    """`borrow(*directories)`: the experiment in a workspace of this test's own, to change at will,
    holding copies of those directories of the finished one, or of another one (`of`)."""

    def copy(*directories: str, of: Workspace = workspace) -> Experiment:
        for directory in directories:
            shutil.copytree(of.path / directory, tmp_path / "workspace" / directory)
        return of.experiment.model_copy(update={"workspace": tmp_path / "workspace"})

    return copy
