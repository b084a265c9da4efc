"""The results page from rows made by hand; no model, no cluster."""

import json
import struct
from pathlib import Path

import pytest

from jobs import stage
from jobs.reproduce import report, targets
from jobs.reproduce.end_to_end import ALONE
from jobs.reproduce.experiments import TASKS
from jobs.reproduce.rows import DETECTED as SPEECH_DETECTED
from mmrag.config import Experiment, Reproduce

MULTIMODAL, TEXT, SPOKEN = ("knn", "multimodal"), ("knn", "text"), ("knn", "spoken")
REFERENCES = {f"u{number}": "call mary lopez now" for number in range(12)}


def row(task: str, mode: str, datastore: str | None = None, **changes) -> dict:
    wer = changes.pop("wer", 0.25)
    return {
        "task": task,
        "mode": mode,
        "datastore": datastore,
        "phrases": None,
        "entries": None,
        "setting": None,
        "utterances": 12,
        "wer": wer,
        "wer_low": wer / 2,
        "wer_high": wer * 2,
        "entity_recall": None,
        "recall_at_k": None,
        "seconds_of_audio": 20.0,
        "decode_seconds": 5.0,
        "keys_mb": None,
        **changes,
    }


def results(**rates: float) -> list[dict]:
    """What the targets look at: no target is missed. `rates` names some of the word error rates."""
    wer = {
        "everyday": 0.05,
        "plain": 0.4,
        "multimodal": 0.1,
        "text": 0.3,
        "spoken": 0.11,
        "knn": 0.1,
        "boost": 0.2,
        "spotting": 0.1,
        "prompt": 0.3,
        "right": 0.25,
        "wrong": 0.25,
    } | rates
    return [
        row("everyday", "none", wer=wer["everyday"]),
        row("domain", "none", wer=wer["plain"]),
        *(row("domain", "knn", name, entries=9, wer=wer[name]) for name in ("multimodal", "text")),
        row("domain", "knn", "spoken", entries=9, wer=wer["spoken"]),
        row("dynamic_context", "none"),
        *(
            row("dynamic_context", mode, store, phrases=count, wer=wer[mode] * factor)
            for count, factor in ((100, 1), (1000, 2), (10, 0.5))
            for mode, store in (
                *(("knn", "spoken"), ("boost", None), ("spotting", None), ("prompt", None)),
            )
        ),
        row("wrong_datastore", "none", wer=wer["right"]),
        row("wrong_datastore", "knn", "wrong", wer=wer["wrong"]),
    ]


def reading_results(**rates: float) -> list[dict]:
    """Rows of cross-attention and both beside `results()`; no target is missed."""
    wer = {"read": 0.09, "both": 0.08, "list": 0.09, "most": 0.095, "told": 0.25} | rates
    recalled = rates.get("recalled", 0.95)
    cross, spoken = "cross_attention", "spoken"
    return [
        row("domain", cross, "multimodal", wer=wer["read"]),
        row("domain", "both", "multimodal", wer=wer["both"]),
        row("domain", "spotting", "multimodal", wer=wer["both"]),
        *(
            row("dynamic_context", cross, spoken, phrases=n, wer=rate, entity_recall=recalled)
            for n, rate in ((10, wer["list"]), (100, wer["list"]), (1000, wer["most"]))
        ),
        row("dynamic_context", "both", spoken, phrases=100, wer=wer["both"]),
        row("wrong_datastore", cross, "wrong", wer=wer["told"]),
        row("wrong_datastore", "both", "wrong", wer=wer["told"]),
        row("no_speech", "none", setting=SPEECH_DETECTED, wer=0.1, empty=rates.get("empty", 0.98)),
    ]


@pytest.mark.parametrize(
    ("target", "rates", "answer"),
    [
        (0, {"list": 0.125}, "yes"),
        (0, {"list": 0.1251}, "no"),
        (1, {"recalled": 0.9}, "yes"),
        (1, {"recalled": 0.8999}, "no"),
        (2, {"read": 0.0999, "list": 0.0999}, "yes"),
        (2, {"read": 0.1}, "no"),
        (2, {"list": 0.1}, "no"),
        (3, {"both": 0.09}, "yes"),
        (3, {"both": 0.0901}, "no"),
        (4, {"list": 0.09, "most": 0.0989}, "yes"),
        (4, {"list": 0.09, "most": 0.0991}, "no"),
        (5, {"told": 0.2524}, "yes"),
        (5, {"told": 0.2526}, "no"),
        (7, {"empty": 0.97}, "no"),
    ],
)
def test_a_target_of_cross_attention_is_reached_up_to_its_border(target, rates, answer):
    answers = reached([*results(), *reading_results(**rates)])
    assert len(answers) == 6 + 8
    assert answers[6 + target] == answer


