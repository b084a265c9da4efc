"""Training on Ray Train and DeepSpeed makes the plain loop's steps, also after it was killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from ray.train import TrainingFailedError
from safetensors.torch import load_file

from cluster.checkpoints import listed
from cluster.progress import SKIPPED, records
from cluster.store import tracking_uri
from cluster.train import CHECKPOINTS, REJECTED, fit, held, shown
from cluster.validation import DevSplit
from cluster.zero import deepspeed_config
from jobs import stage
from jobs import train as stage_train
from mmrag import artifact
from mmrag.artifact import ArtifactError
from mmrag.config import Experiment, Phase
from mmrag.finite import NonFiniteLoss
from mmrag.model import pretrained
from mmrag.model.cross_attention import Adapter
from mmrag.model.curriculum import Curriculum, TrainingError
from mmrag.model.examples import examples
from mmrag.model.lm import LM
from mmrag.model.loss import Objective
from mmrag.model.train import StepLog, train
from mmrag.model.vocabulary import Vocabulary
from mmrag.records import Utterance
from mmrag.retrieval.contexts import TrainingContexts, read_neighbours
from mmrag.speech import tokenized
from mmrag.speech.tokenized import Tokenized

ROOT = Path(__file__).parents[2]
WAIT_SECONDS = 200


def with_train(experiment: Experiment, **changes) -> Experiment:
    settings = experiment.train.model_copy(update=changes)
    return experiment.model_copy(update={"train": settings})


def with_deepspeed(experiment: Experiment, directory: Path, settings: dict) -> Experiment:
    path = directory / "deepspeed.json"
    path.write_text(json.dumps(settings))
    return with_train(experiment, deepspeed=str(path))


def test_deepspeed_is_told_what_the_experiment_says(experiment):
    settings = with_train(experiment, micro_batches=6, zero_stage=2, clip=0.5)
    config = deepspeed_config(settings, torch.bfloat16)
    assert config["gradient_accumulation_steps"] == 3
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"] == {"enabled": True}
    assert config["zero_optimization"] == {"stage": 2}


def test_a_deepspeed_file_adds_to_the_experiment(experiment, tmp_path):
    extra = {"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": True}
    config = deepspeed_config(with_deepspeed(experiment, tmp_path, extra), torch.float32)
    assert config["zero_optimization"] == {"overlap_comm": True, "stage": 1}
    assert config["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"gradient_clipping": 2.0}, "gradient_clipping"),
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage"),
    ],
)
def test_a_deepspeed_file_may_not_overrule_the_experiment(experiment, tmp_path, extra, named):
    with pytest.raises(ValueError, match=rf"deepspeed\.json sets what .*{named}"):
        deepspeed_config(with_deepspeed(experiment, tmp_path, extra), torch.float32)


@pytest.mark.parametrize("extra", [{"fp16": {"enabled": True}}, {"optimizer": {"type": "Lion"}}])
def test_a_deepspeed_file_changes_nothing_that_is_learned(experiment, tmp_path, extra):
    """Its contents may change while a run is unfinished, as its path may."""
    with pytest.raises(ValueError, match=rf"deepspeed\.json sets \['{next(iter(extra))}'\]"):
        deepspeed_config(with_deepspeed(experiment, tmp_path, extra), torch.float32)


def objective(experiment: Experiment, vocabulary: Vocabulary) -> Objective:
    """The random weights that every worker starts from."""
    torch.manual_seed(experiment.seed)
    lm = LM(experiment.lm, vocabulary.size)
    adapter = experiment.adapter and Adapter(experiment.adapter.shape, experiment.lm)
    return Objective(lm, len(vocabulary.alphabet), experiment.train.ctc_weight, adapter)


def assert_same_steps(plain: list[StepLog], distributed: list[dict]) -> None:
    for one, other in zip(plain, distributed, strict=True):
        assert isinstance(one, StepLog)
        assert (one.step, one.phase, one.tokens) == (other["step"], other["phase"], other["tokens"])
        for measured in ("loss", "ctc_loss", "gradient_norm", "learning_rate"):
            assert getattr(one, measured) == pytest.approx(other[measured], rel=1e-4), one.step


@pytest.mark.ray
def test_two_deepspeed_workers_make_the_steps_of_the_plain_loop(workspace):
    experiment = workspace.experiment
    lm, vocabulary = pretrained.load(workspace.path / "lm")
    splits = [workspace.path / "tokens" / split for split in ("lm", "text")]
    data = examples([one for split in splits for one in tokenized.read(split)], vocabulary)
    model, plain = objective(experiment, vocabulary), []
    before = {name: weight.detach().clone() for name, weight in model.lm.named_parameters()}
    train(model, data, vocabulary, experiment.train, experiment.seed, plain.append)
    distributed = list(records(workspace.path / "lm"))
    assert len(plain) == len(distributed) == experiment.train.steps
    assert_same_steps(plain, distributed)
    trained = dict(lm.named_parameters())
    for name, weight in model.lm.named_parameters():
        assert torch.allclose(weight, trained[name], atol=1e-4), name
        assert not torch.allclose(weight, before[name], atol=1e-3), f"{name} did not learn"


def listed_contexts(experiment: Experiment, corpus: list[Tokenized]) -> TrainingContexts:
    """What the adapter reads, of neighbours in memory."""
    settings, near = experiment.adapter.contexts, experiment.workspace / "neighbours"
    return shown(
        experiment,
        [one.utterance.id for one in corpus],
        [one.utterance.entities for one in corpus],
        {name: read_neighbours(near / name) for name in (settings.retrieved, settings.wrong)},
    )


@pytest.mark.ray
def test_two_deepspeed_workers_train_an_adapter_as_the_plain_loop_does(adapted):
    experiment = adapted.experiment
    lm, vocabulary = pretrained.load(adapted.path / "lm")
    corpus = list(tokenized.read(adapted.path / "tokens" / experiment.adapter.contexts.split))
    model, plain = objective(experiment, vocabulary), []
    model.lm.load_state_dict(lm.state_dict())
    before = {name: weight.detach().clone() for name, weight in model.adapter.named_parameters()}
    data, contexts = examples(corpus, vocabulary), listed_contexts(experiment, corpus)
    train(model, data, vocabulary, experiment.train, experiment.seed, plain.append, contexts)
    distributed = list(records(adapted.path / "adapter"))
    assert len(plain) == len(distributed) == experiment.train.steps
    assert_same_steps(plain, distributed)
    trained = dict(pretrained.load_adapter(adapted.path / "adapter", lm).named_parameters())
    for name, weight in model.adapter.named_parameters():
        assert torch.allclose(weight, trained[name], atol=1e-4), name
        assert not torch.allclose(weight, before[name], atol=1e-3), f"{name} did not learn"
    for name, weight in model.lm.named_parameters():
        assert torch.equal(weight, lm.get_parameter(name)), name


EVERY_STEP = {
    *("step", "phase", "loss", "ctc_loss", "gradient_norm", "learning_rate", "tokens"),
    *("tokens_per_second", "tokens_per_second_per_gpu", "data_wait", "padding", "mfu"),
    "peak_rss_bytes",
}


@pytest.mark.ray
def test_a_training_tells_what_it_measures_at_the_steps_it_is_to(workspace):
    told, settings = list(records(workspace.path / "lm")), workspace.experiment.train
    for one in told:
        done, dev = one["step"] + 1, {name for name in one if name.startswith("dev_")}
        checkpoint = {name for name in one if name.startswith("checkpoint_")}
        assert set(one) - dev - checkpoint == EVERY_STEP, done
        assert 0 <= one["data_wait"] <= 1 and 0 <= one["padding"] < 1 and one["mfu"] > 0
        assert one["tokens_per_second_per_gpu"] == pytest.approx(one["tokens_per_second"] / 2)
        expected = {"dev_loss", "dev_text_loss"} if done % settings.dev.loss_steps == 0 else set()
        expected |= {"dev_wer"} if done % settings.dev.wer_steps == 0 else set()
        assert dev == expected, done
    padded = [
        1 - sum(3 + len(text) for text in texts) / one["tokens"]
        for one, texts in zip(told, text_batches(workspace), strict=False)
    ]
    assert [one["padding"] for one in told[: len(padded)]] == pytest.approx(padded, abs=1e-6)


def text_batches(workspace) -> list[list[list[int]]]:
    """The texts that each step of the first phase reads, which is of text alone."""
    experiment, (phase, *_) = workspace.experiment, workspace.experiment.train.phases
    vocabulary = Vocabulary.load(workspace.path / "lm")
    splits = [workspace.path / "tokens" / split for split in ("lm", "text")]
    data = examples([one for split in splits for one in tokenized.read(split)], vocabulary)
    curriculum = Curriculum(data, experiment.train, experiment.seed)
    steps = [curriculum.step(step)[1] for step in range(phase.steps)]
    return [[data[one.index].text for batch in batches for one in batch] for batches in steps]


@pytest.mark.ray
def test_the_dev_loss_of_two_workers_is_that_of_one_process_with_the_model_they_made(workspace):
    experiment = workspace.experiment
    lm, vocabulary = pretrained.load(workspace.path / "lm")
    made = Objective(lm, len(vocabulary.alphabet), ctc_weight=0.0)
    split = workspace.path / "tokens" / "dev"
    dev = DevSplit(split, experiment, vocabulary, torch.float32, 0, 1, lambda sums: sums)
    expected = dev.measure(made, experiment.train.steps)
    last = records(workspace.path / "lm")[-1]
    assert {name: last[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert set(expected) == {"dev_loss", "dev_text_loss", "dev_wer"}


def train_job(config: Path, address: str, directory: Path) -> subprocess.Popen:
    """`python -m jobs.train` as a process of its own, on the session's cluster."""
    output = (directory / "output.txt").open("ab")
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.train", "--config", str(config)],
        env={**os.environ, "RAY_ADDRESS": address},
        cwd=directory,
        stdout=output,
        stderr=subprocess.STDOUT,
    )


