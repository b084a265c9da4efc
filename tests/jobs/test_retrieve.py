"""What a search finds for every token of a split, before an adapter trains on it."""

import numpy as np
import pytest

from jobs import retrieve
from mmrag import artifact
from mmrag.artifact import ArtifactError
from mmrag.config import ConfigError
from mmrag.model import pretrained
from mmrag.model.states import read_states
from mmrag.retrieval.contexts import read_neighbours
from mmrag.retrieval.datastore import Datastore
from mmrag.speech import tokenized
from mmrag.speech.tokenized import Tokenized

pytestmark = pytest.mark.ray

STORES = ["multimodal", "wrong"]


@pytest.fixture(scope="module")
def spoken(adapted) -> list[Tokenized]:
    split = adapted.experiment.adapter.contexts.split
    return list(tokenized.read(adapted.path / "tokens" / split))


@pytest.fixture(scope="module")
def queries(adapted, spoken) -> dict[str, np.ndarray]:
    """Utterance -> the state before each of its tokens, read by itself."""
    lm, vocabulary = pretrained.load(adapted.path / "lm")
    states = {}
    for one in spoken:
        text = vocabulary.encode(one.utterance.text)
        speech = vocabulary.encode_units(one.units)
        keys, *_ = read_states(lm, vocabulary, [text], [speech], logits=False)
        states[one.utterance.id] = keys.numpy()
    return states


@pytest.mark.parametrize("name", STORES)
def test_every_token_of_every_utterance_has_neighbours(adapted, spoken, queries, name):
    found = read_neighbours(adapted.path / "neighbours" / name)
    assert set(found) == {one.utterance.id for one in spoken}
    made = artifact.load(adapted.path / "neighbours" / name, "neighbours")
    assert made.summary["utterances"] == len(spoken) > 1
    for utterance, entries in found.items():
        assert entries.shape == (len(queries[utterance]), adapted.experiment.attention.k)
        assert (entries >= 0).all()


@pytest.mark.parametrize("name", STORES)
def test_neighbours_are_the_nearest_entries_outside_the_utterances_own_document(
    adapted, spoken, queries, name
):
    store = Datastore.open(adapted.path / "datastores" / name)
    found = read_neighbours(adapted.path / "neighbours" / name)
    keys = store.keys(0, store.entries)
    for one in spoken:
        own = store.document_id(one.utterance.document)
        assert (own is None) == (name == "wrong")
        apart = ((queries[one.utterance.id][:, None] - keys) ** 2).sum(2)
        apart[:, store.documents == own] = np.inf
        entries = found[one.utterance.id]
        nearest = np.sort(apart, axis=1)[:, : entries.shape[1]]
        assert np.allclose(np.take_along_axis(apart, entries, 1), nearest, rtol=1e-3, atol=1e-3)
        assert all(len(set(row)) == len(row) for row in entries.tolist())


def test_an_utterance_would_find_itself_if_it_were_not_left_out(adapted, spoken, queries):
    store = Datastore.open(adapted.path / "datastores" / "multimodal")
    found = read_neighbours(adapted.path / "neighbours" / "multimodal")
    keys = store.keys(0, store.entries)
    itself, tokens = 0, 0
    for one in spoken:
        own = store.document_id(one.utterance.document)
        apart = ((queries[one.utterance.id][:, None] - keys) ** 2).sum(2)
        itself += (store.documents[apart.argmin(1)] == own).sum()
        tokens += len(apart)
        assert own not in store.documents[found[one.utterance.id]]
    assert itself > 0.9 * tokens


def test_an_experiment_without_an_adapter_has_nothing_to_look_up(experiment):
    with pytest.raises(ConfigError, match="no section `adapter`"):
        retrieve.run(experiment)


def test_a_datastore_keyed_by_another_language_model_is_refused(adapted, borrow):
    experiment = borrow("codebook", "tokens", "lm", "datastores", of=adapted)
    file = experiment.workspace / "lm" / "artifact.json"
    true = artifact.load(file.parent, "lm").fingerprint
    file.write_text(file.read_text().replace(true, "0123456789abcdef"))
    with pytest.raises(ArtifactError, match=f"datastores/multimodal was made with lm {true}"):
        retrieve.run(experiment)
