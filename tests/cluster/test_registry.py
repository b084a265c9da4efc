import os
import shutil
import socket
import threading
import time
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from recorded_runs import only_run

from cluster.registry import fetch, register
from cluster.store import tracking_uri
from mmrag import artifact
from mmrag.artifact import Artifact, ArtifactError
from mmrag.config import Tracking


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Artifact]:
    """A model's artifacts, of a few letters each; the language model's has a log."""
    return {
        place: made(tmp_path / "workspace" / place, place.split("/")[0], place)
        for place in ("hubert", "codebook", "lm", "adapter", "tuned/names")
    }


def made(path: Path, kind: str, text: str) -> Artifact:
    with artifact.create(path, kind, {"scale": 0.1}, {}, logs=("metrics.jsonl",)) as draft:
        (draft.path / "weights").write_text(text)
        (draft.path / "metrics.jsonl").write_text("{}")
    return artifact.load(path, kind)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def files(directory: Path) -> dict[str, str]:
    found = (path for path in directory.rglob("[!.]*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_text() for path in found}


def held(cache: Path) -> list[str]:
    """What a cache holds but for locks."""
    return [path.name for path in cache.iterdir() if path.suffix != ".lock"]


def stored(tracking: Tracking, version: str) -> Path:
    """The registered files of the model that is named as the tracking experiment."""
    client = MlflowClient(tracking_uri=tracking_uri(tracking))
    source = client.get_model_version_download_uri(tracking.experiment, version)
    return Path(source.removeprefix("file://"))


def test_what_is_registered_comes_back_file_by_file(tracking, models, cache, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    name = tracking.experiment
    version = register(tracking, name, models)
    assert version == "1"
    directory = fetch(f"models:/{name}@production", tracking, cache)
    assert files(directory) == files(tmp_path / "workspace")
    assert fetch(f"models:/{name}/1", tracking, cache) == directory
    assert held(cache) == [directory.name]
    assert list(Path.cwd().iterdir()) == []


def test_mlflow_itself_finds_a_registered_model_and_its_run(tracking, models, monkeypatch):
    name = tracking.experiment
    register(tracking, name, models)
    client, found = only_run(tracking, "register")
    version = client.get_model_version_by_alias(name, "production")
    assert (version.run_id, found.info.status) == (found.info.run_id, "FINISHED")
    assert version.tags["fingerprint.tuned/names"] == models["tuned/names"].fingerprint
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(tracking))
    listed = mlflow.artifacts.list_artifacts(f"models:/{name}@production")
    assert {file.path for file in listed} == {"hubert", "codebook", "lm", "adapter", "tuned"}


def test_an_alias_moves_to_the_new_version_and_the_old_one_stays(tracking, models, cache, tmp_path):
    name = tracking.experiment
    register(tracking, name, models)
    first = fetch(f"models:/{name}@production", tracking, cache)
    other = models | {"lm": made(tmp_path / "other", "lm", "another")}
    assert register(tracking, name, other) == "2"
    second = fetch(f"models:/{name}@production", tracking, cache)
    assert (second / "lm" / "weights").read_text() == "another"
    assert fetch(f"models:/{name}/1", tracking, cache) == first
    assert register(tracking, name, models, "trial") == "3"
    assert fetch(f"models:/{name}@production", tracking, cache) == second
    assert fetch(f"models:/{name}@trial", tracking, cache) == first


def test_a_second_fetch_downloads_nothing(tracking, models, cache):
    name = tracking.experiment
    version = register(tracking, name, models)
    directory = fetch(f"models:/{name}/1", tracking, cache)
    shutil.rmtree(stored(tracking, version))
    assert fetch(f"models:/{name}/1", tracking, cache) == directory


def test_those_who_ask_together_share_one_download(tracking, models, cache, monkeypatch):
    name = tracking.experiment
    register(tracking, name, models)
    downloaded, download = [], mlflow.artifacts.download_artifacts

    def counted(**arguments) -> str:
        downloaded.append(arguments["artifact_uri"])
        return download(**arguments)

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", counted)
    found = []
    askers = [
        threading.Thread(target=lambda: found.append(fetch(f"models:/{name}/1", tracking, cache)))
        for _ in range(3)
    ]
    for each in askers:
        each.start()
    for each in askers:
        each.join()
    assert len(found) == 3 and len(set(found)) == 1
    assert len(downloaded) == len(models)


def test_a_download_that_stops_half_way_leaves_nothing_half(
    tracking, models, cache, monkeypatch, tmp_path
):
    name = tracking.experiment
    register(tracking, name, models)
    download = mlflow.artifacts.download_artifacts

    def stops(**arguments) -> str:
        if arguments["artifact_uri"].endswith("/lm"):
            raise KeyboardInterrupt
        return download(**arguments)

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.artifacts, "download_artifacts", stops)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a killed process tidies nothing
        with pytest.raises(KeyboardInterrupt):
            fetch(f"models:/{name}/1", tracking, cache)
    [half] = held(cache)
    assert half.startswith(".") and (cache / half / "hubert" / "weights").exists()
    (cache / half / "hubert" / "old").touch()
    directory = fetch(f"models:/{name}/1", tracking, cache)
    assert held(cache) == [directory.name]
    assert files(directory) == files(tmp_path / "workspace")


def test_files_changed_in_the_store_are_refused_and_not_kept(tracking, models, cache):
    name = tracking.experiment
    version = register(tracking, name, models)
    (stored(tracking, version) / "lm" / "weights").write_text("other")
    expected = models["lm"].fingerprint
    with pytest.raises(ArtifactError, match=f"should be lm {expected}, but is [0-9a-f]{{16}}$"):
        fetch(f"models:/{name}@production", tracking, cache)
    assert held(cache) == []


def test_a_download_that_fails_says_of_which_version(tracking, models, cache):
    name = tracking.experiment
    register(tracking, name, models)
    client = MlflowClient(tracking_uri=tracking_uri(tracking))
    client.create_model_version(name, "nowhere://bucket/model")
    with pytest.raises(OSError, match=rf"^models:/{name}/2 \(version 2 in .*be downloaded: .+$"):
        fetch(f"models:/{name}/2", tracking, cache)
    assert held(cache) == []


def test_another_artifact_than_the_registered_one_is_refused_naming_both(
    tracking, models, cache, tmp_path
):
    name = tracking.experiment
    version = register(tracking, name, models)
    other = made(tmp_path / "other", "codebook", "another")
    shutil.copytree(other.path, stored(tracking, version) / "codebook", dirs_exist_ok=True)
    expected = models["codebook"].fingerprint
    with pytest.raises(ArtifactError, match=f"{expected}, but is {other.fingerprint}"):
        fetch(f"models:/{name}@production", tracking, cache)


def test_what_no_tag_vouches_for_is_not_downloaded(tracking, models, cache, tmp_path):
    name = tracking.experiment
    without = {place: one for place, one in models.items() if place != "adapter"}
    version = register(tracking, name, without)
    shutil.copytree(models["adapter"].path, stored(tracking, version) / "adapter")
    directory = fetch(f"models:/{name}@production", tracking, cache)
    assert not (directory / "adapter").exists()
    assert (directory / "lm").exists()


def test_tags_about_other_things_are_ignored(tracking, models, cache):
    name = tracking.experiment
    register(tracking, name, models)
    client = MlflowClient(tracking_uri=tracking_uri(tracking))
    client.set_model_version_tag(name, "1", "fingerprint.corpus", "0" * 16)
    assert (fetch(f"models:/{name}/1", tracking, cache) / "lm").exists()


@pytest.mark.parametrize("tagged", [True, False])
def test_a_version_without_a_language_model_is_refused(tracking, models, cache, tagged):
    name = tracking.experiment
    version = register(tracking, name, models)
    client = MlflowClient(tracking_uri=tracking_uri(tracking))
    shutil.rmtree(stored(tracking, version) / "lm")
    if not tagged:
        client.delete_model_version_tag(name, version, "fingerprint.lm")
    with pytest.raises(ArtifactError, match=f"models:/{name}/1 .*holds no lm/$"):
        fetch(f"models:/{name}/1", tracking, cache)
    assert held(cache) == []


def test_a_version_that_something_else_registered_is_refused(tracking, models, cache):
    name = tracking.experiment
    register(tracking, name, models)
    client = MlflowClient(tracking_uri=tracking_uri(tracking))
    source = client.get_model_version_download_uri(name, "1")
    client.create_model_version(name, source)
    with pytest.raises(ArtifactError, match=r"has no tag fingerprint\.hubert"):
        fetch(f"models:/{name}/2", tracking, cache)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("models:/nobody@production", "no model 'nobody' is registered in sqlite:"),
        ("models:/{name}@staging", r"no alias 'staging', its aliases are \['production'\]$"),
        ("models:/{name}/7", "has no version 7$"),
    ],
)
def test_what_is_not_registered_is_named(tracking, models, cache, uri, said):
    register(tracking, tracking.experiment, models)
    with pytest.raises(ValueError, match=said):
        fetch(uri.format(name=tracking.experiment), tracking, cache)


