"""What each mode hands the decoder for a batch."""

from dataclasses import replace

import numpy as np
import pytest
import ray.cloudpickle
import torch
from plain_ctc import spelling_of

from cluster.modes import (
    Both,
    CrossAttentionRetrieval,
    DatastoreSpotting,
    DocumentKNN,
    KNNRetrieval,
    NoRetrieval,
    PhraseBoosting,
    PhraseCrossAttention,
    PhrasePrompting,
    PhraseSpotting,
    SubsetKNN,
    open_locally,
    phrase_mode,
    retrieval_mode,
)
from mmrag.config import (
    KNN,
    CrossAttention,
    Index,
    LanguageModel,
    RetrievedAttention,
    Spotting,
)
from mmrag.decoding.boost import START
from mmrag.model.cross_attention import Adapter
from mmrag.model.lm import LM
from mmrag.model.vocabulary import SentencePieces, Vocabulary
from mmrag.recogniser import Recogniser
from mmrag.records import Units, Utterance
from mmrag.retrieval import datastore
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.index import IndexShard, shard_directory
from mmrag.retrieval.segment import Description, Segment, windows_of
from mmrag.speech.tokenized import Tokenized

KNN_SETTINGS = KNN(k=3, weight=0.5, temperature=1)
READ_SETTINGS = RetrievedAttention(k=3, stride=2, whole=4)
WIDTH, DOCUMENTS, TOKENS = 4, 6, 5
MENTIONS = 2
PHRASES = {"maria": 3, "peter pan": 2, "rome": 1, "the lighthouse": 4}
WORDS = ["maria lopez", "peter pan", "the light is on"]
VOCABULARY = Vocabulary(SentencePieces.train(WORDS, 50), units=3)
SHAPE = LanguageModel(width=WIDTH, layers=1, heads=2, kv_heads=2, feed_forward=4, tied=True)
LISTENER = CrossAttention(
    every=1,
    heads=1,
    head_width=WIDTH,
    window=2,
    encoder_layers=1,
    encoder_heads=1,
    encoder_feed_forward=4,
)
DEAF = Recogniser(
    codebook=None,
    lm=LM(SHAPE, VOCABULARY.size),
    vocabulary=VOCABULARY,
    adapter=None,
    identity={},
    calibration=None,
    ngram=None,
    encoder=None,
)
"""Models without an adapter; nobody listens here, so that there is no speech encoder either."""


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


@pytest.fixture(scope="module")
def reader():
    """Models with an adapter."""
    torch.manual_seed(0)
    return replace(DEAF, adapter=Adapter(LISTENER, SHAPE).eval())


@pytest.fixture(scope="module")
def entities(tmp_path_factory):
    """A datastore of PHRASES, each spoken MENTIONS times and so many tokens long.

    The first mention of every phrase stands in one segment, the second in the next.
    """
    path = tmp_path_factory.mktemp("entities")
    datastore.create(path, Description(WIDTH, 2, "l2", "none", {}))
    draw = np.random.default_rng(2)
    lengths = list(PHRASES.values())
    for number in range(MENTIONS):
        segment = Segment(
            keys=draw.standard_normal((sum(lengths), WIDTH)),
            tokens=draw.integers(1, 9, sum(lengths)),
            windows=np.zeros((sum(lengths), 2)),
            positions=np.concatenate([np.arange(length) for length in lengths]),
            utterances=np.repeat(np.arange(len(lengths)), lengths),
            names=[(f"{phrase} {number}", phrase) for phrase in PHRASES],
        )
        datastore.write_segment(path, f"part-{number}", segment)
    datastore.publish(path, [f"part-{number}" for number in range(MENTIONS)])
    return path


def test_alone_the_decoder_is_given_nothing():
    assert NoRetrieval().open(DEAF)(spoken("a")) == {}


def test_a_directory_is_opened_where_the_mode_is_opened(directory):
    given = KNNRetrieval(directory, KNN_SETTINGS).open(DEAF)(spoken("a", "b"))
    retrieval = given["retrieval"]
    assert retrieval.settings == KNN_SETTINGS
    assert retrieval.retriever.datastore.entries == DOCUMENTS * TOKENS


def test_each_utterance_searches_its_own_documents_alone(directory):
    named = {"a": ["d1", "d4"], "b": ["d0"], "c": list(map("d{}".format, range(DOCUMENTS)))}
    guide = DocumentKNN(directory, KNN_SETTINGS, named).open(DEAF)
    everything = Datastore.open(directory)
    queries = np.random.default_rng(1).standard_normal((4, WIDTH)).astype(np.float32)
    batch = spoken("b", "a", "c")
    for one, retrieval in zip(batch, guide(batch)["retrieval"], strict=True):
        found = retrieval.retriever.search(queries, DOCUMENTS * TOKENS)
        entries = found.entries[found.entries >= 0].reshape(len(queries), -1)
        documents = set(everything.document_names(everything.documents[entries[0]]))
        assert documents == set(named[one.utterance.id])
        assert entries.shape[1] == len(documents) * TOKENS


