import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrag.config import Index
from mmrag.records import Neighbours
from mmrag.retrieval import gpu, sizing
from mmrag.retrieval.datastore import Datastore, create, delete, publish, write_segment
from mmrag.retrieval.index import (
    IndexShard,
    build_again,
    save_index,
    saved_shards,
    shard_directory,
    shard_ranges,
)
from mmrag.retrieval.ivf import IVF
from mmrag.retrieval.retrievers import LocalRetriever, SubsetRetriever
from mmrag.retrieval.segment import DatastoreError, Description, Segment, distances, prepare

FLAT = Index(kind="flat", shards=1)
IVFPQ = Index(kind="ivfpq", shards=1, lists=8, code_bytes=4, probes=8, rerank=8)
IVFSQ = Index(kind="ivfsq", shards=1, lists=8, scalar_bits=8, probes=8, rerank=8)
KINDS = {
    "flat": FLAT,
    "ivfpq": IVFPQ,
    "ivfsq": IVFSQ,
    "ivfsq of few bits": IVFSQ.model_copy(update={"scalar_bits": 4, "residual": False}),
    "with longer codes": IVFPQ.model_copy(update={"scalar_bits": 8}),
    "with short longer codes": IVFPQ.model_copy(update={"scalar_bits": 4, "refine": 300}),
    "fast-scan": IVFPQ.model_copy(update={"fast_scan": True}),
    "fast-scan with longer codes": IVFPQ.model_copy(update={"fast_scan": True, "scalar_bits": 6}),
    "gpu": IVFPQ.model_copy(update={"gpu": True}),
    "gpu, scalar codes": IVFSQ.model_copy(update={"gpu": True}),
    "gpu with longer codes": IVFPQ.model_copy(update={"gpu": True, "scalar_bits": 8}),
}
METRICS = ["l2", "ip", "cosine"]
EVERYTHING = {"rerank": 300, "refine": 300}


@pytest.fixture(params=KINDS, ids=list(KINDS))
def index(request, monkeypatch):
    """Settings of each kind; what a GPU would hold is a copy in memory."""
    if "gpu" in request.param:
        monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
        monkeypatch.setattr(gpu, "to_gpu", faiss.clone_index)
        monkeypatch.setattr(gpu, "to_cpu", faiss.clone_index)
    return KINDS[request.param]


def append(directory, name, keys, documents):
    write_segment(
        directory,
        name,
        Segment(
            keys=keys,
            tokens=100 + np.arange(len(keys)),
            windows=np.arange(2 * len(keys)).reshape(-1, 2),
            positions=np.zeros(len(keys)),
            utterances=np.arange(len(keys)),
            names=[(f"{name}-{row}", f"d{document}") for row, document in enumerate(documents)],
        ),
    )
    publish(directory, [name])


def make(directory, keys, metric="l2", documents=None):
    identity = {"lm": "f00d"}
    create(directory, Description(keys.shape[1], 2, metric, "none", identity))
    documents = np.arange(len(keys)) % 5 if documents is None else documents
    half = len(keys) // 2
    append(directory, "one", keys[:half], documents[:half])
    append(directory, "two", keys[half:], documents[half:])
    return Datastore.open(directory)


def random_keys(rows, width=8, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


def brute_force(datastore, queries, k, exclude_documents=None, among=None):
    """The slow twin: every distance, every entry (or those `among`), sorted in plain Python."""
    metric = datastore.description.metric
    found = Neighbours.none(len(queries), k)
    keys = datastore.keys(0, datastore.entries)
    deleted, documents = set(datastore.deleted.tolist()), np.asarray(datastore.documents)
    tokens = np.asarray(datastore.tokens)
    for row, query in enumerate(prepare(queries, metric)):
        far = distances(np.broadcast_to(query, keys.shape), keys, metric)
        excluded = -1 if exclude_documents is None else exclude_documents[row]
        allowed = [
            (far[entry], entry)
            for entry in (range(datastore.entries) if among is None else set(among.tolist()))
            if entry not in deleted and documents[entry] != excluded
        ]
        for column, (distance, entry) in enumerate(sorted(allowed)[:k]):
            found.distances[row, column] = distance
            found.entries[row, column] = entry
            found.tokens[row, column] = tokens[entry]
            found.documents[row, column] = documents[entry]
    return found


def assert_same(got, expected):
    np.testing.assert_array_equal(got.entries, expected.entries)
    np.testing.assert_array_equal(got.distances, expected.distances)
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_array_equal(got.documents, expected.documents)
    assert got.distances.dtype == np.float32
    assert got.entries.dtype == np.int64


def flat(datastore, shards=1):
    return LocalRetriever.build(datastore, Index(kind="flat", shards=shards), seed=0)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    entries=st.integers(0, 60),
    distinct=st.integers(1, 60),
    shards=st.integers(1, 6),
    k=st.integers(1, 12),
    metric=st.sampled_from(METRICS),
    gone=st.sampled_from([0.0, 0.2, 0.9, 1.0]),
    exclude=st.booleans(),
)
def test_sharded_search_equals_one_flat_index_and_brute_force(
    tmp_path_factory, seed, entries, distinct, shards, k, metric, gone, exclude
):
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((distinct, 8))[rng.integers(distinct, size=entries)]
    datastore = make(
        tmp_path_factory.mktemp("datastore"), keys, metric, rng.integers(3, size=entries)
    )
    delete(datastore.directory, np.flatnonzero(rng.random(entries) < gone))
    datastore.refresh()
    queries = rng.standard_normal((4, 8)).astype(np.float32)
    if entries:
        queries[0] = keys[0]
    excluded = rng.integers(-1, 3, size=4) if exclude else None
    expected = brute_force(datastore, queries, k, excluded)
    assert_same(flat(datastore).search(queries, k, excluded), expected)
    assert_same(flat(datastore, shards).search(queries, k, excluded), expected)


