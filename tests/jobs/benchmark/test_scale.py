"""How figures grow with a corpus is worked out, and one small corpus is measured for real."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from jobs.benchmark import loaded, scale, simulated
from jobs.benchmark.loaded import Loading
from jobs.benchmark.progress import Progress
from jobs.benchmark.scale import QUICK, Row
from mmrag.model.packed import Packed

SMALL = replace(QUICK, utterances=40)


def row(values, expected, most=None, negligible=0.0):
    return Row("part", "what", "s", [10.0, 100.0, 1000.0], values, expected, most, negligible)


@pytest.mark.parametrize(
    ("values", "grows", "flat", "linear"),
    [
        ([5, 5, 5], "flat", True, True),
        ([5, 5.2, 5.5], "flat", True, True),
        ([1, 10, 100], "linear", False, True),
        ([1, 3, 10], "linear", False, True),
        ([1, 100, 10_000], "N^2.00", False, False),
        ([100, 10, 1], "flat", True, True),
    ],
)
def test_growth_is_told_and_judged(values, grows, flat, linear):
    assert row(values, "flat").grows == grows
    assert (row(values, "flat").good, row(values, "linear").good) == (flat, linear)


def test_a_figure_may_be_too_large_or_too_small_to_matter():
    assert row([5, 5, 5], "flat", most=5).good
    assert not row([5, 5, 5], "flat", most=4).good
    assert row([0.001, 0.01, 0.09], "flat", most=1, negligible=0.1).good
    one = Row("part", "what", "s", [10.0], [3.0], "flat", 4)
    assert one.grows == "one size alone" and one.good


def test_a_simulated_corpus_is_as_large_as_it_says_and_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(simulated, "AT_A_TIME", 16)
    known = simulated.vocabulary(tmp_path / "vocabulary")
    data = Packed(simulated.corpus(tmp_path / "corpus", known, 40), known)
    assert len(data) == 40
    assert data.units.mean() == pytest.approx(simulated.UNITS_EACH, rel=0.2)
    assert data[39].name == "00000039" and data.find("00000039").tolist() == [39]
    for one in data:
        assert known.first_piece <= min(one.units) and max(one.units) < known.size
        assert len(one.letters) and max(one.letters) < len(known.alphabet)
    a_corpus = scale._bytes(data.directory)
    assert a_corpus / 40 < simulated.BYTES_EACH + 200, "files of a few bytes have headers"


def test_one_worker_is_measured_at_a_step(tmp_path):
    known = simulated.vocabulary(tmp_path / "vocabulary")
    corpus = simulated.corpus(tmp_path / "corpus", known, 60)
    phase = {"name": "simulated", "steps": 6, "mixture": scale.MIXTURE}
    told = scale.Train(**{**scale.TRAIN, "micro_batches": 2}, phases=[phase])
    order = Loading(
        str(corpus), str(tmp_path / "vocabulary"), told.model_dump(mode="json"), 1, 5, 2
    )
    found = loaded.measured(order)
    assert 0 < found["tokens"] <= 2 * scale.TRAIN["micro_batch_tokens"]
    assert found["private_mb"] > 10 and found["shared_mb"] > 0 and found["peak_mb"] > 10


def test_a_full_disk_makes_the_largest_corpus_smaller_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(scale.shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000_000_000))
    counts, said = scale._affordable(tmp_path, [100, 1000, 10**9])
    assert counts[:2] == [100, 1000] and 10**6 < counts[2] < 10**8
    assert said == [
        f"Training data: 10 GB of disk are free, which is room for {counts[2]:,} of "
        "1,000,000,000 utterances."
    ]
    assert scale._affordable(tmp_path, [100, 1000]) == ([100, 1000], [])


def test_every_part_gives_rows_that_are_shown_and_written_as_json(tmp_path, monkeypatch, capsys):
    def part(directory, sizes, tell):
        assert directory.is_dir() and sizes is SMALL
        return [row([5, 5, 5], "flat", 9), row([1, 100, 10_000], "linear")], ["A sentence."]

    monkeypatch.setattr(scale, "PARTS", {"some part": part})
    found = scale.measure(tmp_path, SMALL)
    assert json.loads(json.dumps(found)) == found
    assert found["scale.growth"] == {"good": 1, "rows": 2}
    scale.show(found)
    told = capsys.readouterr().out
    assert "1 of 2" in told and "missed" in told and "A sentence." in told and "N^2.00" in told


@pytest.mark.slow
def test_training_data_is_measured_at_every_size(tmp_path):
    rows, said = scale.training_data(tmp_path, SMALL, Progress())
    assert {len(one.values) for one in rows} == {3}
    assert said and all(value > 0 for one in rows for value in one.values)