def checkpoints(draft: Path) -> list[str]:
    """Checkpoints that a resumed run would find."""
    return listed(draft / CHECKPOINTS / "train") or []


def interrupted(experiment: Experiment, draft: Path, address: str, directory: Path) -> Path:
    """Train, and kill the job at its first checkpoint; the configuration's file."""
    config = directory / "experiment.yaml"
    config.write_text(experiment.model_dump_json())  # JSON is YAML
    job = train_job(config, address, directory)
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while not checkpoints(draft):
            assert job.poll() is None, (directory / "output.txt").read_text()
            assert time.monotonic() < deadline, "no checkpoint was written"
            time.sleep(0.02)
    finally:
        job.kill()
        job.wait()
    assert draft.exists(), "the run was over before it could be killed"
    return config


def stored(draft: Path) -> set[str]:
    """The modules whose weights the checkpoints hold."""
    folder = draft / CHECKPOINTS / "train"
    parts = [part for name in checkpoints(draft) for part in (folder / name).glob("part-*")]
    return {key.split("/")[1].split(".")[0] for part in parts for key in load_file(part)}


def assert_goes_on_where_it_was_killed(
    experiment: Experiment, address: str, directory: Path, kind: str
) -> Path:
    """Train, kill the job at its first checkpoint, run it again; what was made in the end."""
    draft, finished = experiment.workspace / f".{kind}.partial", experiment.workspace / kind
    config = interrupted(experiment, draft, address, directory)
    every = experiment.train.checkpoint_steps
    before = [one for one in records(draft) if one["step"] < every]
    assert len(before) == every
    assert stored(draft) == ({"adapter"} if kind == "adapter" else {"lm", "ctc"})

    resumed = train_job(config, address, directory)
    assert resumed.wait(WAIT_SECONDS) == 0, (directory / "output.txt").read_text()
    assert "going on where a stopped run left off" in (directory / "output.txt").read_text()
    after = list(records(finished))
    assert [one["step"] for one in after] == list(range(experiment.train.steps))
    # These carry the time they took: the first steps were not made again.
    assert after[:every] == before
    assert not (finished / CHECKPOINTS).exists()
    return finished


