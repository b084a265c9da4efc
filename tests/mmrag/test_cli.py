import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile
from encoded_audio import coded
from random_models import write_calibration, write_models
from rich.console import Console
from whisper_checkpoint import random_whisper

from mmrag import artifact, cached, cli, lookup_options, recogniser, shipped, terminal
from mmrag.config import KNN, Index, LanguageModel, RetrievedAttention, as_dict
from mmrag.corpora.synthetic import assign_voices, render
from mmrag.corpora.voices.espeak import Synthesizer
from mmrag.decoding.tune import DEFAULTS, SETTINGS, Tuned
from mmrag.model.vocabulary import SentencePieces, Vocabulary
from mmrag.recogniser import CALIBRATION
from mmrag.records import Transcript
from mmrag.retrieval import datastore
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.index import IndexShard, shard_directory
from mmrag.retrieval.segment import Description, Segment
from mmrag.retrieval.shortlist import Shortlist
from mmrag.speech.audio import SAMPLE_RATE

SHAPE = LanguageModel(width=16, layers=1, heads=2, kv_heads=2, feed_forward=24, tied=False)
NAME = "maria"


def write_datastore(models, name, identity=None):
    """Entries that all say the last piece of `NAME`, or another identity than the models'."""
    token = Vocabulary.load(models / "lm").encode(NAME)[-1]
    made = {role: artifact.load(models / role, role).fingerprint for role in ("lm", "codebook")}
    return write_entries(models / "datastores" / name, token, {**made, **(identity or {})})


def write_entries(directory, token, identity):
    description = Description(width=16, window=3, metric="l2", audio="none", identity=identity)
    segment = Segment(
        keys=np.random.default_rng(0).standard_normal((8, 16)),
        tokens=np.full(8, token),
        windows=np.full((8, 3), token),
        positions=np.zeros(8),
        utterances=np.zeros(8),
        names=[("u", "contacts [home]")],
    )
    with artifact.create(directory, "datastore", {}, {}) as draft:
        datastore.create(draft.path, description)
        datastore.write_segment(draft.path, "only", segment)
        datastore.publish(draft.path, ["only"])
        entries = Datastore.open(draft.path)
        shard = IndexShard.build(entries, 0, 8, Index(kind="flat", shards=1), seed=0)
        shard.save(shard_directory(draft.path, 0))
    return directory


def write_tuned(models, name, made_for):
    """Settings that ignore what is found, tuned for the datastore `made_for`."""
    write_deaf(models / "tuned" / name, {"datastore": artifact.load(made_for, "datastore")})


def write_deaf(directory, inputs):
    """Settings that ignore what is found."""
    with artifact.create(directory, "tuned", {}, inputs) as draft:
        settings = as_dict(KNN(k=2, weight=0.0, temperature=3))
        (draft.path / SETTINGS).write_text(json.dumps({**settings, "finalists": []}))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    vocabulary = Vocabulary(SentencePieces.train(["turn on the light", NAME], 60), units=12)
    write_models(directory, SHAPE, vocabulary, talkative=True)
    write_datastore(directory, "contacts")
    return directory


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("audio") / "clip [one].wav"
    wave = np.random.default_rng(0).standard_normal(SAMPLE_RATE) / 10
    soundfile.write(path, wave, SAMPLE_RATE)
    return path


@pytest.fixture
def mmrag(models, capsys):
    """Run `mmrag transcribe …`; the exit status, standard output and standard error.

    The clips are noise, which is transcribed all the same unless `threshold` says otherwise, by a
    random model, which agrees with nothing that retrieval says and loops.
    """

    def run(*arguments, models=models, threshold=0):
        asked = ["--models", models, "--speech-threshold", threshold, "--trust", *arguments]
        with pytest.raises(SystemExit) as stopped:
            cli.main(["transcribe", *map(str, asked)])
        status, printed = stopped.value.code, capsys.readouterr()
        if isinstance(status, str):  # Python prints it and exits with 1
            return 1, printed.out, printed.err + status
        return status, printed.out, printed.err

    return run


