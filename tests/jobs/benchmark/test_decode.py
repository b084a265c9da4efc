"""The measurements of decoding, with a tiny model."""

import json
import sys
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest
import torch

from jobs.benchmark import __main__, decode, growth, keys, performance, scaling
from jobs.benchmark.bandwidth import read_bandwidth, weight_bytes
from jobs.benchmark.decode import TARGETS
from jobs.benchmark.repeats import exponent, interleaved, ratio, told, worst
from jobs.benchmark.targets import rounded, verdict
from jobs.benchmark.transformers_peer import TransformersPeer
from jobs.benchmark.workload import Ids, answered, language_model, requests, stepped
from mmrag.config import LanguageModel
from mmrag.decoding.engine import Engine

SHAPE = LanguageModel(width=32, layers=2, heads=2, kv_heads=2, feed_forward=48, tied=False)
VOCABULARY = 105
SMALL = replace(
    decode.QUICK,
    lm=SHAPE,
    vocabulary=VOCABULARY,
    requests=5,
    prompts=(4, 20),
    outputs=(3, 6),
    batches=(2, 4),
    continuous=(2,),
    rows=(4,),
    repeats=1,
    phrases=(3, 30),
    axes=replace(
        decode.QUICK.axes,
        batch=(1, 2),
        length=(8, 16),
        layers=(1, 2),
        datastore=(300, 900),
        steps=4,
    ),
    bandwidth_bytes=1 << 20,
)


ELSEWHERE = {
    "searches": [
        {"rule": "never", "searches_per_token": 1.0, "wer": [0.1, 0.05, 0.2], "changed": 0}
        | {"clips": 9}
    ],
    "reads": [
        {"rule": "4 tokens", "searches_per_token": 0.25, "wer": [0.1, 0.05, 0.2], "changed": 1}
        | {"clips": 9}
    ],
    "knn_unspared": {"local": ratio([3], [2])},
    "read_for": {"1": ratio([3], [2])},
}
"""What other modules measure, made up."""


@pytest.fixture(scope="module")
def lm():
    return language_model(SHAPE, VOCABULARY, torch.float32, seed=3)


@pytest.fixture(scope="module")
def asked():
    return requests(7, (4, 30), (2, 12), VOCABULARY, seed=2)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    directory = tmp_path_factory.mktemp("decode")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "SENTENCES", 300)
        patch.setattr(decode, "OTHERS", ())
        return decode.measure(directory, SMALL) | ELSEWHERE


def test_who_speaks_for_longer_says_more(asked):
    many = requests(200, (50, 400), (10, 100), VOCABULARY, seed=1)
    assert many == requests(200, (50, 400), (10, 100), VOCABULARY, seed=1)
    lengths = torch.tensor([[len(one.prompt), one.tokens] for one in many]).T.float()
    assert lengths[0].min() >= 50 and lengths[0].max() <= 400
    assert lengths[1].min() >= 10 and lengths[1].max() <= 100
    assert torch.corrcoef(lengths)[0, 1] > 0.8
    assert lengths[0].tolist() != sorted(lengths[0].tolist())


def test_the_engine_and_transformers_write_the_same_tokens(lm, asked, tmp_path):
    with closing(Engine(lm, Ids(VOCABULARY), 3)) as engine:
        ours = answered(engine, asked)
    assert [len(tokens) for tokens in ours] == [one.tokens for one in asked]
    assert len({tuple(tokens) for tokens in ours}) > len(asked) / 2, "what was read matters"
    peer = TransformersPeer(tmp_path, lm, torch.float32)
    for batch in (1, 3, 7):
        assert peer.generate(asked, batch) == ours
    with peer.continuous(asked, rows=3) as answer:
        assert answer() == ours
        assert answer() == ours


def test_as_many_steps_are_timed_as_there_are_tokens_but_for_the_first(lm, asked):
    ticks = iter(range(1000))
    read, times = stepped(lm, asked[:2], lambda: next(ticks), warm=1)
    assert read == 1
    assert len(times) == max(0, asked[0].tokens - 2)


def test_ways_take_turns():
    turns, heard = [], []
    ways = {name: lambda name=name: turns.append(name) for name in "ab"}
    seconds = interleaved(ways, 3, heard.append)
    assert turns == list("ababab") and len(heard) == 3
    assert {name: len(each) for name, each in seconds.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_of_what_was_measured_side_by_side():
    found = ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])
    assert found == {"median": 2.0, "least": 1.0, "most": 3.0, "repeats": 3}
    assert told(found) == "2.00 (1.00 to 3.00)"
    most = worst({"few": ratio([1], [1]), "many": ratio([3], [2])})
    assert told(most) == "1.50 (1.50 to 1.50), many"


def test_the_exponent_is_the_power_of_the_sizes():
    sizes = [1, 4, 16, 64]
    assert exponent(sizes, [3 * size**0.5 for size in sizes]) == pytest.approx(0.5)


def test_the_weights_of_a_step_are_all_but_an_embedding_that_is_looked_up(lm):
    tied = language_model(SHAPE.model_copy(update={"tied": True}), VOCABULARY, torch.float32, 0)
    blocks = sum(p.numel() for p in lm.blocks.parameters()) + SHAPE.width
    for one in (lm, tied):
        assert weight_bytes(one) == 4 * (blocks + VOCABULARY * SHAPE.width)
    assert read_bandwidth(1 << 16) > 0


