"""Confidence, calibrated on manifests from the command line."""

import json
import re
import sys

import numpy as np
import pytest
import soundfile
from random_models import write_models

from jobs import calibrate
from jobs.calibrate import Recordings, right
from mmrag.config import LanguageModel
from mmrag.model.vocabulary import SentencePieces, Vocabulary
from mmrag.recogniser import CALIBRATION, Recogniser
from mmrag.records import Word
from mmrag.transcribe import Transcript, judged

SHAPE = LanguageModel(width=16, layers=1, heads=2, kv_heads=2, feed_forward=24, tied=False)


@pytest.fixture
def models(tmp_path):
    vocabulary = Vocabulary(SentencePieces.train(["turn on the light", "maria"], 60), units=12)
    write_models(tmp_path / "models", SHAPE, vocabulary, talkative=True)
    return tmp_path / "models"


@pytest.fixture
def manifests(tmp_path, models):
    """Noise, of which one manifest claims what a random model hears, the other something else."""
    draw = np.random.default_rng(0)
    recogniser = Recogniser.load(models)
    rows = {"own": [], "strange": []}
    for number in range(6):
        path = tmp_path / f"{number}.wav"
        soundfile.write(path, draw.standard_normal(16_000) / 10, 16_000)
        path.with_suffix(".jsonl").write_text(
            json.dumps({"audio_filepath": path.name, "text": "x"}) + "\n"
        )
        [one] = heard(recogniser, path)
        rows["own"].append({"audio_filepath": path.name, "text": one})
        rows["strange"].append({"audio_filepath": path.name, "text": "quite another sentence"})
    rows["own"].append({"audio_filepath": "gone.wav", "text": "a"})
    rows["own"].append({"text": "nobody spoke"})
    rows["own"].append({"audio_filepath": "0.wav", "text": "a", "offset": 0.5, "duration": 0.02})
    for name, each in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in each)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    return {name: Recordings(tmp_path / f"{name}.jsonl") for name in rows}


def heard(recogniser, path):
    from mmrag.speech import audio, vad
    from mmrag.transcribe import recognise

    units = recogniser.encode([vad.trim(audio.read(path))[0]])
    for one in recognise(recogniser, units, calibrate.DECODE):
        yield recogniser.vocabulary.decode(one.tokens)


def test_it_is_fitted_on_dev_alone_and_saved_beside_the_models(models, manifests, capsys):
    made = calibrate.run(str(models), manifests, {})
    printed = capsys.readouterr().out
    assert "left out" in printed and "gone.wav" in printed
    assert "0.wav: 0.020 s, shorter than 0.025 s" in printed
    assert Recogniser.load(models).calibration == made
    assert made.fitted_on == {"own": 6, "strange": 6}
    again = calibrate.run(str(models), manifests, {"test": manifests["strange"]})
    assert again == made, "what is tested makes no difference"
    printed = capsys.readouterr().out
    assert "Words of test, by confidence" in printed and "unclear below" in printed


def test_the_command_says_what_is_wrong(models, manifests, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["calibrate", "--models", str(models), *arguments])
        with pytest.raises(SystemExit) as stopped:
            calibrate.main()
        return f"{stopped.value.code} {capsys.readouterr().err}"

    assert "no.jsonl" in run("--dev", f"own={tmp_path / 'no.jsonl'}")
    assert "'own' is not NAME=MANIFEST" in run("--dev", "own")
    own = [f"own={one.path}" for one in manifests.values()]
    assert "--dev: 'own' stands for two manifests" in run("--dev", *own)
    assert "--test: 'own' stands for two manifests" in run("--dev", own[0], "--test", *own)
    (tmp_path / "empty.jsonl").write_text("{}\n")
    assert "empty.jsonl: no clip with a transcript" in run(
        "--dev", f"own={tmp_path / 'empty.jsonl'}"
    )
    wanted = "needs words that are right and words that are wrong"
    assert wanted in run("--dev", f"strange={manifests['strange'].path}")
    assert "no clip of nowhere with" in run("--dev", f"own={manifests['own'].path}@nowhere")
    assert not (models / CALIBRATION).exists()


def test_domains_of_a_manifest_are_read_apart(models, manifests, tmp_path, capsys):
    rows = []
    for name, one in manifests.items():
        for number, line in enumerate(one.path.read_text().splitlines()):
            fields = {**json.loads(line), "utterance": f"{name}-{number}", "domain": name}
            rows.append(json.dumps(fields))
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("\n".join(rows) + "\n")
    apart = {name: Recordings(mixed, frozenset([name])) for name in manifests}
    made = calibrate.run(str(models), apart, {})
    assert made == calibrate.run(str(models), manifests, {})
    assert made.fitted_on == {"own": 6, "strange": 6}
    rows = re.findall(r"(own|strange) +.? *dev +.? *6 +.? *(\S+)%", capsys.readouterr().out)
    assert rows == [("own", "0.0"), ("strange", "100.0")] * 2, "word error rates"


def test_a_word_is_right_if_all_that_it_is_spoken_as_stands_there():
    found = [Word(text, 0.5, 0.5) for text in ("call", "25", "people", "now")]
    assert right("call twenty five men now", found) == [True, True, False, True]
    assert right("call twenty six men now", found) == [True, False, False, True]
    assert right("something else", []) == []


def test_a_transcript_without_a_calibration_or_words_is_left_as_it_is():
    transcript = Transcript("call", (Word("call", 0.5, 0.5),))
    assert judged(transcript, None, calibrate.DECODE) is transcript
