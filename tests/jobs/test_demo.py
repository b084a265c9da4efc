"""What the whole pipeline leaves behind, run once at miniature size by the session's fixture."""

import pytest
from mlflow import MlflowClient

from cluster.store import tracking_uri
from jobs import demo, stage
from mmrag import artifact

pytestmark = pytest.mark.ray

INPUTS = {
    "corpus": {},
    "hubert": {"corpus": "corpus"},
    "codebook": {"hubert": "hubert", "source": "corpus"},
    "tokens": {"hubert": "hubert", "codebook": "codebook", "source": "corpus"},
    "lm": {"tokens": "tokens", "codebook": "codebook"},
    "datastores/text": {"lm": "lm", "codebook": "codebook", "source": "tokens"},
    "datastores/multimodal": {"lm": "lm", "codebook": "codebook", "source": "tokens"},
    "tuned/text": {"datastore": "datastores/text", "lm": "lm", "tokens": "tokens"},
    "tuned/multimodal": {"datastore": "datastores/multimodal", "lm": "lm", "tokens": "tokens"},
    "evaluation": {
        "tokens": "tokens",
        "lm": "lm",
        "datastore multimodal": "datastores/multimodal",
    },
}
"""Every artifact of the demo -> role of each input -> the artifact that plays it."""
KINDS = {"datastores/text": "datastore", "datastores/multimodal": "datastore"}
KINDS |= {"tuned/text": "tuned", "tuned/multimodal": "tuned"}


def made(workspace) -> dict[str, artifact.Artifact]:
    return {name: artifact.load(workspace.path / name, KINDS.get(name, name)) for name in INPUTS}


def runs(workspace):
    tracking = workspace.experiment.tracking
    client = MlflowClient(tracking_uri=tracking_uri(tracking))
    experiment = client.get_experiment_by_name(tracking.experiment)
    return client, client.search_runs(
        [experiment.experiment_id],
        filter_string=f"params.workspace = '{workspace.path}'",
    )


def test_every_artifact_is_finished_and_chained_to_its_inputs_by_fingerprint(workspace):
    artifacts = made(workspace)
    for name, roles in INPUTS.items():
        expected = {role: artifacts[source].fingerprint for role, source in roles.items()}
        assert artifacts[name].inputs == expected, name
    assert len({one.fingerprint for one in artifacts.values()}) == len(artifacts)


def test_fingerprints_are_those_of_the_files_as_they_are(workspace):
    for name, bulk, logs in [("tokens", (), ()), ("lm", (), ("metrics.jsonl",))]:
        one = artifact.load(workspace.path / name, name)
        identity = {
            "schema": one.schema,
            "kind": one.kind,
            "config": one.config,
            "inputs": one.inputs,
        }
        assert artifact.fingerprint(one.path, identity, bulk, logs) == one.fingerprint


def test_nothing_but_the_artifacts_is_left_in_the_workspace(workspace):
    hidden = [
        path.relative_to(workspace.path).as_posix()
        for path in workspace.path.rglob(".*")
        if not path.name.endswith(".lock")
    ]
    assert hidden == []
    top = {path.name for path in workspace.path.iterdir() if not path.name.startswith(".")}
    assert top == {name.split("/")[0] for name in INPUTS}


def test_mlflow_holds_a_finished_run_of_every_stage(workspace):
    client, found = runs(workspace)
    artifacts = made(workspace)
    by_stage = {run.data.tags["stage"]: run for run in found if run.info.status == "FINISHED"}
    assert set(by_stage) == set(INPUTS)
    for name, run in by_stage.items():
        assert run.data.params["stage"] == name
        assert len(run.data.params) > 2, name
        assert run.data.metrics, name
        assert run.data.tags["fingerprint"] == artifacts[name].fingerprint
        files = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert "artifact.json" in files, name
    evaluated = {file.path for file in client.list_artifacts(by_stage["evaluation"].info.run_id)}
    assert {"results.json", "results.md", "wer.png", "transcripts.jsonl"} <= evaluated


def test_training_is_followed_step_by_step_in_mlflow(workspace):
    client, found = runs(workspace)
    [run] = [one for one in found if one.data.tags["stage"] == "lm"]
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in history] == [10, 20, 30, 40]


def test_a_second_run_does_nothing_and_says_so(workspace):
    before = {name: (workspace.path / name / "artifact.json").stat() for name in INPUTS}
    _, tracked = runs(workspace)
    with stage.console.capture() as captured:
        demo.run(workspace.experiment)
    said = " ".join(captured.get().split())
    for name in INPUTS:
        assert f"{name}: nothing to do" in said
        assert "nothing to do" not in workspace.printed
        after = (workspace.path / name / "artifact.json").stat()
        assert (after.st_mtime_ns, after.st_ino) == (before[name].st_mtime_ns, before[name].st_ino)
    assert len(runs(workspace)[1]) == len(tracked)


def test_the_demo_ends_with_transcripts_times_and_what_to_do_next(workspace):
    said = " ".join(workspace.printed.split())
    assert "What retrieval changed" in said
    assert "Time taken" in said
    assert "mmrag transcribe" in said
    for act in range(1, 10):
        assert f"{act}/9" in said
