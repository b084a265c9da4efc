"""The service begins with the datastores that jobs left elsewhere, and keeps its own changes."""

import pytest
from objects import empty
from small_datastores import DESCRIPTION, fill

from mmrag import artifact
from mmrag.retrieval import datastore
from mmrag.retrieval.datastore import Datastore
from serve.fetched import fetch_datastores
from serve.settings import Settings, read


@pytest.fixture(params=["a bucket", "a directory"])
def source(request, tmp_path):
    root = empty("runs") if request.param == "a bucket" else tmp_path / "runs"
    for name, segments in (("names", 1), ("towns", 2), ("@acme/names", 1)):
        with artifact.create(root / "datastores" / name, "datastore", {}, {}) as draft:
            datastore.create(draft.path, DESCRIPTION)
            fill(draft.path, segments)
    return root / "datastores"


@pytest.fixture
def settings(source, tmp_path) -> Settings:
    return read({"datastores": str(tmp_path / "served"), "datastores_from": str(source)})


def test_each_is_copied_once_and_may_then_be_changed(settings):
    assert fetch_datastores(settings) == ["@acme/names", "names", "towns"]
    served = Datastore.open(settings.datastores / "names")
    entries = served.entries
    fill(served.directory, 1, first=7)
    assert fetch_datastores(settings) == []
    assert Datastore.open(settings.datastores / "names").entries == 2 * entries


def test_without_a_source_there_is_nothing_to_copy(settings):
    assert fetch_datastores(settings.model_copy(update={"datastores_from": None})) == []
