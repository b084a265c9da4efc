"""The benchmark of searching and writing a datastore, small."""

import json
import sys

import numpy as np
import pytest

from jobs.benchmark import __main__, built, growth, keys, retrieve
from jobs.benchmark.built import Building
from jobs.benchmark.keys import SyntheticKeys
from jobs.benchmark.opened import Opening, measured
from jobs.benchmark.progress import Progress
from jobs.benchmark.retrieve import TARGETS, Sizes
from mmrag import shipped
from mmrag.retrieval.datastore import Datastore

SMALL = Sizes(
    growth=(1500, 21_000),
    searches=5,
    add_seconds=0.3,
    clips=4,
    rows=4,
    decodings=1,
    decode_seconds=1,
)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(keys, "SENTENCES", 300)


@pytest.fixture(scope="module")
def imitation():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "SENTENCES", 300)
        yield SyntheticKeys(shipped.TINY, seed=0)


def test_synthetic_keys_lie_as_near_to_each_other_as_the_models_own(imitation):
    assert imitation.likeness.synthetic == pytest.approx(imitation.likeness.real, rel=0.15)
    drawn = imitation.draw(500, seed=1)
    assert drawn.shape == (500, imitation.width) and np.isfinite(drawn).all()
    np.testing.assert_array_equal(drawn, imitation.draw(500, seed=1))
    assert not np.array_equal(drawn, imitation.draw(500, seed=2))


def test_a_synthetic_datastore_has_the_entries_it_was_asked_for(imitation, tmp_path, monkeypatch):
    monkeypatch.setattr(keys, "SEGMENT", 70)
    imitation.write(tmp_path, 150, seed=0)
    store = Datastore.open(tmp_path)
    assert store.entries == 150 and len(store.segments) == 3
    assert len(store.document_counts()[0]) == 4 + 4 + 1


def test_an_entrys_token_is_one_that_the_model_wrote_with_such_a_key(imitation):
    segment = imitation.segment("some", 500, seed=3)
    keys, real = imitation._drawn(500, seed=3)
    np.testing.assert_array_equal(segment.keys, keys)
    np.testing.assert_array_equal(segment.tokens, imitation._tokens[real])
    own = ((keys - imitation._real[real]) ** 2).sum(1)
    other = ((keys - imitation._real[np.roll(real, 1)]) ** 2).sum(1)
    assert np.median(own) < np.median(other) / 3


def test_a_datastore_that_is_there_stays_and_another_is_refused(imitation, tmp_path):
    imitation.write(tmp_path, 150, seed=0)
    before = (tmp_path / "segments.json").stat().st_mtime_ns
    imitation.write(tmp_path, 150, seed=0)
    assert (tmp_path / "segments.json").stat().st_mtime_ns == before
    for entries, seed in ((151, 0), (150, 1)):
        with pytest.raises(ValueError, match="holds 150 entries"):
            imitation.write(tmp_path, entries, seed)


def test_what_an_opened_shard_costs_is_measured_in_its_own_process(imitation, tmp_path):
    imitation.write(tmp_path, 200, seed=0)
    order = Building(str(tmp_path), str(tmp_path / "in-2"), 2, Progress())
    built.measured(order)
    found = measured(Opening(str(tmp_path), order.index, 1))
    assert found["seconds"] > 0 and found["entries"] == 100
    assert measured(Opening(str(tmp_path), order.index, 2))["entries"] == 200


def test_an_index_is_built_again_only_for_other_code_or_entries(imitation, tmp_path, monkeypatch):
    orders = []

    class Child:
        """As `Process`, in this one."""

        def __init__(self, module, told, **environment):
            orders.append(told)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def result(self):
            return built.measured(orders[-1])

    monkeypatch.setattr(built, "Process", Child)
    imitation.write(tmp_path / "a", 200, seed=0)
    order = Building(str(tmp_path / "a"), str(tmp_path / "a/in-2"), 2, Progress())
    first = built.built(order)
    assert first["peak_bytes"] > 1e6 and len(built.shards_of(order.index)) == 2
    assert built.built(order)["seconds"] == first["seconds"] and len(orders) == 1
    (tmp_path / "a/in-2/shard-00001/shard.json").unlink()
    (tmp_path / "a/in-2/shard-00001").rmdir()
    assert len(built.shards_of(order.index)) == 1
    built.built(order)
    assert len(orders) == 2 and len(built.shards_of(order.index)) == 2
    monkeypatch.setattr(built, "_code", lambda: "of tomorrow")
    built.built(order)
    built.built(order)
    assert len(orders) == 3


