import errno
import json
import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import ray
from mlflow import MlflowClient

from cluster.progress import METRICS, MetricsWriter, following
from cluster.store import tracking_uri
from jobs import evaluate, stage, tokenize, train
from mmrag import artifact, config
from mmrag.artifact import ArtifactError
from mmrag.config import Experiment, Tracking


@pytest.fixture
def own(experiment: Experiment, tmp_path: Path) -> Experiment:
    """The experiment in a workspace of this test's own, tracked under a name of its own."""
    tracking = Tracking(uri=experiment.tracking.uri, experiment=tmp_path.name)
    return experiment.model_copy(update={"workspace": tmp_path / "w", "tracking": tracking})


def runs(experiment: Experiment) -> list:
    client = MlflowClient(tracking_uri=tracking_uri(experiment.tracking))
    known = client.get_experiment_by_name(experiment.tracking.experiment)
    return client.search_runs([known.experiment_id], order_by=["attributes.start_time"])


def make(experiment: Experiment, work, width: int = 1, **options) -> artifact.Artifact:
    return stage.make(experiment, "lm", "lm", {"width": width}, {}, work, **options)


def write(text: str):
    def work(draft, run) -> None:
        (draft.path / "weights").write_text(text)
        draft.summary["letters"] = len(text)

    return work


def refuse(draft, run) -> None:
    raise AssertionError("a finished stage was run again")


def command_line(monkeypatch, job, *arguments: str) -> str:
    """What the job's command says when it gives up."""
    monkeypatch.setattr(sys, "argv", ["job", *arguments])
    with pytest.raises(SystemExit) as stopped:
        stage.main(job, "A stage.")
    assert isinstance(stopped.value.code, str), "a message, and with it exit status 1"
    return stopped.value.code


def never(experiment: Experiment, force: bool) -> None:
    raise AssertionError("a stage was run with a wrong configuration")


def test_a_quick_look_is_another_experiment_where_a_stage_knows_one(monkeypatch):
    ran = []

    def quick(experiment: Experiment) -> Experiment:
        return experiment.model_copy(update={"seed": experiment.seed + 1})

    def job(experiment: Experiment, force: bool) -> None:
        ran.append(experiment.seed)

    monkeypatch.setattr(stage, "connection", nullcontext)
    for arguments in (["seed=4"], ["seed=4", "--quick"]):
        monkeypatch.setattr(sys, "argv", ["job", *arguments])
        stage.main(job, "A stage.", quick=quick)
    assert ran == [4, 5]
    monkeypatch.setattr(sys, "argv", ["job", "--quick"])
    with pytest.raises(SystemExit):
        stage.main(job, "A stage that has none.")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["lm.widht=3"], ["lm.widht", "unknown key"]),
        (["lm.width=-3"], ["lm.width", "greater than 0"]),
        (["lm.width=wide"], ["lm.width", "valid integer"]),
        (["datastore.metric=hamming"], ["datastore.metric", "'l2', 'ip' or 'cosine'"]),
        (["knn.weight=1.5"], ["knn.weight", "less than or equal to 1"]),
        (["knn.temperature=nan"], ["knn.temperature", "finite"]),
        (["lm.heads=3", "lm.kv_heads=2"], ["lm: ", "heads 3 is not a multiple of kv_heads 2"]),
        (["train.workers.count=3", "train.micro_batches=4"], ["train: ", "multiple of"]),
        (["widht"], ["'widht'", "key.sub=value"]),
        (["--config", "no/such.yaml"], ["no/such.yaml", "no such config file"]),
    ],
)
def test_a_wrong_configuration_is_an_error_that_names_the_key(monkeypatch, arguments, named):
    said = command_line(monkeypatch, never, *arguments)
    assert said.startswith("error: ")
    for part in named:
        assert part in said


