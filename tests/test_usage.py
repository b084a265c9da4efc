"""What docs/usage.md says can be done, and names all that there is."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmrag import cli

ROOT = Path(__file__).parents[1]
USAGE = (ROOT / "docs" / "usage.md").read_text()


def test_its_python_runs(tmp_path):
    [program] = re.findall(r"```python\n(.*?)```", USAGE, re.S)
    shutil.copy(ROOT / "serve" / "probe.flac", tmp_path / "visit.wav")
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    assert re.fullmatch(r"( *\d+\.\d\d-? ?){2} [? ] \d+%  [a-z' ]+\n", ran.stdout), ran.stdout


def test_every_option_of_the_command_is_there(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # no name is broken at a line's end
    with pytest.raises(SystemExit):
        cli.main(["transcribe", "--help"])
    told = capsys.readouterr().out.partition("\noptions:")[2]
    options = set(re.findall(r"^  (?:-\w, )?(--[a-z-]+)", told, re.M)) - {"--help"}
    table = USAGE.split("## From Python")[0]
    named = set(re.findall(r"`(--[a-z-]+)", table))
    assert named == options and len(options) > 10


def test_every_variable_of_ours_is_there():
    files = [*ROOT.glob("*/**/*.py"), *(ROOT / "jobs" / "configs").rglob("*.yaml")]
    rooms = ("mmrag", "cluster", "jobs", "serve")
    texts = [one.read_text() for one in files if one.relative_to(ROOT).parts[0] in rooms]
    used = {name for text in texts for name in re.findall(r"\bMMRAG_[A-Z_]+\b", text)}
    own = {"MMRAG_PYTHON"}  # which the service sets for its own proxy
    assert used - own <= set(re.findall(r"`(MMRAG_[A-Z_]+)`", USAGE))
