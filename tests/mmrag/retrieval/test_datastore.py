import builtins
import gc
import io
import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_datastores import sealed, store_arrays, stored_arrays

from mmrag.retrieval import stored
from mmrag.retrieval.datastore import Datastore, create, delete, publish, write_segment
from mmrag.retrieval.segment import (
    DatastoreError,
    Description,
    Segment,
    distances,
    join,
    prepare,
    windows_of,
)
from mmrag.retrieval.stored import segment_file

IDENTITY = {"lm": "aaaa", "vocabulary": "bbbb"}
DESCRIPTION = Description(width=4, window=3, metric="l2", audio="paired", identity=IDENTITY)


def segment(first_token, names, seed=0):
    """Two entries an utterance; tokens count up from `first_token`."""
    entries = 2 * len(names)
    tokens = first_token + np.arange(entries)
    return Segment(
        keys=np.random.default_rng(seed).standard_normal((entries, 4)),
        tokens=tokens,
        windows=windows_of(tokens, 3),
        positions=np.tile([0, 1], len(names)),
        utterances=np.repeat(np.arange(len(names)), 2),
        names=names,
    )


FIRST = segment(10, [("u1", "book"), ("u2", "call")], seed=1)
SECOND = segment(20, [("u3", "news"), ("u4", "book")], seed=2)


@pytest.fixture
def directory(tmp_path):
    create(tmp_path, DESCRIPTION)
    write_segment(tmp_path, "first", FIRST)
    write_segment(tmp_path, "second", SECOND)
    publish(tmp_path, ["first", "second"])
    return tmp_path


def test_entries_come_back_in_the_order_of_publication(directory):
    datastore = Datastore.open(directory)
    assert datastore.entries == 8
    assert datastore.segments == ["first", "second"]
    np.testing.assert_array_equal(datastore.tokens, [10, 11, 12, 13, 20, 21, 22, 23])
    np.testing.assert_array_equal(datastore.positions, [0, 1] * 4)
    keys = np.concatenate([FIRST.keys, SECOND.keys]).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(datastore.keys(0, 8), keys)
    np.testing.assert_array_equal(datastore.keys(3, 6), keys[3:6])
    np.testing.assert_array_equal(datastore.keys_of(np.array([7, 0, 7, 4])), keys[[7, 0, 7, 4]])
    assert datastore.keys(2, 2).shape == (0, 4)
    assert datastore.keys(0, 8).dtype == np.float32


def test_documents_are_numbered_by_first_appearance_over_all_segments(directory):
    datastore = Datastore.open(directory)
    np.testing.assert_array_equal(datastore.documents, [0, 0, 1, 1, 2, 2, 0, 0])
    assert datastore.document_names(np.arange(3)) == ["book", "call", "news"]
    assert datastore.document_id("news") == 2
    assert datastore.document_id("nowhere") is None
    assert datastore.origins(np.array([0, 3, 4, 7])) == [
        ("book", "u1"),
        ("call", "u2"),
        ("news", "u3"),
        ("book", "u4"),
    ]


def test_a_document_keeps_its_number_whichever_segment_names_it(directory):
    more = [
        segment(30 + 10 * n, [(f"v{n}", name)]) for n, name in enumerate(("new", "call", "new"))
    ]
    for number, one in enumerate(more):
        write_segment(directory, f"more-{number}", one)
    publish(directory, ["more-0", "more-1"])
    publish(directory, ["more-2"])
    datastore = Datastore.open(directory)
    np.testing.assert_array_equal(datastore.documents[8:], [3, 3, 1, 1, 3, 3])
    assert datastore.document_names(np.array([3, 0, 3, 1])) == ["new", "book", "new", "call"]
    assert datastore.entries_of(["new"]).tolist() == [8, 9, 12, 13]
    with pytest.raises(IndexError, match="no document 4"):
        datastore.document_names(np.array([0, 4]))


def test_columns_are_read_like_arrays(directory):
    datastore = Datastore.open(directory)
    for name in ("tokens", "positions", "utterances", "documents"):
        column = getattr(datastore, name)
        whole = np.asarray(column)
        assert (len(column), column.shape, column.dtype) == (8, (8,), np.int32)
        assert column[5] == whole[5]
        assert column.tolist() == whole.tolist() == list(column)
        np.testing.assert_array_equal(column == whole[3], whole == whole[3])
        for at in (slice(2, 7, 2), np.array([[7, 0], [4, 4]]), whole > whole.mean(), slice(3, 3)):
            np.testing.assert_array_equal(column[at], whole[at])
        with pytest.raises(IndexError, match="places 3 to 8 of 8"):
            column[np.array([8, 3])]