def test_where_nobody_speaks_there_is_no_transcript(mmrag, clip):
    status, out, err = mmrag(clip, threshold=0.75)
    assert (status, err) == (0, "")
    assert out.splitlines() == [f"{clip}  0.0–1.0 s", "  (nothing said)"]
    _, printed, _ = mmrag(clip, "--json", threshold=0.75)
    said = json.loads(printed)
    assert (said["text"], said["words"], said["end"]) == ("", [], 1.0)


def test_a_file_is_transcribed_under_its_name_and_times(mmrag, clip):
    status, out, err = mmrag(clip)
    assert (status, err) == (0, "")
    first, text = out.splitlines()
    assert first == f"{clip}  0.0–1.0 s"
    assert text.strip()


def test_the_packages_model_is_used_unless_another_is_named(clip, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["transcribe", str(clip)])
    assert "(nothing said)" in capsys.readouterr().out


def test_what_is_too_unsure_to_be_relied_on_is_marked_or_left_empty(mmrag, models, clip):
    _, plain, _ = mmrag(clip)
    text = plain.splitlines()[1].strip()
    try:
        write_calibration(models)
        _, out, _ = mmrag(clip)
        assert out.splitlines()[1].strip() == f"{text} (unclear)"
        _, out, _ = mmrag(clip, "--unclear", "empty")
        assert out.splitlines()[1].strip() == "(unclear)"
        said = json.loads(mmrag(clip, "--json")[1])
        assert said["unclear"] and 0 < said["confidence"] < 0.5
        assert all(0 < word["confidence"] < 0.5 and word["unclear"] for word in said["words"])
        said = json.loads(mmrag(clip, "--json", "--unclear", "empty")[1])
        assert (said["text"], said["words"], said["unclear"]) == ("", [], True)
        write_calibration(models, bias=20.0, own=0.0, mean=0.0)
        assert mmrag(clip)[1] == plain
        file = models / CALIBRATION / "artifact.json"
        lm = artifact.load(models / "lm", "lm").fingerprint
        file.write_text(file.read_text().replace(lm, "0123456789abcdef"))
        status, _, err = mmrag(clip)
        assert status == 1 and "calibration was made with lm 0123456789abcdef" in err
    finally:
        shutil.rmtree(models / CALIBRATION)
    said = json.loads(mmrag(clip, "--json")[1])
    assert (said["confidence"], said["unclear"]) == (None, False), "nobody calibrated"


def test_json_is_one_object_a_segment_of_audio_with_the_same_words(mmrag, clip):
    _, out, _ = mmrag(clip)
    status, lines, _ = mmrag("--json", "--max-seconds", 1, clip, clip)
    assert status == 0
    answers = [json.loads(line) for line in lines.splitlines()]
    assert [answer["file"] for answer in answers] == [str(clip)] * 2
    for answer in answers:
        assert answer["text"] == out.splitlines()[1].strip()
        assert [word["text"] for word in answer["words"]] == answer["text"].split()
        assert (answer["start"], answer["end"]) == (0.0, 1.0)
        assert {"probability", "lm_probability", "changed", "source"} <= answer["words"][0].keys()


def test_long_audio_is_split(mmrag, tmp_path):
    path = tmp_path / "long.flac"
    soundfile.write(path, np.random.default_rng(0).standard_normal(40_000) / 10, SAMPLE_RATE)
    _, lines, _ = mmrag("--json", "--max-seconds", 1, path)
    answers = [json.loads(line) for line in lines.splitlines()]
    assert len(answers) >= 3
    assert answers[-1]["end"] == 2.5
    assert all(answer["end"] - answer["start"] <= 1 for answer in answers)


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def long(tmp_path):
    """Two minutes of noise."""
    path = tmp_path / "long.wav"
    soundfile.write(path, np.random.default_rng(0).standard_normal(1_920_000) / 10, SAMPLE_RATE)
    return path


