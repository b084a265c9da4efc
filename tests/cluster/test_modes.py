"""What each mode hands the decoder for a batch."""

import numpy as np
import pytest
import ray.cloudpickle

from cluster.modes import (
    BoostingPhrases,
    Plain,
    PromptingPhrases,
    Retrieving,
    RetrievingDocuments,
    RetrievingSome,
)
from mmrag import datastore
from mmrag.config import KNN, Index
from mmrag.datastore import Datastore, Description, Segment
from mmrag.index import IndexShard, shard_directory
from mmrag.records import Units, Utterance
from mmrag.tokens import Tokenized
from mmrag.vocabulary import SentencePieces, Vocabulary

KNN_SETTINGS = KNN(k=3, weight=0.5, temperature=1)
WIDTH, DOCUMENTS, TOKENS = 4, 6, 5
WORDS = ["maria lopez", "peter pan", "the light is on"]
VOCABULARY = Vocabulary(SentencePieces.train(WORDS, 50), units=3)


def spoken(*names: str) -> list[Tokenized]:
    units = Units(np.array([1, 2], np.int32), np.array([3, 4], np.int32))
    return [Tokenized(Utterance(id=name, duration=1.0), units) for name in names]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """DOCUMENTS documents of TOKENS entries each, in two segments and one shard."""
    path = tmp_path_factory.mktemp("datastore")
    datastore.create(path, Description(WIDTH, 2, "l2", "none", {}))
    draw = np.random.default_rng(0)
    half = DOCUMENTS // 2
    for number in range(2):
        segment = Segment(
            keys=draw.standard_normal((half * TOKENS, WIDTH)),
            tokens=draw.integers(0, 9, half * TOKENS),
            windows=np.zeros((half * TOKENS, 2)),
            positions=np.tile(np.arange(TOKENS), half),
            utterances=np.repeat(np.arange(half), TOKENS),
            names=[(f"u{number * half + i}", f"d{number * half + i}") for i in range(half)],
        )
        datastore.write_segment(path, f"part-{number}", segment)
    datastore.publish(path, ["part-0", "part-1"])
    entries = Datastore.open(path)
    settings = Index(kind="flat", shards=1)
    shard = IndexShard.build(entries, 0, entries.entries, settings, seed=0)
    shard.save(shard_directory(path, 0))
    return path


def test_alone_the_decoder_is_given_nothing():
    assert Plain().open(VOCABULARY)(spoken("a")) == {}


def test_a_directory_is_opened_where_the_mode_is_opened(directory):
    given = Retrieving(directory, KNN_SETTINGS).open(VOCABULARY)(spoken("a", "b"))
    retrieval = given["retrieval"]
    assert retrieval.settings == KNN_SETTINGS
    assert retrieval.retriever.datastore.entries == DOCUMENTS * TOKENS


def test_each_utterance_searches_its_own_documents_alone(directory):
    named = {"a": ["d1", "d4"], "b": ["d0"], "c": list(map("d{}".format, range(DOCUMENTS)))}
    guide = RetrievingDocuments(directory, KNN_SETTINGS, named).open(VOCABULARY)
    everything = Datastore.open(directory)
    queries = np.random.default_rng(1).standard_normal((4, WIDTH)).astype(np.float32)
    batch = spoken("b", "a", "c")
    for one, retrieval in zip(batch, guide(batch)["retrieval"], strict=True):
        found = retrieval.retriever.search(queries, DOCUMENTS * TOKENS)
        entries = found.entries[found.entries >= 0].reshape(len(queries), -1)
        documents = {everything.document_name(d) for d in everything.documents[entries[0]]}
        assert documents == set(named[one.utterance.id])
        assert entries.shape[1] == len(documents) * TOKENS


@pytest.mark.parametrize(("entries", "stride", "kept"), [(7, 1, 7), (12, 5, 3), (999, 2, 18)])
def test_some_entries_are_the_first_ones_and_of_each_utterance_every_nth(
    directory, entries, stride, kept
):
    guide = RetrievingSome(directory, KNN_SETTINGS, entries, stride).open(VOCABULARY)
    retriever = guide(spoken("a"))["retrieval"].retriever
    found = retriever.search(np.zeros((1, WIDTH), np.float32), 100).entries[0]
    expected = [e for e in range(min(entries, DOCUMENTS * TOKENS)) if e % TOKENS % stride == 0]
    assert sorted(found[found >= 0]) == expected
    assert len(expected) == kept


def test_phrases_are_boosted_for_the_utterance_they_come_with():
    phrases = {"a": ["maria lopez"], "b": []}
    guide = BoostingPhrases(2.0, phrases).open(VOCABULARY)
    mine, none = guide(spoken("a", "b"))["boosts"]
    first = VOCABULARY.encode("maria lopez")[0]
    bonus = mine.bonus([])
    assert bonus[first] == bonus.max() == 2.0
    assert not none.bonus([]).any()


def test_phrases_stand_in_the_prompt_of_their_utterance():
    phrases = {"a": ["maria lopez", "peter pan"], "b": []}
    contexts = PromptingPhrases(phrases).open(VOCABULARY)(spoken("a", "b"))["contexts"]
    assert [VOCABULARY.decode(ids) for ids in contexts] == ["maria lopez peter pan", ""]


def test_every_mode_travels_to_a_worker(directory):
    named = {"a": ["d1"]}
    for mode in (
        Plain(),
        Retrieving(directory, KNN_SETTINGS),
        RetrievingDocuments(directory, KNN_SETTINGS, named),
        RetrievingSome(directory, KNN_SETTINGS, 3),
        BoostingPhrases(1.0, named),
        PromptingPhrases(named),
    ):
        assert ray.cloudpickle.loads(ray.cloudpickle.dumps(mode)) == mode