@pytest.mark.parametrize(
    "uri",
    [
        "models:/mmrag",
        "models:/mmrag/",
        "models:/mmrag@",
        "models:/mmrag/latest",
        "models:/mmrag/3/lm",
        "models:/../etc/1",
        "models://mmrag/1",
        "runs:/0123/model",
        "mmrag@production",
        "",
    ],
)
def test_a_uri_of_another_form_is_refused(tracking, cache, uri):
    with pytest.raises(ValueError, match="is neither models:/NAME@ALIAS nor models:/NAME/VERSION"):
        fetch(uri, tracking, cache)


def test_a_server_that_is_down_is_named_within_seconds_and_without_its_password(
    models, cache, monkeypatch
):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    down = Tracking(uri=f"http://user:secret@127.0.0.1:{port}", experiment="trial")
    started = time.monotonic()
    with pytest.raises(ConnectionError, match=f"http://127.0.0.1:{port} does not answer") as raised:
        fetch("models:/mmrag@production", down, cache)
    assert time.monotonic() - started < 15
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ
    assert "secret" not in str(raised.value) and "\n" not in str(raised.value)
    assert "name another in tracking.uri;" in str(raised.value)
    with pytest.raises(ConnectionError, match="name another in registry;"):
        fetch("models:/mmrag@production", down, cache, setting="registry")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # a user's own choice is kept
    with pytest.raises(ConnectionError, match="does not answer"):
        register(down, "mmrag", models)
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"