def test_a_misspelt_key_stops_the_job_in_one_line_without_a_traceback(tmp_path):
    job = subprocess.run(
        [sys.executable, "-m", "jobs.synthesize", "lm.widht=3"],
        cwd=tmp_path,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert job.returncode == 1
    assert job.stdout == ""
    [line] = [line for line in job.stderr.splitlines() if "error" in line]
    assert line.startswith("error: ") and line.endswith("lm.widht: unknown key")
    assert "Traceback" not in job.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_finished_stage_is_not_run_again_and_says_so(own):
    first = make(own, write("abc"))
    with stage.console.capture() as said:
        again = make(own, refuse)
    assert again == first
    assert "lm: nothing to do" in said.get()
    assert len(runs(own)) == 1


def test_force_makes_a_finished_stage_again(own):
    first = make(own, write("abc"))
    second = make(own, write("abcd"), force=True)
    assert second.fingerprint != first.fingerprint
    assert (second.path / "weights").read_text() == "abcd"


def test_another_configuration_is_refused_until_forced(own):
    make(own, write("abc"))
    with pytest.raises(ArtifactError, match=r"width was 1 and is now 2.*--force"):
        make(own, refuse, width=2)
    assert make(own, write("x"), width=2, force=True).config == {"width": 2}


def test_force_says_what_it_throws_away(own):
    def stop(draft, run) -> None:
        (draft.path / "part-0").write_text("done")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(own, stop)
    with pytest.raises(ArtifactError, match=r"width was 1 and is now 2.*throws away 1 file in"):
        make(own, refuse, width=2)
    assert len(runs(own)) == 1, "nothing was run, and no run is recorded"
    with stage.console.capture() as said:
        make(own, write("abc"), width=2, force=True)
    assert "lm: --force threw away 1 file of" in said.get()


def test_a_run_records_how_it_was_done_beside_what_is_made(own):
    recipe = config.recipe({"train": own.train})
    made = stage.make(own, "lm", "lm", recipe, {}, write("abc"))
    [run] = runs(own)
    assert run.data.params["train.workers.count"] == str(own.train.workers.count)
    assert run.data.params["train.clip"] == str(own.train.clip)
    assert "workers" not in made.config["train"]


def test_a_run_records_what_its_stage_counted_and_made(own):
    made = make(own, write("abc"))
    [run] = runs(own)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"letters": 3}
    assert run.data.params["width"] == "1"
    assert run.data.params["workspace"] == str(own.workspace)
    assert run.data.tags["fingerprint"] == made.fingerprint
    files = Path(run.info.artifact_uri.removeprefix("file://"))
    assert json.loads((files / "artifact.json").read_text())["fingerprint"] == made.fingerprint


def test_a_full_disk_keeps_the_old_artifact_and_says_what_is_full(own):
    make(own, write("abc"))

    def fill(draft, run) -> None:
        (draft.path / "weights").symlink_to("/dev/full")
        (draft.path / "weights").write_text("abcd")

    with pytest.raises(OSError) as raised:
        make(own, fill, force=True)
    assert raised.value.errno == errno.ENOSPC
    assert "No space left on device" in str(raised.value)
    assert str(own.workspace / "lm") in str(raised.value)
    kept = artifact.load(own.workspace / "lm", "lm")
    assert (kept.path / "weights").read_text() == "abc"
    assert [run.info.status for run in runs(own)] == ["FINISHED", "FAILED"]
    assert "No space left on device" in runs(own)[-1].data.tags["error"]


def test_a_stopped_stage_finds_its_draft_again(own):
    def stop(draft, run) -> None:
        (draft.path / "part-0").write_text("done")
        raise KeyboardInterrupt

    def go_on(draft, run) -> None:
        assert (draft.path / "part-0").read_text() == "done"
        (draft.path / "part-1").write_text("done")

    with pytest.raises(KeyboardInterrupt):
        make(own, stop)
    with stage.console.capture() as said:
        made = make(own, go_on)
    assert "lm: going on where a stopped run left off" in said.get()
    assert {path.name for path in made.path.iterdir()} == {"part-0", "part-1", artifact.FILE}
    [run] = runs(own)
    assert run.info.status == "FINISHED" and run.data.tags["resumed"] == "1"