@pytest.mark.parametrize("metric", METRICS)
def test_rounding_far_from_the_origin_changes_no_neighbour(tmp_path, metric):
    """Norms of 800 and distances below 1: FAISS's own float32 order is noise here."""
    keys = 100 + 0.2 * random_keys(400, 64)
    datastore = make(tmp_path, keys, metric)
    queries = np.repeat(100 + 0.2 * random_keys(10, 64, seed=1), 4, axis=0)
    expected = brute_force(datastore, queries, 5)
    assert_same(flat(datastore).search(queries, 5), expected)
    assert_same(flat(datastore, 3).search(queries, 5), expected)


def test_more_equal_keys_than_were_fetched_come_in_the_order_of_their_ids(tmp_path):
    datastore = make(tmp_path, np.tile(random_keys(1), (500, 1)))
    for shards in (1, 3):
        found = flat(datastore, shards).search(random_keys(3, seed=1), 4)
        np.testing.assert_array_equal(found.entries, [[0, 1, 2, 3]] * 3)


def test_an_excluded_document_is_passed_over_however_much_of_it_is_near(tmp_path, index):
    keys = random_keys(600)
    keys[:300] *= 0.01
    documents = [0] * 300 + [1] * 300
    shard = IndexShard.build(make(tmp_path, keys, documents=documents), 0, 600, index, seed=0)
    found = shard.search(np.zeros((3, 8), np.float32), 5, [0, 1, -1])
    assert (found.documents[0] == 1).all()
    assert (found.documents[1:] == 0).all()
    np.testing.assert_array_equal(found.entries[1], found.entries[2])


@pytest.mark.parametrize("metric", METRICS)
def test_what_visits_and_reranks_everything_is_exact(tmp_path, metric, index):
    datastore = make(tmp_path, random_keys(300), metric)
    queries = random_keys(6, seed=1)
    everything = index.model_copy(update=EVERYTHING)
    shard = IndexShard.build(datastore, 0, 300, everything, seed=0)
    assert_same(shard.search(queries, 7), brute_force(datastore, queries, 7))


def test_distances_are_exact_and_most_neighbours_are_found(tmp_path, index):
    datastore = make(tmp_path, random_keys(600))
    queries = random_keys(20, seed=1)
    found = IndexShard.build(datastore, 0, 600, index, seed=0).search(queries, 5)
    expected = brute_force(datastore, queries, 5)
    recall = np.mean(
        [len(set(a) & set(b)) / 5 for a, b in zip(found.entries, expected.entries, strict=True)]
    )
    assert recall > 0.9
    pairs = np.repeat(queries, 5, axis=0), datastore.keys_of(found.entries.ravel())
    np.testing.assert_array_equal(found.distances.ravel(), distances(*pairs, "l2"))
    assert (np.diff(found.distances) >= 0).all()


def test_a_saved_shard_answers_as_before(tmp_path, index):
    datastore = make(tmp_path / "datastore", random_keys(600))
    shard = IndexShard.build(datastore, 100, 600, index, seed=0)
    shard.save(tmp_path / "shard")
    again = IndexShard.load(tmp_path / "shard", Datastore.open(datastore.directory))
    queries = random_keys(4, seed=1)
    assert (again.start, again.stop) == (100, 600)
    assert_same(again.search(queries, 6), shard.search(queries, 6))
    assert shard.search(queries, 6).entries.min() >= 100


def test_saved_shards_are_found_in_order_and_saving_again_replaces_them(tmp_path):
    datastore = make(tmp_path, random_keys(36))
    assert saved_shards(tmp_path) == []
    built = flat(datastore, shards=12)
    for number in reversed(range(12)):
        built.shards[number].save(shard_directory(tmp_path, number))
    built.shards[0].save(shard_directory(tmp_path, 0))
    again = LocalRetriever.load(saved_shards(tmp_path), datastore)
    assert [shard.start for shard in again.shards] == list(range(0, 36, 3))
    assert_same(again.search(random_keys(2, seed=1), 4), built.search(random_keys(2, seed=1), 4))


def test_a_shard_whose_saving_was_cut_short_does_not_count_as_saved(tmp_path, monkeypatch):
    shard = IndexShard.build(make(tmp_path, random_keys(6)), 0, 6, FLAT, seed=0)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mmrag.retrieval.index.write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            shard.save(shard_directory(tmp_path, 0))
    assert saved_shards(tmp_path) == []
    shard.save(shard_directory(tmp_path, 0))
    assert [path.name for path in (tmp_path / "index").iterdir()] == ["shard-00000"]