def assert_same_artifact(one: Path, other: Path, kind: str, file: str) -> None:
    ours, theirs = load_file(one / file), load_file(other / file)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name
    assert artifact.load(one, kind).fingerprint == artifact.load(other, kind).fingerprint


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_training_goes_on_from_its_checkpoint_to_the_very_same_weights(
    workspace, borrow, ray_cluster, tmp_path
):
    copied = borrow("codebook", "tokens")
    made = assert_goes_on_where_it_was_killed(copied, ray_cluster, tmp_path, "lm")
    assert_same_artifact(made, workspace.path / "lm", "lm", pretrained.WEIGHTS)


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_training_of_an_adapter_goes_on_to_the_very_same_weights(
    adapted, borrow, ray_cluster, tmp_path
):
    copied = borrow("codebook", "tokens", "lm", "datastores", "neighbours", of=adapted)
    made = assert_goes_on_where_it_was_killed(copied, ray_cluster, tmp_path, "adapter")
    assert_same_artifact(made, adapted.path / "adapter", "adapter", pretrained.ADAPTER_WEIGHTS)


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_that_is_told_to_end_stores_its_step_first_and_goes_on_from_it(
    borrow, ray_cluster, tmp_path
):
    copied = borrow("codebook", "tokens")
    phases = (copied.train.phases[0].model_copy(update={"steps": 150}),)
    settings = copied.train.model_copy(update={"phases": phases, "checkpoint_steps": 1000})
    copied = copied.model_copy(update={"train": settings})
    draft, config = copied.workspace / ".lm.partial", tmp_path / "experiment.yaml"
    config.write_text(copied.model_dump_json())
    job = train_job(config, ray_cluster, tmp_path)
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while len(list(records(draft))) < 5:
            assert job.poll() is None, (tmp_path / "output.txt").read_text()
            assert time.monotonic() < deadline, "no step was made"
            time.sleep(0.02)
        job.terminate()
        assert job.wait(WAIT_SECONDS) == 128 + signal.SIGTERM
    finally:
        job.kill()
        job.wait()
    said = (tmp_path / "output.txt").read_text()
    [step] = re.findall(r"did so after step (\d+): the same command goes on", said)
    assert "Traceback" not in said and held(draft).what == f"1 checkpoint up to step {step}"
    assert train_job(config, ray_cluster, tmp_path).wait(WAIT_SECONDS) == 0
    steps = [one["step"] for one in records(copied.workspace / "lm")]
    assert steps == list(range(150)), "no step is missing, and none is there twice"