def test_windows_keep_the_shape_asked_for_and_are_padding_where_nothing_was_found(directory):
    windows = Datastore.open(directory).windows(np.array([[0, -1], [5, 7]]))
    assert windows.dtype == np.int32
    np.testing.assert_array_equal(windows, [[[0, 10, 11], [0, 0, 0]], [[20, 21, 22], [22, 23, 0]]])


def test_an_entry_that_does_not_exist_is_an_error(directory):
    datastore = Datastore.open(directory)
    with pytest.raises(IndexError, match="has 8 entries"):
        datastore.keys(6, 9)
    with pytest.raises(IndexError, match="-2"):
        datastore.windows(np.array([-2]))


def test_a_written_segment_does_not_count_until_it_is_published(directory):
    datastore = Datastore.open(directory)
    write_segment(directory, "third", segment(30, [("u5", "letter")]))
    assert Datastore.open(directory).entries == 8
    write_segment(directory, "third", segment(40, [("u6", "letter")]))
    publish(directory, ["third"])
    assert datastore.entries == 8
    datastore.refresh()
    np.testing.assert_array_equal(datastore.tokens[8:], [40, 41])
    assert datastore.document_id("letter") == 3


def test_publishing_numbers_documents_in_the_segments_file_and_leaves_the_rest_as_written(tmp_path):
    create(tmp_path, DESCRIPTION)
    write_segment(tmp_path, "first", FIRST)
    file = segment_file(tmp_path, "first")
    before = file.stat().st_ino, sealed(file)
    assert stored_arrays(tmp_path, "first")[stored.IDS].tolist() == [-1, -1]
    publish(tmp_path, ["first"])
    assert stored_arrays(tmp_path, "first")[stored.IDS].tolist() == [0, 1]
    assert (file.stat().st_ino, sealed(file)) == before


def test_joined_segments_are_read_as_if_published_one_after_the_other(directory, tmp_path_factory):
    other = tmp_path_factory.mktemp("joined")
    create(other, DESCRIPTION)
    write_segment(other, "both", join([FIRST, SECOND]))
    publish(other, ["both"])
    apart, joined = Datastore.open(directory), Datastore.open(other)
    everything = np.arange(8)
    np.testing.assert_array_equal(joined.keys(0, 8), apart.keys(0, 8))
    np.testing.assert_array_equal(joined.windows(everything), apart.windows(everything))
    for field in ("tokens", "positions", "documents"):
        np.testing.assert_array_equal(getattr(joined, field), getattr(apart, field))
    assert joined.origins(everything) == apart.origins(everything)


def test_publishing_is_all_or_nothing(directory):
    write_segment(directory, "third", segment(30, [("u5", "letter")]))
    for names, problem in [
        (["third", "absent"], "absent .* missing"),
        (["third", "first"], "first .* published already"),
        (["third", "third"], "third .* published already"),
    ]:
        with pytest.raises(DatastoreError, match=problem):
            publish(directory, names)
    assert Datastore.open(directory).entries == 8


def test_a_published_segment_cannot_be_replaced(directory):
    with pytest.raises(DatastoreError, match="first"):
        write_segment(directory, "first", SECOND)


@pytest.mark.parametrize("name", ["", "../up", "Big", "-x", "a b", "a\n"])
def test_a_name_that_is_no_plain_file_name_is_refused(directory, name):
    with pytest.raises(ValueError, match="segment name"):
        write_segment(directory, name, FIRST)
    with pytest.raises(ValueError, match="segment name"):
        publish(directory, [name])


def test_publishers_at_once_lose_no_segment(tmp_path):
    create(tmp_path, DESCRIPTION)
    names = [f"part-{number}" for number in range(8)]

    def work(name):
        write_segment(tmp_path, name, FIRST)
        publish(tmp_path, [name])

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    listed = json.loads((tmp_path / "segments.json").read_text())["segments"]
    assert sorted(entry["name"] for entry in listed) == names
    assert Datastore.open(tmp_path).entries == 4 * len(names)


def test_deletion_accumulates_and_moves_no_entry(directory):
    delete(directory, [3, 1])
    delete(directory, {1, 6})
    datastore = Datastore.open(directory)
    np.testing.assert_array_equal(datastore.deleted, [1, 3, 6])
    np.testing.assert_array_equal(datastore.tokens, [10, 11, 12, 13, 20, 21, 22, 23])
    with pytest.raises(ValueError, match="8 entries"):
        delete(directory, [8])