@pytest.mark.parametrize("line_seconds", [0.0, 1e6])
def test_a_terminal_shows_how_far_a_long_file_is_and_how_fast(
    mmrag, long, monkeypatch, line_seconds
):
    screen = Screen()
    monkeypatch.setattr(terminal, "LINE_SECONDS", line_seconds)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    status, out, _ = mmrag(long, threshold=0.75)
    shown = screen.getvalue()
    assert status == 0 and "(nothing said)" in out and "real time" not in out
    first, *_, last = re.findall(r"(\d+) of 120 s(?:, \d+\.\d times real time)?", shown)
    assert (first, last) == ("0", "120")
    assert str(long)[:20] in shown
    assert shown.endswith("\x1b[2K") == (line_seconds > 0), "only of a long run something stays"


def test_a_pipe_gets_results_alone(mmrag, long):
    status, out, err = mmrag("--json", long, threshold=0.75)
    assert (status, err) == (0, "")
    assert all(json.loads(line)["text"] == "" for line in out.splitlines())


def test_what_was_transcribed_before_an_interruption_is_printed(mmrag, long, monkeypatch):
    from mmrag import transcribe

    def interrupted(*arguments, **more):
        yield from (Transcript("", start=n, end=n + 1.0) for n in range(2))
        raise KeyboardInterrupt

    monkeypatch.setattr(transcribe, "transcribe", interrupted)
    status, out, err = mmrag("--json", long)
    assert (status, err) == (130, "mmrag: interrupted\n")
    assert [json.loads(line)["end"] for line in out.splitlines()] == [1.0, 2.0]


def test_files_that_cannot_be_read_are_named_and_the_others_transcribed(mmrag, clip, tmp_path):
    text, empty, missing = tmp_path / "notes.wav", tmp_path / "empty.wav", tmp_path / "gone.wav"
    text.write_text("meeting at ten")
    empty.touch()
    status, lines, err = mmrag("--json", missing, text, clip, empty, tmp_path, clip)
    assert status == 1
    assert [json.loads(line)["file"] for line in lines.splitlines()] == [str(clip)] * 2
    complaints = err.splitlines()
    assert len(complaints) == 4
    for path, complaint in zip((missing, text, empty, tmp_path), complaints, strict=True):
        assert complaint.startswith(f"mmrag: {path}: ")


def test_a_bad_path_is_one_line_and_the_next_file_is_transcribed(mmrag, clip, tmp_path):
    (tmp_path / "gone.wav").symlink_to("nowhere.wav")
    unreadable = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.wav"))
    bad = [
        tmp_path / "gone.wav",
        tmp_path,
        tmp_path / ("x" * 300),
        tmp_path / "two\nlines.wav",
        unreadable,
    ]
    status, out, err = mmrag(*bad, clip)
    assert status == 1
    assert out.startswith(f"{clip}  0.0–1.0 s")
    reasons = [
        "a link to nowhere.wav, which is not there",
        "is not a file",
        "cannot be opened: File name too long",
        "no such file",
        "caf\\xe9.wav: no such file",
    ]
    for line, reason in zip(err.splitlines(), reasons, strict=True):
        assert line.startswith(f"mmrag: {tmp_path}") and reason in line


@pytest.mark.parametrize("how", [(), ("--json",)])
def test_a_name_that_is_not_utf8_is_transcribed_all_the_same(mmrag, clip, tmp_path, how):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.wav"))
    path.write_bytes(clip.read_bytes())
    status, out, err = mmrag(path, *how)
    assert (status, err) == (0, "")
    assert "xe9.wav" in out


def test_what_a_phone_records_is_transcribed(mmrag, clip, tmp_path):
    samples, _ = soundfile.read(clip)
    path = tmp_path / "memo.m4a"
    path.write_bytes(coded(samples, SAMPLE_RATE, "ipod", "aac"))
    status, out, err = mmrag(path)
    assert (status, err) == (0, "")
    assert out.startswith(f"{path}  0.0–1.0 s")


