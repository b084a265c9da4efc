"""Points in which the terms of a datastore are spotted; no model, no cluster."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.modes import DatastoreSpotting, PhraseSpotting
from jobs.reproduce.experiments import TASKS
from jobs.reproduce.lab import Lab, TunedDatastore
from jobs.reproduce.run import SPOTS
from mmrag.config import KNN, Spotting
from mmrag.records import Utterance
from mmrag.speech.tokenized import Tokenized

pytest.importorskip("faker")

VOTES = KNN(k=4, weight=0.5, temperature=1.0)
SPOTTING = Spotting(weight=3.0)
NAMES = ("anna smith", "bob lee")


def made(name, entries):
    return SimpleNamespace(path=Path(name), summary={"entries": entries})


@pytest.fixture
def lab(tmp_path):
    """A lab of clips that come with letters, whose datastores are names."""
    for split in ("datastore", "dev", "test", "adapter"):
        row = {"utterance": f"{split}-0", "text": "call anna smith", "entities": list(NAMES)}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    lab = object.__new__(Lab)
    lab.settings = SimpleNamespace(utterances=9, phrases=(2,))
    lab.experiment = SimpleNamespace(spotting=SPOTTING, seed=0)
    lab.corpus, lab.attention, lab.spells = SimpleNamespace(path=tmp_path), None, True
    for number, name in enumerate(("text", "multimodal", "spoken_text"), start=1):
        setattr(lab, name, TunedDatastore(made(name, number), VOTES, None, None, 1.0))
    lab.decoy = made("decoy", 9)
    said = Tokenized(Utterance("u0", "call anna smith", entities=NAMES[:1]), None)
    lab.spoken = lambda split, domain, limit: [said]
    return lab


def spotted(lab, task):
    """Name -> how, of the points in which something is spotted."""
    _, _, points = TASKS[task](lab)
    assert len({point.name for point in points}) == len(points)
    return {point.name: point.how for point in points if point.mode == "spotting"}


def test_the_terms_of_a_datastore_are_spotted_where_somebody_spells(lab):
    [point] = lab.terms(made("some", 7), "multimodal")
    assert (point.mode, point.datastore, point.entries, point.phrases, point.lists) == (
        *("spotting", "multimodal", 7),
        *(None, None),
    )
    assert point.how == DatastoreSpotting(Path("some"), SPOTTING)
    lab.spells = False
    assert lab.terms(made("some", 7), "multimodal") == []


def test_terms_of_each_datastore_of_the_domain_are_spotted_and_the_list_of_its_names(lab):
    listed = {"u0": list(NAMES)}
    assert spotted(lab, "domain") == {
        "spotting multimodal 2": DatastoreSpotting(Path("multimodal"), SPOTTING),
        "spotting spoken 3": DatastoreSpotting(Path("spoken_text"), SPOTTING),
        "spotting 2": PhraseSpotting(SPOTTING, listed),
    }
    lab.spells = False
    assert spotted(lab, "domain") == {}


def test_terms_of_the_wrong_datastore_are_spotted_too(lab):
    expected = {"spotting wrong 9": DatastoreSpotting(Path("decoy"), SPOTTING)}
    assert spotted(lab, "wrong_datastore") == expected


def test_what_is_spotted_is_made_anew_where_the_settings_change():
    assert {"domain", "wrong_datastore"} < set(SPOTS) < set(TASKS)
