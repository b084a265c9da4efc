"""The paper's experiments at miniature size: every task, every row, from what the demo made."""

import json
import shutil
from pathlib import Path

import pytest

from jobs import stage
from jobs.reproduce.experiments import TASKS
from jobs.reproduce.run import run
from mmrag.config import ConfigError, Experiment, Reproduce, Workers
from mmrag.corpora.voices import flite
from mmrag.score import word_error_rate

pytestmark = [pytest.mark.ray, pytest.mark.slow]

KEYS = {
    *("task", "model", "mode", "datastore", "phrases", "entries", "setting", "utterances"),
    *("wer", "wer_low", "wer_high", "entity_recall", "recall_at_k"),
    *("seconds_of_audio", "decode_seconds", "keys_mb", "empty"),
    *("inserted", "copied", "looped"),
    *("bad", "bad_unclear", "good", "good_unclear", "calibration_error"),
    *("entities", "entity_precision", "entity_f1", "entity_false_alarms"),
    *(
        f"{words}_{name}"
        for words in ("entity", "other")
        for name in (
            *("wer", "wer_low", "wer_high", "words"),
            *("substitutions", "deletions", "insertions"),
        )
    ),
}
CONDITIONS = ("noise-10", "spanish", *(("flite-slt",) if flite.installed() else ()))
SETTINGS = {
    "utterances": 4,
    "sweep_utterances": 2,
    "phrases": (2, 100),
    "carriers": ("{phrase}", "call {phrase}"),
    "mentions": 1,
    "boost": (1.0, 2.0),
    "shares": (0, 1),
    "sizes": (10, 40, 10**9),
    "strides": (1, 4),
    "documents": (1, 3),
    "conditions": CONDITIONS,
}


def mine(experiment: Experiment, docs: Path) -> Experiment:
    """The experiment with a small section `reproduce`, and a grid of one setting."""
    two = Workers(count=2, num_cpus=0.8)
    return experiment.model_copy(
        update={
            "reproduce": Reproduce(docs=docs, **SETTINGS),
            "evaluate": experiment.evaluate.model_copy(update={"workers": two}),
            "tune": experiment.tune.model_copy(
                update={
                    "k": (4,),
                    "weight": (0.5,),
                    "attention": experiment.tune.attention[:1],
                    "both_weight": (0.2,),
                }
            ),
        }
    )


@pytest.fixture(scope="module")
def reproduced(adapted, workspace, tmp_path_factory) -> tuple[Experiment, list[dict], list[dict]]:
    """(the experiment, rows of results.json, transcripts behind them)."""
    home = tmp_path_factory.mktemp("reproduce")
    shutil.copytree(workspace.path / "corpus", home / "w" / "corpus")
    for name in ("hubert", "codebook", "tokens", "lm", "adapter"):
        shutil.copytree(adapted.path / name, home / "w" / name)
    experiment = mine(adapted.experiment, home / "docs")
    experiment = experiment.model_copy(update={"workspace": home / "w"})
    run(experiment)
    rows = json.loads((home / "docs" / "results.json").read_text())
    heard = [
        json.loads(line)
        for file in sorted((home / "w" / "results").glob("*/transcripts.jsonl"))
        for line in file.open()
    ]
    return experiment, rows, heard


def test_there_are_rows_of_every_task_with_the_agreed_keys(reproduced):
    _, rows, _ = reproduced
    # Of what the corpus does not have.
    absent = ("spoken_squad", "sentences", "people", "synthesizers")
    tasks = [*(task for task in TASKS if task not in absent), "end_to_end", "no_speech"]
    assert list(dict.fromkeys(row["task"] for row in rows)) == tasks
    assert all(row.keys() == KEYS for row in rows)


def test_what_identifies_a_row_is_there_once(reproduced):
    _, rows, _ = reproduced
    about = ("task", "mode", "datastore", "phrases", "entries", "setting")
    identities = [tuple(row[key] for key in about) for row in rows]
    assert len(set(identities)) == len(identities)
    domain = {(r["mode"], r["datastore"]) for r in rows if r["task"] == "domain"}
    assert domain == {("none", None), ("knn", "text")} | {
        (m, s) for m in ("knn", "cross_attention", "both") for s in ("multimodal", "spoken")
    }
    lists = {(r["mode"], r["phrases"]) for r in rows if r["task"] == "dynamic_context"}
    assert lists == {("none", None)} | {
        (m, n) for m in ("knn", "cross_attention", "both", "boost", "prompt") for n in (2, 100)
    }
    unsaid = {(r["mode"], r["phrases"]) for r in rows if r["task"] == "unsaid_phrases"}
    assert unsaid == {one for one in lists if one[0] != "prompt"}
    other = {row["setting"] for row in rows if row["task"] == "robustness"}
    assert other == set(CONDITIONS)


def test_error_rates_are_those_of_the_transcripts(reproduced):
    _, rows, heard = reproduced
    by_point: dict[tuple, list[dict]] = {}
    for one in heard:
        by_point.setdefault((one["task"], one["point"]), []).append(one)
    rates = {
        (task, word_error_rate([o["reference"] for o in own], [o["text"] for o in own], 1).rate)
        for (task, _), own in by_point.items()
    }
    spoken = [row for row in rows if row["task"] not in ("end_to_end", "no_speech")]
    assert len(by_point) == len(spoken)
    for row in spoken:
        assert (row["task"], row["wer"]) in rates
        assert row["wer_low"] <= row["wer"] <= row["wer_high"]


def test_a_size_that_the_corpus_does_not_have_is_left_out(reproduced):
    _, rows, _ = reproduced
    assert [row["entries"] for row in rows if row["task"] == "size"] == [10, 40]


def test_the_page_holds_each_tasks_table_and_every_plot_it_shows(reproduced):
    experiment, rows, _ = reproduced
    docs = experiment.reproduce.docs
    page = (docs / "results.md").read_text()
    shown = [line.split("(")[1].rstrip(")") for line in page.splitlines() if line[:2] == "!["]
    assert shown and all((docs / name).read_bytes()[:4] == b"\x89PNG" for name in shown)
    assert page.count("\n## ") == 2 + len({row["task"] for row in rows})


def test_clips_in_which_nobody_speaks_have_no_words(reproduced):
    _, rows, _ = reproduced
    silent = [row for row in rows if row["task"] == "no_speech"]
    assert {row["mode"] for row in silent} == {"none", "cross_attention"}
    assert all(row["empty"] >= 0.98 for row in silent if row["setting"].endswith("on"))
    assert all(row["wer"] is None and row["utterances"] == 100 for row in silent)


def test_a_finished_task_is_not_done_again(reproduced):
    experiment, rows, _ = reproduced
    with stage.console.capture() as captured:
        run(experiment)
    for task in TASKS:
        assert f"results/{task}: nothing to do" in captured.get()
    assert json.loads((experiment.reproduce.docs / "results.json").read_text()) == rows


def test_an_experiment_without_the_section_is_refused(experiment):
    with pytest.raises(ConfigError, match="no section `reproduce`"):
        run(experiment)
