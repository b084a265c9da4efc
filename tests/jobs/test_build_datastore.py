import numpy as np
import pytest

from jobs import build_datastore
from mmrag import artifact, pretrained, tokens
from mmrag.artifact import ArtifactError
from mmrag.config import ConfigError, Experiment
from mmrag.datastore import Datastore
from mmrag.decode import read_states
from mmrag.index import saved_shards
from mmrag.tokens import Tokenized
from mmrag.vocabulary import EOS

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def stores(workspace) -> dict[str, Datastore]:
    return {
        name: Datastore.open(workspace.path / "datastores" / name)
        for name in ("text", "multimodal")
    }


@pytest.fixture(scope="module")
def read(workspace) -> list[Tokenized]:
    return list(tokens.read(workspace.path / "tokens" / "datastore"))


def with_datastore(experiment: Experiment, **changes) -> Experiment:
    settings = experiment.datastore.model_copy(update=changes)
    return experiment.model_copy(update={"datastore": settings})


def test_each_token_of_each_text_is_an_entry_and_so_is_the_end(workspace, stores, read):
    _, vocabulary = pretrained.load(workspace.path / "lm")
    expected = [t for one in read for t in (*vocabulary.encode(one.utterance.text), EOS)]
    names = [one.utterance.id for one in read for _ in (*vocabulary.encode(one.utterance.text), 0)]
    for store in stores.values():
        assert store.tokens.tolist() == expected
        assert [store.utterance_name(entry) for entry in range(store.entries)] == names


@pytest.mark.parametrize(("name", "heard"), [("text", False), ("multimodal", True)])
def test_keys_made_in_parts_and_batches_equal_those_of_one_utterance(
    workspace, stores, read, name, heard
):
    lm, vocabulary = pretrained.load(workspace.path / "lm")
    assert len(stores[name].segments) > 1
    start = 0
    for one in read:
        text = vocabulary.encode(one.utterance.text)
        speech = vocabulary.encode_units(one.units) if heard else None
        keys, *_ = read_states(lm, vocabulary, [text], [speech], logits=False)
        stored = stores[name].keys(start, start + len(keys))
        assert np.allclose(stored, keys.numpy(), atol=5e-3), one.utterance.id
        start += len(keys)
    assert start == stores[name].entries


def test_keys_over_speech_are_not_those_over_text(stores):
    keys = [store.keys(0, store.entries) for store in stores.values()]
    assert not np.allclose(*keys, atol=5e-2)


def test_a_datastore_says_what_keyed_it_and_how_it_is_sharded(workspace, stores):
    lm = artifact.load(workspace.path / "lm", "lm")
    codebook = artifact.load(workspace.path / "codebook", "codebook")
    for name, store in stores.items():
        identity = {"lm": lm.fingerprint, "codebook": codebook.fingerprint}
        assert store.description.identity == identity
        store.require(identity)
        assert store.description.audio == {"text": "none", "multimodal": "paired"}[name]
        shards = saved_shards(store.directory)
        assert len(shards) == workspace.experiment.datastore.index.shards
        made = artifact.load(store.directory, "datastore")
        assert made.summary["entries"] == store.entries
        assert made.summary["shards"] == len(shards)


def test_a_file_of_lines_becomes_a_datastore_keyed_by_synthetic_speech(borrow, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("call bhavika ruto\n\nport darnby is closed\n")
    experiment = with_datastore(
        borrow("hubert", "codebook", "lm"), name="names", source=str(names), audio="spoken"
    )
    made = build_datastore.run(experiment)
    assert made.summary["utterances"] == 2
    store = Datastore.open(made.path)
    lm, vocabulary = pretrained.load(experiment.workspace / "lm")
    texts = [vocabulary.encode(line) for line in ("call bhavika ruto", "port darnby is closed")]
    assert store.tokens.tolist() == [*texts[0], EOS, *texts[1], EOS]
    unheard, *_ = read_states(lm, vocabulary, texts, [None, None], logits=False)
    assert not np.allclose(store.keys(0, store.entries), unheard.numpy(), atol=5e-2)
    assert store.utterance_name(store.entries - 1) == "names.txt:3"


def test_text_has_no_speech_to_pair_with(borrow, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("call bhavika ruto\n")
    experiment = with_datastore(borrow("codebook", "lm"), source=str(names), audio="paired")
    with pytest.raises(ConfigError, match=r"names\.txt is text: datastore\.audio must be"):
        build_datastore.run(experiment)


def test_a_source_that_is_not_there_is_named(borrow, tmp_path):
    experiment = borrow("codebook", "lm")
    for audio in ("paired", "none"):
        missing = with_datastore(experiment, source=str(tmp_path / "no.txt"), audio=audio)
        with pytest.raises(ArtifactError, match=r"no such file or directory: .*no\.txt"):
            build_datastore.run(missing)