@pytest.mark.parametrize(("entries", "stride", "kept"), [(7, 1, 7), (12, 5, 3), (999, 2, 18)])
def test_some_entries_are_the_first_ones_and_of_each_utterance_every_nth(
    directory, entries, stride, kept
):
    guide = SubsetKNN(directory, KNN_SETTINGS, entries, stride).open(DEAF)
    retriever = guide(spoken("a"))["retrieval"].retriever
    found = retriever.search(np.zeros((1, WIDTH), np.float32), 100).entries[0]
    expected = [e for e in range(min(entries, DOCUMENTS * TOKENS)) if e % TOKENS % stride == 0]
    assert sorted(found[found >= 0]) == expected
    assert len(expected) == kept


def test_phrases_are_boosted_for_the_utterance_they_come_with():
    phrases = {"a": ["maria lopez"], "b": []}
    guide = PhraseBoosting(2.0, phrases).open(DEAF)
    mine, none = guide(spoken("a", "b"))["boosts"]
    first = VOCABULARY.encode("maria lopez")[0]
    bonus = mine.bonus(np.array([START]))[0]
    assert bonus[first] == bonus.max() == 2.0
    assert not none.bonus(np.array([START])).any()


def spelled(text: str) -> Units:
    """A clip in which `text` is heard."""
    letters = spelling_of(text, " abcdefghijklmnopqrstuvwxyz")
    return Units(np.array([1], np.int32), np.array([len(letters)], np.int32), letters)


def test_of_an_utterances_own_phrases_those_are_boosted_that_are_heard_in_it():
    """Whether all utterances have one list, or each its own."""
    said = {"a": "call maria lopez", "b": "call peter pan", "c": "the light is on"}
    batch = [replace(one, units=spelled(said[one.utterance.id])) for one in spoken(*said)]
    listed = ["maria lopez", "peter pan"]
    everybodys, own = dict.fromkeys(said, listed), {"a": listed[:1], "b": listed[:1], "c": []}
    maria, peter = (VOCABULARY.encode(name)[0] for name in listed)
    for phrases, spotted in ((everybodys, [maria, peter, None]), (own, [maria, None, None])):
        guide = PhraseSpotting(Spotting(weight=2.0), phrases).open(DEAF)
        for boost, first in zip(guide(batch)["boosts"], spotted, strict=True):
            assert (boost is None) == (first is None)
            if boost is not None:
                bonus = boost.bonus(np.array([START]))[0]
                assert bonus[first] == bonus.max() == 2.0
                assert not bonus[[one for one in (maria, peter) if one != first]].any()
    with pytest.raises(ValueError, match="a CTC head hears; this model has none"):
        PhraseSpotting(Spotting(), everybodys).open(DEAF)(spoken("a"))


@pytest.fixture
def calls(tmp_path):
    """A datastore of a phrase and a sentence, of which two words surprise."""
    datastore.create(tmp_path, Description(WIDTH, 2, "l2", "none", {}))
    said = ("peter pan", "peter pan"), ("call-17", "call maria lopez on the light")
    words = [(n, word) for n, (_, text) in enumerate(said) for word in text.split()]
    pieces = [(n, word, piece) for n, word in words for piece in VOCABULARY.encode(word)]
    pieces.append((1, "", VOCABULARY.eos))
    numbers, told, tokens = zip(*pieces, strict=True)
    segment = Segment(
        keys=np.zeros((len(tokens), WIDTH)),
        tokens=np.array(tokens),
        windows=windows_of(np.array(tokens), 2),
        positions=np.arange(len(tokens)),
        utterances=np.array(numbers),
        names=[(f"u{number}", document) for number, (document, _) in enumerate(said)],
        surprisals=np.isin(told, ["maria", "lopez"]) * 20.0,
    )
    datastore.write_segment(tmp_path, "only", segment)
    datastore.publish(tmp_path, ["only"])
    return tmp_path


