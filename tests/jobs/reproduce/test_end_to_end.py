"""Clips from the file to the words, heard by a stand-in for the models; no cluster."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from jobs import stage
from jobs.reproduce import end_to_end
from jobs.reproduce.end_to_end import _groups, _HeardClip, calibration_of, confidence
from jobs.reproduce.lab import OWN
from jobs.reproduce.other_speech import spread
from jobs.reproduce.rows import CONFIDENCE, ROW, ROWS
from mmrag import artifact, config
from mmrag.artifact import Artifact, ArtifactError
from mmrag.decoding.confidence import Calibration
from mmrag.records import Transcript, Utterance, Word
from mmrag.speech.audio import AudioError

CALIBRATION = Calibration(bias=0.0, own=1.0, mean=0.0, unclear=0.5)
"""A word is as likely right as its probability says."""
DECODE = config.read(stage.CONFIGS / "reproduce.yaml").decode


def lab(path: Path, utterances: int = 9) -> SimpleNamespace:
    sentences = SimpleNamespace(files=("texts/banking77.txt",))
    return SimpleNamespace(
        corpus=SimpleNamespace(path=path),
        settings=SimpleNamespace(utterances=utterances),
        family=OWN,
        prefix="",
        force=False,
        inputs={},
        heard_by=SimpleNamespace(
            name="models", language=None, made=Artifact(path, "lm", "f" * 16, {}, {})
        ),
        experiment=SimpleNamespace(
            synthesize=SimpleNamespace(sentences=sentences),
            train=SimpleNamespace(base=None),
            workspace=path,
            decode=DECODE,
            seed=0,
            evaluate=SimpleNamespace(resamples=10),
        ),
    )


@pytest.fixture
def corpus(tmp_path):
    rows = [
        {"utterance": "test-000000", "text": "call anna now", "domain": "assistant"},
        {"utterance": "test-000001", "text": "it rains", "domain": "everyday"},
        {"utterance": "test-000002", "text": "my card is lost", "domain": "banking77"},
        {"utterance": "test-000003", "text": "of no domain that is asked for", "domain": "x"},
        {"utterance": "test-000004", "text": "", "domain": "everyday"},
        {"utterance": "people-test-000000-0", "text": "a man", "domain": "people", "age": 30},
        {"utterance": "people-test-000001-0", "text": "a child", "domain": "people", "age": 8},
        {"utterance": "people-test-000002-0", "text": "broken", "domain": "people", "age": 8},
    ]
    for row in rows:
        row |= {"audio_filepath": f"{row['utterance']}.flac", "duration": 2.0}
    rows.append({"utterance": "test-000009", "text": "nobody spoke", "domain": "everyday"})
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_clips_are_told_apart_by_who_speaks_and_what(corpus):
    groups = {name: [one.text for one in clips] for name, clips in _groups(lab(corpus)).items()}
    assert groups == {
        "held-out voices, sentences of the grammar": ["call anna now", "it rains"],
        "held-out voices, real sentences": ["my card is lost"],
        "people, aged 16 and over": ["a man"],
        "people, under 16": ["a child", "broken"],
    }


def test_of_many_clips_some_are_heard_from_all_over():
    clips = [Utterance(id=str(number), text="x") for number in range(100)]
    assert [one.id for one in spread(clips, 3)] == ["0", "49", "99"]
    assert spread(clips, 200) == clips


def clip(reference: str, text: str, probability: float) -> _HeardClip:
    heard, true = text.split(), reference.split()
    correct = [word in true for word in heard]
    said = Utterance(id="u", text=reference, duration=1.0)
    words = [Word(one, probability, probability) for one in heard]
    return _HeardClip(said, text, words, correct, 0.1)


def test_bad_and_good_transcripts_that_are_marked_are_counted():
    heard = [
        clip("a b c", "x y z", 0.2),
        clip("a b c", "x y c", 0.9),
        clip("a b c", "a b c", 0.9),
        clip("a b c", "a b c", 0.4),
        clip("a b c", "a b z", 0.9),  # neither
        clip("a b c", "", 0.9),  # says nothing
    ]
    found = confidence(CALIBRATION, heard)
    assert found.keys() == set(CONFIDENCE)
    assert (found["bad"], found["bad_unclear"]) == (2, 0.5)
    assert (found["good"], found["good_unclear"]) == (2, 0.5)
    assert 0 < found["calibration_error"] < 1


def test_where_nothing_is_bad_or_heard_there_is_no_share():
    assert confidence(CALIBRATION, [clip("a", "a", 0.9)])["bad_unclear"] is None
    nothing = confidence(CALIBRATION, [clip("a", "", 0.9)])
    assert nothing["calibration_error"] is None and nothing["good"] == 0


@pytest.fixture
def heard(monkeypatch) -> list[str]:
    """Stands in for the models: says `call` and the second word of each clip's name."""
    asked: list[str] = []

    def transcribe(path, recogniser, settings):
        assert torch.get_num_threads() == 1 and settings.unclear == "keep"
        asked.append(path.name)
        if path.name == "people-test-000002-0.flac":
            raise AudioError(f"{path.name}: broken")
        yield Transcript("call anna", tuple(Word(w, 0.9, 0.9) for w in ("call", "anna")))
        yield Transcript("")
        yield Transcript("now", (Word("now", 0.9, 0.9),))

    monkeypatch.setattr(end_to_end, "transcribe", transcribe)
    monkeypatch.setattr(end_to_end, "load", lambda name, language: name)
    return asked


