"""What was said of an entry is stored with it, and is there whatever happens to the datastore."""

from dataclasses import replace

import numpy as np
import pytest
from small_datastores import DESCRIPTION, fill, place_of, segment, stored_arrays

from mmrag.config import Index
from mmrag.retrieval import snapshots
from mmrag.retrieval.compaction import compact
from mmrag.retrieval.datastore import Datastore, create, delete, publish, write_segment
from mmrag.retrieval.index import IndexShard
from mmrag.retrieval.phrases import fresh
from mmrag.retrieval.segment import DatastoreError, join
from mmrag.retrieval.stored import WORDINGS, segment_file
from mmrag.retrieval.verify import verify
from mmrag.retrieval.wording import Entry

WORDED = Entry("seven", "Own №7", ("own seven", "/oʊn/"), 0.5, "en-GB")


def add(directory, number, *given, instead_of=()):
    """Publish a segment whose documents are these entries."""
    made = segment(number, documents=tuple(one.text for one in given), utterances=len(given))
    made = replace(made, wordings={one.text: one for one in given})
    write_segment(directory, f"s-{number}", made)
    publish(directory, [f"s-{number}"], instead_of)


@pytest.fixture
def directory(tmp_path):
    create(tmp_path, DESCRIPTION)
    return tmp_path


def test_a_datastore_without_wordings_is_stored_as_ever(directory):
    fill(directory, 2)
    assert not WORDINGS.keys() & stored_arrays(directory, "s-0").keys()
    store = Datastore.open(directory)
    assert store.wordings() == {} and not store.wordings
    assert store.hidden.tolist() == [] and len(store.wordings.weights()[0]) == 0
    assert fresh(store, [Entry("shared"), Entry("shared", "S"), Entry("new")]) == [
        Entry("shared", "S"),
        Entry("new"),
    ]


def test_a_wording_is_read_back_beside_documents_without_one(directory):
    fill(directory, 1)
    add(directory, 7, WORDED, Entry("plain"))
    store = Datastore.open(directory)
    assert store.wordings() == {"seven": WORDED, "plain": Entry("plain")}
    assert store.wordings(["seven", "shared", "nobody"]) == {"seven": WORDED}
    assert store.wordings.pronunciations() == {"seven": WORDED.pronunciations}
    entries, weights = store.wordings.weights()
    assert entries.tolist() == store.entries_of(["seven"]).tolist() and set(weights) == {0.5}
    held = Datastore.of(DESCRIPTION, [replace(segment(0), wordings={"own-0": Entry("own-0", "O")})])
    assert held.wordings() == {"own-0": Entry("own-0", "O")}
    assert list(verify(directory)) == []


def test_an_entry_that_is_given_again_takes_the_place_of_what_it_was_in_one_moment(directory):
    add(directory, 1, WORDED, Entry("plain"))
    before = Datastore.open(directory)
    other = replace(WORDED, display_as="Seven", weight=2.0)
    assert fresh(before, [WORDED, Entry("plain"), other]) == [other]
    old = before.entries_of(["seven"])
    add(directory, 2, other, instead_of=old)
    store = Datastore.open(directory)
    assert store.wordings()["seven"] == other
    assert store.deleted.tolist() == old.tolist()
    assert not np.isin(store.entries_of(["seven"]), old).any()


def test_what_weighs_nothing_is_hidden_from_every_index_and_listed_all_the_same(directory):
    add(directory, 1, Entry("silent", weight=0), Entry("loud"))
    store = Datastore.open(directory)
    silent = store.entries_of(["silent"])
    shard = IndexShard.build(store, 0, store.entries, Index(kind="flat", shards=1), seed=0)
    found = shard.search(store.keys_of(silent), 6)
    assert not np.isin(found.entries, silent).any()
    documents, counts = store.document_counts()
    assert store.document_names(documents) == ["silent", "loud"] and counts.tolist() == [3, 3]
    add(directory, 2, Entry("silent"), instead_of=silent)
    store.refresh()
    shard.refresh(last=True)
    back = store.entries_of(["silent"])
    assert np.isin(shard.search(store.keys_of(back), 1).entries, back).all()


def test_wordings_stay_when_segments_are_merged_and_go_with_their_entries(directory):
    add(directory, 1, WORDED, Entry("gone", "Gone"))
    fill(directory, 2, 2)
    add(directory, 9, Entry("silent", weight=0), Entry("plain"))
    delete(directory, Datastore.open(directory).entries_of(["gone"]).tolist())
    before = Datastore.open(directory)
    assert compact(directory, everything=True).made == 1
    after = Datastore.open(directory)
    assert after.wordings() == before.wordings()
    assert after.wordings().keys() == {"seven", "silent", "plain"}
    assert [one.tolist() for one in after.wordings.weights()] == [
        one[~np.isin(before.wordings.weights()[0], before.deleted)].tolist()
        for one in before.wordings.weights()
    ]
    assert after.hidden.tolist() == before.hidden.tolist()
    assert b"Gone" not in b"".join(file.read_bytes() for file in directory.rglob("*.safetensors"))
    assert list(verify(directory)) == []


def test_a_snapshot_brings_back_what_was_said_then(directory):
    add(directory, 1, WORDED, Entry("plain"))
    snapshots.create(directory, "then")
    old = Datastore.open(directory).entries_of(["seven"])
    add(directory, 2, Entry("seven", "Other"), instead_of=old)
    assert Datastore.open(directory).wordings()["seven"].written == "Other"
    compact(directory, everything=True)
    snapshots.rollback(directory, "then")
    assert Datastore.open(directory).wordings()["seven"] == WORDED


def test_segments_that_are_joined_keep_their_wordings():
    parts = [replace(segment(n), wordings={f"own-{n}": Entry(f"own-{n}", "O")}) for n in (0, 1)]
    assert join(parts).wordings.keys() == {"own-0", "own-1"}


def test_a_wording_that_was_changed_on_the_disk_is_found(directory):
    add(directory, 1, WORDED, Entry("plain"))
    file = segment_file(directory, "s-1")
    content = bytearray(file.read_bytes())
    content[place_of(file, "wording_text")] ^= 1
    file.write_bytes(content)
    assert any("wording_text" in problem for problem in verify(directory))


def test_weights_of_another_length_are_refused(directory):
    add(directory, 1, WORDED, Entry("plain"))
    from small_datastores import store_arrays

    arrays = stored_arrays(directory, "s-1")
    arrays["wording_weights"] = arrays["wording_weights"][:1]
    store_arrays(directory, "s-1", arrays)
    with pytest.raises(DatastoreError, match="wording_weights"):
        Datastore.open(directory)