def files(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*")}


def with_workers(experiment: Experiment, **changes) -> Experiment:
    return with_train(experiment, workers=experiment.train.workers.model_copy(update=changes))


def assert_same_training(directory: Path, workspace) -> None:
    """The losses and weights of the run that nobody interrupted, but for rounding."""
    ours, theirs = list(records(directory)), list(records(workspace.path / "lm"))
    for one, other in zip(ours, theirs, strict=True):
        assert (one["step"], one["tokens"]) == (other["step"], other["tokens"])
        for measured in ("loss", "ctc_loss", "gradient_norm"):
            assert one[measured] == pytest.approx(other[measured], rel=1e-4), one["step"]
    expected = load_file(workspace.path / "lm" / pretrained.WEIGHTS)
    for name, weight in load_file(directory / pretrained.WEIGHTS).items():
        assert torch.allclose(weight, expected[name], atol=1e-4), name


@pytest.mark.ray
def test_another_number_of_workers_stage_and_log_interval_resume(
    workspace, borrow, tmp_path, monkeypatch
):
    """A training that was ended goes on whatever operation was changed; what cannot go on is
    refused, and nothing is lost."""
    from cluster import train as distributed

    experiment = borrow("codebook", "tokens")
    draft = experiment.workspace / ".lm.partial"
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "_worker", acting(stopping(13), tmp_path))
        with pytest.raises(TrainingError, match="enough"):
            stage_train.run(with_train(experiment, log_steps=3))
    before, kept = list(records(draft)), files(draft)
    assert before[-1]["step"] == 12, "one that MLflow was told of lies behind the checkpoint"
    lost = r"--force throws away 1 checkpoint up to step 10 in .*\.lm\.partial"
    named = r"learning_rate was .* and is now 0.5"
    with pytest.raises(ArtifactError, match=rf"train\.{named}.*{lost}"):
        stage_train.run(with_train(experiment, learning_rate=0.5))
    assert files(draft) == kept

    operation = {"log_steps": 6, "max_failures": 3, "checkpoint_steps": 9, "zero_stage": 3}
    changed = with_deepspeed(with_train(experiment, **operation), tmp_path, {"steps_per_print": 5})
    with stage.console.capture() as said:
        made = stage_train.run(with_workers(changed, count=1, num_cpus=0.9))
    assert "lm: going on where a stopped run left off" in said.get()
    every = experiment.train.checkpoint_steps
    assert list(records(made.path))[:every] == before[:every], "the first steps were made again"
    assert_same_training(made.path, workspace)
    assert_one_curve(experiment, made.path, list(records(made.path)))


