"""Merged segments answer as those they stand for, and what was deleted is gone from the disk."""

import json
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_datastores import DESCRIPTION, fill, segment

from mmrag.config import Index
from mmrag.retrieval import compaction, snapshots
from mmrag.retrieval.compaction import FANOUT, Compacted, compact
from mmrag.retrieval.datastore import LIST, Datastore, create, delete, publish, write_segment
from mmrag.retrieval.index import IndexShard
from mmrag.retrieval.segment import DatastoreError, Description, Segment
from mmrag.retrieval.stored import segment_file


@pytest.fixture
def directory(tmp_path):
    create(tmp_path, DESCRIPTION)
    fill(tmp_path, FANOUT)
    return tmp_path


def answers(datastore):
    """Everything that can be asked about living entries."""
    living = np.setdiff1d(np.arange(datastore.entries), datastore.deleted)
    passages = datastore.passages(living)
    documents = np.unique(datastore.documents[living])
    names = datastore.document_names(documents)
    return {
        "keys": datastore.keys_of(living).tolist(),
        "windows": datastore.windows(living).tolist(),
        "passages": [values.tolist() for values in vars(passages).values()],
        "origins": datastore.origins(living),
        "spans": [edges.tolist() for edges in datastore.spans(living)],
        "documents": dict(zip(documents.tolist(), names, strict=True)),
        "entries": {name: datastore.entries_of([name]).tolist() for name in names},
        "ids": {name: datastore.document_id(name) for name in names},
        **{
            column: getattr(datastore, column)[living].tolist()
            for column in ("tokens", "positions", "utterances", "documents")
        },
        "deleted": datastore.deleted.tolist(),
    }


def test_many_small_segments_become_one_that_answers_alike(directory):
    before = Datastore.open(directory)
    asked = answers(before)
    assert compact(directory) == Compacted(merged=FANOUT, made=1, erased=0)
    after = Datastore.open(directory)
    assert answers(after) == asked == answers(before), "and who reads the old ones reads on"
    assert len(after.segments) == 1
    assert len(list((directory / "segments").iterdir())) == 1, "the old ones are gone"
    before.refresh()
    assert before.segments == after.segments
    assert compact(directory) == Compacted(0, 0, 0)


def test_segments_stay_few_however_many_are_appended(tmp_path):
    create(tmp_path, DESCRIPTION)
    written = 0
    for number in range(6 * FANOUT):
        fill(tmp_path, 1, number)
        written += 6 * compact(tmp_path).merged
    datastore = Datastore.open(tmp_path)
    assert len(datastore.segments) < 3 * FANOUT
    assert written <= 6 * 6 * FANOUT * 4, "each entry is written again a few times alone"
    tokens = [1000 * (n + 1) + np.arange(6) for n in range(6 * FANOUT)]
    np.testing.assert_array_equal(datastore.tokens, np.concatenate(tokens))


def contents(directory):
    return b"".join(file.read_bytes() for file in directory.rglob("*") if file.is_file())


def test_what_is_deleted_leaves_the_disk_and_ids_stay(directory):
    datastore = Datastore.open(directory)
    gone = datastore.entries_of(["own-3"])
    token = int(datastore.tokens[gone[0]])
    key = datastore.keys_of(gone[:1]).astype(np.float16).tobytes()
    names = (b"own-3", b"utterance-3-1")
    assert all(name in contents(directory) for name in names) and key in contents(directory)
    delete(directory, gone)
    datastore.refresh()
    asked = answers(datastore)
    assert compact(directory).erased == len(gone) == 3
    after = Datastore.open(directory)
    assert answers(after) == asked
    assert not any(name in contents(directory) for name in names)
    assert key not in contents(directory)
    assert token not in np.asarray(after.tokens) and token not in after.windows(np.arange(48))
    assert after.origins(gone[:1]) == [("", "")]
    assert after.document_id("own-3") is None and after.documents[gone[0]] == -1
    fill(directory, 1, 90)
    assert Datastore.open(directory).document_id("own-90") == FANOUT + 1, "no number is given twice"