def test_an_added_entry_is_found_and_a_deleted_one_never_again(tmp_path, index):
    datastore = make(tmp_path / "datastore", random_keys(300))
    retriever = LocalRetriever(datastore, [IndexShard.build(datastore, 0, 300, index, seed=0)])
    shard = retriever.shards[0]
    shard.save(tmp_path / "shard")
    newcomer = random_keys(1, seed=9)
    append(datastore.directory, "three", newcomer, [0])
    shard.add(300, 301)
    assert retriever.search(newcomer, 1).entries.tolist() == [[300]]
    np.testing.assert_array_equal(retriever.windows(np.array([300, -1])), [[0, 1], [0, 0]])
    reloaded = LocalRetriever.load([tmp_path / "shard"], Datastore.open(datastore.directory))
    assert reloaded.search(newcomer, 1).entries.tolist() == [[300]]
    shard.delete([300, 5000])
    assert 300 not in retriever.search(newcomer, 301).entries
    delete(datastore.directory, [300])
    reloaded = LocalRetriever.load([tmp_path / "shard"], Datastore.open(datastore.directory))
    assert 300 not in reloaded.search(newcomer, 301).entries


def test_deleted_entries_are_numbered_and_not_found_by_an_index_built_after(tmp_path, index):
    datastore = make(tmp_path, random_keys(600))
    gone = np.arange(0, 600, 7)
    delete(tmp_path, gone)
    datastore.refresh()
    everything = index.model_copy(update={"rerank": 600, "refine": 600})
    shard = IndexShard.build(datastore, 0, 600, everything, seed=0)
    shard.save(tmp_path / "shard")
    queries = random_keys(5, seed=1)
    expected = brute_force(datastore, queries, 9)
    for one in (shard, IndexShard.load(tmp_path / "shard", datastore)):
        assert_same(one.search(queries, 9), expected)
        assert (one.search(queries, 600).entries >= 0).sum(1).max() == 600 - len(gone)


@pytest.mark.parametrize("entries", [0, 3])
def test_an_empty_batch_and_too_few_entries_give_missing_neighbours(tmp_path, entries):
    retriever = flat(make(tmp_path, random_keys(entries)), shards=2)
    assert retriever.search(np.zeros((0, 8), np.float32), 4).entries.shape == (0, 4)
    found = retriever.search(random_keys(2), 4)
    assert (found.entries[:, entries:] == -1).all()
    assert (found.distances[:, entries:] == np.inf).all()
    assert (found.documents[:, entries:] == -1).all()
    assert (found.entries[:, :entries] >= 0).all()


def test_an_empty_ivfpq_shard_finds_nothing_until_it_is_given_entries(tmp_path):
    datastore = make(tmp_path, random_keys(300))
    shard = IndexShard.build(datastore, 0, 0, IVFPQ, seed=0)
    assert (shard.search(random_keys(2), 3).entries == -1).all()
    shard.add(0, 300)
    assert (shard.search(random_keys(2), 3).entries >= 0).all()


def test_scalar_codes_have_bits(tmp_path):
    datastore = make(tmp_path, random_keys(300))
    with pytest.raises(ValueError, match=r"ivfsq needs index\.scalar_bits: 4, 6 or 8 a dimension"):
        IndexShard.build(datastore, 0, 300, IVFSQ.model_copy(update={"scalar_bits": 0}), seed=0)


@pytest.mark.parametrize("settings", [IVFPQ, IVFSQ])
def test_no_search_of_a_mapped_index_starts_threads_to_read_ahead(tmp_path, settings):
    datastore = make(tmp_path, random_keys(300))
    IndexShard.build(datastore, 0, 300, settings, seed=0).save(tmp_path / "shard")
    index = IVF.load(tmp_path / "shard", settings)._saved.index
    assert faiss.downcast_InvertedLists(index.invlists).prefetch_nthread == 0


def test_too_few_keys_to_train_on_names_the_setting(tmp_path):
    datastore = make(tmp_path, random_keys(300))
    many = IVFPQ.model_copy(update={"lists": 301})
    with pytest.raises(ValueError, match=r"index\.lists 301 needs at least 301 keys .* has 300"):
        IndexShard.build(datastore, 0, 300, many, seed=0)
    with pytest.raises(ValueError, match=r"needs at least 256 keys .* has 100"):
        IndexShard.build(datastore, 0, 100, IVFPQ, seed=0)
    odd = IVFPQ.model_copy(update={"code_bytes": 3})
    with pytest.raises(ValueError, match=r"index\.code_bytes 3 does not divide width 8"):
        IndexShard.build(datastore, 0, 300, odd, seed=0)