def test_a_store_that_is_not_there_is_not_made_by_asking(cache, tmp_path):
    nowhere = Tracking(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="trial")
    with pytest.raises(ConnectionError, match="no MLflow store at sqlite:"):
        fetch("models:/mmrag@production", nowhere, cache)
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize(
    ("name", "alias"),
    [
        ("a/b", "production"),
        ("a@b", "production"),
        ("", "production"),
        ("mmrag", "latest"),
        ("mmrag", "V2"),
        ("mmrag", "a b"),
        ("mmrag", ""),
    ],
)
def test_a_name_that_no_uri_can_hold_is_refused_before_anything_is_uploaded(
    tracking, models, name, alias
):
    with pytest.raises(ValueError, match="a name has letters"):
        register(tracking, name, models, alias)
    client = MlflowClient(tracking_uri=tracking_uri(tracking))
    assert client.get_experiment_by_name(tracking.experiment) is None


def test_an_artifact_changed_since_it_was_made_is_not_registered(tracking, models):
    (models["lm"].path / "weights").write_text("touched")
    with pytest.raises(ArtifactError, match=f"should be lm {models['lm'].fingerprint}, but is"):
        register(tracking, tracking.experiment, models)


def test_a_training_log_may_grow(tracking, models, cache):
    (models["lm"].path / "metrics.jsonl").write_text("{}\n{}")
    register(tracking, tracking.experiment, models)
    directory = fetch(f"models:/{tracking.experiment}/1", tracking, cache)
    assert (directory / "lm" / "metrics.jsonl").exists()


def test_a_model_lacks_nothing_and_has_nothing_strange(tracking, models):
    without = {place: one for place, one in models.items() if place != "codebook"}
    with pytest.raises(ArtifactError, match="there is no codebook"):
        register(tracking, tracking.experiment, without)
    with pytest.raises(ValueError, match=r"no place for \['corpus'\]"):
        register(tracking, tracking.experiment, models | {"corpus": models["lm"]})