def test_what_nobody_said_is_counted_where_something_was_told():
    rates = {"inserted": 0.01, "copied": 0.002, "looped": 0.0}
    rows = [row(task, "knn", "text", **rates) for task in ("domain", "size", "wrong_datastore")]
    header, *cells = report.hallucinations(rows)
    assert [line[0] for line in cells] == [
        report.TITLES["domain"],
        report.TITLES["wrong_datastore"],
    ]
    assert cells[0][header.index("inserted") :] == ("1.00%", "0.20%", "0.00%")


def transcripts(**wrong: int) -> dict:
    """What was heard with each datastore of the domain: how many utterances have one error."""
    counts = {"multimodal": 0, "text": 6, "spoken": 1} | wrong
    heard = {}
    for name, count in counts.items():
        for number, (utterance, reference) in enumerate(REFERENCES.items()):
            said = reference.replace("lopez", "loped") if number < count else reference
            heard["domain", f"knn {name} 9", utterance] = (reference, said)
    return heard


def reached(rows: list[dict], heard: dict | None = None) -> list[str]:
    return [target[-1] for target in targets.retrieval(rows, heard or transcripts())]


@pytest.fixture
def own(experiment: Experiment, tmp_path: Path) -> Experiment:
    """The experiment with a results page of this test's own."""
    section = Reproduce(
        docs=tmp_path / "docs",
        utterances=12,
        sweep_utterances=12,
        phrases=(10, 100, 1000),
        carriers=("{phrase}",),
        mentions=1,
        boost=(1.0,),
        shares=(0, 1),
        sizes=(10, 100),
        strides=(1,),
        documents=(1,),
        conditions=("telephone",),
    )
    return experiment.model_copy(update={"reproduce": section})


def test_a_table_in_markdown_has_a_rule_under_its_header():
    assert report.markdown([("a", "b"), ("1", "2"), ("3", "–")]) == [
        "| a | b |",
        "| --- | --- |",
        "| 1 | 2 |",
        "| 3 | – |",
    ]
    assert report.markdown([("alone",)]) == ["| alone |", "| --- |"]


def test_columns_in_which_nothing_stands_are_left_out():
    plain = row("everyday", "none")
    always = ("mode", "utterances", "WER", "95 % interval", "× real time")
    assert report._table([plain]) == [always, ("none", "12", "25.0%", "12.5–50.0%", "0.250")]
    kept = report._table([plain, {**plain, "phrases": 10}])
    assert kept[0] == ("mode", "phrases", *always[1:])
    assert [line[1] for line in kept[1:]] == ["–", "10"]


@pytest.mark.parametrize(
    ("key", "value", "title", "shown"),
    [
        ("datastore", "text", "datastore", "text"),
        ("entries", 1_234_567, "entries", "1,234,567"),
        ("phrases", 1000, "phrases", "1,000"),
        ("setting", "flite-slt", "setting", "flite-slt"),
        ("entity_recall", 0.0, "entity recall", "0.0%"),
        ("entity_precision", 0.0, "entity precision", "0.0%"),
        ("entity_f1", 0.836, "entity F1", "83.6%"),
        ("recall_at_k", 1.0, "recall@k", "100.0%"),
        ("keys_mb", 0.04, "keys, MB", "0.0"),
        ("keys_mb", 12.345, "keys, MB", "12.3"),
    ],
)
def test_a_cell_shows_what_was_measured_even_if_it_is_zero(key, value, title, shown):
    header, cells = report._table([row("size", "knn", **{key: value})])
    assert cells[header.index(title)] == shown
    assert len(header) == len(cells) == 6


DETECTED = {
    "entity_recall": 0.8,
    "entity_precision": 0.9,
    "entity_f1": 0.847,
    **{
        f"entity_{name}": rate for name, rate in (("wer", 0.2), ("wer_low", 0.1), ("wer_high", 0.3))
    },
    **{f"other_{name}": rate for name, rate in (("wer", 0), ("wer_low", 0), ("wer_high", 0.015))},
}


def test_words_of_entities_and_other_words_have_their_own_error_rates():
    header, older, newer = report._table([row("domain", "none"), row("domain", "knn", **DETECTED)])
    cells = dict(zip(header, newer, strict=True))
    assert cells["WER, entity words"] == "20.0% (10.0–30.0%)"
    assert cells["WER, other words"] == "0.0% (0.0–1.5%)"
    assert [dict(zip(header, older, strict=True))[name] for name in report.DETECTION] == ["–"] * 4


