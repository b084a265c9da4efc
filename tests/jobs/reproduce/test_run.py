"""Rows of the results from transcripts made by hand; no model, no cluster."""

import json
from types import SimpleNamespace

import pytest
from transcripts import transcribed

from cluster.modes import NoRetrieval
from cluster.stages import TranscribedUtterance
from jobs.reproduce import run
from jobs.reproduce.end_to_end import ALONE
from jobs.reproduce.experiments import TASKS
from jobs.reproduce.lab import OWN, Point
from jobs.reproduce.rows import ROW, ROWS, TOLD, TRANSCRIPTS, row
from jobs.stage import CONFIGS
from mmrag import config
from mmrag.config import ConfigError, Experiment


@pytest.fixture
def lab() -> SimpleNamespace:
    experiment = SimpleNamespace(evaluate=SimpleNamespace(resamples=10), seed=0)
    heard_by = SimpleNamespace(width=4, recipe={})
    return SimpleNamespace(experiment=experiment, heard_by=heard_by, family=OWN, prefix="")


def heard(*texts: str, entities: tuple[str, ...] = ("anna smith",)) -> list[TranscribedUtterance]:
    return [transcribed(number, text, entities=entities) for number, text in enumerate(texts)]


TEXTS = ("call bob now", "call anna smith now", "call joe and anna smith now")


def make_at_once(lab, tmp_path, monkeypatch):
    """A task's work is done where it is asked for, without an artifact or a run."""
    draft = SimpleNamespace(path=tmp_path, summary={})
    tracked = SimpleNamespace(log=lambda values: None, file=lambda path: None)
    monkeypatch.setattr(run.stage, "make", lambda *about, **more: about[5](draft, tracked))
    monkeypatch.setattr(run, "recipe", lambda *sections: {})
    for name in ("decode", "tune", "attention", "spotting"):
        setattr(lab.experiment, name, None)
    lab.experiment.datastore = SimpleNamespace(source=None)
    lab.settings = lab.inputs = lab.tokens = lab.force = None


def test_without_a_list_the_entities_of_the_split_may_be_heard_in_vain(lab):
    made = row(lab, "domain", Point("none", NoRetrieval()), heard(*TEXTS), {"bob", "anna smith"})
    assert (made["entities"], made["entity_false_alarms"]) == (3, 1)
    assert (made["entity_recall"], made["entity_precision"]) == (2 / 3, 2 / 3)


def test_with_lists_the_phrases_of_each_utterance_may_be_heard_in_vain(lab):
    lists = {"u0": ["joe"], "u1": ["bob"], "u2": ["joe", "anna smith"]}
    point = Point("boost", NoRetrieval(), phrases=2, lists=lists)
    made = row(lab, "dynamic_context", point, heard(*TEXTS), {"bob"})
    assert made["entity_false_alarms"] == 1 and made["entity_precision"] == 2 / 3


def test_words_of_entities_and_the_others_make_up_the_error_rate(lab):
    made = row(lab, "domain", Point("none", NoRetrieval()), heard(*TEXTS), set())
    assert (made["entity_words"], made["other_words"]) == (6, 6)
    wrong = made["entity_wer"] * 6 + made["other_wer"] * 6
    assert wrong == pytest.approx(made["wer"] * 12)


def test_every_row_has_the_same_keys_with_entities_or_without(lab):
    point = Point("none", NoRetrieval())
    for own in (("anna smith",), ()):
        made = row(lab, "everyday", point, heard(*TEXTS, entities=own), set())
        assert made.keys() == set(ROW) - set(TOLD)
        assert (made["other_wer"] is None) == (not own)


def test_entities_of_utterances_that_are_not_transcribed_may_be_heard_too(
    lab, tmp_path, monkeypatch
):
    """A task of two utterances, of a split with three: the third one's entity is a candidate."""
    split = [
        SimpleNamespace(utterance=SimpleNamespace(id=f"u{number}", entities=entities))
        for number, entities in enumerate((("anna smith",), ("anna smith",), ("bob",)))
    ]
    make_at_once(lab, tmp_path, monkeypatch)
    lab.spoken = lambda name, domain, limit, made: split[:limit]
    asked = []

    def transcribe(how, spoken):
        asked.extend(spoken)
        return {name: heard("call bob now", "call anna smith now") for name in how}

    lab.transcribe = transcribe
    run._measure(lab, "domain", lambda lab: ("assistant", 2, [Point("none", NoRetrieval())]))
    [row] = json.loads((tmp_path / ROWS).read_text())
    assert asked == split[:2]
    assert (row["entity_false_alarms"], row["entity_precision"]) == (1, 1 / 2)

    asked.clear()
    some = [
        Point("none", NoRetrieval(), setting=setting, domain="people", only=frozenset(only))
        for setting, only in (("first", {"u0"}), ("nobody", {"u9"}), ("both", {"u0", "u1"}))
    ]
    run._measure(lab, "people", lambda lab: ("assistant", 2, some))
    rows = json.loads((tmp_path / ROWS).read_text())
    assert [(row["setting"], row["utterances"]) for row in rows] == [("first", 1), ("both", 2)]
    lines = [json.loads(line) for line in (tmp_path / TRANSCRIPTS).open()]
    assert [line["utterance"] for line in lines] == ["u0", "u0", "u1"]
    assert asked == split[:2], "each is transcribed once"
    asked.clear()
    run._measure(lab, "people", lambda lab: ("assistant", 3, some[:2]))
    assert asked == split[:1], "and nobody of whom no point tells"


