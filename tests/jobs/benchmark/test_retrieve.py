"""The benchmark of searching and writing a datastore, small."""

import json
import sys

import numpy as np
import pytest

from jobs.benchmark import __main__, keys, retrieve
from jobs.benchmark.keys import SyntheticKeys
from jobs.benchmark.opened import Opening, measured
from jobs.benchmark.retrieve import TARGETS, Sizes
from mmrag import shipped
from mmrag.retrieval import sizing
from mmrag.retrieval.datastore import Datastore

SMALL = Sizes(growth=(1500, 4000), searches=5, add_seconds=0.3)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(keys, "SENTENCES", 300)
    monkeypatch.setattr(sizing, "FLAT_ENTRIES", 2000)


@pytest.fixture(scope="module")
def imitation():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "SENTENCES", 300)
        yield SyntheticKeys(shipped.TINY, seed=0)


def test_synthetic_keys_lie_as_near_to_each_other_as_the_models_own(imitation):
    assert imitation.likeness.synthetic == pytest.approx(imitation.likeness.real, rel=0.15)
    drawn = imitation.draw(500, seed=1)
    assert drawn.shape == (500, imitation.width) and np.isfinite(drawn).all()
    np.testing.assert_array_equal(drawn, imitation.draw(500, seed=1))
    assert not np.array_equal(drawn, imitation.draw(500, seed=2))


def test_a_synthetic_datastore_has_the_entries_it_was_asked_for(imitation, tmp_path, monkeypatch):
    monkeypatch.setattr(keys, "SEGMENT", 70)
    imitation.write(tmp_path, 150, seed=0)
    store = Datastore.open(tmp_path)
    assert store.entries == 150 and len(store.segments) == 3
    assert len(store.document_counts()[0]) == 4 + 4 + 1


def test_what_an_opened_shard_costs_is_measured_in_its_own_process(imitation, tmp_path):
    imitation.write(tmp_path, 200, seed=0)
    retrieve._shard(tmp_path, 200, 2)
    found = measured(Opening(str(tmp_path), 1))
    assert found["seconds"] > 0 and found["entries"] == 100
    assert measured(Opening(str(tmp_path), 2))["entries"] == 200


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_everything_is_measured_and_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(retrieve, "QUICK", SMALL)
    monkeypatch.setattr(sys, "argv", ["benchmark", "retrieve", "--quick", "--json"])
    __main__.main()
    results = json.loads(capsys.readouterr().out)
    small, large = results["growth"]
    assert small["why"].startswith("flat") and large["why"].startswith("ivfpq")
    assert small["recall_at_16"] == 1 and large["recall_at_16"] > 0.9
    assert large["codes_scanned"] <= large["entries"] and large["keys_read"] >= 16
    assert set(TARGETS) <= set(results) and results["search_p99_while_compacting"] > 0
    retrieve.show(results)
    printed = capsys.readouterr().out
    assert "4,000" in printed and all(target.title[:20] in printed for target in TARGETS.values())


def test_the_largest_datastore_may_be_chosen(monkeypatch):
    asked = []
    monkeypatch.setattr(retrieve, "measure", lambda directory, sizes: asked.append(sizes) or {})
    for arguments in (["--entries", "500000"], ["--quick"]):
        monkeypatch.setattr(sys, "argv", ["benchmark", "retrieve", "--json", *arguments])
        __main__.main()
    assert [sizes.growth for sizes in asked] == [(100_000, 316_000, 500_000), (50_000, 200_000)]