def test_an_empty_datastore_and_an_empty_segment_are_readable(tmp_path):
    create(tmp_path, DESCRIPTION)
    assert Datastore.open(tmp_path).entries == 0
    write_segment(tmp_path, "empty", segment(0, []))
    publish(tmp_path, ["empty"])
    datastore = Datastore.open(tmp_path)
    assert datastore.entries == 0
    assert datastore.windows(np.array([-1])).tolist() == [[0, 0, 0]]


def test_creating_again_keeps_what_is_there_unless_it_is_described_otherwise(directory):
    create(directory, DESCRIPTION)
    assert Datastore.open(directory).entries == 8
    with pytest.raises(DatastoreError, match="another description"):
        create(directory, replace(DESCRIPTION, width=8))


def test_a_datastore_keyed_by_another_lm_is_refused_by_both_fingerprints(directory):
    datastore = Datastore.open(directory)
    datastore.require(IDENTITY)
    with pytest.raises(DatastoreError, match=r"lm aaaa, but this is lm cccc"):
        datastore.require({**IDENTITY, "lm": "cccc"})
    with pytest.raises(DatastoreError, match=r"codebook None, but this is codebook dddd"):
        datastore.require({"codebook": "dddd"})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"keys": np.zeros((4, 5), np.float16)}, r"its keys are float16 \(4, 5\), not .*\(4, 4\)"),
        ({"tokens": np.zeros(3, np.int32)}, r"its tokens are int32 \(3,\), not int32 \(4,\)"),
        ({"tokens": np.zeros(4, np.int64)}, r"its tokens are int64 \(4,\), not int32 \(4,\)"),
        (
            {"document_offsets": np.zeros(2, np.int64)},
            r"_offsets are int64 \(2,\), .*\(3,\)",
        ),
        ({"document_ids": np.zeros(1, np.int32)}, r"document_ids are int32 \(1,\), not .*\(2,\)"),
        ({"more": np.zeros(1, np.int32)}, "it has the arrays .*more"),
    ],
)
def test_arrays_that_do_not_fit_are_named(directory, change, problem):
    store_arrays(directory, "second", stored_arrays(directory, "second") | change)
    with pytest.raises(DatastoreError, match=rf"second\.safetensors is damaged: .*{problem}"):
        Datastore.open(directory)


def test_a_damaged_or_missing_file_is_named(directory):
    file = segment_file(directory, "second")
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole + b"0", whole[:5], b"", b"\xff" * 100):
        file.write_bytes(damaged)
        with pytest.raises(DatastoreError, match=r"second\.safetensors is damaged"):
            Datastore.open(directory)
    file.unlink()
    with pytest.raises(DatastoreError, match=r"segment second of .* is missing"):
        Datastore.open(directory)


def test_a_segment_replaced_behind_the_lists_back_is_noticed(directory):
    first, second = (segment_file(directory, name) for name in ("first", "second"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(DatastoreError, match=r"second\.safetensors is not the segment that was"):
        Datastore.open(directory)
    write_segment(directory, "third", segment(30, [("u5", "letter")]))
    with pytest.raises(DatastoreError, match=r"second\.safetensors is not the segment that was"):
        publish(directory, ["third"])


def test_a_directory_that_is_no_datastore_is_refused(tmp_path):
    with pytest.raises(DatastoreError, match=r"datastore\.json is missing"):
        Datastore.open(tmp_path)


def test_a_datastore_of_another_format_is_refused_by_name(directory):
    file = directory / "datastore.json"
    fields = json.loads(file.read_text())
    for made in (None, 2):
        changed = {k: v for k, v in fields.items() if k != "format"} | (
            {"format": made} if made else {}
        )
        file.write_text(json.dumps(changed))
        with pytest.raises(
            DatastoreError, match=rf"of format {made or 1}, .* reads 3: build it again"
        ):
            Datastore.open(directory)
    file.write_text("[]")
    with pytest.raises(DatastoreError, match="does not describe a datastore"):
        Datastore.open(directory)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"keys": np.zeros((4, 5))}, r"keys have shape \(4, 5\), not \(4, 4\)"),
        ({"positions": np.zeros(3)}, r"positions have shape \(3,\)"),
        ({"keys": np.full((4, 4), 1e6)}, "does not fit float16"),
        ({"keys": np.full((4, 4), np.nan)}, "does not fit float16"),
        ({"utterances": np.array([0, 0, 1, 2])}, "not below 2"),
        ({"utterances": np.array([1, 1, 0, 0])}, "utterances are not in order"),
    ],
)
def test_a_segment_that_does_not_fit_is_refused_before_anything_is_written(
    directory, change, problem
):
    with pytest.raises(ValueError, match=problem):
        write_segment(directory, "third", replace(FIRST, **change))
    assert not segment_file(directory, "third").exists()