def test_a_datastore_changes_words_and_says_where_they_came_from(mmrag, clip):
    plain = json.loads(mmrag("--json", clip)[1])
    changed = json.loads(mmrag("--json", "--datastore", "contacts", "--weight", 0.9999, clip)[1])
    assert changed["text"] != plain["text"]
    sources = [word["source"] for word in changed["words"] if word["changed"]]
    assert sources
    assert {source["document"] for source in sources} == {"contacts [home]"}
    _, out, _ = mmrag("--datastore", "contacts", "--weight", 0.9999, clip)
    assert "from contacts [home], distance" in out, "brackets are text, not markup"
    _, ignored, _ = mmrag("--json", "--datastore", "contacts", "--weight", 0, clip)
    assert json.loads(ignored) == plain


def test_a_datastore_is_found_by_name_and_by_path(mmrag, models, clip):
    by_name, by_path = (
        mmrag("--json", "--datastore", named, "--weight", 0.9, clip)
        for named in ("contacts", models / "datastores" / "contacts")
    )
    assert by_name == by_path


def test_tuned_settings_are_used_unless_a_weight_is_given(mmrag, models, clip, tmp_path):
    moved = tmp_path / "models"
    shutil.copytree(models, moved)
    write_tuned(moved, "contacts", made_for=moved / "datastores" / "contacts")
    arguments = ("--json", "--datastore", "contacts", clip)
    plain, untuned = mmrag("--json", clip), mmrag(*arguments)
    assert untuned != plain
    assert mmrag(*arguments, models=moved) == plain
    assert mmrag("--weight", 0.3, *arguments, models=moved) != plain


def test_models_own_settings_are_used_where_nothing_was_tuned(mmrag, models, clip, tmp_path):
    moved = tmp_path / "models"
    shutil.copytree(models, moved)
    arguments = ("--json", "--datastore", "contacts", clip)
    plain, without = mmrag("--json", clip), mmrag(*arguments)
    write_deaf(moved / DEFAULTS, {"lm": artifact.load(moved / "lm", "lm")})
    assert mmrag(*arguments, models=moved)[:2] == plain[:2]
    assert without[1] != plain[1]
    assert mmrag("--weight", 0.3, *arguments, models=moved)[1] != plain[1]


def test_settings_of_another_language_model_are_refused(mmrag, models, clip, tmp_path):
    moved = tmp_path / "models"
    shutil.copytree(models, moved)
    other = artifact.load(moved / "codebook", "codebook")
    write_deaf(moved / DEFAULTS, {"lm": other})
    status, _, err = mmrag("--datastore", "contacts", clip, models=moved)
    assert status == 1 and f"was made with lm {other.fingerprint}" in err


def test_settings_tuned_for_another_datastore_are_refused(mmrag, models, clip, tmp_path):
    moved = tmp_path / "models"
    shutil.copytree(models, moved)
    other = moved / "datastores" / "other"
    with artifact.create(other, "datastore", {"other": True}, {}):
        pass
    write_tuned(moved, "contacts", made_for=other)
    status, _, err = mmrag("--datastore", "contacts", clip, models=moved)
    assert status == 1
    fingerprint = artifact.load(other, "datastore").fingerprint
    assert f"was made with datastore {fingerprint}" in err


