import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mmrag.speech import units
from mmrag.speech.units import Codebook, collapse, expand, information, information_of, kmeans

FRAME = 0.02
frame_ids = hnp.arrays(np.int32, st.integers(0, 40), elements=st.integers(0, 3))


@pytest.fixture
def features():
    return np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)


@given(frame_ids)
def test_expand_undoes_collapse(ids):
    assert expand(collapse(ids)).tolist() == ids.tolist()


@given(frame_ids)
def test_collapsed_units_have_no_equal_neighbours_and_no_empty_runs(ids):
    units = collapse(ids)
    assert (units.ids[1:] != units.ids[:-1]).all()
    assert (units.durations > 0).all()
    assert units.durations.sum() == len(ids)


def test_collapse_keeps_the_length_of_each_run():
    units = collapse(np.array([0, 0, 5, 5, 5, 0]))
    assert units.ids.tolist() == [0, 5, 0]
    assert units.durations.tolist() == [2, 3, 1]
    assert units.ids.dtype == units.durations.dtype == np.int32


def test_units_tell_all_half_and_nothing_of_classes():
    classes = np.repeat([0, 1, 2, 3], 50)
    assert information(classes + 7, classes) == pytest.approx(1)
    assert information(np.arange(200), classes) == pytest.approx(1)
    assert information(classes // 2, classes) == pytest.approx(0.5)
    assert information(np.tile([0, 1], 100), classes) == pytest.approx(0, abs=1e-12)
    assert np.isnan(information(classes, np.zeros(200)))
    assert np.isnan(information(np.zeros(0), np.zeros(0)))


def test_collapse_refuses_a_batch():
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        collapse(np.zeros((2, 3), np.int32))


def test_runs_tile_the_clip_in_seconds():
    codebook = Codebook(np.zeros((9, 2)), FRAME)
    spans = codebook.seconds(collapse(np.array([4, 4, 4, 8, 1, 1])))
    np.testing.assert_allclose(spans, [[0, 0.06], [0.06, 0.08], [0.08, 0.12]])


def test_assign_takes_the_nearest_centroid(features):
    codebook = Codebook.fit(features, 8, seed=1, frame_seconds=FRAME)
    distances = ((features[:, None] - codebook.centroids[None]) ** 2).sum(-1)
    assigned = codebook.assign(features)
    assert assigned.dtype == np.int32
    np.testing.assert_array_equal(assigned, distances.argmin(1))


def test_fit_finds_well_separated_clusters():
    centres = np.eye(5, dtype=np.float32) * 100
    noise = np.random.default_rng(0).normal(size=(5, 30, 5)).astype(np.float32)
    codebook = Codebook.fit((centres[:, None] + noise).reshape(-1, 5), 5, 0, FRAME)
    found = codebook.centroids[codebook.assign(centres)]
    np.testing.assert_allclose(found, centres, atol=1.5)


def test_fit_is_decided_by_the_seed(features):
    one, same, other = (kmeans(features, 16, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_fit_says_how_many_features_are_missing(features):
    with pytest.raises(ValueError, match="7 features cannot make 8 clusters"):
        Codebook.fit(features[:7], 8, 0, FRAME)


def test_fit_makes_as_many_clusters_as_there_are_features(features):
    assert len(Codebook.fit(features[:8], 8, 0, FRAME)) == 8


def test_features_of_another_encoder_are_refused(features):
    codebook = Codebook.fit(features, 8, 0, FRAME)
    with pytest.raises(ValueError, match=r"\(F, 6\), not \(200, 5\)"):
        codebook.assign(features[:, :5])


def test_encode_is_assign_then_collapse(features):
    codebook = Codebook.fit(features, 4, 0, FRAME)
    repeated = features.repeat(3, axis=0)
    np.testing.assert_array_equal(expand(codebook.encode(repeated)), codebook.assign(repeated))


def test_a_saved_codebook_comes_back_the_same(tmp_path, features):
    codebook = Codebook.fit(features, 8, 0, FRAME)
    codebook.save(tmp_path / "codebook")
    loaded = Codebook.load(tmp_path / "codebook")
    np.testing.assert_array_equal(loaded.centroids, codebook.centroids)
    assert loaded.frame_seconds == FRAME


def test_a_codebook_of_two_halves_is_refused(tmp_path, features):
    Codebook.fit(features, 8, 0, FRAME).save(tmp_path)
    np.save(tmp_path / "centroids.npy", features[:7])
    with pytest.raises(ValueError, match=r"says 8 units, centroids\.npy holds 7"):
        Codebook.load(tmp_path)


def test_clustering_works_beside_torch(features):
    """Both bring an OpenMP runtime; neither may stop or change the other."""
    before = kmeans(features, 8, 0)
    product = torch.ones(300, 300) @ torch.ones(300, 300)
    np.testing.assert_array_equal(kmeans(features, 8, 0), before)
    assert product.eq(300).all()


def test_torch_finds_the_centroids_that_faiss_finds(features, monkeypatch):
    """On an accelerator torch searches, some frames at a time."""
    book = Codebook(features[:31], FRAME)
    queries = torch.from_numpy(features[31:])
    expected = book.assign(queries)
    assert expected.tolist() == book.assign(queries.numpy()).tolist()
    for rows in (7, 8192):
        monkeypatch.setattr(units, "ROWS", rows)
        found = book.nearest(queries)
        assert found.dtype == torch.int32 and found.tolist() == expected.tolist()
    assert book.nearest(queries[:0]).tolist() == []


@given(frame_ids, st.integers(0, 2**31))
def test_information_of_counts_is_that_of_what_was_counted(ids, seed):
    classes = np.random.default_rng(seed).integers(0, 4, len(ids))
    counts = np.zeros((4, 4), np.int64)
    np.add.at(counts, (ids, classes), 1)
    told, known = information_of(counts), information(ids, classes)
    assert told == pytest.approx(known, nan_ok=True)