def test_a_segment_leaves_no_scratch_behind(directory):
    names = {path.name for path in directory.iterdir()}
    assert names == {".lock", "datastore.json", "segments.json", "segments"}


def test_cosine_keys_are_stored_at_unit_length(tmp_path):
    create(tmp_path, replace(DESCRIPTION, metric="cosine"))
    keys = FIRST.keys.copy()
    keys[2] = 0
    write_segment(tmp_path, "only", replace(FIRST, keys=keys))
    publish(tmp_path, ["only"])
    lengths = np.linalg.norm(Datastore.open(tmp_path).keys(0, 4), axis=1)
    np.testing.assert_allclose(lengths, [1, 1, 0, 1], atol=1e-3)


def test_each_metric_is_what_its_name_says():
    rng = np.random.default_rng(3)
    query, key = rng.standard_normal((2, 5, 4)).astype(np.float32)
    product = (query * key).sum(1)
    norms = np.linalg.norm(query, axis=1) * np.linalg.norm(key, axis=1)

    def distance(metric):
        return distances(prepare(query, metric), prepare(key, metric), metric)

    np.testing.assert_allclose(distance("l2"), ((query - key) ** 2).sum(1), rtol=1e-5)
    np.testing.assert_allclose(distance("ip"), -product, rtol=1e-5)
    np.testing.assert_allclose(distance("cosine"), 2 - 2 * product / norms, rtol=1e-5)


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (1, [[7], [8], [9]]),
        (3, [[0, 7, 8], [7, 8, 9], [8, 9, 0]]),
        (4, [[0, 0, 7, 8], [0, 7, 8, 9], [7, 8, 9, 0]]),
        (9, [[0] * 4 + [7, 8, 9, 0, 0], [0] * 3 + [7, 8, 9] + [0] * 3, [0, 0, 7, 8, 9] + [0] * 4]),
    ],
)
def test_a_window_is_centred_on_its_token(window, expected):
    np.testing.assert_array_equal(windows_of(np.array([7, 8, 9]), window), expected)
    assert windows_of(np.zeros(0, np.int32), window).shape == (0, window)


LENGTHS = (4, 1, 7, 2)


@pytest.fixture(params=[1, 2, 3, 5, 6, 9])
def stretches(request, tmp_path):
    """Utterances of LENGTHS entries in two segments, and the window they are stored with."""
    window = request.param
    create(tmp_path, replace(DESCRIPTION, window=window))
    random, first = np.random.default_rng(5), 10
    for number, lengths in enumerate((LENGTHS[:2], LENGTHS[2:])):
        said = [first + 10 * n + np.arange(length) for n, length in enumerate(lengths)]
        first += 50
        part = Segment(
            keys=random.standard_normal((sum(lengths), 4)),
            tokens=np.concatenate(said),
            windows=np.concatenate([windows_of(tokens, window) for tokens in said]),
            positions=np.concatenate([np.arange(length) for length in lengths]),
            utterances=np.repeat([0, 1], lengths),
            names=[(f"u{number}{n}", "same document") for n in range(2)],
        )
        write_segment(tmp_path, f"part-{number}", part)
    publish(tmp_path, ["part-0", "part-1"])
    return Datastore.open(tmp_path), window


