"""What an evaluation writes about transcripts made by hand; no model, no cluster."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from transcripts import transcribed

from jobs import evaluate, evaluation_tables, stage
from jobs.evaluate import EvaluationMode, Result

STORE = SimpleNamespace(summary={"entries": 9})
PLAIN = EvaluationMode("none")
KNN = EvaluationMode("knn", "multimodal", STORE)
BOTH = EvaluationMode("both", "multimodal", STORE)


def result(way: EvaluationMode, *texts: str, entities: tuple[str, ...] = ("anna smith",)) -> Result:
    heard = [transcribed(number, text, entities=entities) for number, text in enumerate(texts)]
    return evaluate._score(way, heard, 20, 0)


RIGHT, WRONG = "call anna smith now", "call hannah smith now please"


@pytest.fixture
def results() -> list[Result]:
    return [
        result(PLAIN, *[WRONG] * 8),
        result(KNN, *[RIGHT] * 7, WRONG),
        result(BOTH, *[RIGHT] * 8),
    ]


def written(directory: Path, results: list[Result]) -> tuple[dict, str]:
    evaluation_tables.write(directory, results, evaluate._compare(results, 20, 0), "test", None)
    page = (directory / "results.md").read_text()
    return json.loads((directory / "results.json").read_text()), page


def test_entities_are_scored_in_every_mode(tmp_path, results):
    found, page = written(tmp_path, results)
    plain, knn, both = found["rows"]
    assert (plain["entity_recall"], plain["entity_precision"], plain["entity_f1"]) == (0, None, 0)
    assert (knn["entity_recall"], knn["entity_precision"]) == (7 / 8, 1.0)
    assert (plain["entity_wer"], plain["other_wer"]) == (8 / 16, 8 / 16)
    assert (both["entity_wer"], both["other_wer"], both["wer"]) == (0, 0, 0)
    for row in found["rows"]:
        for kind in ("substitutions", "deletions", "insertions", "words"):
            assert row[f"entity_{kind}"] + row[f"other_{kind}"] == row[kind]
        assert "| " + " | ".join(evaluation_tables.entity_cells(row)) + " |" in page
    assert "8 entities." in page


def test_phrases_that_came_with_an_utterance_may_be_heard_in_vain():
    heard = [transcribed(0, "call bob now"), transcribed(1, "call bob now")]
    lists = {"u0": ["bob"], "u1": ["joe"]}
    assert evaluate._score(KNN, heard, 5, 0, lists).row["entity_false_alarms"] == 1
    assert evaluate._score(KNN, heard, 5, 0).row["entity_false_alarms"] == 0


def test_every_pair_of_modes_is_compared(tmp_path, results):
    found, page = written(tmp_path, results)
    names = [(one["a"], one["b"]) for one in found["comparisons"]]
    assert names == [
        ("no retrieval", "knn: multimodal"),
        ("no retrieval", "both: multimodal"),
        ("knn: multimodal", "both: multimodal"),
    ]
    first = found["comparisons"][0]
    rows = found["rows"]
    assert first["difference"]["delta"] == pytest.approx(rows[0]["wer"] - rows[1]["wer"])
    assert first["p"] < 0.05 <= found["comparisons"][2]["p"]
    for one in found["comparisons"]:
        assert one["p_holm"] >= one["p"]
        assert "| " + " | ".join(evaluation_tables.comparison_cells(one)) + " |" in page
    assert "uncorrected" in page and "for the 3 pairs" in page


def test_one_mode_is_compared_with_nothing(tmp_path):
    found, page = written(tmp_path, [result(PLAIN, WRONG)])
    assert found["comparisons"] == [] and "Differences" not in page


def test_without_entities_nothing_is_said_of_them(tmp_path):
    found, page = written(tmp_path, [result(PLAIN, RIGHT, entities=())])
    [row] = found["rows"]
    assert row["entity_f1"] is row["other_wer"] is row["entities"] is None
    assert "entities" not in page
    assert evaluation_tables.entity_cells(row) == ["no retrieval", *["–"] * 9]


def shown(directory: Path) -> str:
    with stage.console.capture() as captured:
        evaluation_tables.show(SimpleNamespace(path=directory))
    return captured.get()


def test_the_terminal_shows_entities_and_differences(tmp_path, results):
    written(tmp_path, results)
    assert "Entities" in shown(tmp_path) and "Differences" in shown(tmp_path)


def test_an_evaluation_of_an_older_version_is_shown_as_well(tmp_path, results):
    found, _ = written(tmp_path, results)
    new = {name for name in found["rows"][0] if name.startswith(("entit", "other_"))}
    for row in found["rows"]:
        for name in new - {"entity_recall"}:
            del row[name]
    del found["comparisons"]
    (tmp_path / "results.json").write_text(json.dumps(found))
    text = shown(tmp_path)
    assert "both: multimodal" in text and "Entities" not in text and "Differences" not in text
    assert evaluation_tables.entity_cells(found["rows"][1])[1:3] == ["87.5%", "–"]


def test_metrics_that_are_tracked_are_keys_of_a_row(results):
    assert set(evaluate._METRICS) <= results[0].row.keys()
    assert replace(results[0], way=KNN).row["entries"] == 9