def test_the_plot_shows_both_ways_and_the_root_of_the_entries(tmp_path):
    sizes = (100, 400, 1600)
    rows = [{"entries": n, "ms_a_query": 0.1 * n**0.5, "flat_ms_a_query": 0.002 * n} for n in sizes]
    [axes] = growth.figure(rows).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert "entries" in axes.get_xlabel() and "milliseconds" in axes.get_ylabel()
    flat, ours, root = (line.get_ydata() for line in axes.get_lines())
    np.testing.assert_allclose(flat, [0.2, 0.8, 3.2])
    np.testing.assert_allclose(ours, [1, 2, 4])
    np.testing.assert_allclose(root, ours)
    growth.plot(tmp_path / "growth.svg", rows)
    assert "</svg>" in (tmp_path / "growth.svg").read_text()


def test_what_cannot_be_plotted_or_is_of_another_part_is_refused_at_once(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(retrieve, "measure", lambda *_: pytest.fail("measured"))
    for arguments, told in (
        (["retrieve", "--plot", "growth.txt"], ".svg or .png"),
        (["retrieve", "--plot", str(tmp_path / "nowhere" / "growth.svg")], "no directory"),
        (["retrieve", "--entries", "0"], "--entries 0"),
        (["serve", "--plot", "growth.svg"], "--plot is an option of retrieve"),
        (["retrieve", "--url", "http://x"], "--url is an option of serve"),
    ):
        monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
        with pytest.raises(SystemExit) as end:
            __main__.main()
        assert told in str(end.value) + capsys.readouterr().err


def test_ten_million_entries_have_targets_of_their_own(capsys):
    one = dict.fromkeys(("flat_ms_a_query", "p50_ms", "p99_ms", "codes_scanned", "keys_read"), 1.0)
    one |= {"ms_a_query": 1.0, "recall_at_16": 0.96, "why": "ivfsq: so many"}
    one |= {"build_seconds": 9.0, "build_peak_bytes": 4e9}
    one |= {"keys_saved_by_longer_codes": 0.875, "recall_lost_by_longer_codes": 0.001}
    results = dict.fromkeys(TARGETS) | {"width": 8, "speedup_over_flat": 30.0, "recall_at_16": 0.96}
    results["neighbour_distance"] = {"real": 1.0, "synthetic": 1.0}
    speeds = dict.fromkeys(("ours", "alone", "flat", "ivfpq"), 100.0)
    results["decoded"] = {"tokens_per_second": speeds, "ivfpq_recall": 0.5, "knn": {"k": 16}}
    results["decoded"] |= {"transcripts_alike": 1, "transcripts_compared": 1}
    for entries, line in ((10**6, "≥ 20 at 1 M     met"), (10**7, "≥ 100 at 10 M     missed")):
        retrieve.show(results | {"growth": [one | {"entries": entries}]})
        printed = " ".join(capsys.readouterr().out.split())
        assert " ".join(line.split()) in printed
        assert "leave 88% of keys unread and lose 0.0010 of recall" in printed


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_everything_is_measured_and_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(retrieve, "QUICK", SMALL)
    plotted = tmp_path / "growth.png"
    given = ["--json", "--plot", str(plotted), "--directory", str(tmp_path / "kept")]
    monkeypatch.setattr(sys, "argv", ["benchmark", "retrieve", "--quick", *given])
    __main__.main()
    results = json.loads(capsys.readouterr().out)
    small, large = results["growth"]
    assert small["why"].startswith("flat") and large["why"].startswith("ivfsq")
    assert small["recall_at_16"] == 1 and large["recall_at_16"] > 0.9
    assert large["codes_scanned"] <= large["entries"] and large["keys_read"] >= 16
    assert plotted.stat().st_size > 10_000
    speeds, ratio = results["decoded"]["tokens_per_second"], results["against_knn_transformers"]
    assert min(speeds.values()) > 0 and 0 < results["decoded"]["ivfpq_recall"] <= 1
    assert ratio == pytest.approx(speeds["ours"] / max(speeds["flat"], speeds["ivfpq"]), rel=0.01)
    assert results["decoded"]["transcripts_compared"] >= 1
    assert (tmp_path / "kept/of-21000/in-8/built.json").exists()
    assert set(TARGETS) <= set(results) and results["search_p99_while_compacting"] > 0
    retrieve.show(results)
    printed = capsys.readouterr().out
    assert "21,000" in printed and all(target.title[:20] in printed for target in TARGETS.values())


def test_the_largest_datastore_may_be_chosen(monkeypatch):
    asked = []
    monkeypatch.setattr(retrieve, "measure", lambda _, sizes, kept: asked.append(sizes) or {})
    for arguments in (["--entries", "500000"], ["--quick"]):
        monkeypatch.setattr(sys, "argv", ["benchmark", "retrieve", "--json", *arguments])
        __main__.main()
    assert [sizes.growth for sizes in asked] == [(100_000, 316_000, 500_000), (50_000, 200_000)]