@pytest.mark.parametrize("role", ["lm", "codebook"])
def test_a_datastore_keyed_by_other_models_is_refused_naming_both(
    mmrag, models, clip, role, tmp_path
):
    moved = tmp_path / "models"
    shutil.copytree(models, moved)
    write_datastore(moved, "foreign", identity={role: "0123456789abcdef"})
    status, out, err = mmrag("--datastore", "foreign", clip, models=moved)
    assert (status, out) == (1, "")
    ours = artifact.load(models / role, role).fingerprint
    assert f"keyed by {role} 0123456789abcdef, but this is {role} {ours}" in err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--datastore", "nowhere"], "nowhere"),
        (["--datastore", "contacts", "--weight", "2"], "mmrag: weight: Input should be"),
        (["--beams", "0"], "mmrag: beams: Input should be greater than 0"),
        (["--speech-threshold", "2"], "mmrag: speech: Input should be less than or equal to 1"),
    ],
)
def test_what_cannot_be_used_is_named_before_anything_is_transcribed(mmrag, clip, arguments, named):
    status, out, err = mmrag(*arguments, clip)
    assert (status, out) == (1, "")
    assert err.startswith("mmrag: ")
    assert named in err


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            "rome\n東京 tower\n".encode(),
            "'東京 tower' cannot be spoken: this model has no letters for",
        ),
        (b"rome\n---\n", "nothing to listen for in '---'"),
        ("rome".encode("utf-16"), "names.txt:1: not UTF-8 text"),
        (b'rome\n{"text": "oslo", "weight": 9}\n', "names.txt:2: weight: a number from 0 to 2"),
        (b'{"text": "oslo", "language": "no"}\n', "language 'no': this model understands en"),
        (b'{"text": "oslo"\n', "names.txt:1: not a JSON object"),
    ],
)
def test_a_phrase_that_cannot_be_listened_for_is_named(mmrag, clip, tmp_path, content, told):
    names = tmp_path / "names.txt"
    names.write_bytes(content)
    status, out, err = mmrag("--phrases", names, "--retrieval", "knn", clip)
    assert (status, out) == (1, "")
    [line] = err.splitlines()
    assert line.startswith("mmrag: ") and told in line


def test_a_model_that_the_package_lacks_is_named(mmrag, clip):
    status, _, err = mmrag(clip, models="mmrag:huge")
    assert status == 2
    assert "argument --models: no model 'mmrag:huge' in the package" in err


def test_a_directory_that_holds_no_models_is_named(mmrag, clip, tmp_path):
    missing = tmp_path / "nowhere"
    status, _, err = mmrag(clip, models=missing)
    assert status == 1
    assert err == f"mmrag: {missing}/hubert is not a finished hubert: no such directory"


@pytest.mark.parametrize(
    "arguments", [[], ["--max-seconds", "0"], ["--max-seconds", "nan", "a.wav"]]
)
def test_wrong_usage_exits_with_2(mmrag, arguments):
    status, _, err = mmrag(*arguments)
    assert status == 2
    assert "usage: mmrag" in err


SPOKEN = {
    "type": "transcript.text.done",
    "text": "call maria",
    "duration": 1.0,
    "words": [
        {
            "word": "call",
            "start": 0.1,
            "end": 0.4,
            "probability": 0.9,
            "lm_probability": 0.9,
            "changed": False,
            "source": None,
        },
        {
            "word": "maria",
            "start": 0.4,
            "end": 0.9,
            "probability": 0.8,
            "lm_probability": 0.02,
            "changed": True,
            "source": {
                "entry": 12,
                "distance": 3.14,
                "attention": 0.4,
                "document": "maria [home]",
                "utterance": "phrase-0",
                "text": "call maria",
            },
        },
    ],
    "missing_shards": 0,
}
PRINTED = [
    "  call maria",
    "    maria  p 0.02 -> 0.80  from maria [home], attention 40%, distance 3.1: “call maria”",
]