def test_rows_of_an_older_version_have_a_page_without_the_new_columns(own):
    report.write(own, everything(), transcripts(), NOTES)
    page = (own.reproduce.docs / "results.md").read_text()
    assert not any(name in page for name in report.DETECTION)
    assert report.ENTITY_NOTE[0] not in page
    rows = [one | (DETECTED if one["task"] == "domain" else {}) for one in everything()]
    report.write(own, rows, transcripts(), NOTES)
    page = (own.reproduce.docs / "results.md").read_text()
    assert all(name in page for name in (*report.DETECTION, *report.ENTITY_NOTE))


def test_the_summary_has_a_column_once_a_row_fills_it():
    rows = results()
    assert report.summary(rows)[0] == "|  | utterances | WER | 95 % interval |"
    rows[1] |= DETECTED
    header = [name.strip() for name in report.summary(rows)[0].split("|")[1:-1]]
    assert header == ["", *(n for n in report.SUMMARY_COLUMNS if n != "recall@k")]


def test_every_target_is_reached_by_a_model_that_reaches_them():
    assert reached(results()) == ["yes"] * 6


@pytest.mark.parametrize(
    ("target", "rates", "answer"),
    [
        (0, {"everyday": 0.1}, "yes"),
        (0, {"everyday": 0.1001}, "no"),
        (1, {"plain": 0.5, "multimodal": 0.25}, "yes"),
        (1, {"plain": 0.5, "multimodal": 0.2501}, "no"),
        (1, {"plain": 0.5, "multimodal": 0.6}, "no"),
        (3, {"multimodal": 0.0, "text": 0.5, "spoken": 0.1}, "yes"),
        (3, {"multimodal": 0.0, "text": 0.5, "spoken": 0.1001}, "no"),
        (3, {"multimodal": 0.0, "text": 0.5, "spoken": 0.6}, "no"),
        (3, {"multimodal": 0.2, "text": 0.2, "spoken": 0.1}, "no"),
        (3, {"multimodal": 0.2, "text": 0.1, "spoken": 0.1}, "no"),
        (4, {"knn": 0.1999, "boost": 0.2, "prompt": 0.3}, "yes"),
        (4, {"knn": 0.2, "boost": 0.2, "prompt": 0.3}, "no"),
        (4, {"knn": 0.2, "boost": 0.3, "prompt": 0.2}, "no"),
        (5, {"right": 0.5, "wrong": 0.5099}, "yes"),
        (5, {"right": 0.5, "wrong": 0.5101}, "no"),
        (5, {"right": 0.5, "wrong": 0.3}, "yes"),
    ],
)
def test_a_target_is_reached_up_to_its_border_and_not_beyond(target, rates, answer):
    assert reached(results(**rates))[target] == answer


def test_two_percent_worse_is_within_the_target():
    assert reached(results(right=0.5, wrong=0.51))[5] == "yes"


@pytest.mark.parametrize("rates", [{"plain": 0.0}, {"right": 0.0}])
def test_a_model_that_makes_no_error_has_a_page_too(rates):
    assert len(reached(results(**rates))) == 6


@pytest.mark.parametrize(
    ("wrong", "answer"),
    [
        ({"multimodal": 0, "text": 9}, "yes"),
        ({"multimodal": 9, "text": 0}, "no"),
        ({"multimodal": 4, "text": 4}, "no"),
        ({"multimodal": 3, "text": 4}, "no"),  # the interval holds zero
    ],
)
def test_multimodal_beats_text_only_if_the_interval_is_clear_of_zero(wrong, answer):
    assert reached(results(), transcripts(**wrong))[2] == answer


def test_the_difference_pairs_the_domains_utterances_and_no_others():
    heard = transcripts(multimodal=3, text=6)
    stray = {
        ("paired_share", "knn multimodal 9 50%", "u0"): ("call mary", "something else entirely"),
        ("domain", "none", "u0"): ("call mary", "something else entirely"),
        ("domain", "knn spoken 9", "u99"): ("call mary", ""),
    }
    found = targets._difference({**stray, **heard}, "multimodal", "text")
    assert found.delta == pytest.approx((3 - 6) / (4 * len(REFERENCES)))
    backwards = dict(reversed({**stray, **heard}.items()))
    assert targets._difference(backwards, "multimodal", "text") == found


def test_a_target_says_what_was_measured():
    found = targets.retrieval(results(), transcripts(multimodal=3, text=6))
    assert [len(target) for target in found] == [4] * 6
    measured = [target[2] for target in found]
    assert measured[0] == "5.0%"
    assert measured[1] == "75% lower (40.0% → 10.0%)"
    assert measured[2].startswith("-6.2 points (-")
    assert measured[3] == "95%"
    assert measured[4] == "10.0%, 20.0%, 30.0%"
    assert measured[5] == "+0.0%"


def test_a_row_that_is_missing_is_named():
    rows = [one for one in results() if one["mode"] != "prompt"]
    with pytest.raises(ValueError, match=r"the results lack .*'dynamic_context', 'prompt'.* 100"):
        targets.retrieval(rows, transcripts())