def test_a_deleted_entry_leaves_its_neighbours_windows_too(directory):
    delete(directory, [1])
    compact(directory, everything=True)
    after = Datastore.open(directory)
    assert after.tokens[:3].tolist() == [1000, 0, 1002]
    windows = [[0, 0, 1000, 0, 1002], [0] * 5, [1000, 0, 1002, 0, 0]]
    assert after.windows(np.arange(3)).tolist() == windows
    assert after.windows(np.arange(3, 6))[1].tolist() == [0, 1003, 1004, 1005, 0]


def test_a_segment_is_written_again_once_enough_of_it_is_deleted(directory):
    compact(directory)
    delete(directory, np.arange(11))
    assert compact(directory) == Compacted(0, 0, 0)
    delete(directory, [11])
    assert compact(directory) == Compacted(1, 1, 12)
    delete(directory, [20])
    assert compact(directory) == Compacted(0, 0, 0), "what is erased is not counted twice"
    assert compact(directory, everything=True) == Compacted(1, 1, 1)


def test_what_is_published_and_deleted_meanwhile_is_there(directory, monkeypatch):
    really = compaction._write

    def slow(*arguments):
        really(*arguments)
        fill(directory, 1, 50)
        delete(directory, [7, 50])

    monkeypatch.setattr(compaction, "_write", slow)
    compact(directory)
    after = Datastore.open(directory)
    assert after.segments[1:] == ["s-50"]
    assert after.deleted.tolist() == [7, 50] and after.tokens[7] != 0, "hidden, erased next time"
    monkeypatch.undo()
    assert compact(directory, everything=True).erased == 2
    assert Datastore.open(directory).tokens[7] == 0


def test_what_changed_meanwhile_in_its_place_is_left_alone(directory, monkeypatch):
    really, calls = compaction._write, []

    def overtaken(*arguments):
        really(*arguments)
        calls.append(1)
        if len(calls) == 1:
            snapshots.create(directory, "monday")
        if len(calls) == 2:
            listed = json.loads((directory / LIST).read_text())
            listed["segments"] = listed["segments"][::-1]
            (directory / LIST).write_text(json.dumps(listed))

    monkeypatch.setattr(compaction, "_write", overtaken)
    fill(directory, 1, FANOUT)
    compact(directory)  # up to the snapshot, which was made at its end
    assert len(Datastore.open(directory).segments) == 1
    fill(directory, 2, FANOUT + 1)
    asked = json.loads((directory / LIST).read_text())["segments"][::-1]
    monkeypatch.setattr(compaction, "_runs", iterated(compaction._runs))
    with pytest.raises(StopIteration):
        compact(directory, everything=True)
    assert json.loads((directory / LIST).read_text())["segments"] == asked, "as somebody left it"


def iterated(really):
    """Runs once, and then no more."""
    calls = iter([1])

    def runs(*arguments):
        next(calls)
        return really(*arguments)

    return runs


