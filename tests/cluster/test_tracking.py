from pathlib import Path

import pytest
from mlflow import MlflowClient

from cluster.tracking import run, tracking_uri
from mmrag.config import Experiment, Tracking


@pytest.fixture
def tracking(experiment: Experiment, tmp_path: Path) -> Tracking:
    """The session's store, under a name of this test's own."""
    return Tracking(uri=experiment.tracking.uri, experiment=tmp_path.name)


def only_run(tracking: Tracking, name: str):
    client = MlflowClient(tracking_uri=tracking_uri(tracking))
    experiment = client.get_experiment_by_name(tracking.experiment)
    runs = client.search_runs([experiment.experiment_id])
    [found] = [one for one in runs if one.info.run_name == name]
    return client, found


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