class Endpoint(BaseHTTPRequestHandler):
    """Answers every upload with the transcript of its server, with an error where it says `no`."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.headers, body))
        refused = {"error": {"message": "not\nlike \x1b[1mthis"}}
        said = [{"type": "transcript.text.delta", "delta": "call "}, self.server.done]
        self.send_response(200)
        self.end_headers()
        for one in [refused] if b"\r\nno\r\n" in body else said:
            self.wfile.write(f"data: {json.dumps(one)}\n\n".encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint():
    with HTTPServer(("127.0.0.1", 0), Endpoint) as server:
        server.asked, server.done = [], SPOKEN
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def ask(endpoint, capsys):
    """Run `mmrag transcribe --url …`; the exit status, standard output and standard error."""

    def run(*arguments, url=endpoint.url):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["transcribe", "--url", url, *map(str, arguments)])
        status, printed = stopped.value.code, capsys.readouterr()
        if isinstance(status, str):
            return 1, printed.out, printed.err + status
        return status, printed.out, printed.err

    return run


def test_what_an_endpoint_heard_looks_like_what_this_process_hears(ask, mmrag, clip):
    status, out, err = ask(clip)
    assert (status, err) == (0, "")
    assert out.splitlines() == [f"{clip}  0.0–1.0 s", *PRINTED]
    here, there = (json.loads(run("--json", clip)[1]) for run in (mmrag, ask))
    assert there.keys() == here.keys()
    assert there["words"][0].keys() == here["words"][0].keys()
    assert (there["file"], there["text"], there["end"]) == (str(clip), "call maria", 1.0)
    source = SPOKEN["words"][1]["source"]
    assert there["words"][1] == {
        "text": "maria",
        "probability": 0.8,
        "lm_probability": 0.02,
        "changed": True,
        "source": source,
        "start": 0.4,
        "end": 0.9,
        "confidence": None,
        "unclear": False,
    }


def test_words_grow_on_a_terminal_and_give_way_to_the_transcript(ask, clip, monkeypatch):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=60, highlight=False, soft_wrap=True)
    monkeypatch.setattr(cli, "console", terminal)
    assert ask(clip)[0] == 0
    grown, transcript = screen.getvalue().split(f"{clip}")
    assert "call" in grown and "maria" not in grown
    assert grown.endswith("\x1b[2K"), "what grew is taken back"
    assert "\x1b[1;32mmaria" in transcript
    screen.truncate(0)
    ask("--json", clip)
    assert screen.getvalue() == ""


def test_an_endpoint_gets_the_phrases_the_datastore_and_the_key(
    ask, endpoint, clip, tmp_path, monkeypatch
):
    monkeypatch.setenv(cli.KEY, "k-123")
    phrases = tmp_path / "names.txt"
    phrases.write_text("maria kuri\n\n zanab \n")
    ask(clip, "--phrases", phrases, "--datastore", "contacts", "--retrieval", "knn")
    [(headers, body)] = endpoint.asked
    assert headers["Authorization"] == "Bearer k-123"
    for name, value in (
        ("context[]", "maria kuri"),
        ("context[]", "zanab"),
        ("datastore", "contacts"),
        ("retrieval", "knn"),
    ):
        assert f'name="{name}"\r\n\r\n{value}\r\n'.encode() in body


def test_files_that_an_endpoint_does_not_transcribe_are_named_and_the_others_are(
    ask, clip, tmp_path
):
    bad, gone = tmp_path / "bad.wav", tmp_path / "gone.wav"
    bad.write_text("no")
    status, lines, err = ask("--json", gone, clip, bad, clip)
    assert status == 1
    assert [json.loads(line)["file"] for line in lines.splitlines()] == [str(clip)] * 2
    assert err.splitlines() == [
        f"mmrag: {gone}: No such file or directory",
        f"mmrag: {bad}: not like �[1mthis",
    ]


def test_shards_that_did_not_answer_are_mentioned(ask, endpoint, clip):
    endpoint.done = SPOKEN | {"missing_shards": 2}
    status, out, err = ask(clip)
    assert (status, out.splitlines()[1:]) == (0, PRINTED)
    said = "2 index shards did not answer: what they hold was not found"
    assert err == f"mmrag: {clip}: {said}\n"


def test_nothing_that_is_retrieved_commands_the_terminal(ask, endpoint, clip):
    first, second = SPOKEN["words"]
    source = second["source"] | {"document": "\x1b]0;owned\x07"}
    endpoint.done = SPOKEN | {"words": [first, second | {"source": source}]}
    _, out, _ = ask(clip)
    assert "from �]0;owned�, attention" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--models", "mmrag:tiny"],
        ["--weight", "0.3"],
        ["--beams", "1"],
        ["--max-seconds", "4"],
        ["--speech-threshold", "0.75"],
        ["--trust", "--device", "cpu"],
    ],
)
def test_what_an_endpoint_decides_for_itself_is_refused_even_at_its_default(
    ask, endpoint, clip, arguments
):
    status, _, err = ask(clip, *arguments)
    assert status == 2
    for flag in arguments:
        assert flag in err or not flag.startswith("--")
    assert "it is the endpoint's own" in err
    assert endpoint.asked == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--retrieval", "knn"], "--retrieval knn needs a --datastore or --phrases"),
        (["--phrases", "nowhere.txt"], "nowhere.txt"),
        (["--url", "nowhere"], "nowhere is no URL"),
    ],
)
def test_what_cannot_be_asked_is_named_before_anything_is_sent(
    ask, endpoint, clip, arguments, named
):
    status, out, err = ask(clip, *arguments)
    assert (status, out) == (1, "")
    assert err.startswith("mmrag: ") and named in err
    assert endpoint.asked == []


def test_to_ask_an_endpoint_no_models_are_loaded(endpoint, clip):
    script = (
        "import sys\n"
        "from mmrag import cli\n"
        "try:\n"
        "    cli.main(sys.argv[1:])\n"
        "except SystemExit as stopped:\n"
        "    heavy = {'torch', 'faiss', 'scipy', 'torchaudio'} & sys.modules.keys()\n"
        "    sys.exit(stopped.code or ' '.join(heavy) or 0)\n"
    )
    command = [sys.executable, "-c", script, "transcribe", "--url", endpoint.url, str(clip)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "call maria" in done.stdout


def test_phrases_that_are_spoken_show_how_far_they_are(models, clip, tmp_path, monkeypatch, capsys):
    phrases = tmp_path / "names.txt"
    phrases.write_text("maria\nmaria now\n")
    monkeypatch.setenv(cached.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(terminal, "LINE_SECONDS", 0.0)
    arguments = ["transcribe", str(clip), "--models", str(models), "--phrases", str(phrases)]
    for told in (True, False):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*arguments, "--retrieval", "knn"])
        said = capsys.readouterr()
        assert stopped.value.code == 0, said.err
        assert ("speaking the phrases: 6/6 sentences" in said.err) == told


def test_who_speaks_the_phrases_may_be_said_where_there_are_some(mmrag, clip, tmp_path):
    status, _, errors = mmrag(clip, "--takes", 2)
    assert status == 1 and "--takes: goes with --phrases" in errors
    names = tmp_path / "names.txt"
    names.write_text("maria\n")
    asked = ("--phrases", names, "--voices", "kokoro", "--kokoro", tmp_path)
    status, _, errors = mmrag(clip, *asked)
    assert status == 1 and ("jobs.fetch_voices" in errors or "pip install" in errors)


def test_phrases_are_written_as_their_file_says(tmp_path, monkeypatch, capsys):
    file, names = tmp_path / "clip.wav", tmp_path / "names.jsonl"
    [planned] = assign_voices(["please call priya raghavan tomorrow"], seed=0)
    soundfile.write(file, render(planned, Synthesizer()).wave, SAMPLE_RATE)
    monkeypatch.setenv(cached.CACHE, str(tmp_path / "cache"))
    told = {}
    for weight in (1, 0):
        one = {"text": "priya raghavan", "display_as": "Priya R.", "weight": weight}
        names.write_text(json.dumps(one) + "\nTomorrow\n")
        asked = ["--models", shipped.TINY, "--phrases", str(names), "--json"]
        with pytest.raises(SystemExit) as stopped:
            cli.main(["transcribe", str(file), *asked])
        said = capsys.readouterr()
        assert stopped.value.code == 0, said.err
        told[weight] = json.loads(said.out)
    assert told[1]["text"] == "please call Priya R. Tomorrow"
    assert [word["text"] for word in told[1]["words"]] == told[1]["text"].split()
    assert "Priya" not in told[0]["text"]


@pytest.mark.parametrize(
    ("asked", "most"), [([], 2), (["--shortlist", "1"], 1), (["--shortlist", "0"], None)]
)
def test_a_long_list_is_shortened_for_each_segment(mmrag, clip, tmp_path, monkeypatch, asked, most):
    names, shortened = tmp_path / "names.txt", []
    names.write_text("".join(f"maria {word}\n" for word in ("now", "call", "rome")))
    monkeypatch.setenv(cached.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(lookup_options, "SHORTLIST", 2)
    few = RetrievedAttention(k=1, stride=1, whole=2)
    plain = Tuned(KNN(k=1, weight=0.5, temperature=1), KNN(k=1, weight=0.5, temperature=1), few)
    monkeypatch.setattr("mmrag.decoding.tune.default", lambda *_: plain)
    given = Shortlist.given

    def watched(self, text, *ways):
        shortened.append((self.most, text))
        return given(self, text, *ways)

    monkeypatch.setattr(Shortlist, "given", watched)
    status, out, err = mmrag("--phrases", names, "--retrieval", "knn", *asked, clip)
    assert status == 0, err
    assert out and [short for short, _ in shortened] == ([most] if most else [])


def test_a_shortlist_is_a_number_of_phrases(mmrag, clip, tmp_path, monkeypatch):
    monkeypatch.setenv(cached.CACHE, str(tmp_path / "cache"))
    names = tmp_path / "names.txt"
    names.write_text("maria\n")
    status, _, err = mmrag("--phrases", names, "--retrieval", "knn", "--shortlist", "-1", clip)
    assert status == 1 and "--shortlist -1: a number of phrases, or 0 for all" in err


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """A Whisper with random weights, as its name is given."""
    directory = tmp_path_factory.mktemp("whisper")
    return random_whisper(directory, ["turn on the light", NAME], window_seconds=4, tokens=40)


def test_a_whisper_transcribes_and_listens_for_phrases(mmrag, clip, whisper, tmp_path, monkeypatch):
    monkeypatch.setenv(cached.CACHE, str(tmp_path / "cache"))
    names = tmp_path / "names.txt"
    names.write_text("Maria\n")
    status, out, _ = mmrag("--json", clip, models=whisper)
    plain = json.loads(out)
    assert status == 0 and (plain["start"], plain["end"]) == (0.0, 1.0) and plain["words"]
    told = mmrag("--json", "--phrases", names, "--weight", "1", clip, models=whisper)
    heard = json.loads(told[1])
    assert told[0] == 0 and heard["text"] != plain["text"]
    assert {word["source"]["document"] for word in heard["words"] if word["source"]} == {"Maria"}


def test_a_whisper_looks_things_up_in_a_datastore_of_its_own(mmrag, clip, whisper, models):
    """What was tuned for it lies where `jobs.tune` puts it, beside the datastores."""
    loaded = recogniser.load(whisper)
    [token] = loaded.vocabulary.encode(NAME)[-1:]
    workspace = Path(whisper.removeprefix("whisper:")).parent / "workspace"
    store = write_entries(workspace / "datastores" / "own", token, loaded.keyed_by)
    status, out, err = mmrag("--json", "--datastore", store, clip, models=whisper)
    sources = [word["source"] for word in json.loads(out)["words"]]
    assert status == 0 and any(sources) and "own is not tuned (jobs.tune)" in err
    write_tuned(workspace, "own", store)
    told = mmrag("--json", "--datastore", store, clip, models=whisper)
    assert told[0] == 0 and "is not tuned" not in told[2]
    foreign = models / "datastores" / "contacts"
    status, _, err = mmrag("--datastore", foreign, clip, models=whisper)
    assert status == 1 and "contacts" in err and "whisper" in err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--retrieval", "cross_attention"], "adapters belong to mmrag's own language model"),
        (["--language", "es"], "language 'es': this checkpoint knows English alone"),
    ],
)
def test_what_a_whisper_cannot_do_is_said_in_a_line(
    mmrag, clip, whisper, tmp_path, arguments, told
):
    names = tmp_path / "names.txt"
    names.write_text("Maria\n")
    status, _, err = mmrag("--phrases", names, *arguments, clip, models=whisper)
    assert status == 1 and told in err and len(err.splitlines()) == 1


def test_a_language_is_for_a_multilingual_whisper(mmrag, clip):
    status, _, err = mmrag("--language", "en", clip)
    assert status == 1 and "only a multilingual Whisper is told its language" in err
