import io
import pickle

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrag import storage
from mmrag.storage import StorageError, Url, beside, download, is_url, located, upload

MEMORY = fsspec.filesystem("memory")


@pytest.fixture(autouse=True)
def bucket():
    MEMORY.store.clear()
    MEMORY.pseudo_dirs[:] = [""]
    return Url("memory://bucket/corpus")


@pytest.fixture
def broken(monkeypatch):
    """Makes a storage's answers fail: `broken(error)`, after the first `answers` of them."""

    def fail(error: Exception, answers: int = 0) -> None:
        whole, asked = MEMORY.cat_file, []

        def cat_file(*arguments, **named):
            asked.append(arguments)
            if len(asked) > answers:
                raise error
            return whole(*arguments, **named)

        store = storage._filesystem(Url("memory://bucket"))
        monkeypatch.setattr(store, "cat_file", cat_file)

    return fail


def test_what_has_no_scheme_is_a_path_and_a_file_url_is_one_too(tmp_path):
    assert located("runs/a") == located(located("runs/a"))
    assert located(f"file://{tmp_path}") == tmp_path
    assert located("s3://bucket/runs/") == Url("s3://bucket/runs")
    assert not is_url("lhotse:cuts.jsonl") and not is_url("/data/a") and is_url("gs://bucket")


def test_a_url_has_the_parts_of_a_path():
    url = Url("s3://bucket/runs/a b/x.jsonl.gz")
    assert (url.scheme, url.name, url.stem, url.suffix) == ("s3", "x.jsonl.gz", "x.jsonl", ".gz")
    assert url.parent / "x.jsonl.gz" == url
    assert str(url.relative_to(Url("s3://bucket/runs"))) == "a b/x.jsonl.gz"
    assert not url.is_relative_to(Url("s3://bucket/run")) and Url("s3://b").parent == Url("s3://b")
    assert pickle.loads(pickle.dumps(url)) == url


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a/../b",
        "s3://bucket/./b",
        "s3://bucket//b",
        "s3://bucket/a\nb",
        "s3:///b",
        "file:///etc/passwd",
        "simplecache::s3://bucket/a",
        "s3://bucket/a::memory://b",
        "bucket/a",
    ],
)
def test_a_url_that_climbs_or_chains_is_refused(text):
    with pytest.raises(ValueError):
        Url(text)


def test_a_password_in_a_url_is_refused_and_not_repeated():
    with pytest.raises(ValueError, match="leave it out") as refused:
        Url("https://somebody:hunter2@host/a.wav")
    assert "hunter2" not in str(refused.value)


def test_a_signature_is_used_and_never_shown():
    url = Url("https://host/a.wav?X-Amz-Signature=abc")
    assert str(url) == "https://host/a.wav" and url.suffix == ".wav" and "abc" in url.text


@given(st.text(max_size=20))
def test_no_name_leads_out_of_its_folder(name):
    root = Url("memory://bucket/corpus")
    try:
        found = root / name
    except ValueError:
        return
    assert found.is_relative_to(root) and ".." not in found.text.split("/")


def test_a_local_file_is_never_named_by_one_at_a_url(bucket, tmp_path):
    assert beside(tmp_path, "/data/a.wav") == located("/data/a.wav")
    assert beside(tmp_path, "s3://b/a.wav") == beside(bucket, "s3://b/a.wav") == Url("s3://b/a.wav")
    assert beside(bucket, "a/b.wav") == bucket / "a/b.wav"
    for name in ("/etc/passwd", "file:///etc/passwd", "../other/a.wav"):
        with pytest.raises(ValueError):
            beside(bucket, name)


@pytest.mark.parametrize("size", [0, 1, storage.BLOCK_BYTES, 2 * storage.BLOCK_BYTES + 17])
def test_what_is_read_piece_by_piece_is_what_was_written(bucket, size):
    content = np.random.default_rng(0).bytes(size)
    (bucket / "a.bin").write_bytes(content)
    with (bucket / "a.bin").open() as stream:
        assert stream.read() == content
        assert stream.seek(-5, io.SEEK_END) == max(0, size - 5) and stream.read() == content[-5:]
        assert stream.seek(1) == 1 and stream.read(3) == content[1:4]


def test_a_piece_is_asked_for_once_and_only_a_few_are_kept(bucket, monkeypatch):
    monkeypatch.setattr(storage, "BLOCK_BYTES", 100)
    monkeypatch.setattr(storage, "READ_BYTES", 10)
    (bucket / "a.bin").write_bytes(bytes(100 * (storage.BLOCKS + 4)))
    store, asked = storage._filesystem(bucket), []
    whole = store.cat_file
    monkeypatch.setattr(
        store, "cat_file", lambda *a, start, end: asked.append(start) or whole(*a, start, end)
    )
    with (bucket / "a.bin").open() as stream:
        for place in (450, 470, 490, 401):
            stream.seek(place)
            stream.read(5)
        assert asked == [400]
        stream.seek(0)
        stream.read()
        assert stream.raw._block.cache_info().currsize == storage.BLOCKS


def test_files_are_listed_by_their_names_from_the_folder(bucket):
    for name in ("b.wav", "a/c.wav", "a/d/e.txt"):
        (bucket / name).write_bytes(name.encode())
    (bucket.parent / "corpus2/x.wav").write_bytes(b"not in it")
    MEMORY.store["/bucket/corpus/a/../../up"] = MEMORY.store["/bucket/corpus/b.wav"]
    assert bucket.listing() == ({"a/c.wav": 7, "a/d/e.txt": 9, "b.wav": 5}, ["a/../../up"])
    assert Url("memory://bucket/nothing").listing() == ({}, [])


def test_a_tree_is_copied_there_and_back(bucket, tmp_path):
    names = ["a.txt", "b/c.txt"]
    (tmp_path / "from/b").mkdir(parents=True)
    for name in names:
        (tmp_path / "from" / name).write_text(name)
    upload(tmp_path / "from", names, bucket)
    download(bucket, names, tmp_path / "to")
    assert [(tmp_path / "to" / name).read_text() for name in names] == names
    assert bucket.is_dir() and (bucket / "a.txt").is_file() and not (bucket / "b.txt").exists()


def test_a_missing_library_is_named_with_what_to_install(monkeypatch):
    def missing(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(storage.fsspec, "filesystem", missing)
    storage._connected.cache_clear()
    with pytest.raises(StorageError, match=r"s3:// is missing: pip install mmrag\[s3\]"):
        Url("s3://bucket/a").exists()
    with pytest.raises(StorageError, match="gs:// is missing: pip install gcsfs"):
        Url("gs://bucket/a").exists()


def test_a_scheme_that_nobody_knows_is_named():
    with pytest.raises(StorageError, match="no library knows nowhere://"):
        Url("nowhere://bucket/a").exists()


def test_what_is_wrong_with_one_object_is_told_from_a_storage_that_does_not_answer(bucket, broken):
    with pytest.raises(FileNotFoundError, match="no such object"):
        (bucket / "a").open()
    (bucket / "a").write_bytes(b"content")
    broken(PermissionError("AccessDenied"))
    with pytest.raises(PermissionError, match="access is refused"):
        (bucket / "a").read_bytes()
    broken(PermissionError("The provided token has expired."))
    with pytest.raises(StorageError, match="credentials are not accepted: The provided token"):
        (bucket / "a").read_bytes()
    broken(RuntimeError("Could not connect to the endpoint\nmore of it"))
    with pytest.raises(StorageError, match="does not answer: RuntimeError: Could not") as error:
        (bucket / "a").read_bytes()
    assert error.value.strerror == str(error.value) and "more" not in str(error.value)