NOTES = {
    "everyday": "Common words.",
    "domain": "Requests.",
    "dynamic_context": "Lists.",
    "wrong_datastore": "Another domain.",
    "size": "More entries.",
    "window": "Nobody measured this.",
    "robustness": "Noise.",
}


def everything() -> list[dict]:
    return [
        *results(),
        row("size", "knn", "multimodal", entries=10),
        row("size", "knn", "multimodal", entries=1000, wer=0.2),
        row("robustness", "none", setting="telephone", wer=0.0),
        row("robustness", "knn", "multimodal", setting="telephone"),
    ]


def sections(page: str) -> dict[str, list[str]]:
    """Title -> the lines below it."""
    parts = page.split("\n## ")[1:]
    return {title: lines for title, *lines in (part.splitlines() for part in parts)}


def test_the_page_has_the_targets_and_every_task_that_was_measured(own):
    report.write(own, everything(), transcripts(), NOTES)
    docs = own.reproduce.docs
    found = sections((docs / "results.md").read_text())
    assert list(found) == [
        "Targets",
        *("Everyday sentences", "Domain adaptation", "Dynamic context", "The wrong datastore"),
        *("Size of the datastore", "Other recordings"),
    ]
    assert sum(line.endswith("| yes |") for line in found["Targets"]) == 6
    assert found["Domain adaptation"][1] == "Requests."
    assert found["Domain adaptation"][3:] == [
        *report.markdown(report._table([one for one in everything() if one["task"] == "domain"])),
        "",
        "![Domain adaptation](domain.png)",
    ]
    assert not any("![" in line for line in found["Everyday sentences"])
    assert json.loads((docs / "results.json").read_text()) == everything()


def test_every_plot_that_the_page_shows_is_there(own):
    report.write(own, everything(), transcripts(), NOTES)
    docs = own.reproduce.docs
    shown = [
        line.partition("](")[2].rstrip(")")
        for line in (docs / "results.md").read_text().splitlines()
        if line.startswith("![")
    ]
    assert shown == ["domain.png", "dynamic_context.png", "size.png", "robustness.png"]
    assert sorted(path.name for path in docs.iterdir()) == sorted(
        [*shown, "results.md", "results.json"]
    )
    for name in shown:
        head = (docs / name).read_bytes()[:24]
        assert head.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", head[16:])
        assert width > 500 and height > 200


def test_the_same_rows_write_the_same_page_over_the_old_one(own):
    report.write(own, everything(), transcripts(), NOTES)
    page = (own.reproduce.docs / "results.md").read_text()
    report.write(own, everything()[:-1], transcripts(), NOTES)
    assert (own.reproduce.docs / "results.md").read_text() != page
    report.write(own, everything(), transcripts(), NOTES)
    assert (own.reproduce.docs / "results.md").read_text() == page


def test_the_terminal_shows_every_tasks_table():
    with stage.console.capture() as captured:
        report.show(everything())
    printed = captured.get()
    order = [printed.index(report.TITLES[task]) for task in NOTES if task != "window"]
    assert order == sorted(order)
    assert report.TITLES["window"] not in printed
    assert "1,000" in printed and "telephone" in printed


def test_the_terminal_shows_what_is_marked_and_of_whom():
    marked = {"bad": 30, "bad_unclear": 0.9, "good": 7, "good_unclear": 0.0}
    settings = ("held-out voices, sentences of the grammar", "people, aged 16 and over")
    rows = [
        row("end_to_end", "none", setting=name, calibration_error=0.05, **marked)
        for name in settings
    ]
    with stage.console.capture() as captured:
        report.show(rows)
    printed = " ".join(captured.get().split())
    assert "90.0% of 30" in printed and "0.0% of 7" in printed and "people" in printed
    header, *cells = report._table(rows)
    assert dict(zip(header, cells[0], strict=True))["calibration error"] == "0.050"


def test_every_task_has_a_title_and_those_that_are_plotted_are_tasks():
    assert set(report.TITLES) == {*TASKS, *ALONE}
    assert set(report.PLOTS) < set(report.TITLES)


def test_the_summary_has_the_rows_that_were_measured_in_its_own_order():
    lines = report.summary([*results(), *reading_results()][::-1])
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(report.SUMMARY)
    everyday = lines[2].split("|")
    assert [cell.strip() for cell in everyday[2:4]] == ["12", "5.0%"]
    assert len(report.summary(results()[:1])) == 3


def test_the_readme_shows_the_summary_of_the_results_that_are_kept():
    root = Path(__file__).parents[3]
    rows = json.loads((root / "docs" / "results.json").read_text())
    assert "\n".join(report.summary(rows)) in (root / "README.md").read_text()
