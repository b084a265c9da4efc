"""How the command ends: never with a traceback, whatever the terminal, the user or the machine."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from mmrag import cached, shipped, terminal
from mmrag.artifact import load

MAIN = "from mmrag.cli import main; main()"
NOWHERE = "import pwd\ndef unknown(uid): raise KeyError(uid)\npwd.getpwuid = unknown\n"
"""A process whose user has no entry and so no home, as in a container."""
NARROW = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
ASCII = {**NARROW, "PYTHONIOENCODING": "ascii"}


def mmrag(*arguments, before="", environment=(), without=(), **options):
    """Run the command in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if name not in without}
    return subprocess.run(
        [sys.executable, "-c", before + MAIN, *arguments],
        env={**kept, **dict(environment)},
        capture_output=True,
        timeout=120,
        **options,
    )


HEARD = (
    "from mmrag import cli\nfrom mmrag.records import Transcript\n"
    "def here(options):\n"
    "    for file in options.files:\n"
    "        cli._print(file, Transcript('Zo\\xeb', end=1.0), options.json)\n"
    "cli._here = here\n"
)
"""A transcript is at hand: what is tested is how it is told, and models take seconds to load."""


def test_help_needs_neither_a_home_nor_the_models():
    loaded = "import atexit, sys\natexit.register(lambda: print('torch' in sys.modules))\n"
    told = mmrag("--help", before=NOWHERE + loaded, without=["HOME"])
    assert (told.returncode, told.stderr) == (0, b"")
    assert told.stdout.startswith(b"usage: mmrag")
    assert told.stdout.endswith(b"False\n")


def test_phrases_without_a_home_ask_for_a_directory(monkeypatch):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cached.Path, "home", nobody)
    monkeypatch.setenv(cached.CACHE, "kept")
    assert cached.directory("spoken phrases").name == "kept"
    monkeypatch.delenv(cached.CACHE)
    with pytest.raises(ValueError, match="to keep spoken phrases in: set MMRAG_CACHE"):
        cached.directory("spoken phrases")


@pytest.mark.parametrize("environment", [ASCII, NARROW], ids=["ascii", "C locale"])
def test_a_terminal_of_few_letters_shows_escapes(environment):
    told = mmrag("transcribe", "a.wav", before=HEARD, environment=environment)
    assert (told.returncode, told.stderr) == (0, b"")
    assert told.stdout.decode("ascii").splitlines() == [
        "a.wav  0.0\\u20131.0 s",
        "  (nothing said)",
    ]


@pytest.mark.parametrize("environment", [ASCII, {}], ids=["ascii", "utf-8"])
def test_json_is_json_on_every_terminal(environment):
    names = [b"Zo\xc3\xab.wav", b"\xff.wav"]
    told = mmrag("transcribe", *names, "--json", before=HEARD, environment=environment)
    assert (told.returncode, told.stderr) == (0, b"")
    assert [json.loads(line)["text"] for line in told.stdout.splitlines()] == ["Zo\xeb"] * 2


@pytest.mark.parametrize("by_line", [False, True])
def test_where_nobody_reads_on_the_command_ends_without_a_word(by_line):
    lines = "import sys\nsys.stdout.reconfigure(line_buffering=True)\n" if by_line else ""
    code = HEARD.replace("    for", "    input()\n    for") + lines + MAIN
    process = subprocess.Popen(
        [sys.executable, "-c", code, "transcribe", *["a.wav"] * 3, "--json"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    _, err = process.communicate(b"\n", timeout=60)
    assert (process.returncode, err) == (141, b"")


INTERRUPTIBLE = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
"""A shell starts what runs in its background, and all that this starts, without Ctrl-C."""
SLOW = (
    "import sys, time, mmrag.cli\n"
    "def here(options):\n"
    "    print('started', flush=True)\n"
    "    time.sleep(60)\n"
    "mmrag.cli._here = here\n"
)
"""A transcript that takes its time."""
SLOW_STAGE = (
    "import time\nfrom jobs import stage\n"
    "def run(experiment, force):\n"
    "    print('started', flush=True)\n"
    "    time.sleep(60)\n"
    "stage.connection = __import__('contextlib').nullcontext\n"
    "stage.main(run, '')\n"
)


@pytest.mark.parametrize(
    ("code", "arguments", "said"),
    [
        (SLOW + MAIN, ["transcribe", "a.wav"], b"mmrag: interrupted\n"),
        (SLOW_STAGE, [], b"error: interrupted\n"),
    ],
    ids=["the command", "a stage"],
)
def test_an_interrupted_command_says_so_in_one_line(code, arguments, said):
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE + code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"started\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", said)


TABLE = (
    "from rich.table import Table\nfrom jobs import stage\n"
    "def run(experiment, force):\n"
    "    table = Table(title='Zo\\xeb \\u2013 3.8 %')\n"
    "    table.add_row('\\xd7')\n"
    "    stage.console.print(table)\n"
    "stage.connection = __import__('contextlib').nullcontext\n"
    "stage.main(run, '')\n"
)


def test_a_stages_table_is_shown_on_an_ascii_terminal():
    told = subprocess.run(
        [sys.executable, "-c", TABLE], env={**os.environ, **ASCII}, capture_output=True
    )
    assert (told.returncode, told.stderr) == (0, b"")
    assert "Zo\\xeb \\u2013" in told.stdout.decode("ascii")


def test_a_closed_standard_output_is_no_traceback():
    told = subprocess.run(
        [sys.executable, "-c", "import sys\nsys.stdout = None\n" + MAIN, "--help"],
        capture_output=True,
    )
    assert (told.returncode, told.stderr[:6]) == (0, b"usage:")


def test_an_artifact_reads_the_same_in_a_locale_of_few_letters(tmp_path):
    code = "import sys\nfrom mmrag.artifact import load\nprint(load(sys.argv[1], 'lm').fingerprint)"
    path = shipped.find(shipped.TINY) / "lm"
    told = subprocess.run(
        [sys.executable, "-c", code, path], env={**os.environ, **NARROW}, capture_output=True
    )
    assert told.stdout.decode().strip() == load(path, "lm").fingerprint, told.stderr


def test_a_bar_is_drawn_where_there_is_a_terminal(monkeypatch):
    drawn = io.StringIO()
    shown = Console(file=drawn, force_terminal=True, width=80)
    monkeypatch.setattr(terminal, "Console", lambda **_: shown)
    with terminal.progress("speaking the phrases") as progress:
        progress(3, 40)
        progress(40, 40)
    assert "speaking the phrases" in drawn.getvalue()
    assert "40/40" in drawn.getvalue()


def test_a_line_is_printed_now_and_then_where_there_is_none(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    with terminal.progress("speaking the phrases") as progress:
        for done in range(1, 31):
            now[0] = done * 1.0
            progress(done, 30)
    assert capsys.readouterr().err.splitlines() == [
        f"mmrag: speaking the phrases: {done}/30 sentences" for done in (10, 20, 30)
    ]
    with terminal.progress("speaking the phrases") as progress:
        progress(1, 1)
    assert capsys.readouterr().err == "", "what is done at once needs no word"