def test_the_span_of_a_window_stays_within_its_utterance(stretches):
    datastore, window = stretches
    edges = np.cumsum([0, *LENGTHS])
    everything = np.arange(datastore.entries)
    starts, stops = datastore.spans(everything)
    for entry, start, stop in zip(everything, starts, stops, strict=True):
        [own] = [n for n in range(4) if edges[n] <= entry < edges[n + 1]]
        span = [
            other
            for other in range(edges[own], edges[own + 1])
            if -(window // 2) <= other - entry < window - window // 2
        ]
        assert list(range(start, stop)) == span
        assert start <= entry < stop


def test_a_passage_is_the_window_with_each_tokens_own_key(stretches):
    datastore, window = stretches
    order = np.random.default_rng(0).permutation(datastore.entries)
    asked = np.concatenate([order, order[:3]])
    found, windows = datastore.passages(asked), datastore.windows(asked)
    assert found.tokens.shape == found.present.shape == (len(asked), window)
    assert (found.tokens.dtype, found.keys.dtype) == (np.int32, np.float16)
    starts, stops = datastore.spans(asked)
    for row, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        length = stop - start
        assert found.present[row].tolist() == [n < length for n in range(window)]
        np.testing.assert_array_equal(found.tokens[row, :length], windows[row][windows[row] > 0])
        np.testing.assert_array_equal(found.keys[row, :length], datastore.keys(start, stop))
        assert not found.tokens[row, length:].any() and not found.keys[row, length:].any()


def assert_answers_alike(one, other):
    everything, random = np.arange(one.entries), np.random.default_rng(4).permutation(one.entries)
    assert one.entries == other.entries
    for field in ("tokens", "positions", "utterances", "documents", "deleted"):
        ours, theirs = getattr(one, field), getattr(other, field)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs, err_msg=field)
    for entries in (everything, random, everything[:0]):
        np.testing.assert_array_equal(one.keys_of(entries), other.keys_of(entries))
        np.testing.assert_array_equal(one.windows(entries), other.windows(entries))
        np.testing.assert_array_equal(one.spans(entries), other.spans(entries))
        assert one.origins(entries) == other.origins(entries)
        for ours, theirs in zip(
            vars(one.passages(entries)).values(),
            vars(other.passages(entries)).values(),
            strict=True,
        ):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
    for name in ("book", "call", "news", "nowhere"):
        assert one.document_id(name) == other.document_id(name)
        np.testing.assert_array_equal(one.entries_of([name]), other.entries_of([name]))


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("segments", [[FIRST, SECOND], [segment(0, []), SECOND], []])
def test_a_datastore_in_memory_answers_bit_for_bit_like_the_published_segments(
    tmp_path, metric, segments
):
    description = replace(DESCRIPTION, metric=metric)
    create(tmp_path, description)
    names = [f"part-{number:05d}" for number in range(len(segments))]
    for name, one in zip(names, segments, strict=True):
        write_segment(tmp_path, name, one)
    publish(tmp_path, names)
    written = sorted(tmp_path.rglob("*"))
    held = Datastore.of(description, segments)
    published = Datastore.open(tmp_path)
    assert (held.directory, held.description) == (None, published.description)
    assert held.segments == published.segments
    assert_answers_alike(held, published)
    held.refresh()
    assert_answers_alike(held, published)
    assert sorted(tmp_path.rglob("*")) == written


def test_a_datastore_in_memory_keeps_what_it_was_given(directory):
    keys, tokens = FIRST.keys.copy(), FIRST.tokens.copy()
    held = Datastore.of(DESCRIPTION, [replace(FIRST, keys=keys, tokens=tokens)])
    keys[:], tokens[:] = 0, 0
    np.testing.assert_array_equal(held.keys(0, 4), Datastore.open(directory).keys(0, 4))
    np.testing.assert_array_equal(held.tokens, FIRST.tokens)


def test_a_datastore_in_memory_is_as_strict_as_one_on_disk():
    with pytest.raises(ValueError, match=r"part-00001: keys have shape \(4, 4\), not \(3, 4\)"):
        Datastore.of(DESCRIPTION, [FIRST, replace(SECOND, tokens=SECOND.tokens[:3])])
    held = Datastore.of(DESCRIPTION, [FIRST])
    with pytest.raises(IndexError, match="a datastore in memory has 4 entries"):
        held.keys(2, 5)
    with pytest.raises(DatastoreError, match="a datastore in memory was keyed by lm aaaa"):
        held.require({"lm": "cccc"})


def test_origins_name_document_and_utterance_of_existing_entries_alone(directory):
    datastore = Datastore.open(directory)
    assert datastore.origins(np.array([7, 0, 3])) == [
        ("book", "u4"),
        ("book", "u1"),
        ("call", "u2"),
    ]
    for entry in (-1, 8):
        with pytest.raises(IndexError, match="has 8 entries"):
            datastore.origins(np.array([0, entry]))