def test_of_a_datastores_phrases_and_terms_those_are_boosted_that_are_heard(calls):
    said = {"a": "call maria lopez", "b": "call peter pan", "c": "the light is on"}
    batch = [replace(one, units=spelled(said[one.utterance.id])) for one in spoken(*said)]
    guide = DatastoreSpotting(calls, Spotting(weight=2.0)).open(DEAF)
    *heard, nothing = guide(batch)["boosts"]
    maria, peter = (VOCABULARY.encode(name)[0] for name in ("maria", "peter"))
    for boost, first, other in zip(heard, (maria, peter), (peter, maria), strict=True):
        bonus = boost.bonus(np.array([START]))[0]
        assert bonus[first] == bonus.max() == 2.0 and not bonus[other]
    assert nothing is None
    with pytest.raises(ValueError, match="a CTC head hears; this model has none"):
        guide(spoken("a"))


def test_a_datastore_without_phrases_and_terms_spots_nothing(directory):
    batch = [replace(one, units=spelled("call maria lopez")) for one in spoken("a", "b")]
    assert DatastoreSpotting(directory, Spotting()).open(DEAF)(batch) == {"boosts": [None, None]}


def test_phrases_stand_in_the_prompt_of_their_utterance():
    phrases = {"a": ["maria lopez", "peter pan"], "b": []}
    contexts = PhrasePrompting(phrases).open(DEAF)(spoken("a", "b"))["contexts"]
    assert [VOCABULARY.decode(ids) for ids in contexts] == ["maria lopez peter pan", ""]


def test_every_row_reads_what_a_search_of_one_datastore_brings(directory, reader):
    one, other = CrossAttentionRetrieval(directory, READ_SETTINGS).open(reader)(spoken("a", "b"))[
        "attention_sources"
    ]
    assert one is other  # windows that one clip found are encoded for the other
    assert one.settings == READ_SETTINGS
    assert not one.whole
    assert one.retriever.datastore.entries == DOCUMENTS * TOKENS
    assert one.cache.source is one.retriever


def test_a_retriever_that_is_open_is_used_as_it_is(directory, reader):
    retriever = open_locally(directory)
    [reading] = CrossAttentionRetrieval(retriever, READ_SETTINGS).open(reader)(spoken("a"))[
        "attention_sources"
    ]
    assert reading.retriever is retriever


def test_reading_takes_models_with_an_adapter(directory, entities):
    for mode in (
        CrossAttentionRetrieval(directory, READ_SETTINGS),
        PhraseCrossAttention(entities, READ_SETTINGS, {"a": ["rome"]}, mentions=1),
        retrieval_mode(directory, KNN_SETTINGS, READ_SETTINGS),
    ):
        with pytest.raises(ValueError, match="no cross-attention adapter"):
            mode.open(DEAF)


def middles(entities, phrases, mentions):
    """By hand: the entry in the middle of each of the first mentions of each phrase."""
    first = dict(zip(PHRASES, np.cumsum([0, *PHRASES.values()]).tolist(), strict=False))
    total = sum(PHRASES.values())
    return [
        total * number + first[phrase] + PHRASES[phrase] // 2
        for phrase in phrases
        for number in range(mentions)
    ]


@pytest.mark.parametrize("mentions", [1, 2])
def test_a_short_list_is_read_whole_whatever_is_asked(entities, reader, mentions):
    phrases = {"a": ["the lighthouse", "rome"], "b": [], "c": ["maria"]}
    mode = PhraseCrossAttention(entities, READ_SETTINGS, phrases, mentions)
    batch = spoken("c", "a", "b")
    for one, reading in zip(batch, mode.open(reader)(batch)["attention_sources"], strict=True):
        listed = phrases[one.utterance.id]
        assert reading.entries.tolist() == middles(entities, listed, mentions)
        assert reading.whole


def test_a_long_list_is_searched_and_nothing_but_that_list(entities, reader):
    phrases = {"a": ["rome", "maria", "peter pan"], "b": ["rome"]}
    everything = Datastore.open(entities)
    mode = PhraseCrossAttention(entities, READ_SETTINGS, phrases, MENTIONS)
    long, short = mode.open(reader)(spoken("a", "b"))["attention_sources"]
    assert len(long.entries) > READ_SETTINGS.whole >= len(short.entries)
    assert short.whole and not long.whole
    queries = np.random.default_rng(3).standard_normal((5, WIDTH)).astype(np.float32)
    names = everything.document_names(everything.documents)
    listed = np.array([entry for entry, name in enumerate(names) if name in phrases["a"]])
    apart = ((queries[:, None] - everything.keys_of(listed)) ** 2).sum(2)
    found = long.retriever.search(queries, len(listed) + 7)
    assert np.array_equal(found.entries[:, : len(listed)], listed[apart.argsort(1)])
    assert (found.entries[:, len(listed) :] == -1).all()