def measured(corpus, tmp_path, monkeypatch) -> list[dict]:
    """The rows that the task writes."""
    draft = SimpleNamespace(path=tmp_path, summary={})
    tracked = SimpleNamespace(file=lambda path: None)
    monkeypatch.setattr(stage, "make", lambda *about, **more: about[5](draft, tracked))
    end_to_end.end_to_end(lab(corpus))
    return json.loads((tmp_path / ROWS).read_text())


def test_each_group_is_a_row_with_rates_confidence_and_time(corpus, tmp_path, monkeypatch, heard):
    made = Artifact(tmp_path, "calibration", "c", {}, {})
    CALIBRATION.save(tmp_path)
    monkeypatch.setattr(end_to_end, "calibration_of", lambda lab: made)
    before = torch.get_num_threads()
    rows = measured(corpus, tmp_path, monkeypatch)
    assert torch.get_num_threads() == before
    by = {row["setting"]: row for row in rows}
    assert list(by) == sorted(_groups(lab(corpus)))
    assert all(row.keys() == set(ROW) and row["task"] == "end_to_end" for row in rows)
    grammar = by["held-out voices, sentences of the grammar"]
    assert grammar["utterances"] == 2 and grammar["wer"] == pytest.approx(3 / 5)
    assert (grammar["bad"], grammar["good"]) == (1, 1)
    assert grammar["seconds_of_audio"] == 4.0 and grammar["decode_seconds"] >= 0
    assert by["people, under 16"]["utterances"] == 1, "what cannot be read is left out"
    assert heard.count("test-000002.flac") == 2, "once to load what is loaded once"


def test_a_first_clip_that_cannot_be_read_is_named_once_and_the_next_loads(heard, capsys):
    clips = [
        Utterance(id=name, text="call", audio=Path(f"{name}.flac"), duration=1.0)
        for name in ("people-test-000002-0", "one", "two")
    ]
    told = list(end_to_end._heard(None, clips, DECODE))
    assert [one.said.id for one in told] == ["one", "two"]
    assert heard == [f"{name}.flac" for name in ("people-test-000002-0", "one", "one", "two")]
    assert capsys.readouterr().out.count("left out") == 1


def test_without_a_calibration_there_are_no_marks(corpus, tmp_path, monkeypatch, heard, capsys):
    rows = measured(corpus, tmp_path, monkeypatch)
    assert all(row[key] is None for row in rows for key in CONFIDENCE)
    assert all(row["wer"] is not None for row in rows)
    printed = " ".join(capsys.readouterr().out.split())
    assert "no confidence" in printed and "jobs.calibrate" in printed


def test_a_calibration_counts_for_the_language_model_that_it_was_made_of(tmp_path, monkeypatch):
    own = lab(tmp_path)
    loaded = []

    def load(place, kind):
        loaded.append(place)
        return Artifact(place, kind, "c", {}, {"lm": "f" * 16})

    monkeypatch.setattr(artifact, "load", load)
    (tmp_path / "calibration").mkdir()
    own.experiment.train.base = "mmrag:small"
    assert calibration_of(own).place == tmp_path / "calibration", "the workspace's own goes first"
    (tmp_path / "calibration").rmdir()
    assert calibration_of(own).place.parent.name == "small"
    own.heard_by.made = Artifact(tmp_path, "lm", "0" * 16, {}, {})
    assert calibration_of(own) is None
    monkeypatch.undo()
    own.experiment.train.base = None
    assert calibration_of(own) is None
    with pytest.raises(ArtifactError):
        artifact.load(tmp_path / "calibration", "calibration")
