"""What was wished of hearing people and new voices, from rows made by hand."""

import pytest

from jobs.reproduce import targets
from jobs.reproduce.lab import OWN, WHISPER
from jobs.reproduce.listed import UNSAID

RIGHT, WRONG = ("call anna now then", "call anna now then"), ("call anna now then", "a b c d")


def row(task: str, mode: str = "none", wer: float = 0.2, **changes) -> dict:
    return {
        **{"task": task, "model": OWN, "mode": mode, "datastore": None, "phrases": None},
        **{"setting": None, "utterances": 9, "wer": wer, "entity_recall": 0.9},
        **{"seconds_of_audio": 10.0, "decode_seconds": 1.0},
        **changes,
    }


def rows(**changed) -> list[dict]:
    """Rows with which every target is just reached; `changed` are some of their values."""
    value = {
        **{"people": 0.35, "stored": 0.1, "recall": 0.8, "hundred": 0.9, "thousands": 0.8},
        **{"unsaid": 0.202, "wrong": 0.202, "bad": 0.9, "good": 0.05, "time": 1.0},
    } | changed
    return [
        row("everyday"),
        row("domain"),
        row("domain", "knn", 0.9, datastore="text", entity_recall=1.0),
        row("domain", "knn", 0.19, datastore="multimodal", entity_recall=0.1),
        row(
            "domain", "both", value["stored"], datastore="multimodal", entity_recall=value["recall"]
        ),
        row("sentences", setting="banking77"),
        row("people", wer=0.9, setting="people/dev, aged 16 and over"),
        row("people", wer=value["people"], setting="people/test, aged 16 and over"),
        row("people", wer=0.9, setting="people/test, under 16"),
        row("dynamic_context"),
        row("dynamic_context", "knn", phrases=100, entity_recall=value["hundred"]),
        row("dynamic_context", "prompt", phrases=100, entity_recall=1.0),
        row("dynamic_context", "boost", phrases=2000, entity_recall=value["thousands"]),
        row("unsaid_phrases"),
        row("unsaid_phrases", "knn", value["unsaid"], phrases=100, setting=UNSAID),
        row("unsaid_phrases", "boost", 0.9, phrases=2000, setting=UNSAID),
        row("wrong_datastore"),
        row("wrong_datastore", "knn", value["wrong"]),
        row("wrong_datastore", "cross_attention", 0.9, phrases=100, setting="none of them said"),
        row("end_to_end", bad=30, bad_unclear=value["bad"], good=0, good_unclear=None),
        row("end_to_end", bad=10, bad_unclear=0.9, good=20, good_unclear=value["good"])
        | {"decode_seconds": value["time"]},
    ]


def heard(errors: int, task: str = "everyday") -> dict:
    """Twenty transcripts without retrieval of everyday sentences and twenty of real ones, of which
    `errors` of `task` are all wrong."""
    return {
        (each, point, f"{point}{n}"): WRONG if n < errors and each == task else RIGHT
        for each, point in (("everyday", "none"), ("domain", "none"), ("sentences", "none clinc"))
        for n in range(20 if each == "sentences" else 10)
    } | {("domain", "knn multimodal 7", "u"): WRONG}


def test_every_target_has_what_was_measured_and_its_count():
    found = targets.targets(rows(), heard(2))
    assert [reached for *_, reached in found] == ["yes"] * len(found)
    assert len(found) == 12
    told = {title: measured for title, _, measured, _ in found}
    assert told["WER of held-out voices, sentences of the grammar (20)"] == "10.0%"
    assert told["WER of people/test, aged 16 and over (9)"] == "35.0%"
    assert told["names, multi-modal datastore: WER against none"] == "knn 5%, both 50%"
    assert told["100 phrases, the names among them: entity recall"] == "knn 0.90"
    assert told["transcripts with more than half of their words wrong (40): marked as unclear"] == (
        "90.0%"
    )
    assert told["time on one core, × real time"] == "0.100"


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({"people": 0.351}, "people/test"),
        ({"stored": 0.101}, "names, multi-modal datastore: WER"),
        ({"recall": 0.79}, "names, multi-modal datastore: entity recall"),
        ({"hundred": 0.89}, "100 phrases, the names"),
        ({"thousands": 0.79}, "2,000 phrases"),
        ({"unsaid": 0.2021}, "100 phrases, none of them said"),
        ({"wrong": 0.2021}, "the wrong datastore"),
        ({"bad": 0.89}, "more than half"),
        ({"good": 0.051}, "at most a tenth"),
        ({"time": 1.01}, "time on one core"),
    ],
)
def test_a_target_that_is_missed_is_the_one_that_was_missed(changed, missed):
    found = targets.targets(rows(**changed), heard(2))
    [(title, *_)] = [target for target in found if target[-1] == "no"]
    assert missed in title


@pytest.mark.parametrize(
    ("task", "title"), [("domain", "of the grammar"), ("sentences", "real sentences")]
)
def test_a_rate_is_of_all_utterances_of_its_tasks(task, title):
    found = targets.targets(rows(), heard(3, task))
    [(missed, _, measured, _)] = [target for target in found if target[-1] == "no"]
    assert title in missed and measured == "15.0%"


def test_without_those_tasks_or_of_another_model_there_are_other_targets_or_none():
    assert targets.targets([row("everyday")], {}) == []
    assert targets.targets([], {}) == []
    assert targets.targets([one | {"model": WHISPER} for one in rows()], heard(0)) == []
    fewer = [one for one in rows() if one["task"] not in ("dynamic_context", "wrong_datastore")]
    assert len(targets.targets(fewer, heard(0))) == 12 - 3


def test_a_model_that_makes_no_error_has_targets_too():
    perfect = [one | {"wer": 0.0} for one in rows()]
    assert all(len(target) == 4 for target in targets.targets(perfect, heard(0)))