def clusters(rows, width=8, seed=0):
    """Keys around a hundred centres, as a language model's states lie."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(1).standard_normal((100, width)) * 5
    return centres[generator.integers(100, size=rows)] + generator.standard_normal((rows, width))


@pytest.mark.parametrize("metric", METRICS)
def test_recall_is_the_share_of_the_nearest_of_other_documents_that_is_found(tmp_path, metric):
    datastore = make(tmp_path, clusters(800), metric)
    few = IVFPQ.model_copy(update={"probes": 2, "rerank": 1})
    shard = IndexShard.build(datastore, 100, 700, few, seed=0)
    at = np.linspace(100, 699, 256).astype(np.int64)
    queries, own = datastore.keys_of(at), datastore.documents[at].tolist()
    found = shard.search(queries, 16, own).entries
    expected = brute_force(datastore, queries, 16, own, among=np.arange(100, 700)).entries
    share = np.mean([len(set(a) & set(b)) / 16 for a, b in zip(found, expected, strict=True)])
    assert shard.recall == pytest.approx(share, abs=1e-6) and shard.recall < 0.99
    shard.save(tmp_path / "shard")
    assert IndexShard.load(tmp_path / "shard", datastore).recall == shard.recall


def test_any_of_keys_that_are_equal_will_do(tmp_path):
    datastore = make(tmp_path, np.tile(random_keys(2), (300, 1)))
    assert IndexShard.build(datastore, 0, 600, IVFPQ, seed=0).recall == 1


def test_without_another_document_there_is_no_recall_and_flat_has_none_to_measure(tmp_path):
    datastore = make(tmp_path, random_keys(300), documents=[0] * 300)
    assert IndexShard.build(datastore, 0, 300, IVFPQ, seed=0).recall is None
    assert IndexShard.build(datastore, 0, 300, FLAT, seed=0).recall is None


def test_a_shard_that_finds_too_little_is_not_built(tmp_path):
    datastore = make(tmp_path, random_keys(600))
    poor = IVFPQ.model_copy(update={"probes": 1, "rerank": 1, "min_recall": 0.9})
    with pytest.raises(ValueError, match=r"recall@16 is 0\.\d+ and index\.min_recall 0\.9"):
        IndexShard.build(datastore, 0, 600, poor, seed=0)
    good = poor.model_copy(update={"probes": 8, "rerank": 64})
    assert IndexShard.build(datastore, 0, 600, good, seed=0).recall >= 0.9


def test_auto_sizes_the_index_and_searches_more_until_it_is_good(tmp_path, monkeypatch):
    monkeypatch.setattr(sizing, "FLAT_ENTRIES", 500)
    monkeypatch.setattr(sizing, "SCANNED", 40)
    monkeypatch.setattr(sizing, "RERANKED", 1)
    monkeypatch.setattr(sizing, "GOOD_RECALL", 0.999)
    monkeypatch.setattr(sizing, "LEAST_GAIN", 0)
    auto = Index(kind="auto", shards=1, entry_bytes=10)
    datastore = make(tmp_path, clusters(4000, 16))
    shard = IndexShard.build(datastore, 0, 4000, auto, seed=0)
    assert shard.settings.kind == "ivfpq" and "4,000 keys in 256 lists" in shard.why
    assert shard.settings.code_bytes == 2 and shard.settings.probes > 3
    assert shard.recall >= sizing.GOOD_RECALL or not sizing.wider(shard.settings, 4000)
    shard.save(tmp_path / "shard")
    again = IndexShard.load(tmp_path / "shard", datastore)
    assert (again.settings, again.why) == (shard.settings, shard.why)
    assert_same(again.search(clusters(5, 16, 3), 7), shard.search(clusters(5, 16, 3), 7))
    assert IndexShard.build(datastore, 0, 400, auto, seed=0).settings.kind == "flat"


def test_auto_does_not_pay_for_what_finds_hardly_more(tmp_path, monkeypatch):
    monkeypatch.setattr(sizing, "FLAT_ENTRIES", 500)
    monkeypatch.setattr(sizing, "GOOD_RECALL", 1.1)
    datastore = make(tmp_path, clusters(4000, 16))

    def built(least):
        monkeypatch.setattr(sizing, "LEAST_GAIN", least)
        return IndexShard.build(datastore, 0, 4000, Index(kind="auto", shards=1), seed=0)

    first = sizing.chosen(Index(kind="auto", shards=1), 4000, 16)[0]
    kept, grown = built(0.5), built(-1)
    assert kept.settings == first
    assert sizing.wider(grown.settings, 4000) == [] and grown.recall >= kept.recall


@pytest.mark.parametrize("metric", METRICS)
def test_turned_keys_are_found_by_their_exact_distances(tmp_path, metric):
    datastore = make(tmp_path, clusters(900, 32), metric)
    turned = IVFPQ.model_copy(update={"code_bytes": 2, "turned": True, "rerank": 900})
    shard = IndexShard.build(datastore, 0, 900, turned, seed=0)
    queries = clusters(6, 32, seed=5)
    assert_same(shard.search(queries, 7), brute_force(datastore, queries, 7))
    assert shard.recall == 1
    shard.save(tmp_path / "shard")
    again = IndexShard.load(tmp_path / "shard", datastore)
    assert_same(again.search(queries, 7), shard.search(queries, 7))
    wide = turned.model_copy(update={"code_bytes": 5})
    with pytest.raises(ValueError, match="stand for 40 dimensions, and keys have 32"):
        IndexShard.build(datastore, 0, 900, wide, seed=0)


def test_what_a_saved_index_takes_in_is_found_and_saved_with_it(tmp_path, index):
    datastore = make(tmp_path / "datastore", random_keys(600))
    everything = index.model_copy(update={"rerank": 900, "refine": 900})
    IndexShard.build(datastore, 0, 600, everything, seed=0).save(tmp_path / "shard")
    append(datastore.directory, "three", random_keys(50, seed=7), [9] * 50)
    append(datastore.directory, "four", random_keys(50, seed=8), [9] * 50)
    grown = LocalRetriever.load([tmp_path / "shard"], Datastore.open(datastore.directory))
    queries = random_keys(6, seed=1)
    expected = brute_force(grown.datastore, queries, 7)
    assert_same(grown.search(queries, 7), expected)
    files = sorted((tmp_path / "shard").glob("*.faiss"))
    before = [file.read_bytes() for file in files]
    grown.shards[0].save(tmp_path / "whole")
    assert [file.read_bytes() for file in files] == before
    whole = IndexShard.load(tmp_path / "whole", grown.datastore)
    assert whole.stop == 700
    assert_same(whole.search(queries, 7), expected)


def test_an_index_is_built_again_in_other_shards_beside_the_one_that_is_in_use(tmp_path):
    datastore = make(tmp_path, random_keys(600))
    save_index(tmp_path)
    in_use, queries = LocalRetriever.load(saved_shards(tmp_path), datastore), random_keys(4, seed=1)
    append(tmp_path, "three", random_keys(60, seed=5), [9] * 60)
    delete(tmp_path, [3, 300])
    build_again(tmp_path, FLAT.model_copy(update={"shards": 3}))
    again = LocalRetriever.load(saved_shards(tmp_path), Datastore.open(tmp_path))
    assert [(one.start, one.stop) for one in again.shards] == shard_ranges(660, 3)
    in_use.refresh()
    assert_same(again.search(queries, 9), in_use.search(queries, 9))
    coded = IVFPQ.model_copy(update={"shards": 2, "rerank": 300})
    first = saved_shards(tmp_path)[0].parent
    build_again(tmp_path, coded)
    assert first.exists() and not (tmp_path / "index").exists(), "the one before is in use"
    found = LocalRetriever.load(saved_shards(tmp_path), Datastore.open(tmp_path))
    assert_same(found.search(queries, 9), in_use.search(queries, 9))
    build_again(tmp_path, FLAT)
    assert not first.exists() and len(saved_shards(tmp_path)) == 1


def test_an_index_that_cannot_be_built_leaves_the_one_that_there_is(tmp_path):
    make(tmp_path, random_keys(100))
    save_index(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="needs at least 256 keys"):
        build_again(tmp_path, IVFPQ)
    assert sorted(tmp_path.iterdir()) == before
    assert saved_shards(tmp_path)[0].parent.name == "index"


def test_a_damaged_pointer_to_the_index_is_named(tmp_path):
    make(tmp_path, random_keys(20))
    build_again(tmp_path, FLAT)
    for content in ("{", "{}", "[]"):
        (tmp_path / "index.json").write_text(content)
        with pytest.raises(DatastoreError, match=r"index\.json is damaged"):
            saved_shards(tmp_path)


def test_keys_are_read_as_they_lie_and_each_once(tmp_path, monkeypatch):
    datastore = make(tmp_path, clusters(600))
    shard = IndexShard.build(datastore, 0, 600, IVFPQ, seed=0)
    read, keys_of = [], datastore.keys_of

    def reading(entries):
        read.append(entries)
        return keys_of(entries)

    monkeypatch.setattr(datastore, "keys_of", reading)
    shard.search(np.tile(clusters(1, seed=2), (8, 1)), 4)
    assert len(read) == 1 and len(read[0]) <= 4 * IVFPQ.rerank
    assert (np.diff(read[0]) > 0).all()


def test_longer_codes_choose_whose_keys_are_read(tmp_path, monkeypatch):
    """Of 48 candidates by poor codes, 6 keys are read, and hardly anything is missed."""
    datastore, queries = make(tmp_path, clusters(2000, 16)), clusters(40, 16, seed=5)
    exact = brute_force(datastore, queries, 3).entries
    poor = IVFPQ.model_copy(update={"code_bytes": 2, "rerank": 2, "refine": 16})
    read, keys_of = [], datastore.keys_of
    monkeypatch.setattr(datastore, "keys_of", lambda asked: read.append(asked) or keys_of(asked))

    def found(settings):
        shard = IndexShard.build(datastore, 0, 2000, settings, seed=0)
        read.clear()
        hits = [len(set(a) & set(b)) for a, b in zip(one(shard), exact.tolist(), strict=True)]
        return np.mean(hits) / 3, sum(map(len, read)) / len(queries)

    def one(shard):
        return [shard.search(query[None], 3).entries[0].tolist() for query in queries]

    (many, keys), (few, fewer), (chosen, chosen_keys) = (
        found(poor.model_copy(update=each)) for each in ({"rerank": 16}, {}, {"scalar_bits": 8})
    )
    assert (keys, fewer, chosen_keys) == (48, 6, 6)
    assert few < many - 0.1 and chosen > many - 0.01


def test_a_damaged_file_of_an_index_is_named(tmp_path):
    datastore = make(tmp_path / "datastore", random_keys(600))
    settings = KINDS["with longer codes"]
    for damaged in ("index.faiss", "scalar.faiss"):
        directory = tmp_path / damaged
        IndexShard.build(datastore, 0, 600, settings, seed=0).save(directory)
        file = directory / damaged
        for content in (b"", file.read_bytes()[:200], None):
            file.unlink() if content is None else file.write_bytes(content)
            with pytest.raises(DatastoreError, match="is damaged"):
                IndexShard.load(directory, datastore)


def test_longer_codes_of_another_index_are_refused(tmp_path):
    datastore, settings = make(tmp_path / "data", random_keys(900)), KINDS["with longer codes"]
    IndexShard.build(datastore, 0, 900, settings, seed=0).save(tmp_path / "long")
    IndexShard.build(datastore, 0, 600, settings, seed=0).save(tmp_path / "short")
    (tmp_path / "long" / "scalar.faiss").rename(tmp_path / "short" / "scalar.faiss")
    with pytest.raises(DatastoreError, match="900 and 600 codes"):
        IndexShard.load(tmp_path / "short", datastore)


def test_a_gpu_is_asked_for_where_there_is_one_that_has_such_codes(tmp_path, monkeypatch):
    datastore = make(tmp_path, random_keys(300))
    wanted = IVFPQ.model_copy(update={"gpu": True})
    with pytest.raises(ValueError, match=r"index\.gpu: FAISS finds no GPU here"):
        IndexShard.build(datastore, 0, 300, wanted, seed=0)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    for update, why in (
        ({"fast_scan": True}, r"index\.fast_scan"),
        ({"residual": False}, r"index\.residual"),
        ({"probes": 4000}, r"index\.probes 4000"),
        ({"code_bytes": 5, "turned": True}, "no codes of 5 bytes for 40 dimensions"),
    ):
        with pytest.raises(ValueError, match=why):
            gpu.used(wanted.model_copy(update=update), 40 if "turned" in update else 8)
        assert not gpu.used(IVFPQ.model_copy(update=update), 40 if "turned" in update else 8)
    with pytest.raises(ValueError, match=r"no codes of 6 bits \(index\.scalar_bits\)"):
        gpu.used(IVFSQ.model_copy(update={"gpu": True, "scalar_bits": 6}), 8)
    assert gpu.used(IVFSQ, 8) and gpu.used(IVFPQ, 8)
    assert not gpu.used(IVFPQ.model_copy(update={"gpu": False}), 8)


def test_what_was_built_on_a_gpu_is_searched_by_cores_elsewhere(tmp_path, monkeypatch):
    datastore, queries = make(tmp_path / "data", random_keys(600)), random_keys(4, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(faiss, "get_num_gpus", lambda: 1)
        patch.setattr(gpu, "to_gpu", faiss.clone_index)
        patch.setattr(gpu, "to_cpu", faiss.clone_index)
        shard = IndexShard.build(datastore, 0, 600, KINDS["gpu"], seed=0)
        shard.save(tmp_path / "shard")
    again = IndexShard.load(tmp_path / "shard", datastore)
    assert_same(again.search(queries, 6), shard.search(queries, 6))


@pytest.mark.gpu
@pytest.mark.parametrize("metric", METRICS)
def test_a_real_gpu_finds_what_the_cores_find(tmp_path, metric, monkeypatch):
    """Needs faiss-gpu in the place of faiss-cpu."""
    if not faiss.get_num_gpus():
        pytest.skip("FAISS finds no GPU here")
    datastore, queries = make(tmp_path, clusters(4000, 32), metric), clusters(40, 32, seed=5)
    for update in ({}, {"scalar_bits": 8}, {"turned": True}):
        wanted = IVFPQ.model_copy(update={"gpu": True, "refine": 64, **update})
        shard = IndexShard.build(datastore, 0, 4000, wanted, seed=0)
        shard.save(tmp_path / "shard")
        with monkeypatch.context() as patch:
            patch.setattr(faiss, "get_num_gpus", lambda: 0)
            cores = IndexShard.load(tmp_path / "shard", datastore)
        expected = brute_force(datastore, queries, 8).entries
        for one in (shard, cores):
            found = one.search(queries, 8).entries
            hits = [len(set(a) & set(b)) for a, b in zip(found, expected, strict=True)]
            assert np.mean(hits) / 8 > 0.9


def test_a_gpu_finds_no_more_than_it_can(tmp_path, monkeypatch):
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(gpu, "to_gpu", faiss.clone_index)
    monkeypatch.setattr(gpu, "MOST_FOUND", 40)
    datastore = make(tmp_path, random_keys(600), documents=[0] * 300 + [1] * 300)
    for kind in ("gpu", "gpu with longer codes"):
        shard = IndexShard.build(datastore, 0, 600, KINDS[kind], seed=0)
        found = shard.search(random_keys(3, seed=1), 300, [0, 1, -1])
        assert (found.entries >= 0).sum(1).max() <= 40


def test_half_bytes_that_do_not_divide_the_width_are_refused(tmp_path):
    odd = IVFPQ.model_copy(update={"code_bytes": 8, "fast_scan": True})
    with pytest.raises(ValueError, match="16 codes of half a byte do not divide width 8"):
        IndexShard.build(make(tmp_path, random_keys(300)), 0, 300, odd, seed=0)


def test_a_search_that_cannot_be_meant_is_refused(tmp_path):
    retriever = flat(make(tmp_path, random_keys(10)))
    with pytest.raises(ValueError, match=r"\(2, 9\): the keys have width 8"):
        retriever.search(random_keys(2, 9), 3)
    with pytest.raises(ValueError, match="1 exclusions for 2 queries"):
        retriever.search(random_keys(2), 3, [0])
    with pytest.raises(ValueError, match="0 neighbours"):
        retriever.search(random_keys(2), 0)


def test_a_shard_of_another_datastore_is_refused(tmp_path):
    shard = IndexShard.build(make(tmp_path / "a", random_keys(20)), 0, 20, FLAT, seed=0)
    shard.save(tmp_path / "shard")
    for other in [
        make(tmp_path / "other-width", random_keys(20, 4)),
        make(tmp_path / "other-metric", random_keys(20), "ip"),
        make(tmp_path / "fewer-entries", random_keys(10)),
    ]:
        with pytest.raises(DatastoreError, match=str(other.directory)):
            IndexShard.load(tmp_path / "shard", other)
    with pytest.raises(DatastoreError, match="no index shard"):
        IndexShard.load(tmp_path / "nowhere", shard.datastore)


def test_adding_out_of_order_and_shards_with_gaps_are_refused(tmp_path):
    datastore = make(tmp_path, random_keys(20))
    shard = IndexShard.build(datastore, 0, 10, FLAT, seed=0)
    with pytest.raises(ValueError, match="do not go on from 10"):
        shard.add(12, 20)
    with pytest.raises(ValueError, match="datastore of 20"):
        shard.add(10, 21)
    with pytest.raises(ValueError, match="leave entries out"):
        LocalRetriever(datastore, [shard, IndexShard.build(datastore, 12, 20, FLAT, seed=0)])


@given(st.integers(0, 1000), st.integers(1, 40))
def test_shard_ranges_cover_every_entry_once_and_evenly(entries, shards):
    ranges = shard_ranges(entries, shards)
    assert len(ranges) == shards
    assert [entry for start, stop in ranges for entry in range(start, stop)] == list(range(entries))
    sizes = [stop - start for start, stop in ranges]
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    entries=st.integers(0, 80),
    chosen=st.sampled_from([0.0, 0.3, 1.0]),
    twins=st.integers(1, 8),
    k=st.integers(1, 12),
    metric=st.sampled_from(METRICS),
    gone=st.sampled_from([0.0, 0.3, 1.0]),
    exclude=st.booleans(),
)
def test_a_subset_is_searched_as_by_brute_force(
    tmp_path_factory, seed, entries, chosen, twins, k, metric, gone, exclude
):
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((entries, 8)).repeat(twins, axis=0)[:entries]
    datastore = make(
        tmp_path_factory.mktemp("datastore"), keys, metric, rng.integers(3, size=entries)
    )
    delete(datastore.directory, np.flatnonzero(rng.random(entries) < gone))
    datastore.refresh()
    queries = rng.standard_normal((4, 8)).astype(np.float32)
    if entries:
        queries[0] = keys[0]
    excluded = rng.integers(-1, 3, size=4) if exclude else None
    subset = rng.permutation(np.flatnonzero(rng.random(entries) < chosen))
    retriever = SubsetRetriever(datastore, subset)
    expected = brute_force(datastore, queries, k, excluded, among=subset)
    assert_same(retriever.search(queries, k, excluded), expected)
    doubled = SubsetRetriever(datastore, np.concatenate([subset, subset]))
    assert_same(doubled.search(queries, k, excluded), expected)


@pytest.mark.parametrize("metric", METRICS)
def test_a_subset_of_everything_is_the_whole_datastore(tmp_path, metric):
    datastore = make(tmp_path, random_keys(400), metric)
    whole, queries = SubsetRetriever(datastore, np.arange(400)), random_keys(9, seed=1)
    assert_same(whole.search(queries, 7), flat(datastore, 3).search(queries, 7))
    excluded = [0, 1, 2, 3, 4, -1, 0, 1, 2]
    expected = flat(datastore).search(queries, 7, excluded)
    assert_same(whole.search(queries, 7, excluded), expected)
    np.testing.assert_array_equal(whole.windows(np.array([3, -1])), [[6, 7], [0, 0]])


def test_a_subset_with_many_equal_keys_gives_as_many_and_their_exact_distance(tmp_path):
    """Which of more than SPARE equal ones come is left open."""
    datastore = make(tmp_path, np.tile(random_keys(1), (300, 1)))
    found = SubsetRetriever(datastore, np.arange(100, 300)).search(random_keys(3, seed=1), 4)
    expected = brute_force(datastore, random_keys(3, seed=1), 4)
    np.testing.assert_array_equal(found.distances, expected.distances)
    assert all(len(set(row)) == 4 and min(row) >= 100 for row in found.entries.tolist())
    np.testing.assert_array_equal(found.tokens, datastore.tokens[found.entries])


def test_a_subset_leaves_out_a_whole_document_however_near_it_is(tmp_path):
    keys = random_keys(300)
    keys[:200] *= 0.01
    datastore = make(tmp_path, keys, documents=[0] * 200 + [1] * 100)
    retriever = SubsetRetriever(datastore, np.arange(100, 220))
    found = retriever.search(np.zeros((3, 8), np.float32), 30, [0, 1, -1])
    assert sorted(found.entries[0].tolist()) == [-1] * 10 + list(range(200, 220))
    assert np.isinf(found.distances[0, 20:]).all() and (found.documents[0, 20:] == -1).all()
    assert (found.documents[1:] == 0).all()


@pytest.mark.parametrize("entries", [0, 30])
def test_a_datastore_that_was_just_created_can_be_indexed_searched_and_added_to(tmp_path, entries):
    datastore = make(tmp_path, random_keys(entries))
    save_index(tmp_path)
    save_index(tmp_path)
    assert saved_shards(tmp_path) == [shard_directory(tmp_path, 0)]
    assert not list(tmp_path.glob(".index*"))
    retriever = LocalRetriever.load(saved_shards(tmp_path), datastore)
    queries = random_keys(3, seed=1)
    assert_same(retriever.search(queries, 4), brute_force(datastore, queries, 4))
    assert retriever.entries == entries
    append(tmp_path, "three", random_keys(2, seed=2), [0, 1])
    delete(tmp_path, [entries])
    assert_same(retriever.search(queries, 4), brute_force(datastore, queries, 4))
    retriever.refresh()
    assert retriever.entries == entries + 2
    now = Datastore.open(tmp_path)
    assert_same(retriever.search(queries, 4), brute_force(now, queries, 4))
    save_index(tmp_path)
    reloaded = LocalRetriever.load(saved_shards(tmp_path), now)
    assert_same(reloaded.search(queries, 4), brute_force(now, queries, 4))


def test_a_datastore_whose_shards_are_saved_keeps_them(tmp_path):
    for number, shard in enumerate(flat(make(tmp_path, random_keys(30)), shards=3).shards):
        shard.save(shard_directory(tmp_path, number))
    save_index(tmp_path)
    assert len(saved_shards(tmp_path)) == 3


def test_whoever_indexes_second_keeps_the_first_ones_shard(tmp_path, monkeypatch):
    make(tmp_path, random_keys(30))
    build = IndexShard.build

    def build_late(*arguments, **settings):
        monkeypatch.setattr(IndexShard, "build", build)
        save_index(tmp_path)  # another process, meanwhile
        append(tmp_path, "three", random_keys(2, seed=2), [0, 1])
        return build(*arguments, **settings)

    monkeypatch.setattr(IndexShard, "build", build_late)
    save_index(tmp_path)
    [shard] = saved_shards(tmp_path)
    assert IndexShard.load(shard, Datastore.open(tmp_path)).stop == 30
    assert not list(tmp_path.glob(".index*"))


def test_every_shard_hides_what_was_deleted_since_and_the_last_one_grows(tmp_path):
    retriever = flat(make(tmp_path, random_keys(30)), shards=3)
    append(tmp_path, "three", random_keys(5, seed=2), [0, 1, 2, 3, 4])
    delete(tmp_path, [0, 15, 29, 32])
    retriever.refresh()
    assert [(one.start, one.stop) for one in retriever.shards] == [(0, 10), (10, 20), (20, 35)]
    queries = random_keys(3, seed=1)
    expected = brute_force(Datastore.open(tmp_path), queries, 35)
    assert_same(retriever.search(queries, 35), expected)


@pytest.mark.parametrize("metric", METRICS)
def test_a_datastore_in_memory_is_searched_like_the_one_on_disk(tmp_path, metric):
    keys = random_keys(40)
    written = make(tmp_path, keys, metric)
    segment = Segment(
        keys=keys,
        tokens=written.tokens,
        windows=written.windows(np.arange(40)),
        positions=written.positions,
        utterances=np.arange(40),
        names=[origin[::-1] for origin in written.origins(np.arange(40))],
    )
    held, queries = Datastore.of(written.description, [segment]), random_keys(5, seed=1)
    assert_same(flat(held, 3).search(queries, 6), flat(written).search(queries, 6))
    subset = np.array([30, 2, 17])
    found, expected = (SubsetRetriever(d, subset).search(queries, 6) for d in (held, written))
    assert_same(found, expected)


def test_nothing_of_nothing_is_searched(tmp_path):
    identity = {"lm": "f00d"}
    nothing = Datastore.of(Description(8, 2, "l2", "none", identity), [])
    for retriever in (SubsetRetriever(nothing, np.arange(0)), flat(nothing)):
        assert (retriever.search(random_keys(2), 3).entries == -1).all()
        none = np.empty(0, np.int64)
        assert retriever.passages(none).keys.shape == (0, 2, 8)
        assert retriever.windows(none).shape == (0, 2)
        assert retriever.origins(none) == []


def test_retrievers_name_the_origins_of_their_datastores_entries(tmp_path):
    datastore = make(tmp_path, random_keys(20))
    asked = np.array([19, 0])
    assert datastore.origins(asked) == [("d4", "two-9"), ("d0", "one-0")]
    for retriever in (flat(datastore, 3), SubsetRetriever(datastore, np.arange(5))):
        assert retriever.origins(asked) == datastore.origins(asked)


def test_retrievers_hand_out_the_passages_of_their_datastore(tmp_path):
    datastore = make(tmp_path, random_keys(60))
    asked = np.array([59, 0, 7, 7])
    expected = datastore.passages(asked)
    for retriever in (flat(datastore, 3), SubsetRetriever(datastore, np.arange(5))):
        found = retriever.passages(asked)
        for field in ("tokens", "keys", "present"):
            np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))


class Unsummed(np.ndarray):
    """Flags that nobody may walk through."""

    def sum(self, *arguments, **options):
        raise AssertionError("a search walks over every entry")


def test_deletions_are_counted_when_they_are_made_and_not_at_a_search(tmp_path):
    datastore = make(tmp_path, random_keys(60))
    shard = IndexShard.build(datastore, 10, 60, FLAT, seed=0)
    rng, gone = np.random.default_rng(1), set()
    for number in range(12):
        asked = rng.integers(0, 70, size=rng.integers(0, 9))
        shard.delete(asked if number % 2 else asked.tolist())
        gone |= set(asked.tolist()) & set(range(10, 60))
        assert shard.deletions == len(gone)
    append(tmp_path, "three", random_keys(5, seed=2), range(5))
    delete(tmp_path, [12, 61])
    datastore.refresh()
    shard.refresh(last=True)
    gone |= {12, 61}
    assert shard.deletions == len(gone) == np.count_nonzero(shard._deleted)
    shard._deleted = shard._deleted.view(Unsummed)
    found = shard.search(random_keys(3, seed=5), 60)
    assert set(found.entries[0].tolist()) - {-1} == set(range(10, 65)) - gone