def test_two_at_once_take_turns(directory):
    fill(directory, 2 * FANOUT, FANOUT)
    asked, done = answers(Datastore.open(directory)), []
    threads = [
        threading.Thread(target=lambda: done.append(compact(directory, everything=True)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(one.merged for one in done) == 3 * FANOUT
    assert answers(Datastore.open(directory)) == asked


def test_one_that_was_stopped_leaves_nothing_behind_for_long(directory, monkeypatch):
    asked = answers(Datastore.open(directory))

    def fails(*arguments):
        raise KeyboardInterrupt

    for name in ("_write", "write_list"):
        with monkeypatch.context() as patch:
            patch.setattr(compaction, name, fails)
            with pytest.raises(KeyboardInterrupt):
                compact(directory)
        assert answers(Datastore.open(directory)) == asked
    compact(directory)
    assert answers(Datastore.open(directory)) == asked
    left = {path.name for path in directory.iterdir()}
    assert left == {".lock", ".compacting", "datastore.json", LIST, "segments"}
    assert len(list((directory / "segments").iterdir())) == 1


def test_a_reader_that_is_overtaken_reads_the_new_list(directory, monkeypatch):
    from mmrag.retrieval import datastore as module

    really, calls = module.open_segment, []

    def overtaken(*arguments):
        if not calls:
            calls.append(1)
            compact(directory)
        return really(*arguments)

    monkeypatch.setattr(module, "open_segment", overtaken)
    assert Datastore.open(directory).entries == 6 * FANOUT
    [merged] = Datastore.open(directory).segments
    segment_file(directory, merged).unlink()
    with pytest.raises(DatastoreError, match=rf"segment {merged} of .* is missing"):
        Datastore.open(directory)


def test_an_index_built_before_answers_after(directory):
    before = Datastore.open(directory)
    shard = IndexShard.build(before, 0, before.entries, Index(kind="flat", shards=1), seed=0)
    delete(directory, [5, 6, 7])
    queries = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
    before.refresh()
    shard.refresh(last=True)
    found = shard.search(queries, 4)
    compact(directory)
    before.refresh()
    shard.refresh(last=True)
    again = shard.search(queries, 4)
    np.testing.assert_array_equal(again.entries, found.entries)
    np.testing.assert_array_equal(again.tokens, found.tokens)
    after = Datastore.open(directory)
    built = IndexShard.build(after, 0, after.entries, Index(kind="flat", shards=1), seed=0)
    np.testing.assert_array_equal(built.search(queries, 4).entries, found.entries)


def test_rows_of_zeros_take_no_room(tmp_path):
    wide = Description(width=2048, window=5, metric="l2", audio="none", identity={})
    create(tmp_path, wide)
    one = segment(0, utterances=200, length=3, documents=("own",))
    keys = np.random.default_rng(0).standard_normal((600, 2048))
    write_segment(tmp_path, "only", Segment(**{**vars(one), "keys": keys}))
    publish(tmp_path, ["only"])
    delete(tmp_path, np.arange(100, 600))
    compact(tmp_path)
    [file] = (tmp_path / "segments").iterdir()
    assert file.stat().st_size > 600 * 4096
    assert file.stat().st_blocks * 512 < 150 * 4096


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 4)),
        st.tuples(st.just("delete"), st.floats(0, 1)),
        st.tuples(st.just("compact"), st.booleans()),
    ),
    min_size=1,
    max_size=14,
)


@given(operations=OPERATIONS)
@settings(max_examples=25, deadline=None)
def test_whatever_is_done_in_whatever_order_living_entries_are_as_they_were(
    tmp_path_factory, operations
):
    directory = tmp_path_factory.mktemp("random")
    create(directory, DESCRIPTION)
    expected: list[tuple[int, str] | None] = []
    for number, (what, how) in enumerate(operations):
        if what == "add":
            one = segment(number, utterances=how)
            write_segment(directory, f"s-{number}", one)
            publish(directory, [f"s-{number}"])
            documents = [one.names[u][1] for u in one.utterances]
            expected += zip(one.tokens.tolist(), documents, strict=True)
        elif what == "delete" and expected:
            start = int(how * len(expected))
            gone = range(start, min(len(expected), start + 4))
            delete(directory, gone)
            expected = [None if n in gone else one for n, one in enumerate(expected)]
        elif what == "compact":
            compact(directory, everything=how)
    datastore = Datastore.open(directory)
    living = [n for n, one in enumerate(expected) if one is not None]
    assert np.setdiff1d(np.arange(datastore.entries), datastore.deleted).tolist() == living
    told = zip(
        datastore.tokens[np.array(living, int)].tolist(),
        (document for document, _ in datastore.origins(np.array(living, int))),
        strict=True,
    )
    assert list(told) == [expected[n] for n in living]
    listed = json.loads((directory / LIST).read_text())
    assert sum(one["entries"] for one in listed["segments"]) == len(expected)
