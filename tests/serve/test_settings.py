"""The service's settings: one complete file, checked before anything starts."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mmrag import shipped
from mmrag.config import ConfigError
from serve.app import build
from serve.settings import CONFIG, http_options, read


def test_the_file_is_complete_and_stays_on_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("MMRAG_RUNS", str(tmp_path))
    settings = read({})
    assert settings.model == shipped.DEFAULT and settings.datastores.is_relative_to(tmp_path)
    assert http_options()["host"] == "127.0.0.1"
    [application] = OmegaConf.load(CONFIG)["applications"]
    assert application["import_path"] == f"{build.__module__}:{build.__name__}"


def test_two_cores_are_enough_for_everything_and_some_shards():
    settings = read({})
    parts = (settings.ingress, settings.encoder, settings.retriever, settings.decoder)
    assert sum(part.num_cpus * part.max for part in parts) + 10 * settings.retriever.shard_cpus <= 2


@pytest.mark.parametrize(
    "given",
    [
        {"decoder.rows": "16"},
        {"decoder.rows": 16},
        {"decoder": {"rows": 16}},
        {"decoder": "{rows: 16}"},
    ],
)
def test_a_setting_may_be_given_dotted_or_nested(given):
    settings = read(given)
    assert settings.decoder.rows == 16
    assert settings == read({}).model_copy(update={"decoder": settings.decoder})


def test_a_list_is_given_as_yaml_writes_it():
    assert read({"preload": "[contacts, places]"}).preload == ("contacts", "places")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"decoder.row": 8}, "decoder.row"),
        ({"colour": "red"}, "colour"),
        ({"decoder.rows": 0}, "decoder.rows"),
        ({"decoder.rows": "many"}, "decoder.rows"),
        ({"limits.upload_mb": -1}, "limits.upload_mb"),
        ({"name": "../model"}, "name"),
        ({"aliases": ["two words"]}, "aliases"),
        ({"aliases": ["gpt-4o-transcribe-diarize"]}, "promises speakers"),
        ({"unknown_fields": "ignore"}, "unknown_fields"),
        ({"languages": []}, "languages"),
        ({"retrieval_defaults.attention.whole": -1}, "retrieval_defaults.attention.whole"),
        ({"encoder.min": 3}, "min 3 is more than max 2"),
        ({"ingress.target_ongoing_requests": 200}, "nothing would ever scale up"),
        ({"decoder.rows": "${nothing}"}, "nothing"),
        ({"decoder.rows": "["}, "config.yaml"),
        ({"decoder.rows": "{"}, "config.yaml"),
        ({"name.first": "a"}, "name"),
        ({"decoder": "fast"}, "decoder"),
        ({"": 1}, "config.yaml"),
        ({"speaking.takes": 9}, "speaking.takes"),
        ({"speaking.voices": "{flite: 1}"}, "speaking.voices"),
        ({"speaking.voices": "{kokoro: 1}"}, "speaking.voices: "),
    ],
)
def test_what_is_wrong_is_named_before_anything_starts(given, named):
    with pytest.raises(ConfigError) as wrong:
        build(given)
    assert named in str(wrong.value)


def test_espeak_alone_speaks_unless_others_are_named():
    assert read({}).speaking.voices == {"espeak": 1}
    assert read({"speaking.voices": "{kokoro: 1}"}).speaking.voices == {"kokoro": 1}


def test_a_path_below_home_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read({"speaking.kokoro": "~/kokoro"}).speaking.kokoro == str(tmp_path / "kokoro")
    assert read({"datastores": "~/kept"}).datastores == tmp_path / "kept"
    assert read({"datastores": "kept"}).datastores == Path.cwd() / "kept"


def test_without_a_home_only_a_path_below_it_is_refused(monkeypatch, tmp_path):
    def unknown(path):
        if str(path).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return path

    monkeypatch.setenv("MMRAG_RUNS", str(tmp_path))
    with monkeypatch.context() as without:
        without.setattr("pathlib.Path.expanduser", unknown)
        with pytest.raises(ConfigError, match=r"datastores.*nobody's home is known"):
            read({"datastores": "~/kept"})
    monkeypatch.delenv("HOME", raising=False)
    assert read({}).datastores.is_relative_to(tmp_path)


def test_an_empty_variable_of_the_environment_is_one_that_is_not_set(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MMRAG_RUNS", "")
    assert read({}).datastores == tmp_path / "runs" / "serve" / "datastores"