def test_recordings_of_people_make_a_point_a_split_and_age_group_and_only_they(tmp_path):
    rows = [
        {"utterance": "test-000001", "text": "a planned sentence", "domain": "everyday"},
        {"utterance": "people-test-000000-0", "text": "one", "domain": "people", "age": 15.5},
        {"utterance": "people-test-000001-0", "text": "two", "domain": "people", "age": 16},
        {"utterance": "people-test-000002-0", "text": "three", "domain": "people", "age": 40},
        {"utterance": "guests-test-000000-0", "text": "four", "domain": "guests"},
    ]
    dev = [
        {"utterance": "dev-000001", "text": "a planned sentence", "domain": "everyday"},
        {"utterance": "people-dev-000000-0", "text": "five", "domain": "people", "age": 8},
    ]
    for split, each in {"test": rows, "dev": dev}.items():
        lines = "".join(json.dumps(row) + "\n" for row in each)
        (tmp_path / f"{split}.jsonl").write_text(lines)
    lab = SimpleNamespace(
        corpus=SimpleNamespace(path=tmp_path), settings=SimpleNamespace(utterances=9)
    )
    _, limit, points = TASKS["people"](lab)
    assert limit == 5
    assert {point.setting: (point.domain, point.split, sorted(point.only)) for point in points} == {
        "people/dev, under 16": ("people", "dev", ["people-dev-000000-0"]),
        "people/test, aged 16 and over": (
            *("people", "test", ["people-test-000001-0", "people-test-000002-0"]),
        ),
        "people/test, under 16": ("people", "test", ["people-test-000000-0"]),
        "guests/test, of unknown age": ("guests", "test", ["guests-test-000000-0"]),
    }
    assert len({point.name for point in points}) == len(points)
    lab.settings.utterances = 1
    assert all(len(point.only) == 1 for point in TASKS["people"](lab)[2])


def test_real_sentences_make_a_point_a_text_file():
    experiment = config.read(CONFIGS / "train_small.yaml")
    settings = SimpleNamespace(utterances=7)
    _, limit, points = TASKS["sentences"](SimpleNamespace(experiment=experiment, settings=settings))
    assert limit == 7
    assert [point.domain for point in points] == [
        "clinc150",
        "banking77",
        "restaurant8k",
        "ljspeech",
    ]
    grammar = about()
    none = SimpleNamespace(experiment=grammar, settings=settings)
    assert TASKS["sentences"](none)[2] == []


def about(**changes) -> Experiment:
    whole = config.read(CONFIGS / "reproduce.yaml")
    settings = whole.reproduce.model_copy(update=changes)
    return whole.model_copy(update={"reproduce": settings})


def test_a_whisper_is_compared_beside_our_own_models_and_not_twice():
    beside = about(whisper="/checkpoint")
    assert [one.models for one in run._compared(beside)] == [None, "whisper:/checkpoint"]
    alone = beside.model_copy(update={"models": "whisper:/other"})
    assert [one.models for one in run._compared(alone)] == ["whisper:/other"]
    assert [one.models for one in run._compared(about())] == [None]


def test_tasks_are_chosen_by_name_and_an_unknown_one_is_named():
    assert list(run._chosen(about(tasks=("no_speech", "domain")))) == ["domain", "no_speech"]
    assert list(run._chosen(about())) == [*TASKS, *ALONE]
    with pytest.raises(ConfigError, match=r"reproduce\.tasks: no task domian; there are everyday"):
        run._chosen(about(tasks=("domian",)))


def test_files_that_are_not_there_are_named_with_how_to_do_without(tmp_path):
    small = config.read(CONFIGS / "reproduce_small.yaml")
    corpora = tmp_path / "corpora"
    corpus = small.synthesize.model_copy(
        update={
            "sentences": small.synthesize.sentences.model_copy(
                update={"files": (str(corpora / "text.txt"),)}
            ),
            "recordings": config.Recordings(test=str(corpora / "test.jsonl")),
        }
    )
    about = small.reproduce.model_copy(update={"passages": str(corpora / "passages.json")})
    small = small.model_copy(update={"synthesize": corpus, "reproduce": about})
    with pytest.raises(ConfigError) as raised:
        run.require_files(small, ["people", "spoken_squad"])
    message = str(raised.value)
    assert all(name in message for name in ("text.txt", "test.jsonl", "passages.json"))
    assert "MMRAG_CORPUS" in message
    assert message.endswith(
        "synthesize.sentences=null synthesize.recordings=null reproduce.passages=null"
    )
    corpora.mkdir()
    for name in ("text.txt", "test.jsonl"):
        (corpora / name).touch()
    run.require_files(small, ["people"])
    with pytest.raises(
        ConfigError, match=r"no such files: reproduce\.passages: .*passages\.json\."
    ):
        run.require_files(small, ["spoken_squad"])
    none = ["synthesize.sentences=null", "synthesize.recordings=null", "reproduce.passages=null"]
    run.require_files(config.read(CONFIGS / "reproduce_small.yaml", none), TASKS)


def test_what_is_measured_on_dev_is_read_from_dev(lab, tmp_path, monkeypatch):
    """A task with points of two splits: each asks for the utterances of its own."""
    make_at_once(lab, tmp_path, monkeypatch)
    asked = []

    def spoken(split, domain, limit, made):
        asked.append((split, domain))
        return [SimpleNamespace(utterance=SimpleNamespace(entities=()))]

    lab.spoken = spoken
    lab.transcribe = lambda how, spoken: {name: heard("call bob now") for name in how}
    points = [
        Point("none", NoRetrieval(), setting=split, domain="people", split=split)
        for split in ("dev", "test")
    ]
    run._measure(lab, "people", lambda lab: ("everyday", 9, points))
    assert asked == [("dev", "people"), ("test", "people")]
    rows = json.loads((tmp_path / ROWS).read_text())
    assert [row["setting"] for row in rows] == ["dev", "test"]