def test_a_stage_that_is_stopped_again_and_again_has_one_curve_in_mlflow(own):
    """Whatever was told before the kill, no step is told twice and none is missing."""

    def train(first: int, last: int, killed: int | None = None):
        def work(draft, tracked) -> None:
            after = tracked.last_step("loss") or 0

            def log(record: dict) -> None:
                tracked.log({"loss": record["loss"]}, record["step"])

            with following(draft.path, log, after):
                writer = MetricsWriter(draft.path, first)
                for step in range(first, last):
                    writer.write({"step": step, "loss": 1.0 / step})
            if killed:  # after this nobody told MLflow of what the workers wrote
                writer = MetricsWriter(draft.path, last)
                for step in range(last, killed):
                    writer.write({"step": step, "loss": 1.0 / step})
                raise KeyboardInterrupt

        return work

    for first, last, killed in ((1, 5, 8), (6, 9, 10)):
        with pytest.raises(KeyboardInterrupt):
            make(own, train(first, last, killed), logs=(METRICS,))
    make(own, train(8, 14), logs=(METRICS,))
    [run] = runs(own)
    client = MlflowClient(tracking_uri=tracking_uri(own.tracking))
    points = client.get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in points] == list(range(1, 14))
    assert [point.value for point in points] == [1.0 / step for step in range(1, 14)]
    assert run.data.tags["resumed"] == "2" and run.info.status == "FINISHED"


def test_a_stage_whose_run_was_deleted_says_so_and_tells_its_curve_again(own):
    def stop(draft, run) -> None:
        (draft.path / "part-0").write_text("done")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(own, stop)
    [first] = runs(own)
    MlflowClient(tracking_uri=tracking_uri(own.tracking)).delete_run(first.info.run_id)
    with stage.console.capture() as said:
        make(own, write("abc"))
    [second] = runs(own)
    told = f"MLflow run {first.info.run_id} is no longer there; run {second.info.run_id} takes"
    assert told in said.get()


def test_a_stage_that_begins_anew_has_a_run_of_its_own(own):
    def stop(draft, run) -> None:
        (draft.path / "part-0").write_text("done")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(own, stop)
    make(own, write("abc"), force=True)
    assert [run.info.status for run in runs(own)] == ["FAILED", "FINISHED"]


def test_who_makes_what_is_being_made_does_not_touch_its_run(own):
    def twice(draft, run) -> None:
        with pytest.raises(ArtifactError, match="another process is writing"):
            make(own, refuse)
        [found] = runs(own)
        assert found.info.status == "RUNNING"
        (draft.path / "weights").write_text("abc")

    make(own, twice)
    [run] = runs(own)
    assert run.info.status == "FINISHED"


def test_a_store_that_is_silent_keeps_what_force_would_throw_away(own):
    def stop(draft, run) -> None:
        (draft.path / "part-0").write_text("done")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(own, stop)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        down = own.tracking.model_copy(update={"uri": f"http://127.0.0.1:{free.getsockname()[1]}"})
    with pytest.raises(ConnectionError, match="does not answer"):
        make(own.model_copy(update={"tracking": down}), refuse, width=2, force=True)
    assert (own.workspace / ".lm.partial" / "part-0").exists()


@pytest.mark.parametrize(
    ("job", "wanted"),
    [(tokenize, "pretrain_hubert"), (train, "tokenize"), (evaluate, "train")],
)
def test_a_missing_input_names_the_job_that_makes_it(own, job, wanted):
    with pytest.raises(ArtifactError, match=rf"made by: python -m jobs\.{wanted}"):
        job.run(own)


@pytest.mark.ray
def test_a_mistake_that_shows_in_a_worker_is_told_without_its_traceback(ray_cluster, monkeypatch):
    @ray.remote(num_cpus=0.1)
    def complain() -> None:
        raise ArtifactError("/runs/lm is not a finished lm")

    def job(experiment: Experiment, force: bool) -> None:
        ray.get(complain.remote())

    assert command_line(monkeypatch, job) == "error: /runs/lm is not a finished lm"


@pytest.mark.ray
def test_a_mistake_of_ours_keeps_its_traceback(ray_cluster, monkeypatch):
    def job(experiment: Experiment, force: bool) -> None:
        raise KeyError("width")

    monkeypatch.setattr(sys, "argv", ["job"])
    with pytest.raises(KeyError):
        stage.main(job, "A stage.")
