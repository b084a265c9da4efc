from pathlib import Path

import pytest
from mlflow import MlflowClient
from recorded_runs import only_run

from cluster import mounts
from cluster.store import tracking_uri
from cluster.tracking import run
from mmrag import artifact
from mmrag.config import Tracking


def test_a_relative_sqlite_path_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    uri = tracking_uri(Tracking(uri="sqlite:///runs/mlflow.db", experiment="trial"))
    assert uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert (tmp_path / "runs").is_dir()
    assert tracking_uri(Tracking(uri=uri, experiment="trial")) == uri


def test_the_environment_wins_over_the_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example:5000")
    configured = Tracking(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="trial")
    assert tracking_uri(configured) == "http://mlflow.example:5000"


def test_a_database_on_a_share_is_warned_of_and_a_server_is_not(tracking, capsys, monkeypatch):
    with run(tracking, "alone", {}):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(mounts, "network", lambda path: "nfs4")
    with run(tracking, "shared", {}):
        pass
    path = tracking_uri(tracking).removeprefix("sqlite:///")
    assert capsys.readouterr().err == (
        f"warning: the MLflow database {Path(path).resolve()} lies on nfs4, where several machines "
        "may damage it: start an MLflow server with a database of its own, and name it in "
        "MLFLOW_TRACKING_URI\n"
    )


def test_a_database_at_a_url_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"not at a URL: start an MLflow server, and name it in"):
        tracking_uri(Tracking(uri="sqlite:///s3://bucket/runs/mlflow.db", experiment="trial"))
    assert not list(tmp_path.iterdir())


def test_a_run_records_parameters_metrics_tags_and_files(tracking, tmp_path):
    opened = tmp_path / "results.md"
    opened.write_text("# results")
    many = {f"p{number}": number for number in range(250)}
    with run(tracking, "evaluation", {"lm": {"width": 32, "shape": {"heads": 2}}, **many}) as one:
        one.log({"wer": 0.5, "recall": None}, step=3)
        one.log({"wer": 0.25}, step=4)
        one.tag("purpose", "a test")
        one.file(opened)
    client, found = only_run(tracking, "evaluation")
    assert found.info.status == "FINISHED"
    assert found.data.params["lm.width"] == "32"
    assert found.data.params["lm.shape.heads"] == "2"
    assert {name: found.data.params[name] for name in many} == {k: str(v) for k, v in many.items()}
    assert found.data.metrics == {"wer": 0.25}
    history = client.get_metric_history(found.info.run_id, "wer")
    assert [(metric.step, metric.value) for metric in history] == [(3, 0.5), (4, 0.25)]
    assert found.data.tags["stage"] == "evaluation"
    assert found.data.tags["purpose"] == "a test"
    assert [file.path for file in client.list_artifacts(found.info.run_id)] == ["results.md"]


def test_files_are_kept_beside_the_database_wherever_the_job_runs(tracking, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with run(tracking, "elsewhere", {}):
        pass
    _, found = only_run(tracking, "elsewhere")
    database = Path(tracking_uri(tracking).removeprefix("sqlite:///"))
    assert found.info.artifact_uri.startswith((database.parent / "mlartifacts").as_uri())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError("no audio"), KeyboardInterrupt()])
def test_a_run_that_raises_is_failed_and_says_why(tracking, error):
    name = f"broken by {type(error).__name__}"
    with pytest.raises(type(error)), run(tracking, name, {}):
        raise error
    _, found = only_run(tracking, name)
    assert found.info.status == "FAILED"
    assert found.data.tags["error"] == f"{type(error).__name__}: {error}"


class Stopped(Exception):
    pass


def stopped(tracking: Tracking, draft: Path, params: dict, steps: range) -> str:
    """A run of `draft` that logs its losses and fails; its id."""
    known = []

    def train() -> None:
        with run(tracking, "lm", params, draft) as one:
            known.append(one.id)
            for step in steps:
                one.log({"loss": 1.0 / (step + 1)}, step)
            raise Stopped

    with pytest.raises(Stopped):
        train()
    return known[0]


def test_a_run_that_was_stopped_is_gone_on_with(tracking, tmp_path):
    params = {"train": {"clip": 1.0, "log_steps": 10}}
    first = stopped(tracking, tmp_path, params, range(1, 5))
    changed = {"train": {"clip": 1.0, "log_steps": 7, "added": 3}}
    with run(tracking, "lm", changed, tmp_path) as one:
        assert (one.id, one.gone, one.last_step("loss"), one.last_step("wer")) == (
            *(first, None, 4, None),
        )
        client, found = only_run(tracking, "lm")
        assert found.info.status == "RUNNING" and "error" not in found.data.tags
        one.log({"loss": 0.1}, 5)
    client, found = only_run(tracking, "lm")
    assert found.info.status == "FINISHED"
    assert found.data.tags["resumed"] == "1"
    assert found.data.tags["changed.train.log_steps"] == "7"
    assert "changed.train.clip" not in found.data.tags
    expected = {"train.clip": "1.0", "train.log_steps": "10", "train.added": "3"}
    assert found.data.params == expected
    points = client.get_metric_history(found.info.run_id, "loss")
    assert [point.step for point in points] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("lost", ["deleted", "in another experiment", "unknown"])
def test_a_run_that_is_no_longer_there_is_replaced_and_named(tracking, tmp_path, lost):
    first = stopped(tracking, tmp_path, {}, range(3))
    if lost == "deleted":
        MlflowClient(tracking_uri=tracking_uri(tracking)).delete_run(first)
    elif lost == "in another experiment":
        tracking = tracking.model_copy(update={"experiment": f"{tracking.experiment}-2"})
    else:
        first = "0" * 32
        (tmp_path / artifact.RECORDED).write_text(f'{{"run": "{first}"}}')
    with run(tracking, "lm", {}, tmp_path) as one:
        assert one.gone == first != one.id
        assert one.last_step("loss") is None
    with run(tracking, "lm", {}, tmp_path) as again:
        assert (again.id, again.gone) == (one.id, None)


def test_a_run_without_a_draft_is_a_new_one_each_time(tracking):
    with run(tracking, "one", {}) as one, run(tracking, "two", {}) as other:
        assert one.id != other.id and one.last_step("loss") is None