def test_the_entries_of_documents_are_found_by_name_without_the_deleted_ones(directory):
    datastore = Datastore.open(directory)
    assert datastore.entries_of(["book"]).tolist() == [0, 1, 6, 7]
    assert datastore.entries_of(["news", "call", "nowhere", "call"]).tolist() == [2, 3, 4, 5]
    assert datastore.entries_of(["nowhere"]).tolist() == datastore.entries_of([]).tolist() == []
    delete(directory, [1, 4, 5])
    datastore.refresh()
    assert datastore.entries_of(["book"]).tolist() == [0, 6, 7]
    assert datastore.entries_of(["news"]).tolist() == []
    assert datastore.entries_of(["news"]).dtype == np.int64


def test_a_refresh_that_fails_changes_nothing(directory):
    datastore = Datastore.open(directory)
    write_segment(directory, "third", segment(30, [("u5", "letter")]))
    publish(directory, ["third"])
    path = segment_file(directory, "third")
    path.rename(path.with_suffix(".gone"))
    with pytest.raises(DatastoreError, match=r"segment third of .* is missing"):
        datastore.refresh()
    assert (datastore.entries, datastore.segments) == (8, ["first", "second"])
    path.with_suffix(".gone").rename(path)
    datastore.refresh()
    assert_answers_alike(datastore, Datastore.open(directory))


def test_no_passages_have_the_shape_of_some(directory):
    found = Datastore.open(directory).passages(np.empty(0, np.int64))
    assert (found.tokens.shape, found.keys.shape) == ((0, 3), (0, 3, 4))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_thousand_segments_are_mapped_once_and_keep_no_file_open(tmp_path, monkeypatch):
    create(tmp_path, DESCRIPTION)
    names = [f"part-{number}" for number in range(1000)]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)  # a thousand flushes take their time
        for number, name in enumerate(names):
            write_segment(tmp_path, name, segment(2 * number, [(f"u{number}", "d")], seed=number))
        publish(tmp_path, names)
    before = descriptors()
    datastore = Datastore.open(tmp_path)
    assert descriptors() == before
    entries = np.random.default_rng(0).permutation(datastore.entries)
    keys = datastore.keys_of(entries)
    windows = datastore.windows(entries)
    opened, really = [], io.open

    def counted(file, *arguments, **options):
        opened.append(file)
        return really(file, *arguments, **options)

    monkeypatch.setattr(io, "open", counted)
    monkeypatch.setattr(builtins, "open", counted)
    np.testing.assert_array_equal(datastore.keys_of(entries), keys)
    np.testing.assert_array_equal(datastore.windows(entries), windows)
    assert opened == []
    assert descriptors() == before
    Path(tmp_path / "segments.json").read_text()
    assert opened, "an opened file is counted"
    expected = np.concatenate(
        [np.random.default_rng(n).standard_normal((2, 4)) for n in range(1000)]
    )
    np.testing.assert_array_equal(keys, expected.astype(np.float16).astype(np.float32)[entries])


def maps(directory) -> int:
    return Path("/proc/self/maps").read_text().count(str(directory / "segments"))


ADDED = {"third": "letter", "fourth": "diary", "fifth": "book", "sixth": "letter"}
"""Segment -> its document; "book" is in segments before."""


def add(directory, name):
    write_segment(directory, name, segment(30, [("u5", ADDED[name])]))
    publish(directory, [name])


def test_publishing_reads_what_is_new_and_segments_that_have_its_documents(directory, monkeypatch):
    read, really = set(), stored.open_tensors
    monkeypatch.setattr(stored, "open_tensors", lambda path: read.add(path.stem) or really(path))
    for name, expected in {
        "third": {"first", "second", "third"},
        "fourth": {"third", "fourth"},
        "fifth": {"first", "fourth", "fifth"},
        "sixth": {"third", "fifth", "sixth"},
    }.items():
        read.clear()
        add(directory, name)
        assert read == expected


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_documents_have_their_numbers_whether_digests_are_kept_or_read(
    directory, monkeypatch, kept
):
    monkeypatch.setattr(stored, "FEW", kept)
    for name in ADDED:
        add(directory, name)
    store = Datastore.open(directory)
    assert store.documents.tolist() == [0, 0, 1, 1, 2, 2, 0, 0, 3, 3, 4, 4, 0, 0, 3, 3]
    assert store.document_names(np.arange(5)) == ["book", "call", "news", "letter", "diary"]


def test_a_datastore_that_nobody_holds_is_unmapped_and_what_is_held_stays(directory):
    datastore = Datastore.open(directory)
    assert maps(directory) == 2, "a map a segment"
    held = datastore.windows(np.arange(8))
    del datastore
    gc.collect()
    assert maps(directory) == 0
    assert held[0].tolist() == [0, 10, 11]