def test_a_list_is_long_from_one_window_more_than_are_read_whole(entities, reader):
    phrases = {"a": ["rome", "maria", "peter pan"]}
    for whole in (5, 6):
        settings = READ_SETTINGS.model_copy(update={"whole": whole})
        mode = PhraseCrossAttention(entities, settings, phrases, MENTIONS)
        [reading] = mode.open(reader)(spoken("a"))["attention_sources"]
        assert len(reading.entries) == 6
        assert reading.whole == (whole == 6)


def test_a_window_that_stands_in_many_lists_is_encoded_once(entities, reader):
    phrases = {"a": ["rome"], "b": ["rome", "maria", "peter pan"]}
    mode = PhraseCrossAttention(entities, READ_SETTINGS, phrases, MENTIONS)
    guide = mode.open(reader)
    caches = [
        reading.cache
        for names in ("ab", "ba")
        for reading in guide(spoken(*names))["attention_sources"]
    ]
    assert all(cache is caches[0] for cache in caches)


def test_a_phrase_that_the_datastore_does_not_know_is_not_read(entities, reader):
    phrases = {"a": ["atlantis", "rome"]}
    mode = PhraseCrossAttention(entities, READ_SETTINGS, phrases, mentions=1)
    [reading] = mode.open(reader)(spoken("a"))["attention_sources"]
    assert reading.entries.tolist() == middles(entities, ["rome"], 1)


def test_together_hands_over_what_each_of_them_would(directory, reader):
    ways = (
        CrossAttentionRetrieval(directory, READ_SETTINGS),
        PhraseBoosting(1.0, {"a": ["maria lopez"]}),
    )
    batch = spoken("a")
    given = Both(ways).open(reader)(batch)
    alone = [way.open(reader)(batch) for way in ways]
    assert given.keys() == {"attention_sources", "boosts"} == alone[0].keys() | alone[1].keys()
    assert given["attention_sources"][0].settings == READ_SETTINGS
    assert np.array_equal(
        given["boosts"][0].bonus(np.array([START])), alone[1]["boosts"][0].bonus(np.array([START]))
    )


def test_what_is_given_says_whether_neighbours_vote_or_are_read_or_both(directory):
    votes, reads = (
        KNNRetrieval(directory, KNN_SETTINGS),
        CrossAttentionRetrieval(directory, READ_SETTINGS),
    )
    assert retrieval_mode(directory, KNN_SETTINGS, None) == votes
    assert retrieval_mode(directory, None, READ_SETTINGS) == reads
    assert retrieval_mode(directory, KNN_SETTINGS, READ_SETTINGS) == Both((votes, reads))


def test_a_list_may_be_searched_or_read_or_both_by_the_utterance_it_comes_with(directory):
    lists = {"u": ["maria"]}
    votes = DocumentKNN(directory, KNN_SETTINGS, lists)
    read = PhraseCrossAttention(directory, READ_SETTINGS, lists, MENTIONS)
    assert phrase_mode(directory, KNN_SETTINGS, None, lists, MENTIONS) == votes
    assert phrase_mode(directory, None, READ_SETTINGS, lists, MENTIONS) == read
    both = phrase_mode(directory, KNN_SETTINGS, READ_SETTINGS, lists, MENTIONS)
    assert both == Both((votes, read))


def test_neighbours_that_vote_and_are_read_come_from_one_datastore(directory, reader):
    given = retrieval_mode(directory, KNN_SETTINGS, READ_SETTINGS).open(reader)(spoken("a", "b"))
    assert given.keys() == {"retrieval", "attention_sources"}
    assert given["retrieval"].settings == KNN_SETTINGS
    assert [reading.settings for reading in given["attention_sources"]] == [READ_SETTINGS] * 2
    asked = [given["retrieval"].retriever, given["attention_sources"][0].retriever]
    assert {one.datastore.directory for one in asked} == {directory}


def test_every_mode_travels_to_a_worker(directory):
    named = {"a": ["d1"]}
    for mode in (
        NoRetrieval(),
        KNNRetrieval(directory, KNN_SETTINGS),
        DocumentKNN(directory, KNN_SETTINGS, named),
        SubsetKNN(directory, KNN_SETTINGS, 3),
        CrossAttentionRetrieval(directory, READ_SETTINGS),
        PhraseCrossAttention(directory, READ_SETTINGS, named, mentions=2),
        retrieval_mode(directory, KNN_SETTINGS, READ_SETTINGS),
        PhraseBoosting(1.0, named),
        PhraseSpotting(Spotting(), named),
        DatastoreSpotting(directory, Spotting()),
        PhrasePrompting(named),
    ):
        assert ray.cloudpickle.loads(ray.cloudpickle.dumps(mode)) == mode