def assert_one_curve(experiment: Experiment, made: Path, told: list[dict]) -> None:
    """MLflow has one run of it, and in it each figure once a step, as `metrics.jsonl` has it."""
    client = MlflowClient(tracking_uri=tracking_uri(experiment.tracking))
    known = client.get_experiment_by_name(experiment.tracking.experiment)
    found = [
        run
        for run in client.search_runs([known.experiment_id], max_results=1000)
        if run.data.params.get("workspace") == str(experiment.workspace)
    ]
    [run] = found
    assert run.info.status == "FINISHED" and run.data.tags["resumed"] == "1"
    assert run.data.tags["fingerprint"] == artifact.load(made, "lm").fingerprint
    by_step = {one["step"] + 1: one for one in told}
    for name in ("loss", "dev_loss", "dev_wer", "data_wait", "mfu"):
        points = client.get_metric_history(run.info.run_id, name)
        steps = [point.step for point in points]
        assert steps == sorted(set(steps)) and steps[-1] == experiment.train.steps, name
        if "dev" in name:
            assert steps == [step for step, one in by_step.items() if name in one]
        if name == "loss":
            values = [by_step[step]["loss"] for step in steps]
            assert [point.value for point in points] == pytest.approx(values, rel=1e-4)


@pytest.mark.ray
def test_a_checkpoint_says_how_long_training_stood_still_for_it_and_how_long_it_was_stored(
    workspace,
):
    told = [one for one in records(workspace.path / "lm") if "checkpoint_upload_seconds" in one]
    assert told
    assert all(one["checkpoint_upload_seconds"] > 0 for one in told)
    stalls = [one for one in records(workspace.path / "lm") if "checkpoint_stall_seconds" in one]
    every = workspace.experiment.train.checkpoint_steps
    assert [one["step"] for one in stalls] == [every, 2 * every, 3 * every]


def acting(act, directory: Path):
    """A worker that calls `act(step, rank, directory)` before each step; pickled whole.

    What a step reads is made earlier, beside the one before.
    """

    def worker(config: dict) -> None:
        import ray.train

        from cluster import train

        chosen, rank = train.learning_rate, ray.train.get_context().get_world_rank()

        def rate(step, settings):
            act(step, rank, directory)
            return chosen(step, settings)

        train.learning_rate = rate
        try:
            train._worker(config)
        finally:
            train.learning_rate = chosen

    return worker