def test_every_field_is_measured_or_left_to_another_module(results):
    measured = {key for key in TARGETS if results[key] is not None}
    assert measured == {
        *("decode.vs_generate", "decode.vs_continuous_batching", "decode.single_vs_generate"),
        *("decode.vs_roofline", "decode.beam_cost", "decode.phrase_overhead"),
    }
    assert all(results[key]["least"] > 0 for key in measured)
    ways = [(one["way"], one["at_a_time"]) for one in results["swept"]]
    continuous = "continuous batching"
    engines = [("engine, int8", 4), ("engine", 4)]
    assert ways == [*engines, ("generate", 2), ("generate", 4), (continuous, 2)]
    assert results["float32"]["alike"] == results["float32"]["compared"] > 0
    assert set(results["decode.phrase_overhead"]["each"]) == {"3 phrases", "30 phrases"}


def test_what_others_measure_is_asked_for(monkeypatch, tmp_path):
    found = {"decode.knn_overhead": ratio([1], [1])}
    monkeypatch.setattr(decode, "OTHERS", (lambda directory, quick, tell: found,))
    for part in ("throughput", "single", "roofline", "beams", "phrases"):
        monkeypatch.setattr(decode.Decoding, part, stub(part))
    monkeypatch.setattr(scaling, "measure", lambda *_: {})
    assert decode.measure(tmp_path, SMALL)["decode.knn_overhead"] == found["decode.knn_overhead"]


def stub(part):
    """A measurement that finds nothing."""

    def measured(self):
        return {}

    measured.__doc__ = part
    return measured


def test_a_peer_that_cannot_run_here_is_a_row_without_a_figure(lm, monkeypatch, tmp_path):
    @contextmanager
    def refuses(*_):
        raise RuntimeError("no accelerator")
        yield

    monkeypatch.setattr(TransformersPeer, "continuous", refuses)
    heard = []
    found = decode.Decoding(tmp_path, SMALL, heard.append).throughput()
    assert "decode.vs_continuous_batching" not in found
    assert "no accelerator" in found["reasons"]["decode.vs_continuous_batching"]
    assert list(found["throughput"]) == ["engine, int8", "engine", "generate"]


def test_the_tables_show_every_target_and_what_the_model_computes_in(results, capsys):
    decode.show(results)
    shown = capsys.readouterr().out
    assert shown.count("not measured") == 4
    for text in ("tokens a second", "in float32", "Quick: a tiny model", "GB/s", "300: "):
        assert text in shown


def test_the_page_marks_what_is_missed_and_says_why(results, tmp_path):
    missed = {**results, "decode.beam_cost": ratio([3], [1])}
    missed["decode.single_vs_generate"] = ratio([1], [10])
    performance.write(tmp_path, "decode", {**missed, "reasons": {"decode.beam_cost": "it pays"}})
    page = (tmp_path / "performance.md").read_text()
    [beams] = [line for line in page.splitlines() if line.startswith("| `decode.beam_cost`")]
    assert "**missed**" in beams and "3.00 (3.00 to 3.00)" in beams and "≤ 2" in beams
    assert "* `decode.beam_cost` missed: it pays." in page
    assert f"* `decode.knn_overhead` not measured: {performance.UNEXPLAINED}." in page
    assert "* `decode.single_vs_generate`" not in page
    assert (tmp_path / "performance.png").stat().st_size > 1000


def test_a_reason_outlives_the_next_measurement(results, tmp_path):
    performance.write(tmp_path, "decode", {**results, "decode.beam_cost": ratio([3], [1])})
    file = tmp_path / "performance.json"
    figures = json.loads(file.read_text())
    assert figures["decode"]["requests"] == 5
    file.write_text(json.dumps({**figures, "reasons": {"decode.beam_cost": "it pays"}}))
    performance.rewrite(tmp_path)
    assert "missed: it pays" in (tmp_path / "performance.md").read_text()
    performance.write(tmp_path, "decode", {**results, "decode.beam_cost": ratio([4], [1])})
    assert "missed: it pays" in (tmp_path / "performance.md").read_text()


def test_the_page_is_the_same_from_what_was_kept(results):
    kept = json.loads(json.dumps(rounded(results)))
    assert {key: verdict(TARGETS[key], kept[key]) for key in TARGETS} == {
        key: verdict(TARGETS[key], rounded(results)[key]) for key in TARGETS
    }
    assert decode.grids(kept) == decode.grids(rounded(results))


def test_the_plot_has_a_line_with_the_exponent_beside_what_was_measured():
    sizes = [1, 10, 100]
    one = {"title": "batch", "sizes": sizes, "ms": [2, 20, 200], "exponent": 1.0}
    figure = growth.panels({"batch": one, "layers": {**one, "title": "layers"}})
    measured, line = figure.axes[0].get_lines()
    assert line.get_ydata() == pytest.approx(measured.get_ydata())
    assert [axes.get_xlabel() for axes in figure.axes] == ["batch", "layers"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["phrases", "--docs", "docs"], "--docs is an option of decode"),
        (["decode", "--docs", "nowhere"], "no directory nowhere"),
    ],
)
def test_a_page_is_written_of_its_subjects_where_there_is_a_place_for_it(
    monkeypatch, capsys, arguments, said
):
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    with pytest.raises(SystemExit) as stopped:
        __main__.main()
    assert said in capsys.readouterr().err + str(stopped.value)


def test_a_measurement_goes_to_the_page_and_to_the_terminal(results, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(decode, "measure", lambda _, sizes: {**results, "quick": sizes.quick})
    arguments = ["benchmark", "decode", "--quick", "--json", "--docs", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    __main__.main()
    assert json.loads(capsys.readouterr().out)["requests"] == 5
    assert "## Decoding" in (tmp_path / "performance.md").read_text()