def stopping(at: int):
    """An act that has all workers give up together before a step."""

    def stop(step: int, rank: int, directory: Path) -> None:
        from mmrag.model.curriculum import TrainingError

        if step == at:
            raise TrainingError("enough")

    return stop


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_goes_on_with_fewer_workers_when_a_node_is_lost(tmp_path):
    program = subprocess.run(
        [sys.executable, ROOT / "tests" / "support" / "elastic_training.py", tmp_path],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert program.returncode == 0, program.stderr[-3000:]
    seen = json.loads(program.stdout.splitlines()[-1])
    assert set(seen["before"]) == {2} and set(seen["after"]) == {1}
    assert seen["steps"] == list(range(30))


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_then_one_then_two_make_the_run_that_was_not_interrupted(
    workspace, tmp_path, monkeypatch
):
    """… at a new stage of ZeRO each time."""
    from cluster import train as distributed

    directory = tmp_path / "lm"
    directory.mkdir()
    Vocabulary.load(workspace.path / "lm").save(directory)
    splits = [workspace.path / "tokens" / split for split in ("lm", "text")]

    def go_on(count: int, stage: int) -> None:
        experiment = with_workers(with_train(workspace.experiment, zero_stage=stage), count=count)
        fit(experiment, splits, directory, lambda _: None)

    ours = distributed._worker
    for count, zero_stage, at in [(2, 2, 13), (1, 3, 24)]:
        monkeypatch.setattr(distributed, "_worker", acting(stopping(at), tmp_path))
        with pytest.raises(TrainingError, match="enough"):
            go_on(count, zero_stage)
        assert held(directory).what.endswith(f"up to step {at // 10 * 10}")
    monkeypatch.setattr(distributed, "_worker", ours)
    go_on(2, 0)
    assert_same_training(directory, workspace)


@pytest.mark.ray
@pytest.mark.slow
def test_workers_that_are_asked_to_leave_commit_their_step_and_others_go_on_from_it(
    workspace, tmp_path, monkeypatch, capfd
):
    def ask_once(step: int, rank: int, directory: Path) -> None:
        """SIGTERM to one of the two, as a node's service manager sends it."""
        import os
        import signal
        import time

        from cluster import preemption

        (directory / f"step-{step}-of-{rank}").open("a").write("x")
        if step == 13 and rank == 1 and not (directory / "asked").exists():
            (directory / "asked").touch()
            os.kill(os.getpid(), signal.SIGTERM)
            while not preemption._asked.is_set():
                time.sleep(0.01)

    from cluster import train as distributed

    monkeypatch.setattr(distributed, "_worker", acting(ask_once, tmp_path))
    weights = fit_again(workspace, tmp_path / "lm", max_failures=0)
    assert "asked to leave, and did so after step 14" in capfd.readouterr().err
    made = {step: len((tmp_path / f"step-{step}-of-0").read_text()) for step in range(40)}
    assert set(made.values()) == {1}, "no step is made twice"
    expected = load_file(workspace.path / "lm" / pretrained.WEIGHTS)
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name
    assert [one["step"] for one in records(tmp_path / "lm")] == list(range(40))


@pytest.mark.ray
@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_stored_ends_the_run_and_is_named(
    workspace, tmp_path, monkeypatch
):
    """… and the run goes on from the one before."""

    def full(step: int, rank: int, directory: Path) -> None:
        import time

        from cluster import checkpoints

        def write(self, path: Path) -> None:
            raise OSError("No space left on device")

        if step == 15 and rank == 1:
            checkpoints.Share.write = write
        if step == 25:
            time.sleep(60)  # the attempt is ended meanwhile

    from cluster import train as distributed

    ours = distributed._worker
    monkeypatch.setattr(distributed, "_worker", acting(full, tmp_path))
    named = "the checkpoint of step 20 could not be stored as .*: No space left on device"
    with pytest.raises(TrainingFailedError, match=named):
        fit_again(workspace, tmp_path / "lm", max_failures=0)
    assert held(tmp_path / "lm").what == "1 checkpoint up to step 10"
    monkeypatch.setattr(distributed, "_worker", ours)
    splits = [workspace.path / "tokens" / split for split in ("lm", "text")]
    fit(workspace.experiment, splits, tmp_path / "lm", lambda _: None)
    assert_same_training(tmp_path / "lm", workspace)


def spoiling(steps: set[int]):
    """An act that makes the loss of one worker no number in some steps."""

    def spoil(step: int, rank: int, directory: Path) -> None:
        from mmrag.model.loss import Objective

        if not hasattr(Objective, "unspoilt"):
            Objective.unspoilt = Objective.forward
        unspoilt = Objective.unspoilt
        wrong = step in steps and rank == 1
        Objective.forward = (
            (lambda self, batch: unspoilt(self, batch) * float("nan")) if wrong else unspoilt
        )

    return spoil


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_steps_on_a_loss_that_is_no_number_are_not_taken_and_the_third_in_a_row_is_the_last(
    workspace, borrow, monkeypatch, zero_stage
):
    """… whether the run was stopped in between or not; and what is left is the plain loop's."""
    from cluster import train as distributed

    phases = (Phase(name="speech", steps=7, mixture={"speech_first": 1.0}),)
    changes = {"phases": phases, "checkpoint_steps": 1, "zero_stage": zero_stage}
    experiment = with_train(borrow("codebook", "tokens"), **changes)
    draft, ours = experiment.workspace / ".lm.partial", distributed._worker
    monkeypatch.setattr(distributed, "_worker", acting(spoiling({1, 3, 4, 5}), draft))
    for _ in range(2):  # the second time there is but one step to lose
        with pytest.raises(NonFiniteLoss, match=r"step 6, .*the third step in a row") as raised:
            stage_train.run(experiment)
        assert "train.leave_out=[ID]" in str(raised.value)
        lost = list(records(draft, SKIPPED))
        assert [one["step"] for one in lost] == [1, 3, 4, 5]
        assert all(name in str(raised.value) for name in lost[-1]["read"][:20])
        assert held(draft).what.endswith("up to step 5")

    vocabulary = Vocabulary.load(workspace.path / "lm")
    splits = [workspace.path / "tokens" / split for split in ("lm", "text")]
    data = examples([one for split in splits for one in tokenized.read(split)], vocabulary)
    _, micro_batches = Curriculum(data, experiment.train, experiment.seed).step(5)
    assert lost[-1]["read"] == list(dict.fromkeys(data[one.index].name for one in micro_batches[1]))

    monkeypatch.setattr(distributed, "_worker", ours)
    with stage.console.capture() as said:
        made = stage_train.run(experiment)
    assert "3 skipped" in said.get() and made.summary["skipped"] == 3
    model, plain = objective(experiment, vocabulary), []
    forward, seen = model.forward, []

    def spoilt(batch):
        seen.append(batch)
        wrong = len(seen) in (2 * 1 + 2, 2 * 3 + 2, 2 * 4 + 2)
        return forward(batch) * (float("nan") if wrong else 1.0)

    model.forward = spoilt
    train(model, data, vocabulary, experiment.train, experiment.seed, plain.append)
    assert_same_steps(plain, [one for one in records(made.path) if "loss" in one])
    trained = load_file(made.path / pretrained.WEIGHTS)
    for name, weight in model.lm.named_parameters():
        assert torch.allclose(weight, trained[name], atol=1e-4), name


@pytest.mark.ray
@pytest.mark.slow
def test_utterances_too_long_for_a_micro_batch_are_listed_beside_the_model(workspace, borrow):
    experiment = borrow("codebook", "tokens")
    part = next((experiment.workspace / "tokens" / "text").glob("part-*.parquet"))
    known = list(tokenized.read_part(part))
    long = Tokenized(Utterance(id="endless", text="light " * 900, document="x"), None)
    tokenized.write_part(part, [*known, long])
    phases = (Phase(name="text", steps=2, mixture={"text": 1.0}),)
    with stage.console.capture() as said:
        made = stage_train.run(with_train(experiment, phases=phases))
    [line] = [json.loads(line) for line in (made.path / REJECTED).open()]
    assert line["id"] == "endless" and line["length"] > line["budget"] == 400
    assert line["formats"] == ["text"]
    assert made.summary["rejected"] == 1 and "1 rejected" in said.get()
    assert all(one["tokens"] <= 2 * 400 for one in records(made.path))


@pytest.mark.ray
@pytest.mark.slow
def test_an_utterance_to_leave_out_that_there_is_not_is_named_without_another_try(
    workspace, tmp_path
):
    with pytest.raises(TrainingError, match=r"train\.leave_out: no utterance nobody to train on"):
        fit_again(workspace, tmp_path / "lm", leave_out=("nobody",), max_failures=3)


def fit_again(workspace, directory: Path, **changes) -> dict[str, torch.Tensor]:
    """The workspace's language model trained once more, into `directory`; its weights."""
    directory.mkdir()
    Vocabulary.load(workspace.path / "lm").save(directory)
    splits = [workspace.path / "tokens" / split for split in ("lm", "text", "dev")]
    changed = with_train(workspace.experiment, **changes)
    fit(changed, splits[:2], directory, lambda _: None, dev=splits[2])
    return load_file(directory / pretrained.WEIGHTS)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_partitioned_training_makes_the_same_steps(workspace, tmp_path, stage):
    weights = fit_again(workspace, tmp_path / "lm", zero_stage=stage)
    expected = load_file(workspace.path / "lm" / pretrained.WEIGHTS)
    assert {name: weight.shape for name, weight in weights.items()} == {
        name: weight.shape for name, weight in expected.items()
    }
    for name, weight in weights.items():
        assert torch.allclose(weight, expected[name], atol=1e-4), name
    for one, other in zip(records(tmp_path / "lm"), records(workspace.path / "lm"), strict=True):
        figures = {"loss", "ctc_loss", "gradient_norm", "dev_loss", "dev_text_loss", "dev_wer"}
        measured = {name: other[name] for name in figures & other.keys()}
        assert figures & one.keys() == measured.keys()
        for name, value in measured.items():
            assert one[name] == pytest.approx(value, rel=1e-4), (name, one["step"])


@pytest.mark.ray
@pytest.mark.slow
def test_word_errors_of_a_model_too_large_to_copy_are_refused_before_it_is_trained(
    workspace, tmp_path
):
    dev = workspace.experiment.train.dev.model_copy(update={"wer_copy_gib": 1e-9})
    with pytest.raises(TrainingError, match=r"train\.dev\.wer_steps: under ZeRO-3 each worker"):
        fit_again(workspace, tmp_path / "lm", zero_stage=3, dev=dev)
    assert not records(tmp_path / "lm")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_base_model_is_where_training_starts(workspace, tmp_path, stage):
    torch.manual_seed(11)
    vocabulary = Vocabulary.load(workspace.path / "lm")
    base = LM(workspace.experiment.lm, vocabulary.size)
    pretrained.to_huggingface(tmp_path / "base", base)
    weights = fit_again(
        workspace,
        tmp_path / "lm",
        zero_stage=stage,
        base=str(tmp_path / "base"),
        learning_rate=1e-9,
        phases=(Phase(name="text", steps=1, mixture={"text": 1.0}),),
    )
    theirs = dict(base.named_parameters())
    assert weights.keys() == theirs.keys()
    for name, weight in weights.items():
        if name not in ("embedding.weight", "head.weight"):
            assert torch.allclose(weight, theirs[name], atol=1e-6), name
    first = vocabulary.first_piece  # a base model's pieces are counted from 0, ours from here
    pieces = weights["embedding.weight"][first : vocabulary.first_unit]
    assert torch.allclose(pieces, theirs["embedding.weight"][: len(pieces)], atol=1e-6)
